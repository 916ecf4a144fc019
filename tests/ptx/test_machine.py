"""The PTX interpreter: known results of small programs, and every kind of fault that it must detect."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ptx import fragments, machine
from tests.ptx.memory import Fault
from tests.ptx.program import parse

_ENTRY = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry kernel(
	.param .u64 .ptr .global kernel_param_0,
	.param .u64 .ptr .global kernel_param_1
)
.reqntid {threads}
{{
	.reg .pred 	%p<9>;
	.reg .b32 	%r<99>;
	.reg .b64 	%rd<99>;
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b64 	%rd2, [kernel_param_1];
	mov.u32 	%r1, %tid.x;
	mov.u32 	%r2, %ctaid.x;
	mul.wide.u32 	%rd3, %r1, 4;
	add.s64 	%rd4, %rd1, %rd3;
	add.s64 	%rd5, %rd2, %rd3;
	shl.b32 	%r3, %r1, 2;
{body}
	ret;
}}
"""


def _run(body: str, source: Tensor, target: Tensor, threads: int = 64, shared: int = 4096, grid: int = 1) -> Tensor:
    """``target`` after ``body``, in which %r1 is the lane, %r2 the block, %r3 four times the lane, and %rd4 and %rd5
    the lane's elements of ``source`` and ``target``."""
    program = parse(_ENTRY.format(threads=threads, body=body))
    machine.run(program, [source, target], [source, target], shared, grid)
    return target


def _ints(n: int = 64) -> Tensor:
    return torch.randint(-(2**31), 2**31, (n,)).int()


