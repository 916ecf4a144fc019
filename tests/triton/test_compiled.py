"""A part of the compile report: kernels compiled ahead of time and inspected, without a GPU.

The whole report: ``python -m pyvit.triton_kernels.tools.compile_report``.
"""

from __future__ import annotations

import re

import pytest
import torch

from pyvit.dispatch import devices

matrix = pytest.importorskip("pyvit.triton_kernels.tools.compile_report")
common = pytest.importorskip("pyvit.triton_kernels.common")
compiled = pytest.importorskip("pyvit.triton_kernels.tools.compile")
tiles = pytest.importorskip("pyvit.triton_kernels.tiles")
workloads = pytest.importorskip("pyvit.triton_kernels.tools.workloads")

SUBSET = [
    ("attention N=197 d=64", "bf16", "sm_80"),
    ("attention N=197 d=64", "bf16", "sm_90"),
    ("attention N=197 d=64", "bf16", "sm_100"),
    ("attention N=197 d=64", "bf16", "gfx942"),
    ("attention N=577 d=64", "fp32", "sm_90"),
    ("attention N=257 d=80", "fp16", "sm_90"),
    ("patches 16", "bf16", "sm_90"),
    ("attention map N=197 d=64", "bf16", "sm_90"),
    ("attention N=257 d=88", "fp32", "sm_90"),
    ("window 7 padded", "fp32", "sm_90"),
    ("info_nce 4096 d=512", "bf16", "sm_90"),
    ("info_nce 4096 d=512", "bf16", "sm_100"),
    ("nt_xent 2048 d=128", "fp32", "sm_90"),
    ("sigmoid_contrastive 4096 d=768", "fp16", "sm_80"),
]


@pytest.mark.parametrize(("case", "dtype", "arch"), SUBSET, ids=[f"{a} {d} {c}" for c, d, a in SUBSET])
def test_compiles_within_the_rules(case: str, dtype: str, arch: str) -> None:
    found = list(matrix.reports(case, dtype, arch))
    assert found
    for launch, report in found:
        assert not matrix.faults(report, dtype), (report, launch.options)


#: Cases that launch every kernel.
KERNELS = {
    "attention N=50 d=64": {"forward_short", "backward_short"},
    "attention N=577 d=64": {"forward_long", "backward_dq", "backward_dkdv"},
    "attention N=197 d=64 bias": {"bias_gradient"},
    "attention map N=197 d=64": {"map_rows"},
    "window 7": {"window_forward", "window_backward", "table_gradient"},
    "window 12": {"window_forward", "window_backward_keys", "window_backward_queries"},
    "window 16 cosine": {
        "window_forward_long",
        "window_backward_keys",
        "window_backward_queries",
        "window_backward_bias",
    },
    "patches 16 keep 49": {"patch_forward", "patch_image_gradient", "patch_weight_gradient", "spread_tokens"},
    "info_nce 4096 d=512": {"pair_sums", "pair_gradient"},
}


def test_the_cases_launch_every_kernel() -> None:
    launched = {case: {launch.name for launch in matrix.launches(case, "bf16", "sm_80")} for case in KERNELS}
    assert all(kernels <= launched[case] for case, kernels in KERNELS.items()), launched
    every = {launch.name for case in matrix.CASES for launch in matrix.launches(case, "bf16", "sm_80")}
    assert every == set().union(*KERNELS.values())


#: Architectures with the same tiles, shared memory and instructions: a kernel is compiled for one of them, in turn.
TWINS = (("sm_86", "sm_89"), ("sm_100", "sm_103"))


def _architectures(number: int) -> list[str]:
    """Those that case ``number`` of KERNELS is compiled for."""
    return [arch for arch in compiled.PARTS if arch not in {twins[number % 2] for twins in TWINS}]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "arch"), [(case, arch) for i, case in enumerate(KERNELS) for arch in _architectures(i)]
)
def test_every_kernel_on_every_part(case: str, arch: str) -> None:
    """Compiled for every GPU, or for its twin: within its shared memory, on its tensor cores, without atomics and many
    spills."""
    for launch in matrix.launches(case, "bf16", arch):
        if launch.name in KERNELS[case]:
            report = compiled.inspect(launch, arch)
            assert not matrix.faults(report, "bf16"), (report, launch.options)


