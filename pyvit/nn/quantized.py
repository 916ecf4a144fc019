"""Linear layers on int8 weights, for inference: what :func:`pyvit.quantize` puts in place of linear layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyvit.nn.linear import Linear, bypassed, plain
from pyvit.ops import linear_int8 as ops
from pyvit.ops.linear_int8 import Int8Layer, quantize_weight
from pyvit.ops.prepacked import Norm, normalize


@bypassed
class QuantizedLinear(nn.Module):
    """activation(x W^T + bias) with W int8 and a scale per output channel: (..., K) -> (..., M), of the dtype of x.

    See :mod:`pyvit.ops.linear_int8` for the numbers. There is no gradient: in training mode with gradients enabled the
    module raises RuntimeError, and in evaluation mode the backward pass does.

    Args:
        layer: an ``nn.Linear`` with finite weights, whose bias is kept.
        name: of the layer in its model, for messages.
        factors: (K,) powers of two by which channels of x are divided, and the weight's columns multiplied, before
            both are rounded: for channels much larger than the others (Xiao et al., "SmoothQuant", 2023). A layer norm
            before the layer takes the division into its own weights, which costs nothing.

    Buffers, as in ``state_dict``: ``weight`` (M, K) int8; ``weight_scale`` (M,) and, with factors, ``smoothing`` (K,),
    which is 1 / factors: float32 whatever the module is cast to. The weight in the order in which it is multiplied is
    not saved; it is made anew where the weight has changed. ``dtype``: of the float weight that they stand for.
    """

    fuses_residual = True  # see pyvit.nn.residual.fusion_args

    weight: Tensor
    weight_scale: Tensor
    smoothing: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Linear, name: str = "", factors: Tensor | None = None) -> None:
        super().__init__()
        with torch.inference_mode(False), torch.no_grad():
            wanted = layer.weight if factors is None else layer.weight.detach().float() * factors
            weight, scale = quantize_weight(wanted)
        self._set(layer, name, weight, scale, factors)

    @classmethod
    def without_values(cls, layer: nn.Linear, name: str = "") -> QuantizedLinear:
        """A layer of the shape of ``layer``, which may be on the meta device, whose weight ``load_state_dict`` sets."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        rows, columns = layer.weight.shape
        weight, scale = torch.zeros(rows, columns, dtype=torch.int8, device="cpu"), torch.ones(rows, device="cpu")
        self._set(layer, name, weight, scale, None)
        return self

    def _set(self, layer: nn.Linear, name: str, weight: Tensor, scale: Tensor, factors: Tensor | None) -> None:
        self.in_features, self.out_features, self.name = layer.in_features, layer.out_features, name
        self.activation: str | None = getattr(layer, "activation", None)
        self.dtype = layer.weight.dtype
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("smoothing", None if factors is None else 1.0 / factors.float())
        self.register_parameter("bias", layer.bias)
        self.training = layer.training
        self.original: list[nn.Linear] = []  # the layer replaced, if it is kept; no submodule
        self.pack()

    def pack(self) -> None:
        """Brings the weight into the order in which it is multiplied."""
        if self.weight.is_inference():  # whose changes PyTorch does not count
            with torch.inference_mode(False):
                self._buffers["weight"] = self.weight.clone()
        self.packed = ops.pack(self.weight)
        self.version = _version(self.weight)

    def dequantized(self) -> nn.Linear:
        """The layer that was replaced, or where it was not kept, or the int8 weight has changed since, one with the
        values of the int8 weight."""
        if self.original and _version(self.weight) == self.version:
            layer = self.original[0]
        else:
            sizes = (self.in_features, self.out_features, self.bias is not None)
            layer = Linear(*sizes, self.activation, device=self.weight.device, dtype=self.dtype)
            with torch.no_grad():
                weight = self.weight * self.weight_scale[:, None]
                layer.weight.copy_(weight if self.smoothing is None else weight * self.smoothing)
        layer.bias = self.bias
        return layer.train(self.training)

    def int8(self) -> Int8Layer:
        buffers = self._buffers  # attributes of a module take half a microsecond each
        return Int8Layer(buffers["weight"], buffers["weight_scale"], self._parameters["bias"], self.packed)  # type: ignore[arg-type]

    def forward(
        self, x: Tensor, norm: Norm | None = None, scale: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """residual + scale * layer(norm(x)), the arguments as of :func:`pyvit.ops.linear`."""
        return self.multiply(x, self.activation, self.bias, norm, scale, residual)

    def multiply(
        self,
        x: Tensor,
        activation: str | None = None,
        bias: Tensor | None = None,
        norm: Norm | None = None,
        scale: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """residual + scale * activation(norm(x) W^T + bias), whatever activation and bias the layer itself has."""
        self.refuse_training()
        y, norm = self.smooth(x, norm)
        layer = self.int8()._replace(bias=bias)
        out = ops.linear_int8(y, layer, activation=activation, norm=norm, scale=scale, residual=residual)
        return without_gradient(self.name, out, x, residual)

    @property
    def int8_original_dtype(self) -> torch.dtype:
        """``dtype`` by the name under which open_clip asks for it."""
        return self.dtype

    def smooth(self, x: Tensor, norm: Norm | None) -> tuple[Tensor, Norm | None]:
        """x and norm with the channels that the layer gets divided by its factors."""
        if norm is not None and len(norm) == 2:  # an RMS norm, which the int8 kernels do not have
            x, norm = normalize(x, norm), None
        smoothing = self._buffers["smoothing"]
        if smoothing is None:
            return x, norm
        if norm is None:
            return x * smoothing.to(x.dtype), None
        weight, bias, eps = norm
        weight = smoothing if weight is None else weight * smoothing.to(weight.dtype)
        return x, (weight, bias if bias is None else bias * smoothing.to(bias.dtype), eps)

    def refuse_training(self) -> None:
        if self.training and torch.is_grad_enabled():
            raise RuntimeError(
                f"QuantizedLinear {self.name}: int8 weights are for inference; call model.eval(), or "
                "pyvit.dequantize(model) before training"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: self._buffers[name] for name in ("weight_scale", "smoothing")}
        super()._apply(fn, recurse)
        for name, kept in before.items():
            now = self._buffers[name]
            if kept is not None and now is not None and now.dtype != torch.float32:
                self._buffers[name] = kept.to(now.device)
        for layer in self.original:
            layer._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        self.pack()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        given = state_dict.get(f"{prefix}weight")
        if given is not None and given.dtype != torch.int8:  # a copy would cut it to integers
            errors: list[str] = args[-1]
            errors.append(
                f"{prefix.removesuffix('.')}: weight is int8 here and {given.dtype} in the state dict; call "
                "pyvit.dequantize(model) first"
            )
            return
        if given is not None:  # with factors or without, as the saved layer
            has = state_dict.get(f"{prefix}smoothing") is not None
            empty = torch.ones(self.in_features, device=self.weight.device)
            self._buffers["smoothing"] = (self.smoothing if self.smoothing is not None else empty) if has else None
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "packed": None}  # type: ignore[misc]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.pack()

    def extra_repr(self) -> str:
        activation = f", activation={self.activation}" if self.activation else ""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}{activation}"


