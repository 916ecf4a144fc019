"""The emulation itself: instruction layouts by the PTX manual's formulas, rounding, and the faults that it must
detect."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

TYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


def _words(halves: Tensor) -> Tensor:
    return halves.contiguous().view(torch.int16).view(torch.int32)


def _scattered(c: Tensor) -> Tensor:
    """Accumulators (32, 4) of a 16 x 8 matrix: lane 4 g + t holds (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t +
    1)."""
    lanes = torch.arange(32)
    g, t = lanes // 4, lanes % 4 * 2
    return torch.stack([c[g, t], c[g, t + 1], c[g + 8, t], c[g + 8, t + 1]], 1)


@pytest.mark.parametrize("name", TYPES)
def test_mma_16bit_layout(emulator, name):
    a, b, c = torch.randn(16, 16).to(TYPES[name]), torch.randn(16, 8).to(TYPES[name]), torch.randn(16, 8)
    lanes = torch.arange(32)
    g, t = lanes // 4, lanes % 4 * 2
    # Eight elements of A per lane, i = 0..7: row g + 8 for i in {2, 3, 6, 7}; column 2t + (i & 1), plus 8 from i = 4
    # on.
    rows = [g + (8 if i in (2, 3, 6, 7) else 0) for i in range(8)]
    columns = [t + i % 2 + (8 if i >= 4 else 0) for i in range(8)]
    registers_a = _words(torch.stack([a[r, k] for r, k in zip(rows, columns, strict=True)], 1))
    registers_b = _words(torch.stack([b[t + i % 2 + 8 * (i // 2), g] for i in range(4)], 1))
    text, (_, _, got) = emulator.call("probe_mma", list(TYPES).index(name), registers_a, registers_b, _scattered(c))
    assert text is None
    torch.testing.assert_close(got, _scattered(a.float() @ b.float() + c), rtol=1e-5, atol=1e-5)


def test_mma_tf32_layout_and_truncation(emulator):
    a, b, c = torch.randn(16, 8), torch.randn(8, 8), torch.randn(16, 8)
    lanes = torch.arange(32)
    g, t = lanes // 4, lanes % 4
    registers_a = torch.stack([a[g, t], a[g + 8, t], a[g, t + 4], a[g + 8, t + 4]], 1)
    registers_b = torch.stack([b[t, g], b[t + 4, g]], 1)
    _, (_, _, got) = emulator.call("probe_mma", 2, registers_a, registers_b, _scattered(c))
    cut = [(x.view(torch.int32) & -8192).view(torch.float32) for x in (a, b)]
    torch.testing.assert_close(got, _scattered(cut[0] @ cut[1] + c), rtol=1e-6, atol=1e-6)
    assert (got - _scattered(a @ b + c)).abs().max() > 1e-5  # the instruction truncates full float32 inputs


@pytest.mark.parametrize("transposed", [0, 1])
def test_ldmatrix_layout(emulator, transposed):
    matrices = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
    _, (_, got) = emulator.call("probe_ldmatrix", transposed, matrices, torch.zeros(32, 4, dtype=torch.int32))
    for lane in range(32):
        for i, matrix in enumerate(matrices.mT if transposed else matrices):
            low, high = matrix[lane // 4, lane % 4 * 2], matrix[lane // 4, lane % 4 * 2 + 1]
            assert got[lane, i] == int(low) | int(high) << 16


@pytest.mark.parametrize("a_by_k", [0, 1])
@pytest.mark.parametrize("b_by_k", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fragments_multiply(emulator, dtype, a_by_k, b_by_k):
    a, b = torch.randn(16, 32).to(dtype), torch.randn(16, 32).to(dtype)
    name = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}[dtype]
    given = (a.mT.contiguous() if a_by_k else a, b.mT.contiguous() if b_by_k else b)
    _, (_, _, got) = emulator.call(f"probe_product_{name}", *given, torch.full((16, 16), torch.nan), a_by_k, b_by_k)
    # Three TF32 products have float32's accuracy; a single one has an error of 1e-3.
    torch.testing.assert_close(got.double(), a.double() @ b.double().mT, rtol=1e-6, atol=1e-5)


def test_roundings(emulator):
    x = torch.cat(
        [
            torch.randn(500),
            torch.randn(200) * 1e-6,
            torch.randn(100) * 1e5,
            torch.tensor([0.0, -0.0, 65519.0, 65520.0, 2.0**-25]),
        ]
    )
    for i, dtype in enumerate((torch.bfloat16, torch.float16)):
        _, (_, got) = emulator.call("probe_round", i, x, torch.empty_like(x), len(x))
        assert torch.equal(got, x.to(dtype).float())
    _, (_, got) = emulator.call("probe_round", 2, x, torch.empty_like(x), len(x))
    assert ((got - x).abs() <= x.abs() * 2.0**-11).all()
    assert torch.equal(got.view(torch.int32) & 8191, torch.zeros(len(x), dtype=torch.int32))


def _fault(emulator, which, shared=256):
    return emulator.call("probe_fault", which, torch.arange(64.0), torch.full((64,), -1.0), shared)


def test_barrier_orders_an_exchange(emulator):
    for _ in range(5):
        text, (_, out) = _fault(emulator, 0)
        assert text is None
        assert torch.equal(out, (torch.arange(64.0) + 33) % 64)


def test_a_missing_barrier_shows(emulator):
    _, (_, out) = _fault(emulator, 1)
    assert out.isnan().any()


def test_unwritten_shared_memory_is_nan(emulator):
    assert _fault(emulator, 9)[1][1].isnan().all()


@pytest.mark.parametrize(
    ("which", "shared", "message"),
    [
        (2, 256, "not all threads reach the same point: 24 threads ended, 40 at the barrier probe.cu"),
        (4, 256, "cp.async copies that it never waited for"),
        (5, 256, "not all threads reach the same point"),
        (0, 200 << 10, "a block may have 166912"),
        (10, 256, "ldmatrix on a misaligned row"),
        (11, 256, "ldmatrix reads outside shared memory"),
    ],
)
def test_faults_are_reported(emulator, which, shared, message):
    assert message in _fault(emulator, which, shared)[0]


def test_async_copies_land_at_the_wait(emulator):
    text, (_, out) = _fault(emulator, 3)
    assert text is None
    assert out[:16].isnan().all()


@pytest.mark.parametrize(
    ("which", "message"), [(6, "AddressSanitizer"), (7, "heap-buffer-overflow"), (8, "misaligned address")]
)
def test_sanitizers_see_into_fibers(emulator, which, message):
    with pytest.raises(RuntimeError, match=message):
        _fault(emulator, which)