def test_refused_parts_have_no_tensor_core_products() -> None:
    (launch,) = matrix.launches("attention map N=197 d=64", "fp16", "sm_75")
    assert devices.refusal("triton", devices.PARTS["sm_75"], torch.float16) is not None
    assert matrix.faults(compiled.inspect(launch, "sm_75"), "fp16") == ["no tensor-core instruction"]


def test_hopper_uses_warpgroup_products() -> None:
    for _, report in matrix.reports("attention N=577 d=64", "bf16", "sm_90"):
        assert report.warpgroup > 0, report


def _loads(d: int) -> list[list[str]]:
    """The loads and asynchronous copies, with their widths, of attention's kernels for heads of ``d`` channels."""
    with common.recording("sm_90") as found:
        workloads.attention(workloads._Maker(torch.bfloat16, "meta", 8), 257, d)()
    texts = [compiled.build(launch, "sm_90").asm["ptx"] for launch in found]
    return [re.findall(r"ld\.global[.\w]*|cp\.async\.c[ag]|0x(?:4|8|10)(?=, )", text) for text in texts]


@pytest.mark.parametrize(("d", "multiple_of_16"), [(72, 80), (88, 96)])
def test_rows_that_divide_by_8_are_read_as_those_that_divide_by_16(d: int, multiple_of_16: int) -> None:
    """16 bytes at a time and asynchronously. Triton itself only knows of a stride whether it divides by 16."""
    assert _loads(d) == _loads(multiple_of_16)


@pytest.mark.parametrize(
    ("arch", "n", "d", "bias"),
    [
        ("sm_80", 197, 64, False),
        ("sm_80", 128, 64, True),
        ("sm_90", 197, 64, True),
        ("sm_90", 257, 64, False),
        ("sm_90", 197, 48, False),
        ("sm_100", 257, 64, False),
        ("gfx942", 50, 64, False),
    ],
)
def test_shared_memory_is_within_the_bound_that_chose_the_kernel(arch: str, n: int, d: int, bias: bool) -> None:
    with common.recording(arch) as found:
        workloads.attention(workloads._Maker(torch.bfloat16, "meta", 8), n, d, bias)()
    shape = (arch, 2, (d, d), n, bias)
    bounds = {
        "forward_short": tiles.forward_short_shared(*shape),
        "backward_short": tiles.backward_short_shared(*shape),
    }
    checked = [launch for launch in found if launch.name in bounds]
    assert "backward_short" in {launch.name for launch in checked}
    for launch in checked:
        report = compiled.inspect(launch, arch)
        assert report.shared <= bounds[launch.name] <= tiles.SHARED_LIMIT[arch], launch.name


def test_a_part_with_little_shared_memory_gets_kernels_that_fit() -> None:
    """On 99 KB, 197 queries and their gradients do not fit: two passes."""
    for n, bias, names in (
        (197, False, {"forward_short", "backward_dq", "backward_dkdv"}),
        (197, True, {"forward_long", "backward_dq", "backward_dkdv", "bias_gradient"}),
        (64, False, {"forward_short", "backward_short"}),
    ):
        with common.recording("sm_89") as found:
            workloads.attention(workloads._Maker(torch.bfloat16, "meta", 8), n, 64, bias)()
        assert {launch.name for launch in found} == names


def test_compiled_products_use_bfloat16() -> None:
    """bfloat16 operands are converted to float32 only in the interpreter; compiled products use bfloat16."""
    (launch,) = matrix.launches("attention map N=197 d=64", "bf16", "sm_90")
    text = compiled.build(launch, "sm_90").asm["ttir"]
    dots = re.findall(r"tt\.dot [^\n]*", text)
    assert dots
    assert all("xbf16>" in dot for dot in dots)


def test_float32_is_never_plain_tf32() -> None:
    for arch, wanted in (("sm_80", "tf32x3"), ("sm_90", "tf32x3"), ("gfx942", None)):
        (launch,) = matrix.launches("attention map N=197 d=64", "fp32", arch)
        precisions = set(re.findall(r"inputPrecision = (\w+)", compiled.build(launch, arch).asm["ttir"]))
        assert precisions == ({wanted} if wanted else set()), arch


