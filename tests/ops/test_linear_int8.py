"""Linear layers with int8 weights: the numbers of pyvit/ops/linear_int8.py, the same bits everywhere."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyvit import library
from pyvit.ops import reference
from pyvit.ops.linear_int8 import Int8Layer, formula, linear_int8, mlp_int8, pack, quantize_rows, quantize_weight

pytestmark = pytest.mark.skipif(library.problem() is not None, reason="needs the compiled library")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = ("portable", "avx2", "avxvnni", "avx512", "avx512vnni")  # that of "avx512bf16" is the last
#: Rows, K, M: on every side of a vector, of a panel of columns, of a tile and of a block of rows.
SIZES = [(1, 3, 5), (7, 33, 64), (50, 96, 96), (13, 600, 17), (200, 64, 130), (5, 70, 2001), (1, 4, 16), (90, 130, 400)]


def layer(m: int, k: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> Int8Layer:
    weight, scale = quantize_weight(torch.randn(m, k) * k**-0.5)
    return Int8Layer(weight, scale, torch.randn(m).to(dtype) if bias else None, pack(weight))


def defined(x: Tensor, a: Int8Layer) -> Tensor:
    """The operator's definition without norm and activation, exact in its sums, in float32."""
    steps, row_scale = quantize_rows(x.float())
    sums = (steps.double() @ a.weight.double().T).float()
    y = sums * a.scale * row_scale
    return y if a.bias is None else y + a.bias.float()


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: f"cpu-{dtype}")
def test_the_product_is_exact(dtype: torch.dtype) -> None:
    """Bit for bit the definition."""
    for rows, k, m in SIZES:
        for bias in (True, False):
            x, a = torch.randn(rows, k).to(dtype), layer(m, k, dtype, bias)
            assert torch.equal(linear_int8(x, a), defined(x, a).to(dtype)), (rows, k, m, bias)


@pytest.mark.isa
@pytest.mark.parametrize("sign", [1, -1], ids=lambda sign: f"cpu-{sign}")
def test_the_largest_sums(sign: int) -> None:
    """Every weight 127 or -127 and every step 255, the widest layer there is: no intermediate saturates or wraps."""
    k = 65536
    weight = torch.full((20, k), 127, dtype=torch.int8)
    weight[1::2] *= -1
    a = Int8Layer(weight, torch.ones(20), None, pack(weight))
    x = torch.full((9, k), float(sign))
    x[1::2, 1::2] = 0.0
    x[2] = torch.tensor([1.0, -1.0]).repeat(k // 2)  # steps of 127.5 on both sides of zero
    found = linear_int8(x, a)
    assert torch.equal(found, defined(x, a))
    assert found[0, 0] == sign * torch.tensor(255 * 127 * k, dtype=torch.float32) * torch.tensor(1 / 255)
    narrow = Int8Layer(weight[:, :100].contiguous(), torch.ones(20), None, pack(weight[:, :100]))
    assert torch.equal(linear_int8(x[:, :100], narrow), defined(x[:, :100], narrow))


def test_quantize_rows_rounds_ties_to_even_and_never_leaves_its_range() -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, 255.0], [-0.5, -1.5, -2.5, -255.0], [-127.5, 127.5, 0.5, -0.5]])
    steps, scale = quantize_rows(x)
    assert steps[0].tolist() == [0, 2, 2, 255]
    assert steps[1].tolist() == [-1, -1, -3, -255]  # z = 255: it is q that is even
    assert steps[2].tolist() == [-128, 127, 0, 0]  # z = 128: 255.5 would be the 257th number
    assert torch.equal(scale.flatten(), torch.ones(3))
    rows = torch.randn(1000, 40) * torch.logspace(-30, 30, 1000)[:, None]
    steps, scale = quantize_rows(rows)
    spans = steps.amax(1) - steps.amin(1)
    assert (spans <= 255).all()
    assert (spans >= 254).all()
    assert ((steps * scale - rows).abs() <= scale * 1.01).all()


