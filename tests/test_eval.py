"""Evaluation functions on features, maps and models with known answers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pyvit.data import TensorImages
from pyvit.data.files import DecodedImages
from pyvit.eval import contact_sheet, visualize
from pyvit.eval.features import LastBlocks, features, labels_of, over, predict, right
from pyvit.eval.knn import knn_accuracy, knn_predict
from pyvit.eval.linear import linear_probe
from pyvit.eval.retrieval import part_map, recall, recall_of
from pyvit.eval.zero_shot import text_classifier, zero_shot, zero_shot_accuracy_of
from pyvit.models.registry import create_model
from pyvit.train import presets  # noqa: F401  (registers the small models)


def test_neighbours_vote_by_similarity():
    bank = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), dim=1)
    labels = torch.tensor([0, 0, 1])
    scores = knn_predict(torch.tensor([[0.0, 2.0]]), bank, labels, 2, k=3, temperature=0.07)
    want = torch.stack([(((bank[:2, 1]) - 1) / 0.07).exp().sum(), torch.tensor(1.0)])
    torch.testing.assert_close(scores[0], want)
    assert knn_accuracy((bank, labels), (bank, labels), k=1) == 100
    with pytest.raises(ValueError, match=r"k must be in 1\.\.3"):
        knn_predict(bank, bank, labels, 2, k=4)


def test_linear_probe_separates_what_is_separable_and_nothing_else():
    torch.manual_seed(0)
    labels = torch.randint(0, 4, (600,))
    clear, noise = F.one_hot(labels, 4) + 0.1 * torch.randn(600, 4), torch.randn(600, 4)
    assert linear_probe((clear[:400], labels[:400]), (clear[400:], labels[400:]), epochs=10)["linear"] == 100
    assert linear_probe((noise[:400], labels[:400]), (noise[400:], labels[400:]), epochs=10)["linear"] < 40


def test_recall():
    similar = torch.tensor([[0.9, 0.1, 0.5], [0.8, 0.2, 0.5], [0.3, 0.2, 0.9]])
    found = recall(similar, torch.eye(3, dtype=torch.bool), (1, 2, 3))
    assert found == pytest.approx({1: 200 / 3, 2: 200 / 3, 3: 100})


def test_part_map_is_the_class_token_that_attends_to_one_patch():
    """With one block and all attention on patch p, the model's own embedding must equal the map at p."""
    torch.manual_seed(0)
    model = create_model("clip_pico_patch8_32", depth=1, vocab_size=50, context_length=8).eval()
    images, text = torch.randn(2, 3, 32, 32), torch.randint(1, 50, (2, 8))
    with torch.no_grad():
        maps = part_map(model, images, text)
        values = lambda module, inputs, qkv: torch.cat([qkv[..., :192], qkv[:, 6:7, 192:].expand(-1, 17, -1)], -1)  # noqa: E731
        hook = model.visual.blocks[0].attn.qkv.register_forward_hook(values)  # every token carries patch 5's value
        alone = (model.encode_image(images) * model.encode_text(text)).sum(1)
        hook.remove()
    torch.testing.assert_close(maps.flatten(1)[:, 5], alone, rtol=1e-4, atol=1e-5)


def test_mass_threshold_keeps_the_fewest_cells():
    maps = torch.tensor([[[0.5, 0.3], [0.15, 0.05]]])
    assert visualize.keep_mass(maps, 0.6).tolist() == [[[True, True], [False, False]]]
    assert visualize.keep_mass(maps, 0.5).sum() == 1
    with pytest.raises(ValueError, match=r"mass must be in \(0, 1\]"):
        visualize.keep_mass(maps, 0.0)


def test_principal_components_colour_what_differs():
    features = torch.zeros(1, 2, 2, 5)
    features[0, 0] = 1.0
    colors = visualize.pca_colors(features)
    assert colors.shape == (1, 3, 2, 2)
    assert torch.allclose(colors[0, :, 0, 0], colors[0, :, 0, 1])
    assert (colors[0, 0, 0, 0] - colors[0, 0, 1, 0]).abs() > 0.4


def test_templates_must_have_a_place_for_the_name():
    with pytest.raises(ValueError, match="templates must each contain"):
        text_classifier(torch.nn.Linear(1, 1), lambda t: t, ["a"], ["no place"])


@pytest.mark.parametrize("channels", [1, 3])
def test_sheets_are_pictures(tmp_path, channels):
    images = torch.rand(3, channels, 8, 8)
    ranked = [[("a", 0.7), ("b", 0.3)]] * 3
    paths = [
        contact_sheet.save_guesses(tmp_path / "guesses.png", images, ["a", "b", "a"], ranked, "guesses"),
        contact_sheet.save_sheet(tmp_path / "sheet.png", [("image", images)], ["one", "two", "three"], "sheet"),
    ]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in paths)


