"""Every operator's inputs, definition and providers for a case: pyvit, the naive form, PyTorch's own, torch.compile."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pyvit
from benchmarks import baselines, inputs
from benchmarks.cases import Case
from benchmarks.workload import OURS
from pyvit import dispatch
from pyvit.ops import prepacked, reference

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Provider:
    """``fn(**tensors)`` returns the output, or a tuple that starts with it.

    ``prepare`` converts the inputs to the provider's own layout before timing, as a model would have them. ``version``
    of the library, if it is not torch alone. ``unchecked``: why its output cannot be compared with the definition.
    """

    name: str
    fn: Callable[..., Any]
    prepare: Callable[[Tensors], Tensors] | None = None
    version: str = ""
    unchecked: str = ""
    missing: str = ""

    def whole(self, **tensors: Tensor) -> Tensor:
        """The output from the operator's inputs, differentiable: used by the correctness check."""
        out = self.fn(**(self.prepare(tensors) if self.prepare else tensors))
        return out if isinstance(out, Tensor) else out[0]


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile(fn)`` at the first call: importing the compiler takes seconds, and most runs do not need it."""
    made: list[Callable[..., Any]] = []

    def run(**tensors: Tensor) -> Any:
        if not made:
            made.append(torch.compile(fn, dynamic=False))
        return made[0](**tensors)

    return run


@dataclass(frozen=True)
class Spec:
    """An operator for one case: inputs, definition, providers.

    ``flops`` of the forward, ``backward`` flops in multiples of it, ``output`` elements; ``items``: see
    :class:`benchmarks.gate.Gate`.
    """

    tensors: Tensors
    naive: Callable[..., Tensor]
    providers: Sequence[Provider]
    grads: Sequence[str]
    flops: float
    backward: float
    output: int
    items: Sequence[int] | None = None
    unavailable: Mapping[str, str] | None = None


def _cast(tensors: Tensors, dtype: torch.dtype, device: str) -> Tensors:
    return {name: t.to(device, dtype if t.is_floating_point() else None) for name, t in tensors.items()}


def sdpa_options(case: Case) -> dict[str, Any]:
    """The arguments of ``F.scaled_dot_product_attention`` for a case of flash_attention, besides tensors."""
    s = case.shape
    return {
        "is_causal": s.get("causal", False),
        "dropout_p": s.get("dropout", 0.0),
        "enable_gqa": s.get("kv_heads", s["heads"]) != s["heads"],
    }


#: Of peers with dropout.
DRAWS = "its dropout mask is its own"


def _flash_attention(case: Case, source: str, dtype: torch.dtype, device: str) -> Spec:
    b, h, n, d = (case.shape[key] for key in ("batch", "heads", "length", "dim"))
    options = sdpa_options(case)
    causal, dropout_p, gqa = options.values()
    packed = inputs.projected_qkv(source, b, n, h * d).to(device, dtype).view(b, n, 3, h, d)
    tensors = dict(zip("qkv", packed.permute(2, 0, 3, 1, 4).unbind(0), strict=True))  # strided views, as in a model
    if gqa:
        tensors |= {name: tensors[name][:, : case.shape["kv_heads"]] for name in "kv"}
    if case.shape.get("bias"):
        tensors["bias"] = torch.randn(1, h, n, n, generator=torch.Generator().manual_seed(5)).to(device, dtype)
    future = torch.ones(n, n, dtype=torch.bool, device=device).triu(1)
    seed = torch.tensor([5], device=device) if dropout_p else None  # ours and the definition drop the same weights

    def definition(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return reference.flash_attention(q, k, v, bias, causal, d**-0.5, dropout_p, seed)[0]

    def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        if seed is not None:
            of = sys.modules["pyvit.ops.flash_attention"]  # the function of that name hides the module
            chosen = dispatch.select(of.check(q, k, v, bias, causal, dropout_p, gqa, False), None)
            return of.ATTENTION(q, k, v, bias, causal, d**-0.5, dropout_p, seed, chosen)[0]
        return pyvit.ops.flash_attention(q, k, v, bias=bias, is_causal=causal, enable_gqa=gqa)

    def naive(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        if gqa:
            k, v = (t.repeat_interleave(h // t.shape[1], 1) for t in (k, v))
        if dropout_p:
            return F.dropout((q * d**-0.5 @ k.transpose(-2, -1)).softmax(-1), dropout_p) @ v
        return baselines.naive_attention(q, k, v, q.new_zeros(n, n).masked_fill(future, -math.inf) if causal else bias)

    def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, **options)

    draws = DRAWS if dropout_p else ""
    providers = [
        Provider(OURS, ours),
        Provider("naive", naive, unchecked=draws),
        Provider("sdpa", sdpa, unchecked=draws),
        Provider("compile", compiled(naive), unchecked=draws),
    ]
    flops = 4 * b * h * n * n * d / (2 if causal else 1)
    # The dropout mask of an entry depends on its place in the batch: the reference computes all of them.
    items = None if b == 1 or dropout_p else (0, b - 1) if n < 512 else (b - 1,)
    return Spec(tensors, definition, providers, ("q", "k", "v"), flops, 2.5, b * h * n * d, items)


def _flash_attention_varlen(case: Case, source: str, dtype: torch.dtype, device: str) -> Spec:
    lengths = case.shape["lengths"]
    h = case.shape["heads"]
    d = case.shape["dim"]
    ends = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    longest = max(lengths)
    packed = torch.cat([inputs.projected_qkv(source, 1, n, h * d, seed=i)[0] for i, n in enumerate(lengths)]).to(
        device, dtype
    )
    tensors = dict(zip("qkv", packed.view(-1, 3, h, d).unbind(1), strict=True))
    groups = {
        n: [i for i, m in enumerate(lengths) if m == n] for n in lengths
    }  # equal lengths are adjacent, as crops are

    def per_length(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            outs, at = [], 0
            for n, members in groups.items():
                rows = slice(at, at + n * len(members))
                crops = [t[rows].view(len(members), n, h, d).transpose(1, 2) for t in (q, k, v)]
                outs.append(attend(*crops).transpose(1, 2).reshape(-1, h, d))
                at = rows.stop
            return torch.cat(outs)

        return run

    def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.flash_attention_varlen(q, k, v, ends, ends, longest, longest, None, False, d**-0.5)[0]

    providers = [
        Provider(OURS, lambda q, k, v: pyvit.ops.flash_attention_varlen(q, k, v, ends, ends, longest, longest)),
        Provider("naive", per_length(baselines.naive_attention)),
        Provider("sdpa", per_length(baselines.sdpa)),
    ]
    flops = sum(4 * h * n * n * d for n in lengths)
    return Spec(tensors, definition, providers, ("q", "k", "v"), flops, 2.5, sum(lengths) * h * d)


def _rope_attention(case: Case, source: str, dtype: torch.dtype, device: str) -> Spec:
    b, h, n, d = (case.shape[key] for key in ("batch", "heads", "length", "dim"))
    norm = case.shape.get("norm")
    packed = inputs.projected_qkv(source, b, n, h * d).to(device, dtype).view(b, n, 3, h, d)
    tensors = dict(zip("qkv", packed.permute(2, 0, 3, 1, 4).unbind(0), strict=True))  # strided views, as in a model
    rng = torch.Generator().manual_seed(7)
    angles = torch.randn(n - 1, d // 2, generator=rng).repeat(1, 2)  # of all tokens but the class token
    rope = torch.stack((angles.sin(), angles.cos()), 1).to(device)
    parameters = {}
    if norm is not None:
        parameters = {f"{x}_weight": torch.rand(d, generator=rng).to(device) + 0.5 for x in "qk"}
        if norm == "layer":
            parameters |= {f"{x}_bias": torch.randn(d, generator=rng).to(device) / 4 for x in "qk"}
    fixed = [parameters.get(f"{x}_{kind}") for x in "qk" for kind in ("weight", "bias")]

    def turned(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
        return reference.normalize_and_rotate(x, rope[None, None], weight, bias, norm or "none", 1e-5, 1, False)

    def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.flash_attention(
            turned(q, *fixed[:2]), turned(k, *fixed[2:]), v, None, False, d**-0.5, 0.0, None
        )[0]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        eps = {} if norm is None else {"qk_norm": norm, "eps": 1e-5, **parameters}
        return pyvit.ops.rope_attention(q, k, v, rope, num_prefix_tokens=1, **eps)

    def apart(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, k, v: attend(turned(q, *fixed[:2]), turned(k, *fixed[2:]), v)

    alone = "attention alone: neither norm nor rotation"
    providers = [
        Provider(OURS, ours),
        Provider("naive", apart(baselines.naive_attention)),
        Provider("apart", apart(pyvit.ops.flash_attention)),
        Provider("apart, SDPA", apart(baselines.sdpa)),
        Provider("attention alone", pyvit.ops.flash_attention, unchecked=alone),
        Provider("compile", compiled(apart(baselines.naive_attention))),
    ]
    flops = 4 * b * h * n * n * d
    items = None if b == 1 else (0, b - 1) if n < 512 else (b - 1,)
    return Spec(tensors, definition, providers, ("q", "k", "v"), flops, 2.5, b * h * n * d, items)


def _decomposed_attention(case: Case, source: str, dtype: torch.dtype, device: str) -> Spec:
    b, h, side, d = (case.shape[key] for key in ("batch", "heads", "side", "dim"))
    n = side * side
    packed = inputs.projected_qkv(source, b, n, h * d).to(device, dtype).view(b, n, 3, h, d)
    tensors = dict(zip("qkv", packed.permute(2, 0, 3, 1, 4).unbind(0), strict=True))  # strided views, as in a model
    rng = torch.Generator().manual_seed(8)
    tensors |= {name: torch.randn(b, h, n, side, generator=rng).to(device, dtype) for name in ("rel_h", "rel_w")}

    def with_bias(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
            return attend(q, k, v, (rel_h[..., :, None] + rel_w[..., None, :]).flatten(-2))

        return call

    def definition(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
        return reference.decomposed_attention(q, k, v, rel_h, rel_w, d**-0.5)[0]

    channels = functools.partial(pyvit.ops.decomposed_attention, backend="torch")
    providers = [
        Provider(OURS, pyvit.ops.decomposed_attention),
        Provider("naive", with_bias(baselines.naive_attention)),
        Provider("SDPA with the bias", with_bias(baselines.sdpa)),
        Provider("as channels", channels),
        Provider("compile", compiled(with_bias(baselines.naive_attention))),
    ]
    flops = 4 * b * h * n * n * d
    return Spec(tensors, definition, providers, tuple(tensors), flops, 2.5, b * h * n * d, (0,) if b > 1 else None)


def _window_attention(case: Case, source: str, dtype: torch.dtype, device: str) -> Spec:
    b, side, width, heads, window, shift, version = (
        case.shape[key] for key in ("batch", "side", "width", "heads", "window", "shift", "version")
    )
    rng = torch.Generator().manual_seed(6)
    table = torch.randn((2 * window - 1) ** 2, heads, generator=rng)
    tensors = {"qkv": inputs.window_qkv(source, b, side, width), "bias_table": table}
    if version == 2:
        tensors["logit_scale"] = torch.full((heads,), math.log(10.0))
    tensors = _cast(tensors, dtype, device)
    scale = (width // heads) ** -0.5
    index = reference.relative_position_index((window, window)).to(device)
    mask = baselines.shift_mask(side, side, window, shift).to(device, dtype) if shift else None

    def definition(qkv: Tensor, bias_table: Tensor, logit_scale: Tensor | None = None) -> Tensor:
        return reference.window_attention(
            qkv, [window] * 2, [shift] * 2, heads, bias_table, logit_scale, None, scale, 0.0, None
        )[0]

    def ours(qkv: Tensor, bias_table: Tensor, logit_scale: Tensor | None = None) -> Tensor:
        return pyvit.ops.window_attention(
            qkv, window, shift, num_heads=heads, bias_table=bias_table, logit_scale=logit_scale
        )

    def prepare(given: Tensors) -> Tensors:
        # A model rolls and partitions the C channels before the projection, not its 3C: the clock sees that on a map of
        # C channels.
        qkv = given["qkv"]
        rolled = qkv.roll((-shift, -shift), (1, 2)) if shift else qkv
        return {**given, "qkv": baselines.partition(rolled, window), "x": qkv[..., :width].contiguous()}

    def timm_path(attend: baselines.Attend) -> Callable[..., tuple[Tensor, Tensor]]:
        def run(qkv: Tensor, x: Tensor, bias_table: Tensor, logit_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
            windows = baselines.partition(x.roll((-shift, -shift), (1, 2)) if shift else x, window)
            out = baselines.window_core(qkv, heads, bias_table, index, mask, attend, logit_scale)
            out = baselines.reverse(out, window, side, side)
            return out.roll((shift, shift), (1, 2)) if shift else out, windows

        return run

    naive = timm_path(baselines.naive_attention)
    providers = [Provider(OURS, ours), Provider("timm path", naive, prepare)]
    if version == 1:
        providers.append(Provider("timm path, SDPA", timm_path(baselines.sdpa), prepare))
    providers += [Provider("reference", definition), Provider("compile", compiled(naive), prepare)]
    flops = 4 * b * side * side * window * window * width
    return Spec(tensors, definition, providers, tuple(tensors), flops, 2.5, b * side * side * width)


def _patch_embed(case: Case, source: str, dtype: torch.dtype, device: str) -> Spec:
    b, size, patch, width = (case.shape[key] for key in ("batch", "size", "patch", "width"))
    kept, uint8 = case.shape.get("keep"), case.shape.get("uint8", False)
    rng = torch.Generator().manual_seed(8)
    count = (size // patch) ** 2
    images = inputs.pixels(source, b, size)
    mean, std = (torch.tensor(c, device=device) for c in (inputs.IMAGENET_MEAN, inputs.IMAGENET_STD))
    tensors = {
        "images": images if uint8 else inputs.normalised(images),
        "weight": torch.randn(width, 3, patch, patch, generator=rng) / math.sqrt(3 * patch * patch),
        "bias": torch.randn(width, generator=rng) * 0.1,
        "pos_embed": torch.randn(count, width, generator=rng) * 0.2,
        "prefix": torch.randn(1, width, generator=rng),
    }
    if kept:
        tensors["keep"] = torch.rand(b, count, generator=rng).argsort(1)[:, :kept].contiguous()
    tensors = _cast(tensors, dtype, device)
    norm = {"mean": mean, "std": std} if uint8 else {}

    def definition(
        images: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, prefix: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        return reference.patch_embed(
            images, weight, bias, [patch, patch], pos_embed, prefix, keep, norm.get("mean"), norm.get("std")
        )

    def ours(
        images: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, prefix: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        return pyvit.ops.patch_embed(images, weight, bias, pos_embed=pos_embed, prefix=prefix, keep=keep, **norm)

    def floats(images: Tensor, dtype: torch.dtype) -> Tensor:
        return inputs.normalised(images).to(dtype) if images.dtype == torch.uint8 else images

    def assembled(project: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        def run(
            images: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, prefix: Tensor, keep: Tensor | None = None
        ) -> Tensor:
            x = project(floats(images, weight.dtype), weight, bias) + pos_embed
            if keep is not None:
                x = x.gather(1, keep[:, :, None].expand(-1, -1, width))
            return torch.cat([prefix.expand(b, -1, -1), x], 1)

        return run

    def linear(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        g = size // patch
        rows = images.view(b, 3, g, patch, g, patch).permute(0, 2, 4, 1, 3, 5).reshape(b, g * g, -1)
        return F.linear(rows, weight.flatten(1), bias)

    conv = assembled(lambda x, w, bias: F.conv2d(x, w, bias, patch).flatten(2).transpose(1, 2))
    providers = [Provider(OURS, ours), Provider("conv2d", conv), Provider("reshape + linear", assembled(linear))]
    if uint8:  # the baseline for uint8 pixels: our operator on pixels that were normalised before
        float_op = lambda images, **kw: pyvit.ops.patch_embed(images, kw.pop("weight"), kw.pop("bias"), **kw)  # noqa: E731
        providers.append(
            Provider("ours, float pixels", float_op, lambda given: {**given, "images": floats(given["images"], dtype)})
        )
    providers.append(Provider("compile", compiled(conv)))
    flops = 2 * b * (kept or count) * width * 3 * patch * patch
    output = b * ((kept or count) + 1) * width
    return Spec(tensors, definition, providers, ("weight", "bias", "pos_embed", "prefix"), flops, 1.0, output)


def _linear(case: Case, source: str, dtype: torch.dtype, device: str) -> Spec:
    m, k, n, activation = (case.shape[key] for key in ("m", "k", "n", "activation"))
    rng = torch.Generator().manual_seed(9)
    tensors = {
        "x": torch.randn(m, k, generator=rng),
        "weight": torch.randn(n, k, generator=rng) / math.sqrt(k),
        "bias": torch.randn(n, generator=rng) * 0.1,
    }
    naive = lambda x, weight, bias: reference.linear(x, weight, bias, activation)  # noqa: E731
    providers = [
        Provider(OURS, lambda x, weight, bias: pyvit.ops.linear(x, weight, bias, activation=activation)),
        Provider("F.linear", naive),
        Provider("compile", compiled(naive)),
    ]
    return Spec(_cast(tensors, dtype, device), naive, providers, ("x", "weight", "bias"), 2 * m * k * n, 2.0, m * n)


def _gated_mlp(case: Case, source: str, dtype: torch.dtype, device: str) -> Spec:
    rows, width, hidden, split = (case.shape[key] for key in ("rows", "width", "hidden", "split"))
    rng = torch.Generator().manual_seed(9)

    def weight(out: int, columns: int) -> Tensor:
        return torch.randn(out, columns, generator=rng) / math.sqrt(columns)

    tensors = {
        "x": torch.randn(rows, width, generator=rng),
        "fc1_weight": weight(hidden if split else 2 * hidden, width),
        "fc1_bias": torch.randn(hidden if split else 2 * hidden, generator=rng) * 0.1,
        "fc2_weight": weight(width, hidden),
        "fc2_bias": torch.randn(width, generator=rng) * 0.1,
    }
    if split:
        tensors |= {"gate_weight": weight(hidden, width), "gate_bias": torch.randn(hidden, generator=rng) * 0.1}
    if case.shape["norm"]:
        tensors |= {"norm_weight": 1 + torch.randn(hidden, generator=rng) * 0.1, "norm_bias": torch.zeros(hidden)}

    def naive(**t: Tensor) -> Tensor:
        value = F.linear(t["x"], t["fc1_weight"], t["fc1_bias"])
        gate, value = (F.linear(t["x"], t["gate_weight"], t["gate_bias"]), value) if split else value.chunk(2, -1)
        y = F.silu(gate) * value
        y = F.layer_norm(y, (hidden,), t["norm_weight"], t["norm_bias"], 1e-6) if case.shape["norm"] else y
        return F.linear(y, t["fc2_weight"], t["fc2_bias"])

    def ours(**t: Tensor) -> Tensor:
        norm = (t.pop("norm_weight"), t.pop("norm_bias"), 1e-6) if case.shape["norm"] else None
        return pyvit.ops.gated_mlp(**t, hidden_norm=norm)

    def packed(**t: Tensor) -> Tensor:
        for name in ("fc1_weight", "gate_weight", "fc2_weight"):
            if name in t and not prepacked.is_packed(t[name]):
                layer = torch.nn.Linear(1, 1)
                layer._parameters["weight"] = t[name]  # type: ignore[assignment]
                prepacked.pack(layer, 1 if split or name == "fc2_weight" else 2)
        return ours(**t)

    providers = [Provider(OURS, ours), Provider("naive", naive), Provider("compile", compiled(naive))]
    if case.mode == "forward" and device == "cpu":
        providers.insert(1, Provider(f"{OURS}, packed weights", packed))
    flops = 6 * rows * width * hidden
    return Spec(_cast(tensors, dtype, device), naive, providers, tuple(tensors), flops, 2.0, rows * width)


def _norm(case: Case, source: str, dtype: torch.dtype, device: str) -> Spec:
    rows, width, centered = case.shape["rows"], case.shape["width"], case.op == "layer_norm"
    rng = torch.Generator().manual_seed(9)
    shapes = {"x": (rows, width), "weight": (width,)} | ({"bias": (width,)} if centered else {})
    tensors = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    theirs = F.layer_norm if centered else F.rms_norm
    naive = lambda x, **parameters: theirs(x, (width,), **parameters)  # noqa: E731
    providers = [
        Provider(OURS, pyvit.ops.layer_norm if centered else pyvit.ops.rms_norm),
        Provider(f"F.{case.op}", naive),
        Provider("compile", compiled(naive)),
    ]
    # Two for the mean and the variance each, the difference, the product and the sum; or two for the mean square and
    # two products.
    per_element = 7 if centered else 4
    return Spec(
        _cast(tensors, dtype, device), naive, providers, tuple(tensors), per_element * rows * width, 2.0, rows * width
    )


SPECS: dict[str, Callable[[Case, str, torch.dtype, str], Spec]] = {
    "flash_attention": _flash_attention,
    "flash_attention_varlen": _flash_attention_varlen,
    "rope_attention": _rope_attention,
    "decomposed_attention": _decomposed_attention,
    "window_attention": _window_attention,
    "patch_embed": _patch_embed,
    "linear": _linear,
    "gated_mlp": _gated_mlp,
    "layer_norm": _norm,
    "rms_norm": _norm,
}
