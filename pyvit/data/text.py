"""Text to token ids for the two-tower models."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class ByteTokenizer:
    """UTF-8 bytes with a start and an end token: 258 ids. The end token is the largest id, as in CLIP."""

    start, end, pad, vocab_size = 256, 257, 0, 258

    def __init__(self, context_length: int = 77) -> None:
        if context_length < 3:
            raise ValueError(f"ByteTokenizer: context_length must be at least 3, got {context_length}")
        self.context_length = context_length

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """(B, context_length) int64, zero after the end token. Longer texts are cut."""
        texts = [texts] if isinstance(texts, str) else texts
        ids = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row, text in zip(ids, texts, strict=True):
            content = list(text.lower().encode())[: self.context_length - 2]
            row[: len(content) + 2] = torch.tensor([self.start, *content, self.end], device="cpu")
        return ids


class FileTokenizer:
    """A ``tokenizers`` file (tokenizer.json of CLIP, SigLIP, ...). Texts are padded or cut to ``context_length``; a cut
    text keeps its end token.

    Attributes:
        end: id of the end token of every text: the last token that the file adds to a text, or else the ``eos_token``
            in ``tokenizer_config.json`` or ``special_tokens_map.json`` beside it, which is then added here.
        pad: id of the padding: the file's own, the ``pad_token`` named beside it, or the end token.

    Raises ValueError for a file that is not a tokenizer, or without a known end token.
    """

    def __init__(self, path: str | Path, context_length: int = 77) -> None:
        from tokenizers import Tokenizer
        from tokenizers.processors import Sequence as InTurn
        from tokenizers.processors import TemplateProcessing

        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare exceptions
            raise ValueError(f"tokenizer: {path} is not a tokenizer.json: {str(error).splitlines()[0]}") from error
        self._tokenizer, self.context_length = tokenizer, context_length
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())  # ids may have gaps
        beside = {**_beside(path, "special_tokens_map.json"), **_beside(path, "tokenizer_config.json")}
        end, pad = (tokenizer.token_to_id(_content(beside.get(name))) for name in ("eos_token", "pad_token"))
        padding = tokenizer.padding or {}
        tokenizer.no_truncation()
        tokenizer.no_padding()
        empty, some = tokenizer.encode("").ids, tokenizer.encode("a").ids
        own = empty[-1] if empty and some[-1:] == empty[-1:] else None  # the end token that the file adds
        if own is None and end is None:
            raise ValueError(
                f"tokenizer: {path} ends texts with no token, and no eos_token is named in a tokenizer_config.json "
                "beside it: "
                "a text tower needs one"
            )
        if end is not None and own != end:
            name = tokenizer.id_to_token(end)
            last = TemplateProcessing(single=["$A", name], special_tokens=[(name, end)])
            before = tokenizer.post_processor
            tokenizer.post_processor = last if before is None else InTurn([before, last])
        self.end: int = own if end is None else end
        if context_length <= (added := tokenizer.num_special_tokens_to_add(False)):
            raise ValueError(
                f"tokenizer: context_length must be above {added}, the tokens {path} adds, got {context_length}"
            )
        tokenizer.enable_truncation(context_length)
        self.pad: int = next(i for i in (padding.get("pad_id"), pad, self.end) if i is not None)
        if self.pad >= self.vocab_size:
            raise ValueError(f"tokenizer: {path} pads with id {self.pad}, its ids are below {self.vocab_size}")
        side = padding.get("direction", "right")
        tokenizer.enable_padding(
            direction=side, pad_id=self.pad, pad_token=tokenizer.id_to_token(self.pad), length=context_length
        )

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """(B, context_length) int64."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        return torch.tensor([e.ids for e in self._tokenizer.encode_batch(texts)], dtype=torch.int64, device="cpu")

    def content(self) -> bytes:
        """A self-contained tokenizer.json, with end token and padding."""
        return self._tokenizer.to_str().encode()


def _beside(path: str | Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads((Path(path).parent / name).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _content(token: Any) -> str:
    """The text of a special token, which may be written as an object."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def learn_tokenizer(texts: Sequence[str], context_length: int = 77, vocab_size: int = 1024) -> FileTokenizer:
    """Byte-pair encoding (Sennrich et al., 2016) learned from ``texts``, in lower case: the start token, the text, the
    end token. Every text can be encoded, because single bytes are tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    pad, start, end = special = ["<pad>", "<start>", "<end>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    at = [(token, tokenizer.token_to_id(token)) for token in (start, end)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=at)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad), pad_token=pad)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(path := f"{folder}/tokenizer.json")
        return FileTokenizer(path, context_length)


def load_tokenizer(
    spec: str, context_length: int = 77, texts: Sequence[str] | None = None
) -> ByteTokenizer | FileTokenizer:
    """ "bytes"; "bpe", learned from ``texts``; or the path of a tokenizer.json or of a folder that contains one."""
    if spec == "bytes":
        return ByteTokenizer(context_length)
    if spec == "bpe":
        if not texts:
            raise ValueError("tokenizer: must be 'bytes' or a tokenizer.json where captions are not known in advance")
        return learn_tokenizer(texts, context_length)
    path = Path(spec).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer: must be 'bytes', 'bpe' or the path of a tokenizer.json, got {spec!r}")
    return FileTokenizer(path, context_length)
