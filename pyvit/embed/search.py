"""Nearest neighbours of an image or a text among embedded images."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyvit.data.decode import decode_native
from pyvit.embed import shards
from pyvit.embed.encoder import Encoder, Settings, load_encoder
from pyvit.embed.source import open_images
from pyvit.eval import contact_sheet

#: Rows that are compared at a time.
_BLOCK = 16384


class Hit(NamedTuple):
    """An image that was found: cosine similarity, position and name in the source, class or None."""

    score: float
    index: int
    name: str
    label: str | None


def load_query_encoder(
    out: str | Path, model: str | None = None, checkpoint: str | None = None, device: Any = None
) -> Encoder:
    """The encoder that made the vectors in ``out``, for queries. ``model`` and ``checkpoint`` name its weights if they
    have moved.

    Raises ValueError if they are of another model.
    """
    manifest = shards.open_manifest(Path(out).expanduser())
    record = manifest["encoder"]
    settings = Settings(**{field.name: record[field.name] for field in dataclasses.fields(Settings)})
    if model is not None or checkpoint is not None:
        settings = dataclasses.replace(settings, model=model or settings.model, checkpoint=checkpoint)
    encoder = load_encoder(settings, device)
    if encoder.width != record["width"]:
        raise ValueError(
            f"search: {out} has vectors of width {record['width']}, {encoder.name} makes vectors of {encoder.width}"
        )
    if encoder.fingerprint != record["fingerprint"]:
        raise ValueError(
            f"search: the vectors in {out} were made by {record['model']} [{record['fingerprint']}], "
            f"{encoder.name} is another model [{encoder.fingerprint}]"
        )
    return encoder


def search(out: str | Path, query: Tensor | np.ndarray, k: int = 10) -> list[Hit]:
    """The ``k`` images with the largest cosine similarity to ``query`` (D,), by comparing all vectors in float32. Of
    equal ones the first in the source comes first."""
    folder = Path(out).expanduser()
    manifest = shards.open_manifest(folder)
    width = manifest["encoder"]["width"]
    wanted = np.asarray(torch.as_tensor(query).cpu().float().numpy())
    if wanted.shape != (width,):
        raise ValueError(f"search: the query must be of width {width}, as the vectors in {out}, got {wanted.shape}")
    if k < 1:
        raise ValueError(f"search: k must be at least 1, got {k}")
    wanted = wanted / max(float(np.linalg.norm(wanted)), 1e-12)
    best: list[Hit] = []
    for part in shards.parts(folder, manifest):
        scores = np.concatenate([np.zeros(0, np.float32), *(_cosine(x, wanted) for x in _blocks(part.vectors))])
        for i in np.argsort(-scores, kind="stable")[:k].tolist():
            label = part.labels[i] if part.labels else None
            best.append(Hit(float(scores[i]), part.index[i], part.names[i], label))
        best = sorted(best, key=lambda hit: (-hit.score, hit.index))[:k]
    return best


def _blocks(vectors: np.ndarray) -> list[np.ndarray]:
    return [vectors[i : i + _BLOCK] for i in range(0, len(vectors), _BLOCK)]


def _cosine(vectors: np.ndarray, unit: np.ndarray) -> np.ndarray:
    rows = np.asarray(vectors, np.float32)
    lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    return (rows @ unit) / np.maximum(lengths, 1e-12)


def save_hits(path: str | Path, out: str | Path, hits: list[Hit], query: Tensor | None, title: str) -> Path:
    """A contact sheet of ``hits``, after the image (3, side, side) of the query if there is one. Images that can no
    longer be read are grey."""
    images = open_images(shards.open_manifest(Path(out).expanduser())["source"]["path"])
    shown: list[Tensor] = [] if query is None else [query]
    titles = [] if query is None else ["query"]
    for hit in hits:
        try:
            shown.append(thumbnail(images.open(hit.name)))
        except Exception:  # decoders raise many kinds of exceptions for damaged files
            shown.append(torch.full((3, 160, 160), 0.5))
        titles.append(f"{hit.score:.3f} {hit.label if hit.label is not None else hit.name.rpartition('/')[2][-24:]}")
    return contact_sheet.save_grid(Path(path), torch.stack(shown), titles, title)


def embed_one(encoder: Encoder, path: str | Path) -> Tensor:
    """The vector (D,) of an image file. Raises ValueError if it cannot be read."""
    try:
        image = encoder.decode(Path(path).expanduser())
    except ImportError:
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(f"search: {path} does not exist") from error
    except Exception as error:  # decoders raise many kinds of exceptions for damaged files
        raise ValueError(f"search: {path} cannot be read: {type(error).__name__}: {error}") from error
    return encoder([image] if encoder.settings.native else image[None])[0].float().cpu()


def thumbnail(source: Any, side: int = 160) -> Tensor:
    """An image fitted into a white square, floats (3, side, side) in [0, 1]."""
    small = decode_native(source, (1, 1), side * side)
    small = small / 255
    scale = side / max(small.shape[1:])
    size = [max(round(n * scale), 1) for n in small.shape[1:]]
    small = torch.nn.functional.interpolate(small[None], size, mode="bilinear", antialias=True)[0]
    above, left = ((side - n) // 2 for n in size)
    sheet = torch.ones(3, side, side)
    sheet[:, above : above + size[0], left : left + size[1]] = small
    return sheet
