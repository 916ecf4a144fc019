"""The models of timm and transformers that :mod:`pyvit.integrations.coverage` examines: one of each kind, built from
its configuration with random weights and few layers."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyvit.integrations.forwards import kind
from pyvit.integrations.unknown import unknown_attention

#: Layers per stage, and the largest image, where a configuration has more.
_DEPTH, _SIZE = 2, 256
#: Heads of the models of transformers that have more.
_HEADS = 4


class Case(NamedTuple):
    """A model to examine: ``name`` is timm's name of it, or a class of transformers as package.Class. It stands for
    all names in ``also`` too, which are built of the same classes."""

    library: str
    family: str
    name: str
    also: tuple[str, ...] = ()


Built = tuple[nn.Module, dict[str, Any]]


#: Gates of convolutional networks, with one set of weights for all positions.
_NO_ATTENTION = {"timm.layers.global_context.GlobalContext"}


def attention_kinds(model: nn.Module) -> list[str]:
    """The classes of ``model`` that compute attention, sorted: a softmax between matrix products, or a function for
    all of it."""
    return sorted({kind(left.module) for _, left in unknown_attention(model, ())} - _NO_ATTENTION)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Set every parameter and running statistic far from its initial value, so that no term of the model is zero, with
    outputs of each layer of the size of its inputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.is_floating_point():
                continue
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float32)
            if p.dim() == 1 and name.endswith("weight"):  # norms
                p.copy_(1.0 + 0.1 * noise)
            elif p.dim() > 1 and name.endswith("weight") and "embed" not in name.rpartition(".")[0].rpartition(".")[2]:
                p.copy_(p[0].numel() ** -0.5 * noise)
            else:
                p.copy_((0.3 if p.dim() == 1 else 0.1) * noise)
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(0.1 * torch.randn(b.shape, generator=generator))
            elif name.endswith("running_var"):
                b.copy_(1.0 + 0.2 * torch.rand(b.shape, generator=generator))
    return model.eval()


def _fewer(value: Any) -> Any:
    """A number of layers, or one per stage, cut to a few; anything else as it is."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return min(value, _DEPTH)
    if isinstance(value, list | tuple) and value and all(isinstance(n, int) for n in value):
        return type(value)(min(n, _DEPTH) for n in value)
    return value


# timm

_LAYERS = ("depth", "depths", "layers", "num_layers", "stages", "serial_depths", "parallel_depth", "num_blocks")
#: What a class needs besides, once it has few layers.
_ALSO: dict[str, dict[str, Any]] = {
    "VisionTransformerSAM": {"global_attn_indexes": (1,)},
}
#: Arguments that change sizes alone.
_SIZES = {
    *_LAYERS,
    *("embed_dim", "embed_dims", "num_heads", "head_dim", "dims", "img_size", "patch_size", "mlp_ratio", "mlp_ratios"),
    *("window_size", "drop_rate", "drop_path_rate", "init_values", "ls_init_value", "in_chans", "num_classes"),
    *("cache_dir", "feature_cfg", "kwargs_filter", "num_features", "pretrained_cfg", "pretrained_cfg_overlay"),
    *("pretrained_filter_fn", "pretrained_strict"),
}


@contextlib.contextmanager
def _timm_builder(build: Callable[..., Any]) -> Iterator[None]:
    """timm's models are made by ``build(original, model_cls, variant, pretrained, **arguments)``."""
    name = "build_model_with_cfg"
    originals = {m: vars(m)[name] for n, m in sys.modules.items() if n.startswith("timm.models.") and name in vars(m)}
    try:
        for module, original in originals.items():
            setattr(module, name, lambda *args, _original=original, **kwargs: build(_original, *args, **kwargs))
        yield
    finally:
        for module, original in originals.items():
            setattr(module, name, original)


def _small_timm(original: Callable[..., Any], cls: Any, variant: str, pretrained: bool, **arguments: Any) -> Any:
    known = inspect.signature(cls).parameters
    fewer = dict(arguments)
    for name in _LAYERS:
        value = arguments.get(name, known[name].default if name in known else None)
        if _fewer(value) != value:
            fewer[name] = _fewer(value)
    config = arguments.get("model_cfg")
    if dataclasses.is_dataclass(config) and hasattr(config, "depths"):
        fewer["model_cfg"] = dataclasses.replace(config, depths=_fewer(config.depths))  # type: ignore[type-var]
    if dataclasses.is_dataclass(config) and hasattr(config, "blocks"):
        blocks = (dataclasses.replace(b, d=_fewer(b.d)) if hasattr(b, "d") else b for b in config.blocks)
        fewer["model_cfg"] = dataclasses.replace(config, blocks=tuple(blocks))  # type: ignore[type-var]
    if fewer != arguments:
        fewer.update(_ALSO.get(getattr(cls, "__name__", ""), {}))
    size = arguments.get("img_size", known["img_size"].default if "img_size" in known else None)
    smaller = {"img_size": _SIZE} if isinstance(size, int) and size > _SIZE else {}
    for attempt in ({**fewer, **smaller}, fewer, {**arguments, **smaller}):
        with contextlib.suppress(Exception):  # a combination that the class refuses
            return original(cls, variant, pretrained, **attempt)
    return original(cls, variant, pretrained, **arguments)


