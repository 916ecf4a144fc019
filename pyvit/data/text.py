"""Text to token ids for the two-tower models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class ByteTokenizer:
    """UTF-8 bytes between a start and an end token: 258 ids, nothing to download. The end token is the largest id, as in CLIP."""

    start, end, pad, vocab_size = 256, 257, 0, 258

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
            row[: len(content) + 2] = torch.tensor([self.start, *content, self.end])
        return ids


class FileTokenizer:
    """A ``tokenizers`` file (tokenizer.json of CLIP, SigLIP, ...), padded or cut to ``context_length``; a text that is cut keeps its end.

    Attributes:
        end: id of the end token, with which every text ends: the last that the file itself adds to a text, or the ``eos_token`` that
            ``tokenizer_config.json`` or ``special_tokens_map.json`` beside it names, which is then added here.
        pad: id of the padding: the file's own, or the ``pad_token`` named beside it, or the end token.

    Raises ValueError for a file that is no tokenizer, or whose end token nothing names.
    """

    def __init__(self, path: str | Path, context_length: int = 77) -> None:
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare exceptions
            raise ValueError(f"tokenizer: {path} is no tokenizer.json: {str(error).splitlines()[0]}") from error
        self._tokenizer, self.context_length = tokenizer, context_length
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())  # ids may have gaps
        beside = {**_beside(path, "special_tokens_map.json"), **_beside(path, "tokenizer_config.json")}
        named = {name: tokenizer.token_to_id(_content(beside.get(name))) for name in ("eos_token", "pad_token")}
        tokenizer.no_truncation()
        padding = tokenizer.padding or {}
        tokenizer.no_padding()
        empty = tokenizer.encode("")
        added = tokenizer.num_special_tokens_to_add(False)
        last = empty.ids[-1] if added and empty.ids and tokenizer.encode("a").ids[-1] == empty.ids[-1] else None
        if last is None and named["eos_token"] is None:
            raise ValueError(
                f"tokenizer: {path} ends texts with no token, and no eos_token is named in a tokenizer_config.json beside it: "
                "a text tower needs one"
            )
        self._appends = last is None or (named["eos_token"] is not None and last != named["eos_token"])
        self.end: int = named["eos_token"] if self._appends else last  # type: ignore[assignment]
        room = context_length - self._appends
        if room <= added:
            raise ValueError(
                f"tokenizer: context_length must be above {added + self._appends}, the tokens {path} adds, got {context_length}"
            )
        tokenizer.enable_truncation(room)
        self._left = padding.get("direction") == "left"
        self.pad: int = next(i for i in (padding.get("pad_id"), named["pad_token"], self.end) if i is not None)
        if self.pad >= self.vocab_size:
            raise ValueError(f"tokenizer: {path} pads with id {self.pad}, its ids are below {self.vocab_size}")

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """(B, context_length) int64."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        ids = torch.full((len(texts), self.context_length), self.pad, dtype=torch.int64)
        for row, encoded in zip(ids, self._tokenizer.encode_batch(texts), strict=True):
            found = torch.tensor([*encoded.ids, *([self.end] if self._appends else [])])
            row[slice(-len(found), None) if self._left else slice(len(found))] = found
        return ids


def _beside(path: str | Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads((Path(path).parent / name).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _content(token: Any) -> str:
    """The text of a special token, which may be written as an object."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def load_tokenizer(spec: str, context_length: int = 77) -> ByteTokenizer | FileTokenizer:
    """ "bytes", or the path of a tokenizer.json, or of a folder with one."""
    if spec == "bytes":
        return ByteTokenizer(context_length)
    path = Path(spec).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer: must be 'bytes' or the path of a tokenizer.json, got {spec!r}")
    return FileTokenizer(path, context_length)
