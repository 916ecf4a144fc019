"""Microbenchmarks of a GPU's pipes: PTX whose rate one instruction limits.

The floors of attention come from these rates: exponentials (ex2), comparisons (max), multiply-adds, and the tensor
cores by the number of columns of a product, of which powers of two are not the only choice.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Columns of a product of a warp group (wgmma).
COLUMNS = (64, 128, 192, 200, 208, 256)
_UNROLLED = 64


@dataclass(frozen=True)
class Kernel:
    """``text``: PTX of the entry ``name``, whose arguments are a float32 tensor of at least ``grid * threads`` elements
    and the number of loop steps. ``work``: results (or flops) of a block in a step; ``capability``: the only major
    compute capability that has the instruction, or None."""

    name: str
    text: str
    threads: int
    shared: int
    work: float
    unit: str
    blocks: int
    capability: int | None = None


def _entry(name: str, target: str, threads: int, registers: str, body: str, shared: bool = False) -> str:
    memory = ".extern .shared .align 1024 .b8 global_smem[];\n" if shared else ""
    return f""".version 8.0
.target {target}
.address_size 64
{memory}.visible .entry {name}(
	.param .u64 {name}_param_0,
	.param .u32 {name}_param_1
)
.reqntid {threads}
{{
	.reg .pred %p<8>;
	.reg .b32 %r<64>;
	.reg .b64 %rd<16>;
{registers}	ld.param.b64 %rd1, [{name}_param_0];
	ld.param.b32 %r1, [{name}_param_1];
	mov.u32 %r2, %tid.x;
	mov.u32 %r3, %ctaid.x;
	mad.lo.s32 %r4, %r3, {threads}, %r2;
	mul.wide.s32 %rd2, %r4, 4;
	add.s64 %rd3, %rd1, %rd2;
	cvt.rn.f32.s32 %f0, %r2;
{body}	st.global.b32 [%rd3], %f1;
	ret;
}}
"""


def _loop(step: str) -> str:
    return f"""$L__loop:
{step}	add.s32 %r1, %r1, -1;
	setp.ne.s32 %p1, %r1, 0;
	@%p1 bra $L__loop;