def test_quantize_weight() -> None:
    weight = torch.randn(50, 30) * torch.logspace(-30, 30, 50)[:, None]
    weight[3] = 0
    steps, scale = quantize_weight(weight)
    assert steps.min() == -127 or steps.max() == 127
    assert (steps.abs().amax(1) == 127)[torch.arange(50) != 3].all()
    assert not steps[3].any()
    assert scale[3] == 0
    assert ((steps * scale[:, None] - weight).abs() <= 0.501 * scale[:, None]).all()
    with pytest.raises(ValueError, match="weight must be finite"):
        quantize_weight(torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(ValueError, match="at most 65536 columns"):
        quantize_weight(torch.ones(1, 65537))


def around(x: Tensor, m: int, dtype: torch.dtype) -> dict[str, object]:
    norm = (torch.randn(x.shape[-1]).to(dtype), torch.randn(x.shape[-1]).to(dtype), 1e-5)
    return {"norm": norm, "scale": torch.randn(m).to(dtype), "residual": torch.randn(*x.shape[:-1], m).to(dtype)}


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: f"cpu-{dtype}")
@pytest.mark.parametrize("activation", [None, *reference.ACTIVATIONS])
def test_numerics(activation: str | None, dtype: torch.dtype) -> None:
    """One layer and two, with all around them, against the formula in float64. An element next to a tie may round
    another way there: few do, and each is one step of 255."""
    for rows, k, m in SIZES:
        x = torch.randn(rows, k).to(dtype)
        first, second = layer(m, k, dtype), layer(40, m, dtype)
        one, two = around(x, m, dtype), around(x, 40, dtype)
        calls = [(linear_int8(x, first, activation=activation, **one), (first,), one)]  # type: ignore[arg-type]
        if activation:
            calls.append((mlp_int8(x, first, second, activation=activation, **two), (first, second), two))  # type: ignore[arg-type]
        for found, layers, rest in calls:
            wanted = formula(x.double(), layers, activation, rest["norm"], rest["scale"], rest["residual"])  # type: ignore[arg-type]
            limit = {torch.float32: 3e-3, torch.bfloat16: 5e-3, torch.float16: 2e-3}[dtype]
            error = (found.double() - wanted).norm() / wanted.norm()
            assert error < limit, f"{rows} x {k} -> {m}, {len(layers)} layers: {error:.2e}"


@pytest.mark.isa
@pytest.mark.parametrize("activation", reference.ACTIVATIONS, ids=lambda name: f"cpu-{name}")
def test_activations(activation: str) -> None:
    weight = torch.tensor([[127]], dtype=torch.int8).expand(16, 1).contiguous()
    a = Int8Layer(weight, torch.full((16,), 1 / 127), None, pack(weight))
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e30, -1e4, 1e4, 1e30])])[:, None]
    before = linear_int8(x, a)
    found, wanted = linear_int8(x, a, activation=activation), reference.ACTIVATIONS[activation](before.double())
    allowed = 1.6e-4 if activation == "gelu" else 1e-5 * wanted.abs() + 1e-14
    assert ((found - wanted).abs() <= allowed + 1e-7 * wanted.abs()).all()


REPORT = "from tests.ops.test_linear_int8 import digests; print(*digests())"