def _version(t: Tensor) -> int:
    """PyTorch's count of changes, which tensors made under inference mode do not have."""
    return -1 if t.is_inference() else t._version


def quantized(*layers: nn.Module | None) -> bool:
    """Whether all layers are quantized, without hooks or patches, so that fused layers may compute them."""
    return all(type(layer) is QuantizedLinear and plain(layer, QuantizedLinear) for layer in layers)


def quantized_mlp(
    x: Tensor,
    fc1: QuantizedLinear,
    fc2: QuantizedLinear,
    activation: str,
    norm: Norm | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + scale * fc2(activation(fc1(norm(x)))) in one call. fc2 must have no factors: its input is rounded
    within the call."""
    fc1.refuse_training()
    given, (x, norm) = x, fc1.smooth(x, norm)
    layers = fc1.int8(), fc2.int8()
    out = ops.mlp_int8(x, *layers, activation=activation, norm=norm, scale=scale, residual=residual)
    return without_gradient(fc1.name, out, given, residual)


def quantized_attention(
    x: Tensor,
    qkv: QuantizedLinear,
    proj: QuantizedLinear,
    num_heads: int,
    is_causal: bool,
    norm: Norm | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor | None:
    """residual + scale * proj(attention(qkv(norm(x)))) in one call, with x (B, N, C); None where no call computes
    that."""
    if qkv.activation or proj.activation or proj.smoothing is not None:
        return None
    x, norm = qkv.smooth(x, norm)
    return ops.attention_branch(x, qkv.int8(), proj.int8(), num_heads, is_causal, norm, scale, residual)


def quantized_window_attention(
    x: Tensor,
    qkv: QuantizedLinear,
    proj: QuantizedLinear,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    num_heads: int,
    bias_table: Tensor,
    mask_padding: bool,
    norm: Norm | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor | None:
    """As :func:`quantized_attention`, in windows, with x (B, H, W, C)."""
    if qkv.activation or proj.activation or proj.smoothing is not None:
        return None
    x, norm = qkv.smooth(x, norm)
    windows = (window_size, shift_size, num_heads, bias_table, mask_padding)
    return ops.window_attention_branch(x, qkv.int8(), proj.int8(), *windows, norm, scale, residual)


class _WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, out: Tensor, *inputs: Tensor | None) -> Tensor:
        ctx.name = name
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(f"QuantizedLinear {ctx.name}: int8 weights have no gradient; pyvit.dequantize(model) first")


def without_gradient(name: str, out: Tensor, *inputs: Tensor | None) -> Tensor:
    """``out``, whose backward pass raises RuntimeError where one of the inputs it was made of requires a gradient."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _WithoutGradient.apply(name, out.detach(), *inputs)  # type: ignore[no-untyped-call, no-any-return]
    return out
