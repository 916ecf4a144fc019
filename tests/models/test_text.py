"""Text towers pool the end token, with any vocabulary. Tokenizers: end tokens, padding, truncation."""

from __future__ import annotations

import json

import pytest
import torch

import pyvit
from pyvit.data import ByteTokenizer, load_tokenizer
from pyvit.models.checkpoints import CheckpointError, load_checkpoint
from pyvit.models.clip import TextCBOW, TextTransformer
from pyvit.models.infer import model_from_checkpoint

CLIP = {
    "img_size": 32,
    "patch_size": 8,
    "width": 32,
    "depth": 1,
    "num_heads": 2,
    "text_width": 24,
    "text_depth": 2,
    "text_heads": 2,
}


def transformers():
    return pytest.importorskip("transformers")


def clip_of_transformers(vocab, end, pad=1, act="quick_gelu"):
    tf = transformers()
    torch.manual_seed(0)
    text = {
        "vocab_size": vocab,
        "hidden_size": 24,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text |= {
        "max_position_embeddings": 10,
        "eos_token_id": end,
        "pad_token_id": pad,
        "bos_token_id": 0,
        "hidden_act": act,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    config = tf.CLIPConfig(text_config=text, vision_config={**vision, "hidden_act": act}, projection_dim=16)
    return tf.CLIPModel(config).eval()


def texts(vocab, end, pad, length=10):
    """Rows with end tokens at random positions and padding; includes ids above the end token's, if there are any."""
    ids = torch.full((6, length), pad)
    for row, n in zip(ids, (1, 2, 3, 5, 8, 9), strict=True):
        row[:n] = torch.tensor([i for i in range(3, vocab) if i not in (end, pad)])[torch.randperm(vocab - 5)[:n]]
        row[n] = end
    return ids


@pytest.mark.parametrize(
    ("vocab", "end", "pad"),
    [(30, 29, 0), (30, 29, 29), (30, 7, 0), (30, 7, 7), (30, 7, 29), (30, 4, 1), (30, 2, 0)],
    ids=[
        "openai's",
        "padded with the end",
        "an end in the middle",
        "both",
        "padding of the largest id",
        "small",
        "the largest id by 2",
    ],
)
def test_clip_pools_the_end_token(vocab, end, pad, tmp_path):
    theirs = clip_of_transformers(vocab, end, pad)
    theirs.save_pretrained(tmp_path)
    ids = texts(vocab, end if end != 2 else 29, pad)
    wanted = theirs.get_text_features(input_ids=ids)
    wanted = getattr(wanted, "pooler_output", wanted)
    made, _ = model_from_checkpoint(tmp_path)
    assert made.text.eot == (None if end == 2 else end)
    named = pyvit.create_model("clip_vit_base_patch32_224", **CLIP, vocab_size=vocab, context_length=10, embed_dim=16)
    report = load_checkpoint(named, tmp_path)
    assert report.notes == ([] if end == 2 else [f"text.eot {end}, the end token that the file names"])
    for model in (made, named):
        torch.testing.assert_close(model.eval().encode_text(ids, normalize=False), wanted, rtol=1e-4, atol=1e-5)


def test_another_end_token_than_the_files_is_refused(tmp_path):
    clip_of_transformers(30, 7).save_pretrained(tmp_path)

    def make(eot):
        settings = {**CLIP, "vocab_size": 30, "context_length": 10, "embed_dim": 16, "eot": eot}
        return pyvit.create_model("clip_vit_base_patch32_224", **settings)

    with pytest.raises(CheckpointError, match=r"text\.eot 7 in the file, 9 in the model"):
        load_checkpoint(make(9), tmp_path)
    load_checkpoint(make(7), tmp_path)
    state = make(7).state_dict()
    assert load_checkpoint(model := make(None), state).notes == ["text.eot 7, the end token that the file names"]
    assert model.text.eot == 7


def test_the_activation_is_the_configurations(tmp_path):
    clip_of_transformers(30, 29, act="gelu").save_pretrained(tmp_path)
    named = pyvit.create_model("clip_vit_base_patch32_224", **CLIP, vocab_size=30, context_length=10, embed_dim=16)
    with pytest.raises(CheckpointError, match=r"activation 'gelu' in the file, 'quick_gelu' in the model"):
        load_checkpoint(named, tmp_path)
    assert model_from_checkpoint(tmp_path)[0].text.blocks[0].mlp.fc1.activation == "gelu"


def test_siglip_pools_the_last_token(tmp_path):
    tf = transformers()
    text = {
        "vocab_size": 30,
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vision = {k: v for k, v in text.items() if k != "vocab_size"} | {"image_size": 32, "patch_size": 8}
    text |= {"max_position_embeddings": 10, "projection_size": 32}
    theirs = tf.SiglipModel(tf.SiglipConfig(text_config=text, vision_config=vision)).eval()
    theirs.save_pretrained(tmp_path)
    made, _ = model_from_checkpoint(tmp_path)
    ids, images = texts(30, 1, 1), torch.randn(2, 3, 32, 32)
    for ours, wanted in (
        (made.eval().encode_text(ids, normalize=False), theirs.get_text_features(input_ids=ids)),
        (made.encode_image(images, normalize=False), theirs.get_image_features(pixel_values=images)),
    ):
        torch.testing.assert_close(ours, getattr(wanted, "pooler_output", wanted), rtol=1e-4, atol=1e-5)


def test_a_row_without_an_end_pools_its_last_token():
    tower = TextTransformer(8, 20, 6, 16, 2, 1, eot=5).eval()
    assert tower.end_of(torch.tensor([[1, 2, 3, 4, 6, 7], [1, 5, 5, 5, 5, 5], [5, 0, 0, 0, 0, 5]])).tolist() == [
        5,
        1,
        0,
    ]
    with pytest.raises(ValueError, match="eot must be an id below vocab_size = 20, got 20"):
        TextTransformer(8, 20, 6, 16, 2, 1, eot=20)


@pytest.mark.parametrize("pad", [0, 7])
def test_padding_is_ignored_in_a_bag_of_words(pad):
    tower = TextCBOW(8, 20, 16, pad)
    short = torch.tensor([[3, 4, 5]])
    padded = torch.cat((short, torch.full((1, 4), pad)), 1)
    torch.testing.assert_close(tower(short), tower(padded))
    clip = pyvit.create_model("clip_vit_base_patch32_224", **CLIP, vocab_size=20, text="cbow", pad=pad)
    assert clip.text.pad == pad


def write_tokenizer(folder, end="[END]", pad=None, template=True, direction="right", beside=None, extra=0):
    """A word tokenizer whose end token has a small id, with ``extra`` tokens of larger ids."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    words = ["[UNK]", "[BEGIN]", "[END]", "[PAD]", *"abcdefghij", *(f"new{i}" for i in range(extra))]
    tokenizer = tokenizers.Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    if template:
        tokenizer.post_processor = TemplateProcessing(
            single=f"[BEGIN] $A {end}", special_tokens=[("[BEGIN]", 1), (end, 2)]
        )
    if pad is not None:
        tokenizer.enable_padding(pad_id=pad, pad_token=words[pad], direction=direction)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if beside is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(beside))
    return folder / "tokenizer.json"


def test_a_files_padding_and_end(tmp_path):
    read = load_tokenizer(str(write_tokenizer(tmp_path / "own", pad=3)), 6)
    assert (read.end, read.pad) == (2, 3)
    assert read(["a b", "a b c d e f g h"]).tolist() == [[1, 4, 5, 2, 3, 3], [1, 4, 5, 6, 7, 2]]
    read = load_tokenizer(str(tmp_path / "own"), 6)  # a folder
    assert read("a").tolist() == [[1, 4, 2, 3, 3, 3]]
    read = load_tokenizer(
        str(write_tokenizer(tmp_path / "beside", beside={"pad_token": "[PAD]", "eos_token": {"content": "[END]"}})), 6
    )
    assert read("a").tolist() == [[1, 4, 2, 3, 3, 3]]
    read = load_tokenizer(str(write_tokenizer(tmp_path / "none")), 6)
    assert read("a").tolist() == [[1, 4, 2, 2, 2, 2]]  # nothing named: the end token
    read = load_tokenizer(str(write_tokenizer(tmp_path / "left", pad=3, direction="left")), 6)
    assert read(["a", "a b c d e f g h"]).tolist() == [[3, 3, 3, 1, 4, 2], [1, 4, 5, 6, 7, 2]]


def test_an_end_is_added_where_the_file_adds_none(tmp_path):
    path = write_tokenizer(tmp_path / "bare", template=False, beside={"eos_token": "[END]", "pad_token": "[PAD]"})
    read = load_tokenizer(str(path), 5)
    assert read(["a b", "a b c d e f"]).tolist() == [[4, 5, 2, 3, 3], [4, 5, 6, 7, 2]]
    (tmp_path / "alone.json").write_bytes(read.content())  # as a run keeps it
    alone = load_tokenizer(str(tmp_path / "alone.json"), 5)
    assert (alone.end, alone.pad) == (2, 3)
    assert alone(["a b", "a b c d e f"]).tolist() == [[4, 5, 2, 3, 3], [4, 5, 6, 7, 2]]
    with pytest.raises(ValueError, match=r"ends texts with no token, and no eos_token is named"):
        load_tokenizer(str(write_tokenizer(tmp_path / "nothing", template=False)), 5)


def test_files_that_are_not_tokenizers(tmp_path):
    for content in ("{}", "not json", ""):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=r"tokenizer: .*tokenizer\.json is not a tokenizer\.json"):
            load_tokenizer(str(tmp_path / "tokenizer.json"))
    with pytest.raises(FileNotFoundError, match="must be 'bytes', 'bpe' or the path"):
        load_tokenizer(str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="context_length must be above 2"):
        load_tokenizer(str(write_tokenizer(tmp_path / "own")), 2)


@pytest.mark.parametrize("extra", [0, 5])
def test_the_recipe_pools_the_end_of_its_tokenizer(extra, tmp_path):
    """Words with larger ids than the end token must not be pooled: texts that differ after them must have different
    embeddings."""
    from pyvit.data import Data, TensorImages
    from pyvit.train import Config
    from pyvit.train.recipe import load_recipe

    path = write_tokenizer(tmp_path / "own", pad=3, extra=extra)
    part = TensorImages(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), captions=["j a", "j b", "j c", "j d"])
    options = [f"tokenizer={str(path)!r}", "context=8"]
    config = Config(recipe="clip", data="nowhere", model="clip_pico_patch8_32", option=options, batch_size=4)
    recipe = load_recipe("clip")(config, Data("words", part, part, (32, 32))).eval()
    assert recipe.model.text.eot == 2
    ids = recipe.tokenizer(part.captions)
    features = recipe.model.encode_text(ids)
    assert (features[0] - features[1]).abs().max() > 1e-3
    longer = torch.cat((ids, torch.full((4, 0), 3)), 1)
    longer[:, 4:] = 4  # what stands after the end counts for nothing
    torch.testing.assert_close(recipe.model.encode_text(longer), features)


def test_bytes_end_within_the_context():
    ids = ByteTokenizer(6)(["a long caption", ""])
    assert ids.tolist() == [[256, 97, 32, 108, 111, 257], [256, 257, 0, 0, 0, 0]]
    assert (ByteTokenizer.end, ByteTokenizer.pad) == (257, 0)