"""


def _elementwise(name: str, instruction: str, operands: int, flops: int = 1) -> Kernel:
    """Eight independent chains of ``instruction`` in each thread."""
    chains, threads = 8, 256
    body = "".join(f"\tadd.f32 %f{i}, %f0, 0f3F80{i:04X};\n" for i in range(1, chains + 4))
    step = ""
    for i in range(_UNROLLED):
        own = 1 + i % chains
        others = [f"%f{1 + (i + 1) % chains}", f"%f{chains + 2}"][: operands - 1]
        step += f"\t{instruction} %f{own}, {', '.join([f'%f{own}', *others])};\n"
    body += _loop(step) + "".join(f"\tadd.f32 %f1, %f1, %f{i};\n" for i in range(2, chains + 1))
    text = _entry(name, "sm_80", threads, "\t.reg .f32 %f<16>;\n", body)
    return Kernel(name, text, threads, 0, threads * _UNROLLED * flops, "results", 8)


def _mma() -> Kernel:
    """``mma.sync`` m16n8k16 of bfloat16, four independent accumulators in each of eight warps."""
    name, threads, products = "mma_m16n8k16", 256, 16
    body = "".join(f"\tadd.f32 %f{i}, %f0, 0f3F80{i:04X};\n" for i in range(1, 18))
    body += "".join(f"\tmad.lo.s32 %r{10 + i}, %r2, {7919 * (i + 1)}, {i};\n" for i in range(6))
    body += "".join(
        f"\tand.b32 %r{10 + i}, %r{10 + i}, 8323199;\n\tor.b32 %r{10 + i}, %r{10 + i}, 1056980736;\n" for i in range(6)
    )
    step = ""
    for i in range(products):
        acc = ", ".join(f"%f{1 + 4 * (i % 4) + j}" for j in range(4))
        step += (
            f"\tmma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{{acc}}}, {{%r10, %r11, %r12, %r13}}, "
            f"{{%r14, %r15}}, {{{acc}}};\n"
        )
    body += _loop(step) + "".join(f"\tadd.f32 %f1, %f1, %f{i};\n" for i in range(2, 17))
    text = _entry(name, "sm_80", threads, "\t.reg .f32 %f<24>;\n", body)
    return Kernel(name, text, threads, 0, threads / 32 * products * 2 * 16 * 8 * 16, "flop", 2)


def _wgmma(columns: int, from_registers: bool = False) -> Kernel:
    """``wgmma`` m64nNk16 of bfloat16; the operands are 64 channels of K and, unless in registers, A in shared
    memory."""
    name = f"wgmma_n{columns}" + ("_registers" if from_registers else "")
    threads, steps, accumulators = 128, 16, columns // 2
    shared = 8192 + 128 * columns
    body = "\tmov.b32 %r5, global_smem;\n\tshl.b32 %r6, %r2, 2;\n\tadd.s32 %r6, %r5, %r6;\n"
    body += "\tmad.lo.s32 %r7, %r2, 7919, 40503;\n"
    for at in range(0, shared, 4 * threads):  # numbers from 0.5 to 1: zeros would draw less power
        body += f"\tmad.lo.s32 %r7, %r7, 1664525, {1013904223 + at};\n\tand.b32 %r8, %r7, 8323199;\n"
        body += f"\tor.b32 %r8, %r8, 1056980736;\n\tst.shared.b32 [%r6+{at}], %r8;\n"
    body += "\tfence.proxy.async.shared::cta;\n\tbar.sync 0;\n"
    # A descriptor: address, 1024 bytes between groups of eight rows, a swizzle of 128 bytes.
    body += "\tshr.u32 %r9, %r5, 4;\n\tand.b32 %r9, %r9, 16383;\n\tcvt.u64.u32 %rd4, %r9;\n"
    body += f"\tor.b64 %rd4, %rd4, {1 << 62 | 64 << 32 | 1 << 16};\n"
    body += "".join(f"\tadd.s64 %rd{5 + k}, %rd4, {2 * k};\n" for k in range(4))
    body += "".join(f"\tadd.s64 %rd{9 + k}, %rd4, {512 + 2 * k};\n" for k in range(4))
    body += "".join(f"\tmov.b32 %f{1 + i}, 0f00000000;\n" for i in range(accumulators))
    body += "".join(f"\tmov.b32 %r{20 + i}, %r8;\n" for i in range(4))
    acc = ", ".join(f"%f{1 + i}" for i in range(accumulators))
    step = "\twgmma.fence.sync.aligned;\n"
    for i in range(steps):
        a = "{%r20, %r21, %r22, %r23}" if from_registers else f"%rd{5 + i % 4}"
        transposed = "0" if from_registers else "0, 0"
        step += (
            f"\twgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 {{{acc}}}, {a}, %rd{9 + i % 4}, 1, 1, 1, "
            f"{transposed};\n"
        )
    step += "\twgmma.commit_group.sync.aligned;\n\twgmma.wait_group.sync.aligned 0;\n"
    body += _loop(step) + "".join(f"\tadd.f32 %f1, %f1, %f{i};\n" for i in range(2, accumulators + 1))
    text = _entry(name, "sm_90a", threads, f"\t.reg .f32 %f<{accumulators + 2}>;\n", body, shared=True)
    return Kernel(name, text, threads, shared, steps * 2 * 64 * columns * 16, "flop", 2, 9)


def kernels() -> list[Kernel]:
    return [
        _elementwise("ex2", "ex2.approx.ftz.f32", 1),
        _elementwise("max", "max.f32", 2),
        _elementwise("fma", "fma.rn.f32", 3),
        _mma(),
        *(_wgmma(n) for n in COLUMNS),
        *(_wgmma(n, from_registers=True) for n in (64, 128, 200)),
    ]