def test_rules_catch_what_they_are_for() -> None:
    bad = compiled.Report("k", "sm_100", 255, 4096, 1 << 20, 576, 0, 0, 0, 1, frozenset({"f32"}))
    assert len(matrix.faults(bad, "bf16")) == 7


def test_a_kernel_without_enough_tensor_memory_is_reported() -> None:
    """Four accumulators of 128 columns fill the 512 columns of a Blackwell processor's tensor memory, without room for
    a tile of scores."""
    tiles.force("pair_gradient", tiles.Config(block_m=64, block_n=64, edge_n=64, group=4, warps=8))
    try:
        launch = matrix.launches("info_nce 4096 d=512", "bf16", "sm_100")[-1]
    finally:
        tiles.force("pair_gradient", None)
    report = compiled.inspect(launch, "sm_100")
    assert report.kernel == "pair_gradient"
    assert report.stores == 0
    assert report.tensor_memory > 512
    assert {fault.split(":")[0] for fault in matrix.faults(report, "bf16")} >= {
        "no store to memory",
        f"{report.tensor_memory} columns of tensor memory, limit 512",
    }


@pytest.mark.parametrize("case", matrix.CASES)
def test_no_allocation_exceeds_the_inputs(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A score matrix would: N is larger than the head dimension in these cases."""
    sizes: list[int] = []
    run = workloads.prepare(case, torch.bfloat16, "meta")

    def counted(allocate):
        def allocating(*size: object, **kwargs: object) -> torch.Tensor:
            out = allocate(*size, **kwargs)
            sizes.append(out.numel())
            return out

        return allocating

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "new_empty", counted(torch.Tensor.new_empty))
        patched.setattr(torch, "empty", counted(torch.empty))
        with common.recording("sm_90") as found:
            run()
    inputs = max(
        t.numel()
        for launch in found
        for name, t in launch.args.items()
        if name in ("q", "k", "qkv", "images", "weight", "out")
    )
    assert sizes
    assert max(sizes) <= inputs


def _meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def test_arguments_equal_to_one() -> None:
    """Triton turns integers equal to 1 into constants: the kernels compile if every size is 1."""
    from pyvit.triton_kernels import attention_map, flash_attention, patch_embed, window_attention

    with common.recording("sm_90") as found:
        q = _meta(1, 1, 1, 16)
        bias = _meta(1, 1, 1, 1)
        out, lse = flash_attention.flash_attention(q, q, q, bias, True, 1.0, 0.0, None)
        flash_attention.flash_attention_backward(out, lse, out, lse, True, q, q, q, bias, True, 1.0, 0.0, None)
        packed, cu = _meta(1, 1, 16), torch.empty(2, dtype=torch.int32, device="meta")
        long = (cu, cu, 1, 1000, None, False, 1.0)
        out, lse = flash_attention.flash_attention_varlen(packed, packed, packed, *long)
        flash_attention.flash_attention_varlen_backward(out, None, out, lse, False, packed, packed, packed, *long)
        attention_map.attention_map(q, q, torch.empty(1, 1, dtype=torch.int64, device="meta"), None, 1.0)
        rest = ((1, 1), (0, 0), 1, _meta(1, 1), None, None, 1.0, 0.0, None)
        out, lse = window_attention.window_attention(_meta(1, 1, 1, 48), *rest)
        window_attention.window_attention_backward(out, out, lse, _meta(1, 1, 1, 48), *rest)
        keep = torch.empty(1, 1, dtype=torch.int64, device="meta")
        rest = (_meta(1, 1, 1, 1), None, (1, 1), _meta(1, 1), _meta(1, 1), keep, None, None)
        patch_embed.patch_embed_backward(
            patch_embed.patch_embed(_meta(1, 1, 1, 1), *rest), True, True, _meta(1, 1, 1, 1), *rest
        )
    assert len({launch.kernel.__name__ for launch in found}) >= 10
    for launch in found:
        compiled.build(launch, "sm_90")
