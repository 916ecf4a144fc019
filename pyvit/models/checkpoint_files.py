"""Reading weights from files and folders without executing code from them."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from pyvit.models.hub import download, is_hub_name

#: Names of weights in a folder, in order of priority: transformers', timm's and pyvit's, then open_clip's.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")

#: First bytes of files that are often found instead of weights, and the error message.
_NOT_WEIGHTS = (
    (
        b"version https://git-lfs",
        "is a git-lfs pointer, not the weights it stands for: run 'git lfs pull' where it comes from",
    ),
    (b"<", "is a web page, not weights: the download was answered with an error or a login page"),
    (b"{", "is JSON text, not weights"),
    (b"\x1f\x8b", "is compressed (gzip): unpack it first"),
    (b"BZh", "is compressed (bzip2): unpack it first"),
    (b"\xfd7zXZ", "is compressed (xz): unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed (zstd): unpack it first"),
    (b"\x89HDF", "is an HDF5 file (Keras), which is not read: convert it to safetensors"),
)


def read(source: str | os.PathLike[str]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The content of a file or folder of weights, the configuration beside it, and the metadata in it ({} if none).

    Supports files of ``torch.save`` and safetensors, TorchScript archives, indices of shards, and folders that contain
    one of them: those of transformers, timm, open_clip and ``pyvit train``. Other libraries' objects (such as a
    training script's arguments) become empty :class:`Opaque` objects; their code is not executed.

    "hf-hub:OWNER/NAME" is a model of the Hugging Face hub, "timm:NAME" a pre-trained model of timm: see
    :func:`pyvit.models.hub.download`.

    Raises FileNotFoundError, or a one-line ValueError that names the file and the problem.
    """
    path = download(os.fspath(source)) if is_hub_name(source) else Path(source).expanduser()
    if path.is_dir():
        path = weights_in(path)
    if not path.exists():
        reason = "is a link to a file that does not exist" if path.is_symlink() else "does not exist"
        raise FileNotFoundError(f"load_checkpoint: {path} {reason}")
    if not path.is_file():
        raise ValueError(f"load_checkpoint: {path} is not a regular file")
    if path.name.endswith(".index.json"):
        found: tuple[Any, dict[str, Any]] = _read_shards(path), {}
    else:
        found = _read_file(path)
    return found[0], config_beside(path), found[1]


def weights_in(folder: Path) -> Path:
    """The file of weights in a folder. Raises ValueError if there is none, or if there are several with unknown
    names."""
    for name in WEIGHTS:
        if (folder / name).exists() or (folder / name).is_symlink():
            return folder / name
    others = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file())
    if (folder / "last.pt").exists() and (folder / "config.json").exists():
        raise ValueError(
            f"load_checkpoint: {folder} holds a run that has not finished: no model.safetensors yet; run its "
            "command again"
        )
    if len(others) == 1:
        return others[0]
    held = ", ".join(p.name for p in (others or sorted(folder.iterdir()))[:8]) or "nothing"
    wanted = "name one of its files" if others else f"it must hold {', '.join(WEIGHTS[:3])} or another file of weights"
    raise ValueError(f"load_checkpoint: {folder} is a folder, {wanted}; it holds {held}")


def config_beside(path: Path) -> dict[str, Any]:
    """``config.json`` or ``open_clip_config.json`` beside a file; {} if there is none or it cannot be read."""
    for name in ("config.json", "open_clip_config.json"):
        try:
            found = json.loads((path.parent / name).read_text())
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            processor = path.parent / "preprocessor_config.json"  # of transformers: how images are prepared
            with contextlib.suppress(OSError, ValueError):
                found[processor.name] = json.loads(processor.read_text())
            return found
    return {}


def _read_shards(path: Path) -> dict[str, Any]:
    try:
        places = json.loads(path.read_text())["weight_map"]
        names = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"load_checkpoint: {path} is not an index of shards: it must be JSON with a 'weight_map'"
        ) from error
    state: dict[str, Any] = {}
    for name in names:
        shard = path.parent / Path(name).name
        if not shard.exists():
            raise FileNotFoundError(f"load_checkpoint: {path} names {name}, which is not in its folder")
        content, _ = _read_file(shard)
        state.update(content)
    lost = [key for key in places if key not in state]
    if lost:
        raise ValueError(f"load_checkpoint: {path} names tensors that its shards do not hold: {', '.join(lost[:5])}")
    return state


