"""A checkpoint's state dict without the dictionaries and prefixes that training loops put around it."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from pyvit.models import checkpoint_files
from pyvit.models.metadata import Metadata, metadata_in

#: Names of dictionaries in checkpoints that contain a state dict, EMA weights first; and prefixes that wrappers
#: add to all keys.
WRAPPERS = (
    "state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher", "state_dict", "model_state_dict", "model",
    "student", "module", "net", "backbone",
)  # fmt: skip
PREFIXES = ("module.", "backbone.", "teacher.", "student.", "model.", "net.")
#: What compiled and sharded modules insert into keys.
_INNER = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

#: First layers of a ViT, a Swin and a ResNet: "encoder." before one of them is a wrapper's prefix (SimCLR), otherwise
#: part of a layout's names.
STEMS = ("patch_embed.proj.weight", "conv1.weight")


class Source(NamedTuple):
    """A checkpoint as read: its tensors without wrappers and prefixes, its metadata, and the configuration
    beside it."""

    state: dict[str, Tensor]
    metadata: Metadata
    config: dict[str, Any]
    wrapper: str  # the dictionary that contained the tensors, or ""
    plain: bool  # the library that wrote it is unknown
    name: str  # for messages


def read_state(source: str | os.PathLike[str] | Mapping[str, Any], target: Collection[str] = ()) -> dict[str, Tensor]:
    """The tensors of a file or state dict, without wrappers' dictionaries and prefixes.

    ``target`` are the keys of the model to load: a prefix that they also have is kept.
    """
    return open_source(source, target).state


def open_source(source: str | os.PathLike[str] | Mapping[str, Any], target: Collection[str] = ()) -> Source:
    """:func:`read_state`, with metadata and configuration."""
    config: dict[str, Any] = {}
    header: dict[str, Any] = {}
    name = "the checkpoint"
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        source, config, header = checkpoint_files.read(source)
    if not isinstance(source, Mapping):
        raise TypeError(f"load_checkpoint: source must hold a state dict, got {type(source).__name__}")
    content, wrappers = source, list[str]()
    while inner := _inside(content):
        wrappers.append(inner)
        content = content[inner]
    state = {k: v for k, v in content.items() if isinstance(v, Tensor)}
    if not state:
        raise ValueError(f"load_checkpoint: no tensors in source, {name}, whose keys are {list(content)[:8]}")
    metadata = metadata_in(content, header)
    state, metadata = _without_prefixes(state, metadata, target)
    if any(k.endswith("input_resolution") for k in state) and not metadata:  # OpenAI's own archives
        metadata = {rf"{tower}\.blocks\.\d+\.mlp(\.fc1)?": {"activation": "quick_gelu"} for tower in ("visual", "text")}
    known = bool(metadata) or bool(config and "recipe" not in config) or hasattr(content, "_metadata")
    return Source(state, metadata, config, ".".join(wrappers), not known, name)


def _inside(content: Mapping[str, Any]) -> str | None:
    """The wrapper's dictionary that has the weights, or None if ``content`` is a state dict."""
    holds = [
        k
        for k, v in content.items()
        if isinstance(v, Mapping) and any(isinstance(t, Tensor) for t in checkpoint_files.flat(v))
    ]
    if named := next((w for w in WRAPPERS if w in holds), None):
        return named
    if any(isinstance(v, Tensor) for v in content.values()):
        return None
    weights = [k for k in holds if not re.match(r"optim|.*scheduler|.*scaler|.*optimizer", str(k))]
    return weights[0] if len(weights) == 1 else None


def _without_prefixes(
    state: dict[str, Tensor], metadata: Metadata, target: Collection[str]
) -> tuple[dict[str, Tensor], Metadata]:
    if not any(_INNER.search(k) for k in target):
        state = {_INNER.sub("", k): v for k, v in state.items()}
        metadata = {_INNER.sub("", k + ".")[:-1]: v for k, v in metadata.items()}
    state.pop("n_averaged", None)  # torch.optim.swa_utils.AveragedModel
    prefixes = [p for p in PREFIXES if not any(k.startswith(p) for k in target)]
    while True:
        prefix = next((p for p in prefixes if any(k.startswith(p) for k in state)), None)
        if (
            prefix is None
            and not any(k.startswith("encoder.") for k in target)
            and any("encoder." + stem in state for stem in STEMS)
        ):
            prefix = "encoder."
        if prefix is None:  # DINOv2 trains in chunks of blocks: blocks.chunk.i
            return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", k): v for k, v in state.items()}, metadata
        if prefix == "teacher.":  # the teacher is better, as in WRAPPERS
            state = {k: v for k, v in state.items() if not k.startswith("student.")}
            metadata = {k: v for k, v in metadata.items() if not k.startswith("student.")}
        # A DINO checkpoint has heads beside the backbone: keys without the prefix are kept.
        stripped = {k.removeprefix(prefix): v for k, v in state.items()}
        if len(stripped) < len(state):
            twice = [k for k in state if k.startswith(prefix) and k.removeprefix(prefix) in state]
            raise ValueError(
                f"load_checkpoint: source has keys with and without the prefix {prefix!r}: {', '.join(twice[:5])}"
            )
        # Metadata of the inner module has priority over that of its wrapper.
        metadata = {
            **metadata,
            **{
                (k + ".").removeprefix(prefix).removesuffix("."): v
                for k, v in metadata.items()
                if (k + ".").startswith(prefix)
            },
        }
        state = stripped