def _make_timm(name: str) -> nn.Module:
    import timm

    with _timm_builder(_small_timm):
        return timm.create_model(name)


def _timm_arguments() -> dict[str, tuple[Any, dict[str, Any]]]:
    """The class of each of timm's models and its arguments, without building any."""
    import timm

    class Found(Exception):
        pass

    def stop(original: Any, cls: Any, variant: str, pretrained: bool, *args: Any, **arguments: Any) -> None:
        raise Found(cls, arguments)

    found = {}
    with _timm_builder(stop):
        for name in timm.list_models():
            try:
                timm.create_model(name)
            except Found as e:
                found[name] = e.args
    return found


def timm_cases(progress: Callable[[str], None]) -> list[Case]:
    """The smallest of timm's models of each class and each set of attention classes."""
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    arguments = _timm_arguments()
    for name, (cls, given) in arguments.items():
        others = sorted((key, repr(value)) for key, value in given.items() if key not in _SIZES)
        alike[getattr(cls, "__name__", str(cls)), repr(others)].append(name)
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for done, ((cls, _), names) in enumerate(alike.items()):
        progress(f"looking for attention in timm's models: {done} of {len(alike)}")
        try:
            with torch.device("meta"):
                model = _make_timm(names[0])
        except Exception:  # values that its constructor reads
            model = _make_timm(names[0])
        if kinds := attention_kinds(model):
            key = (cls, *kinds)
            groups[key] += names
    return [
        Case("timm", cls, min(names, key=lambda name: (*_timm_size(name, arguments[name][1]), name)), (*sorted(names),))
        for (cls, *_), names in sorted(groups.items())
    ]


def _timm_size(name: str, arguments: dict[str, Any]) -> tuple[int, int, list[int]]:
    """The image size and the width of a model that is not built, and the numbers in its name."""
    import timm

    config = timm.models.get_pretrained_cfg(name)
    widths = next((arguments[key] for key in ("embed_dim", "embed_dims", "dims") if key in arguments), 0)
    width = sum(widths) if isinstance(widths, list | tuple) else int(widths)
    return max((config.input_size if config else (3, 224, 224))[1:]), width, [int(n) for n in re.findall(r"\d+", name)]


def _build_timm(case: Case) -> Built:
    model = _make_timm(case.name)
    channels, *size = model.default_cfg["input_size"]
    made = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if min(size) > _SIZE and (made is not None or not model.default_cfg.get("fixed_input_size")):
        size = made or [_SIZE, _SIZE]
    return model, {"x": torch.randn(1, channels, *size)}


# transformers

_LAYER_NAMES = re.compile(r"(^|_)(num_(\w+_)?layers|layers|depth|depths|num_blocks|num_hidden_blocks)$")
_INDEX_NAMES = re.compile(r"_(index|indexes|indices|indicies)$")
_PIXELS = ("pixel_values", "pixel_values_videos", "image")


def transformers_cases(progress: Callable[[str], None]) -> list[Case]:
    """A class of transformers for each configuration of a model whose input is pixels, or patches and their grids, and
    nothing else."""
    import transformers

    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        package = path.parent.name
        if not re.search("pixel_values|grid_thw", path.read_text()):
            continue
        progress(f"looking for vision models in transformers: {package}")
        module = importlib.import_module(f"transformers.models.{package}.{path.stem}")
        for name, cls in vars(module).items():
            own = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
            if own and cls.__module__ == module.__name__ and "forward" in vars(cls) and _takes_pixels(cls):
                found[package, cls.config_class.__name__].append(name)
    cases: list[Case] = []
    for (package, _), names in sorted(found.items(), key=lambda item: (item[0][0], "For" in min(item[1], key=len))):
        if cases and cases[-1].family == package and all("For" in name for name in names):
            continue  # a head on one of the other models
        name = min(names, key=lambda n: ("For" in n, not n.endswith("Model"), not n.endswith("Backbone"), len(n)))
        cases.append(Case("transformers", package, f"{package}.{name}"))
    return cases


def _takes_pixels(cls: type) -> bool:
    if getattr(cls, "config_class", None) is None:
        return False
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]  # type: ignore[attr-defined]
    names = [p.name for p in parameters]
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    grids = {"grid_thw", "image_grid_thw"} & {*names}
    first = names[:1] in ([n] for n in _PIXELS) or (grids and names[:1] == ["hidden_states"])
    return bool(first) and not {*needed} - {*_PIXELS, "hidden_states", *grids, "spatial_shapes", "pixel_attention_mask"}


_WIDTHS = (
    ("num_attention_heads", "hidden_size", "intermediate_size"),
    ("num_heads", "hidden_size", "intermediate_size"),
    ("num_heads", "embed_dim", "intermediate_size"),
    ("num_attention_heads", "d_model", "encoder_ffn_dim"),
)


