"""Calls through torch.ops: invalid arguments raise errors that name them, and never end the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyvit
from pyvit import library

WORKER = Path(__file__).with_name("low_level.py")


def _calls(*names: str, **environment: str) -> list[str]:
    """The output of low_level.py, and the lines after ``wrong:``."""
    variables = os.environ | {"PYTHONPATH": str(WORKER.parents[2]), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(WORKER), *names], capture_output=True, text=True, env=variables
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"rc {done.returncode} at {lines[-1:]}: {done.stderr[-2000:]}"
    return lines


#: Operators whose calls share a process.
GROUPS = {
    "attention": [
        "flash_attention",
        "flash_attention-causal",
        "flash_attention~backward",
        "flash_attention_qkvpacked_backward",
        "flash_attention_varlen",
        "flash_attention_varlen~backward",
        "attention_map",
        "decomposed_attention",
        "decomposed_attention~backward",
        "rope_attention",
        "rope_attention-packed",
        "rope_attention~backward",
        "rope_attention-packed~backward",
        "window_attention",
        "window_attention-cosine",
        "window_attention~backward",
        "window_attention-cosine~backward",
    ],
    "layers": [
        "patch_embed",
        "patch_embed-bytes",
        "patch_embed~backward",
        "patch_embed-bytes~backward",
        "layer_norm",
        "layer_norm_backward",
        "rms_norm",
        "rms_norm_backward",
        "linear",
        "mlp",
        "gated_mlp",
    ],
    "losses": ["info_nce", "nt_xent", "sigmoid_contrastive", "distillation_cross_entropy", "nearest_neighbor"],
    "passes": [
        "activation",
        "activation_backward",
        "gate",
        "gate_backward",
        "_norm_out",
        "_norm_out-rms",
        "_norm_backward_out",
        "_norm_backward_out-rms",
        "product",
        "transposed",
        "log_sum_exp",
        "pair_softmax",
        "pair_softmax_backward",
        "pair_sigmoid",
        "pair_sigmoid_backward",
        "distillation_tile",
        "distillation_tile_backward",
        "prepack_weight",
        "prepack_header",
        "prepacked_mlp",
        "prepacked_gated_mlp",
        "prepacked_attention",
        "prepacked_window_attention",
        "int8_pack",
        "linear_int8",
        "mlp_int8",
        "attention_int8",
        "window_attention_int8",
    ],
}
GROUPS["losses"] += [f"{name}_backward" for name in GROUPS["losses"][:4]]
COMPILED = ("passes",)


@pytest.mark.skipif(library.problem() is not None, reason="needs the compiled library")
@pytest.mark.parametrize("group", GROUPS)
def test_changed_arguments(group: str) -> None:
    lines = _calls(*GROUPS[group])
    assert len(lines) > 25 * len(GROUPS[group])
    assert not [line for line in lines if line.startswith("wrong:")]


@pytest.mark.skipif(library.problem() is not None, reason="needs the compiled library")
@pytest.mark.parametrize("ends", [[0, 6, 4, 9], [1, 4, 9], [0, 4, 8], [0, 9, 9, 10], [-1, 9]], ids=str)
def test_cumulative_lengths_that_do_not_fit(ends: list[int]) -> None:
    """Straight to the library, past the checks in Python."""
    q, bad, good = torch.randn(9, 2, 8), torch.tensor(ends), torch.tensor([0, *[9] * (len(ends) - 1)])
    kernel = torch.ops.pyvit.flash_attention_varlen
    for cu_q, cu_k, name in ((bad, good, "cu_seqlens_q"), (good, bad, "cu_seqlens_k")):
        with pytest.raises(RuntimeError, match=f"{name} must ascend from 0 to 9"):
            kernel(q, q, q, cu_q, cu_k, 9, 9, None, False, 1.0, "cpu")


def test_changed_arguments_without_the_library() -> None:
    """The checks in Python, which also apply to Triton's kernels."""
    names = [
        name for group, names in GROUPS.items() if group not in COMPILED for name in names if "qkvpacked" not in name
    ]
    lines = _calls(*names, PYVIT_NO_LIBRARY="1")
    assert len(lines) > 25 * len(names)
    assert not [line for line in lines if line.startswith("wrong:")]


@pytest.mark.skipif(library.problem() is not None, reason="needs the compiled library")
def test_every_operator_is_called() -> None:
    """A new operator needs an entry in GROUPS."""
    called = {
        name.partition("-")[0].partition("~")[0] + ("_backward" if "~" in name else "")
        for names in GROUPS.values()
        for name in names
    }
    known = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("pyvit::")}
    about_the_library = {
        "cpu_isa",
        "cuda_archs",
        "cuda_digests",
        "fma_peak",
        "int8_isa",
        "is_prepacked",  # test_prepacked.py
        "override_sdpa",  # tests/integrations/test_sdpa_override.py
        "sdpa_calls",
    }
    assert known - about_the_library == called


@pytest.mark.parametrize("backend", ["cuda", "triton", "gpu"])
def test_a_backend_that_cannot_run_is_refused_by_name(backend: str) -> None:
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises((RuntimeError, ValueError), match=backend):
        torch.ops.pyvit.flash_attention(q, q, q, None, False, 1.0, 0.0, None, backend)
    with pytest.raises((pyvit.BackendError, ValueError), match=backend):
        torch.ops.pyvit.info_nce(q[0, 0], q[0, 0], torch.tensor(1.0), backend)
