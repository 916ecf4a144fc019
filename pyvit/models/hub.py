"""Weights of the Hugging Face hub, by name."""

from __future__ import annotations

import os
from pathlib import Path

#: What "hf-hub:OWNER/NAME" downloads: weights in the layouts that load_checkpoint reads, and their configuration.
_FILES = (
    "config.json", "preprocessor_config.json", "open_clip_config.json", "model.safetensors*", "model-*.safetensors",
    "open_clip_model.safetensors", "pytorch_model*.bin", "pytorch_model.bin.index.json",
)  # fmt: skip


def is_hub_name(source: str | os.PathLike[str]) -> bool:
    return isinstance(source, str) and source.startswith(("hf-hub:", "timm:"))


def download(source: str) -> Path:
    """The folder of a model of the hub, from the cache of huggingface_hub or downloaded into it.

    ``source`` is "hf-hub:OWNER/NAME", or "timm:NAME" with a name of ``timm.list_pretrained()``. Safetensors are
    preferred to pickles.

    Raises ImportError without huggingface_hub (and timm), ValueError for a name that does not exist, and OSError if the
    model is neither in the cache nor can be downloaded.
    """
    kind, _, name = source.partition(":")
    name = _timm(name) if kind == "timm" else name
    if name.count("/") != 1:
        raise ValueError(f"load_checkpoint: a model of the hub must be hf-hub:OWNER/NAME, got {source!r}")
    try:
        from huggingface_hub import list_repo_files, snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError as error:
        raise ImportError(f"load_checkpoint: {source} needs huggingface_hub: pip install huggingface_hub") from error
    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        if any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir()):
            return folder
    except LocalEntryNotFoundError:
        pass
    try:
        safe = any(file.endswith(".safetensors") for file in list_repo_files(name))
        patterns = [p for p in _FILES if not (safe and p.startswith("pytorch_model"))]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except RepositoryNotFoundError as error:
        raise ValueError(f"load_checkpoint: the hub has no model {name!r}, or it needs a login") from error
    except Exception as error:  # offline: errors of several HTTP libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"load_checkpoint: {source} is not in the cache and cannot be downloaded ({reason[:200]}); with a network, "
            f"'hf download {name}' prints a folder to give instead"
        ) from error


def _timm(name: str) -> str:
    """The hub's name of a pre-trained model of timm."""
    try:
        from timm.models import get_pretrained_cfg, list_pretrained
    except ImportError as error:
        raise ImportError(f"load_checkpoint: timm:{name} needs timm: pip install timm") from error
    try:
        config = get_pretrained_cfg(name)
    except RuntimeError:  # a model with other weights
        config = None
    found = getattr(config, "hf_hub_id", None)
    if not found:
        near = ", ".join(list_pretrained(f"*{name.partition('.')[0]}*")[:5])
        raise ValueError(
            f"load_checkpoint: timm has no weights named {name!r}" + (f"; did you mean {near}?" if near else "")
        )
    return found if not found.endswith("/") else found + f"{config.architecture}.{config.tag}"