def digests() -> list[str]:
    """Of the instruction set's name, and of results of everything the operators do."""
    torch.manual_seed(0)
    found = [torch.ops.pyvit.int8_isa()]
    for dtype in (torch.float32, torch.bfloat16):
        for rows, k, m in SIZES:
            x = torch.randn(rows, k) * torch.logspace(-3, 3, rows)[:, None]
            x[::5] *= torch.randn(k).exp().square()  # channels of very different sizes
            x[rows // 2, k // 2] = float("nan") if rows > 8 else 0.0
            x = x.to(dtype)
            first, second = layer(m, k, dtype), layer(24, m, dtype)
            results = [linear_int8(x, first), linear_int8(x, first, norm=(None, None, 1e-6))]
            for activation in reference.ACTIVATIONS:
                results.append(mlp_int8(x, first, second, activation=activation, **around(x, 24, dtype)))  # type: ignore[arg-type]
            numbers = b"".join(y.float().nan_to_num(123.0, 456.0, 789.0).numpy().tobytes() for y in results)
            found.append(hashlib.sha256(numbers).hexdigest()[:16])
    return found


@pytest.mark.skipif(bool(os.environ.get("PYVIT_CPU_ISA")), reason="an instruction set is forced already")
def test_the_same_bits_on_every_instruction_set() -> None:
    """Layer norm, rounding, sums, scales and activations: whatever the width of a vector, and whether or not it has
    byte products or fused multiply-adds."""
    here, *wanted = digests()
    seen = {here}
    for isa in ISAS:
        if isa == here:
            continue
        environment = {**os.environ, "PYVIT_CPU_ISA": isa, "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run([sys.executable, "-c", REPORT], env=environment, capture_output=True, text=True)
        if "not supported by this processor" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        name, *found = done.stdout.split()
        assert found == wanted, isa
        assert name == isa
        seen.add(name)
    assert len(seen) > 1


def test_same_bits_for_any_number_of_threads_and_rows(threads) -> None:
    """Blocks of rows and shared columns: a row's result does not depend on how the work is divided."""
    x, first, second = torch.randn(203, 96), layer(200, 96), layer(96, 200)
    rest = around(x, 96, torch.float32)
    found = []
    for count in (1, 2, 40):
        threads(count)
        found.append(mlp_int8(x, first, second, **rest))  # type: ignore[arg-type]
    assert all(torch.equal(each, found[0]) for each in found)
    few = mlp_int8(x[40:57], first, second, **{**rest, "residual": rest["residual"][40:57]})  # type: ignore[arg-type,index]
    assert torch.equal(few, found[0][40:57])


def test_rows_that_are_not_finite_zero_or_tiny() -> None:
    a = layer(40, 33)
    x = torch.randn(9, 33)
    wanted = linear_int8(x, a)
    x[1, 5], x[2, 7], x[3, 0] = float("nan"), float("inf"), -float("inf")
    x[4, 1], x[4, 2] = 3e38, -3e38  # whose range is not finite
    x[5], x[6] = 0.0, 1e-38
    found = linear_int8(x, a)
    assert found[1:5].isnan().all()
    assert torch.equal(found[5], a.bias)
    assert torch.equal(found[6], a.bias)
    assert torch.equal(found[[0, 7, 8]], wanted[[0, 7, 8]])
    hidden = mlp_int8(x, a, layer(8, 40))
    assert hidden[1:5].isnan().all()
    assert hidden[[0, 5, 6, 7, 8]].isfinite().all()


def test_changes_of_a_weight_are_seen() -> None:
    a, b = layer(30, 20), layer(30, 20)
    x = torch.randn(4, 20)
    before = linear_int8(x, a)
    a.weight.copy_(b.weight)
    found = linear_int8(x, a._replace(scale=b.scale, bias=b.bias))
    assert torch.equal(found, linear_int8(x, b))
    assert not torch.equal(found, before)
    with pytest.raises(RuntimeError, match="packed must be of a weight of this shape"):
        linear_int8(x, a._replace(packed=layer(60, 20).packed))


@pytest.mark.parametrize("shape", [(20,), (0, 20), (3, 0, 20), (2, 3, 20)], ids=str)
def test_shapes_and_strides(shape: tuple[int, ...]) -> None:
    a, x = layer(12, 20), torch.randn(shape)
    found = linear_int8(x, a)
    assert found.shape == (*shape[:-1], 12)
    apart = torch.randn(*shape[:-1], 40)
    apart[..., ::2] = x
    assert torch.equal(linear_int8(apart[..., ::2], a), found)


def test_a_residual_of_another_dtype_is_added_in_the_wider_one() -> None:
    a, x, residual = layer(12, 20), torch.randn(5, 20).bfloat16(), torch.randn(5, 12)
    found = linear_int8(x, a, residual=residual)
    assert found.dtype == torch.float32
    assert torch.equal(found, residual + linear_int8(x, a))


def test_errors() -> None:
    a, x = layer(12, 20), torch.randn(5, 20)
    with pytest.raises(ValueError, match=r"linear_int8: x must be floating-point of shape \(..., 20\)"):
        linear_int8(torch.randn(5, 19), a)
    with pytest.raises(ValueError, match="linear_int8: activation"):
        linear_int8(x, a, activation="gelu2")
    with pytest.raises(ValueError, match=r"mlp_int8: scale must be of shape \(7,\)"):
        mlp_int8(x, a, layer(7, 12), scale=torch.ones(8))
    with pytest.raises(ValueError, match=r"linear_int8: residual must be of shape \(5, 12\)"):
        linear_int8(x, a, residual=torch.ones(12))
    call = torch.ops.pyvit.linear_int8
    with pytest.raises(RuntimeError, match="weight must be int8"):
        call(x, False, None, None, 0.0, torch.randn(12, 20), a.packed, a.scale, a.bias, "", None, None)
    with pytest.raises(RuntimeError, match=r"the scale of a weight must be of shape \(12\)"):
        call(x, False, None, None, 0.0, a.weight, a.packed, torch.ones(11), a.bias, "", None, None)
    with pytest.raises(RuntimeError, match="weight must have at most 65536 columns"):
        torch.ops.pyvit.int8_pack(torch.zeros(1, 65537, dtype=torch.int8))


def test_without_kernels() -> None:
    """What has no packed form, and float64, goes by the formula."""
    a, x = layer(12, 20), torch.randn(5, 20)
    torch.testing.assert_close(linear_int8(x, a._replace(packed=None)), linear_int8(x, a), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear_int8(x.double(), a), linear_int8(x, a).double(), rtol=1e-5, atol=1e-5)
    wanted = F.linear(x, a.weight * a.scale[:, None], a.bias)
    assert (linear_int8(x, a) - wanted).norm() / wanted.norm() < 0.01