def shifted(n: int, seed: int, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise of 64 channels; one channel is larger for each class."""
    labels = torch.arange(n) % classes
    return torch.randn(n, 64, generator=torch.Generator().manual_seed(seed)) + F.pad(
        3.0 * F.one_hot(labels, classes), (0, 64 - classes)
    ), labels


@pytest.mark.parametrize("n", [3, 6, 9, 15, 40, 199, 200])
def test_linear_probe_of_few_images_finds_a_good_rate(n):
    """Not the lowest rate, which learns nothing: about as good as the best of all."""
    train, test = shifted(n, 0), shifted(300, 1)
    rates = (1e-6, 1e-4, 1e-2, 0.1)
    each = {rate: linear_probe(train, test, (rate,))["linear"] for rate in rates}
    found = linear_probe(train, test, rates)
    assert found["rate"] > 1e-6
    assert found["linear"] > (max(each.values()) - 10 if n >= 9 else 33)


def test_ties_in_accuracy_are_broken_by_the_loss():
    train = shifted(300, 0)
    assert linear_probe((train[0] * 100, train[1]), train, (1e-5, 0.1))["rate"] == 0.1


def test_a_rate_at_which_the_loss_is_not_finite_is_not_chosen():
    train, test = shifted(60, 0), shifted(60, 1)
    assert linear_probe(train, test, (1e-2, 1e38))["rate"] == 1e-2
    with pytest.raises(ValueError, match="not finite at any rate"):
        linear_probe(train, test, (1e38,))


@pytest.mark.parametrize("measure", [lambda a, b: knn_accuracy(a, b, 2), lambda a, b: linear_probe(a, b, epochs=1)])
def test_features_that_are_not_finite_are_refused(measure):
    train, test = shifted(30, 0), shifted(30, 1)
    broken = train[0].clone()
    broken[3, 5], broken[7, 1] = torch.nan, torch.inf
    for pair in (((broken, train[1]), test), (train, (broken, test[1]))):
        with pytest.raises(ValueError, match="features must be finite, those of 2 of 30 images are not"):
            measure(*pair)
    with pytest.raises(ValueError, match="at least two classes"):
        measure((train[0], torch.zeros(30, dtype=torch.int64)), test)
    with pytest.raises(ValueError, match="one label for each of the held-out features, got 0 and 0"):
        measure(train, (test[0][:0], test[1][:0]))


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_ties_of_neighbours_do_not_depend_on_their_order(k):
    """If all features are equal, k-NN accuracy is at the chance level, for any order of the images."""
    same = torch.ones(6, 4)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    for order in (torch.arange(6), torch.arange(6).flip(0), torch.tensor([0, 3, 1, 4, 2, 5])):
        assert knn_accuracy((same, labels[order]), (same, labels), k) == pytest.approx(50)


def test_ties_count_their_share():
    scores = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.5, 0.5, 0.5]])
    assert right(scores, torch.tensor([0, 1, 2])) == pytest.approx((1 / 2 + 1 + 1 / 3) / 3)


def test_recall_of_ties_few_answers_and_nothing():
    flat = torch.zeros(4, 4)
    assert recall(flat, torch.eye(4, dtype=torch.bool), (1, 3, 4, 10)) == {1: 0, 3: 0, 4: 100}
    wanting = torch.eye(3, dtype=torch.bool)
    wanting[1] = False
    assert recall(torch.eye(3), wanting, (1, 3)) == pytest.approx({1: 200 / 3, 3: 200 / 3})
    with pytest.raises(ValueError, match="must be finite"):
        recall(torch.full((2, 2), torch.nan), torch.eye(2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"must be \(Q, N\)"):
        recall(torch.zeros(0, 0), torch.zeros(0, 0, dtype=torch.bool))


class Towers(torch.nn.Module):
    """An image tower and a text tower that map equal numbers to the same direction."""

    def __init__(self, n: int, bias: float | None = None):
        super().__init__()
        self.table = torch.nn.Embedding.from_pretrained(torch.eye(n))
        self.logit_bias = None if bias is None else torch.nn.Parameter(torch.tensor(bias))

    def scale(self):
        return torch.tensor(2.0)

    def encode_image(self, images):
        return self.table(images[:, 0, 0, 0].long())

    def encode_text(self, ids):
        return self.table(ids)


class Two:
    group = None

    def __init__(self, n: int, bias: float | None = None):
        self.model = Towers(n, bias)

    def exported(self):
        return self.model

    def tokenizer(self, texts):
        return torch.tensor([int(t.split()[-1]) for t in texts])

    def normalize(self, images):
        return images


class Pairs:
    classes, name = None, "pairs"

    def __init__(self, test):
        self.test = test


def numbered(numbers: list[int], captions: list[str] | None = None) -> TensorImages:
    return TensorImages(torch.tensor(numbers, dtype=torch.uint8)[:, None, None, None], torch.tensor(numbers), captions)


def test_recall_with_several_captions_per_image():
    images = numbered([i // 5 for i in range(30)], [f"caption {k} of {i}" for i in range(6) for k in range(5)])
    images.groups = [i // 5 for i in range(30)]
    found = recall_of(Two(6), Pairs(images), (1, 5))
    assert found == pytest.approx(
        {"text_to_image@1": 100, "text_to_image@5": 100, "image_to_text@1": 100, "image_to_text@5": 100}
    )


def test_siglip_zero_shot_is_a_sigmoid_per_class():
    images = numbered([0, 1, 2])
    for bias in (None, -1.5):
        two = Two(3, bias)
        classifier = text_classifier(two.model, two.tokenizer, ["0", "1", "2"], ["number {}"])
        logits = 2 * torch.eye(3) + (bias or 0)
        want = logits.softmax(1) if bias is None else logits.sigmoid()
        torch.testing.assert_close(zero_shot(two.model, images, classifier, two.normalize), want)
    data = Pairs(images)
    data.classes = ["0", "1", "2"]
    assert zero_shot_accuracy_of(Two(3, 40.0), data, ["number {}"]) == {
        "zero_shot": 100
    }  # a sigmoid of 1 in every class


def test_prompts_take_names_as_words():
    seen: list[str] = []

    def tokenizer(texts):
        seen.extend(texts)
        return torch.zeros(len(texts), dtype=torch.int64)

    text_classifier(Towers(2), tokenizer, ["golden_retriever", "{0}"], ["a {} of {name}"])
    assert seen == ["a golden retriever of {name}", "a {0} of {name}"]


class Fragile:
    """A decoder that fails for negative numbers."""

    shape = (1, 1, 1)

    def whole(self, source):
        if source < 0:
            raise ValueError("negative")
        return torch.full((1, 1, 1), source, dtype=torch.uint8)


@pytest.mark.filterwarnings("ignore:skipped")
@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_left_out_of_figures(workers):
    items = [5, -1, 7, 9, -1, 4]
    images = DecodedImages(items, Fragile(), list(range(6)), groups=list(range(6)))
    got = over(images, lambda b: b["image"].flatten().float(), batch=2, workers=workers)
    assert got.tolist() == [5, 7, 9, 4]
    assert labels_of(images).tolist() == [0, 2, 3, 5]
    assert len(images.problems) == 2
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1, 3))
    assert [len(x) for x in predict(model, images, lambda x: x.float())] == [4, 4]
    model.forward_head, model.forward_features = (lambda x, pre_logits: x), (lambda x: x.flatten(1))
    found, labels = features(model, DecodedImages(items, Fragile(), list(range(6))), lambda x: x.float())
    assert (found.flatten().tolist(), labels.tolist()) == ([5, 7, 9, 4], [0, 2, 3, 5])
    with pytest.raises(ValueError, match="none of the 2 images can be read; the last: row 1"):
        over(DecodedImages((-1, -1), Fragile()), lambda b: b["image"], batch=2)


def test_settings_out_of_range_are_refused():
    train, test = shifted(30, 0), shifted(30, 1)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature must be above 0"):
            knn_accuracy(train, test, 1, temperature)
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        linear_probe(train, test, epochs=0)


def test_indices_to_look_at_are_different():
    assert visualize.choose(8, 5) == [0, 1, 2, 3, 4]
    assert visualize.choose(2, 10) == [0, 5]
    with pytest.raises(ValueError, match="count: must be at least 1"):
        visualize.choose(0, 5)


def test_features_of_the_last_blocks():
    model = create_model("vit_pico_patch8_32", num_classes=0).eval()
    x = torch.rand(3, 3, 32, 32)
    found = LastBlocks(model, 2).forward_features(x)
    tokens, want = model.embed(x), []
    for i, block in enumerate(model.blocks):
        tokens = block(tokens)
        if i >= 2:
            want += [model.norm(tokens)[:, 0], model.norm(tokens)[:, 1:].mean(1)]
    torch.testing.assert_close(found, torch.cat(want, 1))
    with pytest.raises(ValueError, match="blocks must be 1 to 4, got 5"):
        LastBlocks(model, 5)
    with pytest.raises(ValueError, match="not a vision transformer"):
        LastBlocks(create_model("swin_pico_patch4_window4_32"), 1)
