"""The CUDA window-attention kernels in the emulation, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from pyvit import testing
from pyvit.dispatch import cost_model
from pyvit.ops import window_attention
from tests.extremes import ROWS, extreme_table

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
pytestmark = pytest.mark.usefixtures("cuda_on_host")


def _tensors(dtype, b, h, w, heads, d, window, *, cosine=False, pad=False, parameters=torch.float32):
    tensors = {"qkv": torch.randn(b, h, w, 3 * heads * d).to(dtype)}
    tensors["bias_table"] = torch.randn((2 * window[0] - 1) * (2 * window[1] - 1), heads).to(parameters)
    if cosine:
        tensors["logit_scale"] = torch.randn(heads).to(parameters) + 1
    if pad:
        tensors["pad_qkv"] = torch.randn(3 * heads * d).to(parameters)
    return tensors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [7, 8, 12])
def test_shifted_windows(dtype, window):
    tensors = _tensors(dtype, 1, 2 * window, 2 * window, 2, 32, (window, window))
    testing.check_op(window_attention, tensors, backend="cuda", window_size=window, shift_size=window // 2, num_heads=2)


@pytest.mark.parametrize(
    ("dtype", "window", "d"),
    [
        (torch.bfloat16, (1, 3), 16),
        (torch.float32, (4, 16), 64),
        (torch.bfloat16, (5, 13), 32),
        (torch.float32, (5, 13), 32),
        (torch.float16, (9, 16), 24),
        (torch.bfloat16, (5, 29), 32),
        (torch.bfloat16, (5, 13), 40),
    ],
)
def test_where_one_pass_ends(dtype, window, d):
    """3, 64, 65, 144 and 145 tokens: the smallest and largest windows of each kernel; a padded map with windows in few
    groups."""
    tensors = _tensors(dtype, 1, 2 * window[0] - 1, window[1], 2, d, window, cosine=True, pad=True)
    shift = (window[0] // 2, 0)
    testing.check_op(window_attention, tensors, backend="cuda", window_size=window, shift_size=shift, num_heads=2)


@pytest.mark.parametrize("side", [16, 18])
def test_large_windows(side):
    """The table's gradient in the pass over queries, and in its own pass if it does not fit into shared memory."""
    tensors = _tensors(torch.bfloat16, 1, side, 2 * side, 1, 32, (side, side), cosine=True)
    testing.check_op(window_attention, tensors, backend="cuda", window_size=side, shift_size=side // 2, num_heads=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("pad", [False, True])
def test_padding(dtype, cosine, pad):
    tensors = _tensors(dtype, 2, 10, 12, 2, 32, (7, 7), cosine=cosine, pad=pad)
    testing.check_op(window_attention, tensors, backend="cuda", window_size=7, shift_size=3, num_heads=2)


def test_oblong_windows_and_small_heads():
    tensors = _tensors(torch.float32, 1, 9, 8, 3, 8, (3, 4), pad=True)
    testing.check_op(window_attention, tensors, backend="cuda", window_size=(3, 4), shift_size=(1, 2), num_heads=3)


def test_an_axis_of_one_window_is_not_shifted():
    tensors = _tensors(torch.bfloat16, 2, 5, 14, 2, 64, (7, 7), parameters=torch.bfloat16)
    testing.check_op(window_attention, tensors, backend="cuda", window_size=7, shift_size=3, num_heads=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("window", [7, 12, 13])
def test_finite_masks(dtype, cosine, window):
    """Tables that mask rows by -inf or finite numbers; one pass with whole rows, one pass with parts of rows, several
    passes."""
    tensors = _tensors(dtype, 1, window, window, ROWS, 16, (window, window), cosine=cosine)
    tensors["bias_table"] = extreme_table((2 * window - 1) ** 2)
    testing.check_op(
        window_attention, tensors, backend="cuda", window_size=window, num_heads=ROWS, scores=30.0 if cosine else 0.0
    )


def test_the_largest_windows_under_finite_masks():
    """The table's gradient in its own pass."""
    tensors = _tensors(torch.bfloat16, 1, 18, 18, 3, 32, (18, 18))
    tensors["bias_table"] = extreme_table(35**2)[:, [1, 3, 10]].contiguous()
    testing.check_op(window_attention, tensors, backend="cuda", window_size=18, num_heads=3)


def test_without_a_table():
    qkv = torch.randn(1, 14, 14, 96)
    testing.check_op(window_attention, {"qkv": qkv}, backend="cuda", window_size=7, num_heads=1, scale=0.3)


@pytest.mark.parametrize("store", ["transposed", "permuted", "sliced", "shifted", "expanded"])
def test_strides(store):
    tensors = {"qkv": torch.randn(2, 8, 8, 48).bfloat16()}
    testing.check_op(
        window_attention,
        tensors,
        backend="cuda",
        window_size=4,
        shift_size=2,
        num_heads=2,
        store=store,
        store_grad=store,
    )


def test_temperature_beyond_its_clamp_has_no_gradient():
    qkv, logit_scale = torch.randn(1, 8, 8, 96), torch.tensor([5.0], requires_grad=True)
    window_attention(qkv, 4, num_heads=1, logit_scale=logit_scale, backend="cuda").square().sum().backward()
    assert logit_scale.grad.item() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_keys_in_padding_under_cosine_attention(dtype):
    """Swin V2's key bias is zero, so padding keys are zero vectors, and must not become NaN."""
    tensors = _tensors(dtype, 1, 5, 7, 1, 32, (7, 7), cosine=True)
    pad = torch.randn(96)
    pad[32:64] = 0
    testing.check_op(window_attention, tensors, backend="cuda", window_size=7, num_heads=1, pad_qkv=pad)


def test_same_bits_in_every_order_of_threads():
    tensors = {
        name: t.requires_grad_()
        for name, t in _tensors(torch.bfloat16, 3, 9, 14, 2, 32, (7, 7), cosine=True, pad=True).items()
    }

    def run():
        out = window_attention(**tensors, window_size=7, shift_size=3, num_heads=2, backend="cuda")
        return [out, *torch.autograd.grad(out.float().square().sum(), list(tensors.values()))]

    assert all(map(torch.equal, run(), run()))


ONE_PASS, QUERIES, KEYS, TABLE = (
    f"window_attention_backward{part}" for part in ("", " (queries)", " (keys)", " (bias)")
)


@pytest.mark.parametrize("kilobytes", [99, 163, 227])
@pytest.mark.parametrize(
    ("dtype", "window", "d", "at_99", "beyond"),
    [
        (torch.bfloat16, 7, 32, {ONE_PASS}, {ONE_PASS}),
        (torch.bfloat16, 12, 32, {QUERIES, KEYS}, {ONE_PASS}),
        (torch.float32, 8, 64, {QUERIES, KEYS}, {ONE_PASS}),
        (torch.bfloat16, 16, 32, {QUERIES, KEYS, TABLE}, {QUERIES, KEYS}),
        (torch.float32, 16, 64, {QUERIES, KEYS, TABLE}, {QUERIES, KEYS, TABLE}),
    ],
)
def test_shared_memory_of_the_device(cuda_on_host, kilobytes, dtype, window, d, at_99, beyond):
    """No launch asks for more than an RTX 4090, an A100 or an H100 has; with less, the gradients take more passes."""
    passes, limit = at_99 if kilobytes == 99 else beyond, kilobytes << 10
    tensors = _tensors(dtype, 1, window, 2 * window, 1, d, (window, window), cosine=True)
    cuda_on_host.limit_shared(limit)
    cuda_on_host.call("pyvit_emulation_forget_sites")
    try:
        testing.check_op(
            window_attention, tensors, backend="cuda", window_size=window, shift_size=window // 2, num_heads=1
        )
    finally:
        cuda_on_host.limit_shared()
    launches = cuda_on_host.launches()
    assert max(shared for _, _, shared in launches) <= limit
    assert {name for name, _, _ in launches if name.startswith("window_attention_backward")} == passes
    sizes = window**2, d, dtype.itemsize, limit
    assert cost_model.cuda_window_fits(*sizes)
    assert cost_model.cuda_one_pass_fits(*sizes) == (passes == {ONE_PASS})
    assert ONE_PASS in passes or cost_model.cuda_table_sums_fit(*sizes) == (TABLE not in passes)


def test_a_window_beyond_the_devices_shared_memory_is_refused(emulator):
    """And the cost model knows to the byte."""
    side, d = 36, 64
    qkv, out, lse = torch.zeros(1, side, side, 3 * d), torch.zeros(1, side, side, d), torch.zeros(1, 1, 1, side**2)
    options = ([side, side], [0, 0], 1, torch.zeros((2 * side - 1) ** 2, 1), None, None, 1.0, 0.0, None, "cuda")
    emulator.limit_shared(99 << 10)
    emulator.call("pyvit_emulation_forget_sites")
    try:
        with pytest.raises(RuntimeError, match=r"\(queries\): \d+ bytes of shared memory, and a block may have 101376"):
            emulator.op("window_attention_backward", out, out, lse, qkv, *options)
    finally:
        emulator.limit_shared()
    ((_, _, needed),) = emulator.launches()
    assert cost_model.cuda_window_fits(side**2, d, 4, needed)
    assert not cost_model.cuda_window_fits(side**2, d, 4, needed - 1)