def _read_file(path: Path) -> tuple[Any, dict[str, Any]]:
    """Content and metadata of a file."""
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise ValueError(f"load_checkpoint: {path} is empty")
    for start, reason in _NOT_WEIGHTS:
        if head.lstrip()[: len(start)] == start:
            raise ValueError(f"load_checkpoint: {path} {reason}")
    if path.suffix == ".safetensors" or (head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 1 << 27):
        return _read_safetensors(path)
    names: list[str] = []
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                members = archive.namelist()
            if any(n.endswith("/constants.pkl") for n in members):
                return torch.jit.load(path, map_location="cpu").state_dict(), {}
            if not any(n.endswith("data.pkl") for n in members):
                kind = "arrays of NumPy (JAX, Flax)" if all(n.endswith(".npy") for n in members) else "other files"
                raise ValueError(f"a zip archive of {kind}, not of torch.save")
        return _read_pickle(path, names), {}
    except Exception as error:  # readers of pickles and archives raise many kinds of exceptions for damaged files
        if str(error).startswith("load_checkpoint:"):
            raise
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(_opaque(path, [named[1], *names])) from error
        if "persistent_load of storage" in str(error):  # a module with its source code, as torch before 1.6 saved it
            raise ValueError(_opaque(path, names or ["torch.nn.Module"])) from error
        damaged = " (cut short or damaged)" if head.startswith(b"PK") and not zipfile.is_zipfile(path) else ""
        told = re.search(r"WeightsUnpickler error:\s*(.*)", str(error))
        reason = told[1] if told else (str(error).strip() or "nothing more is said").splitlines()[0]
        raise ValueError(
            f"load_checkpoint: {path} is not a file of torch.save{damaged}: {type(error).__name__}: {reason[:300]}"
        ) from error


def _read_safetensors(path: Path) -> tuple[Any, dict[str, Any]]:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), dict(metadata)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"load_checkpoint: {path} is not a safetensors file, or is cut short: {error}") from error


class Opaque:
    """Stands for an object of another library in a pickle. Created and filled without executing that library's code."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _dictionary(*args: Any) -> dict[Any, Any]:
    return {}


def _read_pickle(path: Path, names: list[str]) -> Any:
    """A file of ``torch.save``, read by torch's unpickler for tensors and plain values; ``names`` collects the classes
    of other objects."""
    if zipfile.is_zipfile(path):
        names += torch.serialization.get_unsafe_globals_in_checkpoint(path)
    while True:
        stand_ins = [
            (_dictionary if name == "collections.defaultdict" else type(name, (Opaque,), {}), name) for name in names
        ]
        try:
            with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():  # type: ignore[arg-type]
                warnings.simplefilter("ignore")
                content = torch.load(path, map_location="cpu", weights_only=True)
            break
        except pickle.UnpicklingError as error:  # files of torch before 1.6 cannot be scanned beforehand
            named = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
            name = "" if named is None else named[1] if "." in named[1] else f"builtins.{named[1]}"
            if not name or name in names:
                raise
            names.append(name)
    if names and not any(isinstance(v, torch.Tensor) for v in flat(content)):
        found = [type(v).__name__ for v in flat(content) if isinstance(v, Opaque)]
        raise ValueError(_opaque(path, found or names))
    return content


def flat(content: Any, depth: int = 3) -> Any:
    """All values of nested dictionaries."""
    if isinstance(content, dict) and depth:
        for value in content.values():
            yield from flat(value, depth - 1)
    else:
        yield content


def _opaque(path: Path, names: list[str]) -> str:
    return (
        f"load_checkpoint: {path} holds objects besides tensors and plain values ({', '.join(names[:5])}) in the "
        "place of weights; if you "
        "trust it, read it with torch.load(path, weights_only=False) and give its state dict"
    )
