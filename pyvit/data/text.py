"""Text to token ids for the two-tower models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


class ByteTokenizer:
    """UTF-8 bytes between a start and an end token: 258 ids, nothing to download. The end token is the largest id, as in CLIP."""

    start, end, vocab_size = 256, 257, 258

    def __init__(self, context_length: int = 77) -> None:
        if context_length < 3:
            raise ValueError(f"ByteTokenizer: context_length must be at least 3, got {context_length}")
        self.context_length = context_length

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """(B, context_length) int64, zero after the end token; longer texts are cut."""
        texts = [texts] if isinstance(texts, str) else texts
        ids = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row, text in zip(ids, texts, strict=True):
            content = list(text.lower().encode())[: self.context_length - 2]
            row[: len(content) + 2] = torch.tensor([self.start, *content, self.end], device="cpu")
        return ids


class FileTokenizer:
    """A ``tokenizers`` file (tokenizer.json of CLIP, SigLIP, ...), padded or cut to ``context_length``."""

    def __init__(self, path: str | Path, context_length: int = 77) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(path))
        self._tokenizer.enable_truncation(context_length)
        self._tokenizer.enable_padding(length=context_length)
        self.context_length, self.vocab_size = context_length, self._tokenizer.get_vocab_size()

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        texts = [texts] if isinstance(texts, str) else list(texts)
        return torch.tensor([e.ids for e in self._tokenizer.encode_batch(texts)], dtype=torch.int64)


def load_tokenizer(spec: str, context_length: int = 77) -> ByteTokenizer | FileTokenizer:
    """ "bytes", or the path of a tokenizer.json."""
    if spec == "bytes":
        return ByteTokenizer(context_length)
    if not Path(spec).is_file():
        raise FileNotFoundError(f"tokenizer: must be 'bytes' or the path of a tokenizer.json, got {spec!r}")
    return FileTokenizer(spec, context_length)
