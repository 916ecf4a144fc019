"""Cases and targets of ``make gpu``, and its providers: each of our backends, and each peer by name and version."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import pyvit
from benchmarks import baselines
from benchmarks.cases import LEVELS, Case, Target
from benchmarks.specs import DRAWS, Provider, Spec, compiled, sdpa_options
from benchmarks.workload import OURS
from pyvit.dispatch import devices
from pyvit.dispatch.capabilities import absent
from pyvit.ops.reference import relative_position_index

PINNED = {
    "sdpa cuDNN": SDPBackend.CUDNN_ATTENTION,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
#: Providers that the backend "torch" may call.
PYTORCHS = ("sdpa", *PINNED, "conv2d")
_RIVALS = ("sdpa cuDNN", "sdpa flash", "sdpa efficient")
FA4 = "sdpa flash 4"
GRAPH = f"{OURS}, CUDA graph"
#: window: (side of the map, width, heads, batch), head dimension 32 as in every Swin.
_WINDOWS = {7: (56, 96, 3, 128), 8: (64, 96, 3, 128), 12: (96, 128, 4, 32), 16: (64, 96, 3, 128), 24: (96, 128, 4, 32)}
#: tokens: batch, for 12 heads of 64; every input is larger than the L2 cache.
_TOKENS = {197: 256, 257: 192, 577: 64, 1025: 32}


def ops() -> list[Case]:
    """Attention, windows and patch embedding in bfloat16: forward, backward and both.

    The cases of ``level`` "default" run first: every kind of target once, attention's at every length.
    """
    found = []
    for n, batch in _TOKENS.items():
        shape = {"batch": batch, "heads": 12, "length": n, "dim": 64}
        label = f"{batch}x12x{n}x64"
        found.append(
            Case(
                "flash_attention",
                label,
                "bf16",
                "forward+backward",
                shape,
                Target(1.2, _RIVALS),
                "default",
                ("random",),
            )
        )
        found.append(Case("flash_attention", label, "bf16", "forward", shape, sources=("random",), against=_RIVALS))
    each = (("compile", 2.0), ("timm path", 5.0))
    for window, (side, width, heads, batch) in _WINDOWS.items():
        shape = {
            "batch": batch,
            "side": side,
            "width": width,
            "heads": heads,
            "window": window,
            "shift": window // 2,
            "version": 1,
        }
        label = f"{batch}x{side}x{side}x{width} window {window} shift {window // 2}"
        for mode, percent in (("forward", 60), ("backward", 40)):
            target = Target(against=("timm path",), roofline=percent, each=each)
            level = "default" if window == 7 else "full"
            found.append(Case("window_attention", label, "bf16", mode, shape, target, level, ("random",)))
    shape = {"batch": 256, "size": 224, "patch": 16, "width": 768}
    target = Target(against=("conv2d",), roofline=80)
    found.append(Case("patch_embed", "256x224 patch 16", "bf16", "forward", shape, target, "default", ("random",)))
    found.append(
        Case("patch_embed", "256x224 patch 16 uint8", "bf16", "forward", dict(shape, uint8=True), sources=("random",))
    )
    found.append(
        Case("patch_embed", "256x224 patch 16 keep 25 %", "bf16", "forward", dict(shape, keep=49), sources=("random",))
    )
    return found


def features() -> list[Case]:
    """What users of attention ask for besides: packed sequences, a bias, grouped key heads, dropout, one image."""
    rest: dict[str, Any] = {"sources": ("random",)}
    dense = {"batch": 64, "heads": 12, "length": 197, "dim": 64}
    crops = {"lengths": (197,) * 64 + (37,) * 256, "heads": 12, "dim": 64}
    both = "forward+backward"
    found = [
        Case("flash_attention_varlen", "64x197 + 256x37, 12 heads", "bf16", mode, crops, **rest)
        for mode in ("forward", both)
    ]
    for label, options in (
        ("bias", {"bias": True}),
        ("GQA 3", {"kv_heads": 3}),
        ("dropout 0.1", {"batch": 16, "dropout": 0.1}),
        ("causal", {"causal": True}),
    ):
        shape = dense | options
        label = f"{shape['batch']}x12x197x64 {label}"
        found += [
            Case("flash_attention", label, "bf16", mode, shape, against=_RIVALS, **rest) for mode in ("forward", both)
        ]
    one = dense | {"batch": 1}
    found.append(
        Case(
            "flash_attention",
            "1x12x197x64 launch-bound",
            "bf16",
            "forward",
            one,
            level="default",
            against=_RIVALS,
            **rest,
        )
    )
    window = {"batch": 1, "side": 56, "width": 96, "heads": 3, "window": 7, "shift": 3, "version": 1}
    label = "1x56x56x96 window 7 shift 3"
    found.append(
        Case("window_attention", label, "bf16", "forward", window, level="default", against=("timm path",), **rest)
    )
    return found


def dispatch() -> list[Case]:
    """The calls between which ``pyvit.dispatch.choice`` chooses by measurement: every kind of tile once, forward,
    and forward and backward."""
    distinct = {(c.op, c.label): c for c in ops() if not {"uint8", "keep"} & c.shape.keys()}
    return [
        replace(c, mode=mode, target=None, against=_RIVALS if c.op == "flash_attention" else ("timm path", "conv2d"))
        for c in distinct.values()
        for mode in ("forward", "forward+backward")
    ]


def losses() -> list[Case]:
    """The pairwise losses in bfloat16, forward and backward, against the naive form that stores the logits."""
    target, mode = Target(1 / 0.7, ("naive",), memory=0.05), "forward+backward"
    pairs = {"batch": 16384, "dim": 512}
    crops = {"crops": 10, "views": 2, "batch": 64, "dim": 256, "prototypes": 65536}
    return [
        Case(
            "info_nce", "batch 32768 d 512", "bf16", mode, {"batch": 32768, "dim": 512}, target, "default", ("random",)
        ),
        Case("nt_xent", "batch 8192 d 128", "bf16", mode, {"batch": 8192, "dim": 128}, sources=("random",)),
        Case("sigmoid_contrastive", "batch 16384 d 512", "bf16", mode, pairs, sources=("random",)),
        Case(
            "distillation_cross_entropy",
            "10 + 2 crops of 64, 65536 prototypes",
            "bf16",
            mode,
            crops,
            sources=("random",),
        ),
    ]


def models() -> list[Case]:
    """Throughput of Swin-B, training memory of Swin-T, and ViT-B."""
    compiled, eager = ("timm + compile", "naive + compile", "compile"), ("eager SDPA", "eager naive")
    big, swin = {"batch": 128, "size": 224}, "swin_tiny_patch4_window7_224"
    memory = Target(memory=0.7, against=("timm", "eager naive"))
    faster = Target(1.5, compiled)
    small = {"batch": 64, "size": 224}
    base = "swin_base_patch4_window7_224"
    return [
        Case(base, "batch 128", "bf16", "inference", big, faster, "default", ("random",), eager),
        Case(swin, "batch 64", "bf16", "train", small, memory, "default", ("random",), eager),
        Case("vit_base_patch16_224", "batch 128", "bf16", "inference", big, sources=("random",), against=eager),
    ]


def every() -> list[Case]:
    return [*ops(), *features(), *losses(), *models()]


def ordered(found: list[Case]) -> list[Case]:
    """Cases in order of priority for a run with a time limit: "default" ones first, then those with targets."""
    return sorted(found, key=lambda case: (LEVELS.index(case.level), case.target is None))


def tiny_features() -> list[Case]:
    """One tiny case of each of :func:`features`."""
    found = {}
    for case in features():
        shape = {k: min(v, 33) if isinstance(v, int) else v for k, v in case.shape.items()}
        shape |= {"batch": min(shape.get("batch", 1), 2)}
        if case.op == "flash_attention":
            shape |= {"heads": 3, "kv_heads": 1 if "kv_heads" in shape else 3, "dim": 32}
        if "lengths" in shape:
            shape |= {"lengths": (33, 33, 17), "heads": 2, "dim": 32}
        if case.op == "window_attention":
            shape |= {"side": 14, "width": 64, "heads": 2}
        label = "tiny " + " ".join(case.label.split()[1:])
        found[label] = replace(case, label=label.strip(), shape=shape, dtype="fp32")
    return list(found.values())


def tiny() -> list[Case]:
    """Cases of the same kinds, small enough for the interpreter and the tests."""
    attention = {"batch": 2, "heads": 2, "length": 33, "dim": 32}
    window = {"batch": 1, "side": 14, "width": 64, "heads": 2, "window": 7, "shift": 3, "version": 1}
    patch = {"batch": 2, "size": 32, "patch": 16, "width": 32}
    against, each = ("timm path",), (("timm path", 5.0),)
    pairs, mode = {"batch": 40, "dim": 32}, "forward+backward"
    crops = {"crops": 3, "views": 2, "batch": 5, "dim": 16, "prototypes": 70}
    return [
        Case(
            "flash_attention", "tiny", "fp32", "forward+backward", attention, Target(1.2, _RIVALS), sources=("random",)
        ),
        Case(
            "window_attention",
            "tiny",
            "fp32",
            "forward",
            window,
            Target(against=against, roofline=60, each=each),
            sources=("random",),
        ),
        Case(
            "window_attention",
            "tiny",
            "fp32",
            "backward",
            window,
            Target(against=against, roofline=40, each=each),
            sources=("random",),
        ),
        Case(
            "patch_embed",
            "tiny",
            "fp32",
            "forward",
            patch,
            Target(against=("conv2d",), roofline=80),
            sources=("random",),
        ),
        Case("info_nce", "tiny", "bf16", mode, pairs, Target(1 / 0.7, ("naive",), memory=0.05), sources=("random",)),
        Case("nt_xent", "tiny", "bf16", mode, pairs, sources=("random",)),
        Case("sigmoid_contrastive", "tiny", "bf16", mode, pairs, sources=("random",)),
        Case("distillation_cross_entropy", "tiny", "bf16", mode, crops, sources=("random",)),
    ]


def missing(module: str) -> str | None:
    """Why ``module`` cannot be imported, or None. Its parent packages are imported."""
    try:
        found = importlib.util.find_spec(module) is not None
    except ImportError as error:
        return f"{module}: {error}"
    return None if found else f"{module} is not installed"


def version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return package


def cudnn_version() -> str:
    return f"cuDNN {torch.backends.cudnn.version()}"


def no_flash_4() -> str | None:
    """Why SDPA cannot use FlashAttention 4, or None."""
    try:
        from torch.nn.attention import list_flash_attention_impls
    except ImportError:
        return f"torch {torch.__version__} has no activate_flash_attention_impl"
    if "FA4" not in list_flash_attention_impls():
        return f"torch {torch.__version__} does not know FA4"
    return missing("flash_attn.cute")


@contextlib.contextmanager
def flash_4() -> Iterator[None]:
    """SDPA's flash backend is FlashAttention 4 within the block."""
    from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

    activate_flash_attention_impl("FA4")
    try:
        yield
    finally:
        restore_flash_attention_impl()