def _narrow(config: Any) -> None:
    """A few heads of the width that they have."""
    for heads, width, hidden in _WIDTHS:
        count, size = getattr(config, heads, None), getattr(config, width, None)
        if isinstance(count, int) and isinstance(size, int) and count > _HEADS and size % count == 0:
            setattr(config, heads, _HEADS)
            setattr(config, width, size // count * _HEADS)
            if isinstance(getattr(config, hidden, None), int):
                setattr(config, hidden, max(getattr(config, hidden) // count * _HEADS, 8))
            if getattr(config, "num_key_value_heads", None) == count:
                config.num_key_value_heads = _HEADS
            return


def _shrink(config: Any, narrow: bool, seen: set[int] | None = None) -> None:
    """Few layers and small images, in a configuration and those in it, and with ``narrow`` few heads."""
    seen = set() if seen is None else seen
    if id(config) in seen:
        return
    seen.add(id(config))
    patch = getattr(config, "patch_size", 16)
    if narrow:
        _narrow(config)
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            _shrink(value, narrow, seen)
        elif _LAYER_NAMES.search(name) and _fewer(value) != value:
            setattr(config, name, _fewer(value))
        elif _INDEX_NAMES.search(name) and isinstance(value, list | tuple):
            few = [i for i in value if isinstance(i, int) and i < _DEPTH]
            if len(few) < len(value) and all(isinstance(i, int) for i in value):
                setattr(config, name, few or [_DEPTH - 1])
        elif name == "image_size":
            size = 224 if patch == 14 else _SIZE
            if isinstance(value, int) and value > _SIZE:
                config.image_size = size
            elif isinstance(value, list | tuple) and max(value) > _SIZE:
                config.image_size = type(value)(size for _ in value)
        elif value == "relu":
            setattr(config, name, "gelu")
        elif name == "num_frames" and isinstance(value, int):
            config.num_frames = min(value, 4)


def _build_transformers(case: Case) -> Built:
    package, name = case.name.split(".")
    module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    cls = getattr(module, name)
    problem: Exception | None = None
    for narrow in (True, False, None):
        config = cls.config_class()
        if hasattr(config, "use_pretrained_backbone"):
            config.use_pretrained_backbone = False
        if narrow is not None:
            _shrink(config, narrow)
        try:
            model = cls._from_config(config)
            inputs = _inputs(cls, model.config)
            with torch.no_grad():
                if narrow is not None:
                    model.eval()(**inputs)
            return model, inputs
        except Exception as error:  # sizes that do not go together
            problem = problem or error
    raise problem


def _first(config: Any, *names: str, default: Any) -> Any:
    for name in names:
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    for name in ("vision_config", "backbone_config", "image_encoder_config"):
        if getattr(config, name, None) is not None:
            return _first(getattr(config, name), *names, default=default)
    return default


def _inputs(cls: Any, config: Any) -> dict[str, Any]:
    names = list(inspect.signature(cls.forward).parameters)[1:]
    channels = _first(config, "num_channels", "in_channels", "in_chans", default=3)
    patch = _first(config, "patch_size", default=16)
    if names[0] == "hidden_states" or {"grid_thw", "image_grid_thw"} & {*names}:
        grid = torch.tensor([[1, 8, 12], [1, 4, 8]])
        width = channels * _first(config, "temporal_patch_size", default=1) * patch * patch
        grid_name = next(n for n in names if n.endswith("grid_thw"))
        return {names[0]: torch.randn(int(grid.prod(1).sum()), width), grid_name: grid}
    if "spatial_shapes" in names:
        shapes = torch.tensor([[12, 16], [10, 18]])
        mask = torch.arange(192) < shapes.prod(1)[:, None]
        pixels = torch.randn(2, 192, channels * patch * patch)
        return {"pixel_values": pixels, "pixel_attention_mask": mask.long(), "spatial_shapes": shapes}
    size = _first(config, "image_size", "img_size", "crop_size", default=128)
    size = (size.get("height"), size.get("width")) if isinstance(size, dict) else size
    size = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    frames = _first(config, "num_frames", "frames_per_clip", default=None)
    if names[0] == "pixel_values_videos" or (frames is not None and names[0] == "pixel_values"):
        return {names[0]: torch.randn(1, min(frames or 4, 4), channels, *size)}
    return {names[0]: torch.randn(1, channels, *size)}


LIBRARIES = {"timm": (timm_cases, _build_timm), "transformers": (transformers_cases, _build_transformers)}


def build(case: Case) -> Built:
    """A model in evaluation mode and its inputs by name; its weights and inputs are the same in each process."""
    torch.manual_seed(0)
    model, inputs = LIBRARIES[case.library][1](case)
    for module in list(model.modules()):
        for child, found in list(module.named_children()):
            if type(found) in (nn.ReLU, nn.ReLU6):  # where rounding switches a gradient on or off
                setattr(module, child, nn.GELU())
    return randomise(model), inputs


def tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of a model's output."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    return [t for item in output for t in tensors(item)] if isinstance(output, list | tuple) else []