@pytest.mark.parametrize(
    ("instruction", "wanted"),
    [
        ("add.s32 %r5, %r4, 7;", lambda a: a.astype(np.int64) + 7),
        ("mul.lo.s32 %r5, %r4, %r4;", lambda a: a.astype(np.int64) ** 2),
        ("mul.hi.u32 %r5, %r4, -858993459;", lambda a: (a.view(np.uint32).astype(np.uint64) * 3435973837) >> 32),
        ("div.s32 %r5, %r4, -7;", lambda a: np.trunc(a / -7)),
        ("rem.s32 %r5, %r4, 10;", lambda a: np.fmod(a.astype(np.int64), 10)),
        ("shr.s32 %r5, %r4, 40;", lambda a: np.where(a < 0, -1, 0)),
        ("shl.b32 %r5, %r4, 33;", lambda a: np.zeros_like(a)),
        ("bfe.s32 %r5, %r4, 3, 5;", lambda a: ((a >> 3 & 31) ^ 16) - 16),
        ("bfi.b32 %r5, %r4, 0, 8, 4;", lambda a: (a & 15) << 8),
        ("prmt.b32 %r5, %r4, 0, 0x0123U;", lambda a: np.frombuffer(a.tobytes(), ">u4").astype(np.int64)),
        ("not.b32 %r5, %r4;", lambda a: ~a),
        ("shfl.sync.bfly.b32 %r5, %r4, 3, 31, -1;", lambda a: a[np.arange(64) ^ 3]),
        ("shfl.sync.idx.b32 %r5, %r4, 0, 31, -1;", lambda a: a[np.arange(64) // 32 * 32]),
        ("setp.lt.s32 %p1, %r4, 0;\n\tselp.b32 %r5, 1, 2, %p1;", lambda a: np.where(a < 0, 1, 2)),
        ("max.s32 %r5, %r4, -5;", lambda a: np.maximum(a, -5)),
        ("min.u16x2 %r5, %r4, 65537;", lambda a: np.minimum(a.view(np.uint16), 1).view(np.int32)),
    ],
    ids=lambda v: v.split()[0] if isinstance(v, str) else "",
)
def test_integers(instruction: str, wanted) -> None:
    source = _ints()
    got = _run(
        f"ld.global.b32 {{ %r4 }}, [ %rd4 + 0 ];\n{instruction}\nst.global.b32 [ %rd5 + 0 ], {{ %r5 }};",
        source,
        torch.zeros(64).int(),
    )
    assert np.array_equal(got.numpy(), np.asarray(wanted(source.numpy())).astype(np.int64).astype(np.int32))


@pytest.mark.parametrize(
    ("instruction", "wanted"),
    [
        ("fma.rn.f32 %r5, %r4, %r4, 0f3F800000;", lambda a: a * a + 1),
        ("ex2.approx.ftz.f32 %r5, %r4;", torch.exp2),
        ("max.f32 %r5, %r4, 0f7FC00000;", lambda a: a),
        ("cvt.rn.bf16x2.f32 %r6, %r4, 0f00000000;\n\tand.b32 %r5, %r6, 0xffff0000;", lambda a: a.bfloat16().float()),
        ("cvt.rzi.s32.f32 %r6, %r4;\n\tcvt.rn.f32.s32 %r5, %r6;", torch.trunc),
        ("setp.num.f32 %p1, %r4, %r4;\n\tselp.f32 %r5, %r4, 0f00000000, %p1;", lambda a: a.nan_to_num(0.0)),
    ],
    ids=lambda v: v.split()[0] if isinstance(v, str) else "",
)
def test_floats(instruction: str, wanted) -> None:
    source = torch.randn(64) * 3
    if "num" in instruction:
        source[5] = float("nan")
    got = _run(
        f"ld.global.b32 {{ %r4 }}, [ %rd4 + 0 ];\n{instruction}\nst.global.b32 [ %rd5 + 0 ], {{ %r5 }};",
        source,
        torch.zeros(64),
    )
    assert torch.allclose(got, wanted(source), rtol=3e-7, atol=1e-9)


def test_divergent_lanes_reconverge() -> None:
    """Each lane counts to its own number, all wait at a barrier, then read their neighbours' counts."""
    body = """
	mov.b32 %r4, 0;
$L__loop:
	add.s32 %r4, %r4, 1;
	setp.lt.u32 %p1, %r4, %r1;
	@%p1 bra $L__loop;
	st.shared.b32 [%r3], %r4;
	bar.sync 0;
	xor.b32 %r5, %r3, 252;
	ld.shared.b32 %r6, [%r5];
	st.global.b32 [ %rd5 + 0 ], { %r6 };"""
    got = _run(body, _ints(), torch.zeros(64).int())
    assert got.tolist() == [max(63 - i, 1) for i in range(64)]


_WRITE_OTHERS = "xor.b32 %r5, %r3, 128;\n\tmov.b32 %r6, %r1;"  # %r5: the same lane of the other warp
_COPY = "cp.async.ca.shared.global [ %r3 + 0 ], [ %rd4 + 0 ], 0x4, 4;\n\tcp.async.commit_group;"

FAULTS = {
    "load past the end": ("ld.global.b32 { %r4 }, [ %rd4 + 4 ];", "load of 4 bytes outside"),
    "store past the end": ("st.global.b32 [ %rd5 + 4 ], { %r1 };", "store of 4 bytes outside"),
    "misaligned": ("ld.global.b64 { %rd9 }, [ %rd4 + 0 ];", "misaligned"),
    "a pointer cut to 32 bits": (
        "cvt.u32.u64 %r4, %rd4;\n\tcvt.u64.u32 %rd9, %r4;\n\tld.global.b32 { %r4 }, [ %rd9 + 0 ];",
        "outside",
    ),
    "shared past the end": ("st.shared.b32 [%r3+4096], %r1;", "of 4096"),
    "read before the barrier": (
        f"{_WRITE_OTHERS}\nst.shared.b32 [%r3], %r1;\nld.shared.b32 %r7, [%r5];",
        "another warp wrote",
    ),
    "write before the barrier": (
        f"{_WRITE_OTHERS}\nld.shared.b32 %r7, [%r3];\nst.shared.b32 [%r5], %r6;",
        "another warp read",
    ),
    "two warps, two values": (
        "and.b32 %r5, %r3, 124;\n\tst.shared.b32 [%r5], %r1;",
        "two warps write different values",
    ),
    "global memory before the barrier": (
        "xor.b32 %r5, %r3, 128;\n\tcvt.u64.u32 %rd8, %r5;\n\tadd.s64 %rd9, %rd2, %rd8;\n"
        "st.global.b32 [ %rd5 + 0 ], { %r1 };\nld.global.b32 { %r7 }, [ %rd9 + 0 ];",
        "another warp wrote since",
    ),
    "a copy not waited for": (f"{_COPY}\nld.shared.b32 %r7, [%r3];", "not brought yet"),
    "a copy of another warp": (
        f"{_WRITE_OTHERS}\n{_COPY}\ncp.async.wait_group 0;\nld.shared.b32 %r7, [%r5];",
        "another warp wrote",
    ),
    "a copy left under way": (_COPY, "under way"),
    "half a warp at a product": (
        "setp.lt.u32 %p1, %r1, 16;\n\t@%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r7}, [%r3];",
        "some of its lanes",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault: str) -> None:
    body, message = FAULTS[fault]
    with pytest.raises(Fault, match=message):
        _run(body, _ints(), torch.zeros(64).int())


def test_two_blocks_write_the_same() -> None:
    with pytest.raises(Fault, match=r"another block|two blocks"):
        _run("st.global.b32 [ %rd5 + 0 ], { %r1 };", _ints(), torch.zeros(64).int(), grid=2)


@pytest.mark.parametrize(
    "instruction",
    [
        "brev.b32 %r5, %r1;",
        "add.sat.f32 %r5, %r1, %r1;",
        "cvt.rz.f16.f32 %r5, %r1;",
        "bar.sync 1, 32;",
        "shfl.sync.up.b32 %r5, %r1, 1, 0, -1;",
    ],
    ids=lambda v: v.split()[0],
)
def test_what_the_machine_does_not_know_is_refused(instruction: str) -> None:
    with pytest.raises(NotImplementedError, match="PTX line"):
        _run(instruction, _ints(), torch.zeros(64).int())


# Matrices. The expected products come from plain indexing, written from the PTX manual's figures.


def test_mma_fragments() -> None:
    """16 x 16 by 16 x 8 in bfloat16: registers filled by the manual's formulas for rows and columns, the result read by
    them."""
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 8).bfloat16()
    lane = torch.arange(32)
    row, pair = lane // 4, lane % 4
    halves = []
    for i in range(4):
        halves.append(torch.stack([a[row + 8 * (i % 2), 2 * pair + 8 * (i // 2) + e] for e in range(2)], 1))
    for i in range(2):
        halves.append(torch.stack([b[2 * pair + 8 * i + e, row] for e in range(2)], 1))
    source = torch.stack(halves, 1).contiguous().view(torch.int32).reshape(32 * 6)  # six registers per lane
    loads = "\n".join(f"ld.global.b32 {{ %r{10 + i} }}, [ %rd8 + {4 * i} ];" for i in range(6))
    stores = "\n".join(f"st.global.b32 [ %rd9 + {4 * i} ], {{ %r{20 + i} }};" for i in range(4))
    body = f"""
	mul.wide.u32 %rd7, %r1, 24;
	add.s64 %rd8, %rd1, %rd7;
	mul.wide.u32 %rd7, %r1, 16;
	add.s64 %rd9, %rd2, %rd7;
	{loads}
	mov.b32 %r20, 0f3F800000;
	mov.b32 %r21, 0f3F800000;
	mov.b32 %r22, 0f3F800000;
	mov.b32 %r23, 0f3F800000;
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{ %r20, %r21, %r22, %r23 }}, {{ %r10, %r11, %r12, %r13 }}, {{ %r14, %r15 }}, {{ %r20, %r21, %r22, %r23 }};
	{stores}"""  # noqa: E501
    got = _run(body, source, torch.zeros(128), threads=32).view(32, 4)
    wanted = a.float() @ b.float() + 1
    for i in range(4):
        assert torch.allclose(got[:, i], wanted[row + 8 * (i // 2), 2 * pair + i % 2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("turned", [False, True])
def test_ldmatrix(turned: bool) -> None:
    """One 8 x 8 matrix of 16-bit numbers, a row of 16 bytes at each of the first eight lanes' addresses."""
    tile = torch.arange(64, dtype=torch.int16).view(8, 8)
    body = f"""
	ld.global.b32 {{ %r4 }}, [ %rd4 + 0 ];
	st.shared.b32 [%r3], %r4;
	shl.b32 %r5, %r1, 4;
	and.b32 %r5, %r5, 112;
	ldmatrix.sync.aligned.m8n8.x1{".trans" if turned else ""}.shared.b16 {{%r6}}, [%r5];
	st.global.b32 [ %rd5 + 0 ], {{ %r6 }};"""
    got = _run(body, tile.view(torch.int32).flatten(), torch.zeros(32).int(), threads=32).view(torch.int16).view(8, 8)
    assert torch.equal(got, tile.t() if turned else tile)


@pytest.mark.parametrize(("mode", "width"), [(1, 128), (2, 64), (3, 32)])
def test_swizzled_descriptors_name_every_byte_once(mode: int, width: int) -> None:
    """A tile of 8 rows of the pattern's width, read K by K: no two elements lie at one place, and all lie within the
    tile."""
    found = []
    for k in range(width // 32):
        descriptor = (32 * k) >> 4 | (8 * width >> 4) << 32 | mode << 62
        found.append(fragments.descriptor_places(descriptor, 8, 16, 2, across=False))
    places = np.concatenate([f.ravel() for f in found])
    assert sorted(places) == list(range(0, 8 * width, 2))


_WGMMA = """
	mov.b64 %rd10, 4611686293305294848;
	add.f32 %r10, 0f00000000, 0f00000000;
	add.f32 %r11, 0f00000000, 0f00000000;
	add.f32 %r12, 0f00000000, 0f00000000;
	add.f32 %r13, 0f00000000, 0f00000000;
	{zeros}
	{fence}
	{barrier}
	wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%r10,%r11,%r12,%r13}}, %rd10, %rd10, 1, 1, 1, 0, 0;
	wgmma.commit_group.sync.aligned;
	{early}
	wgmma.wait_group.sync.aligned 0;
	st.global.b32 [ %rd5 + 0 ], {{ %r10 }};"""
_RIGHT = {
    "zeros": "\n".join(f"st.shared.b32 [%r3+{512 * i}], 0;" for i in range(16)),
    "fence": "fence.proxy.async.shared::cta;",
    "barrier": "bar.sync 0;",
    "early": "",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, ""),
        ({"fence": ""}, "without fence.proxy.async"),
        ({"barrier": ""}, "since the last barrier"),
        ({"early": "add.f32 %r14, %r10, %r11;"}, "is read while a wgmma"),
        ({"early": "mov.b32 %r14, %r10;\n\tadd.f32 %r15, %r14, %r14;"}, "%r14 is read while a wgmma"),
        ({"early": "mov.b32 %r10, 0;"}, "is written while a wgmma"),
        ({"early": "st.shared.b32 [%r3], 0;"}, "that a wgmma under way reads"),
    ],
    ids=lambda v: next(iter(v), "as it should be") if isinstance(v, dict) else "",
)
def test_wgmma_order(change: dict[str, str], message: str) -> None:
    body = _WGMMA.format(**(_RIGHT | change))
    if not message:
        assert not _run(body, _ints(128), torch.ones(128), threads=128, shared=16384).any()
        return
    with pytest.raises(Fault, match=message):
        _run(body, _ints(128), torch.ones(128), threads=128, shared=16384)