def _pinned(backend: SDPBackend, options: dict[str, Any]) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, **options)

    return run


def _flex(case: Case, backend: str | None) -> Provider | str:
    """FlexAttention, by Triton or with ``backend`` "FLASH" (by FlashAttention 4), or why there is none."""
    from torch.nn.attention import flex_attention as flex

    if case.shape.get("dropout"):
        return "has no dropout"
    options: dict[str, Any] = {"enable_gqa": sdpa_options(case)["enable_gqa"]}
    if backend is not None:
        if "BACKEND" not in getattr(flex, "FlexKernelOptions").__annotations__:  # noqa: B009  (torch < 2.10 has no such class)
            return f"torch {torch.__version__} has no such option"
        if (why := missing("flash_attn.cute")) is not None:
            return why
        options["kernel_options"] = {"BACKEND": backend}
    causal = case.shape.get("causal", False)

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        def changed(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            if bias is not None:
                score = score + bias[0, h, i, j]
            return torch.where(i >= j, score, -float("inf")) if causal else score

        return flex.flex_attention(q, k, v, score_mod=changed if causal or bias is not None else None, **options)

    return Provider("", compiled(run), version=version("flash-attn-4") if backend else "")


def _varlen(case: Case, device: str) -> Provider | str:
    """``torch.nn.attention.varlen.varlen_attn`` or why there is none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"torch {torch.__version__} has no varlen_attn"
    lengths = case.shape["lengths"]
    ends, longest = torch.tensor([0, *lengths]).cumsum(0).int().to(device), max(lengths)
    return Provider("", lambda q, k, v: varlen_attn(q, k, v, ends, ends, longest, longest))


def _graph(ours: Provider, device: str) -> Provider | str:
    """Ours as a captured CUDA graph: what the GPU needs, without the launches."""
    if device != "cuda":
        return "CUDA graphs need a GPU"
    captured: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def run(**tensors: Tensor) -> Any:
        at = tuple(t.data_ptr() for t in tensors.values())
        if at not in captured:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                ours.fn(**tensors)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = ours.fn(**tensors)
            captured[at] = graph, out
        graph, out = captured[at]
        graph.replay()
        return out

    return Provider("", run)


def _flex_windows(case: Case, spec: Spec) -> Callable[..., Any]:
    """Window attention with FlexAttention: bias and shift mask as a score modification, with roll and partition."""
    from torch.nn.attention.flex_attention import flex_attention

    side, heads, window, shift = (case.shape[key] for key in ("side", "heads", "window", "shift"))
    device = spec.tensors["qkv"].device
    index = relative_position_index((window, window)).to(device)
    mask = baselines.shift_mask(side, side, window, shift).to(device)
    count, n = mask.shape[0], window * window

    def run(qkv: Tensor, x: Tensor, bias_table: Tensor) -> tuple[Tensor, Tensor]:
        def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + bias_table[index[i, j], h] + mask[b % count, i, j]

        windows = baselines.partition(x.roll((-shift, -shift), (1, 2)), window)
        q, k, v = qkv.view(-1, n, 3, heads, qkv.shape[-1] // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
        out = flex_attention(q, k, v, score_mod=biased).transpose(1, 2).reshape(-1, n, qkv.shape[-1] // 3)
        return baselines.reverse(out, window, side, side).roll((shift, shift), (1, 2)), windows

    return compiled(run)


def on_backend(backend: str, ours: Provider) -> Provider:
    """Ours with a given backend."""

    def run(**tensors: Tensor) -> Any:
        with pyvit.use_backend(backend):
            return ours.fn(**tensors)

    return replace(ours, name=f"{OURS} {backend}", fn=run)


def pinned(case: Case) -> list[Provider]:
    """Every backend of SDPA, each alone."""
    options = sdpa_options(case)
    return [
        Provider(
            name,
            _pinned(backend, options),
            version=cudnn_version() if "cuDNN" in name else "",
            unchecked=DRAWS if options["dropout_p"] else "",
        )
        for name, backend in PINNED.items()
    ]


def unable(op: str, backend: str, device: str) -> str | None:
    """Why a backend of ours cannot run ``op`` on this machine's ``device``, or None."""
    return absent(op, backend, device) or (devices.refused(backend, torch.bfloat16) if device == "cuda" else None)


def both(case: Case, spec: Spec) -> list[Provider]:
    """Each of our GPU backends, and every backend of SDPA."""
    ours = next(p for p in spec.providers if p.name == OURS)
    device = next(iter(spec.tensors.values())).device.type
    found = [
        replace(on_backend(backend, ours), missing=unable(case.op, backend, device) or "")
        for backend in ("cuda", "triton")
    ]
    return found + (pinned(case) if case.op == "flash_attention" else [])


def extra(case: Case, spec: Spec) -> Sequence[Provider]:
    """Each of our GPU backends, a CUDA graph of ours for one image, and the peers of a GPU, present or not."""
    if case.op not in ("flash_attention", "flash_attention_varlen", "window_attention", "patch_embed"):
        return []
    ours = next(p for p in spec.providers if p.name == OURS)
    device = next(iter(spec.tensors.values())).device.type
    found: dict[str, Provider | str] = {}
    if case.shape.get("batch") == 1 and case.mode == "forward":
        found[GRAPH] = _graph(ours, device)
    if case.op == "flash_attention":
        found |= {"flex": _flex(case, None), "flex FLASH": _flex(case, "FLASH")}
        if (why := no_flash_4()) is not None:
            found[FA4] = why
    if case.op == "flash_attention_varlen":
        found["varlen_attn"] = _varlen(case, device)
    if case.op == "window_attention" and case.shape["version"] == 1 and case.shape["shift"]:
        path = next(p for p in spec.providers if p.name == "timm path")
        found["flex"] = Provider("flex", _flex_windows(case, spec), path.prepare)
    return both(case, spec) + [
        Provider(name, ours.fn, missing=made) if isinstance(made, str) else replace(made, name=name)
        for name, made in found.items()
    ]


def by_flash_4(case: Case, spec: Spec) -> Sequence[Provider]:
    """SDPA within :func:`flash_4`, which replaces its flash backend in the whole process."""
    flash = next(p for p in pinned(case) if p.name == "sdpa flash")
    return [replace(flash, name=FA4, version=version("flash-attn-4"))]
