"""The package for Hugging Face's ``kernels`` (packaging/hub.py): loaded by ``kernels`` itself, without a network."""

import ast
import copy
import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from pyvit.triton_kernels import digests
from torch import nn

import pyvit
from pyvit.testing import check_op
from tests.integrations.checks import check_rule, results
from tests.integrations.transformers_models import MODELS
from tests.models.parity import relative_error
from tests.peers import peer

kernels = peer("kernels")

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("pyvit_hub", ROOT / "packaging/hub.py")
hub = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hub)


def test_imports_become_relative():
    source = '''"""from pyvit.ops import linear"""
from pyvit import library
from pyvit.ops import (
    linear,
)
def f():
    from pyvit.dispatch.select import Call  # of calls
'''
    expected = '''"""from pyvit.ops import linear"""
from .. import library
from ..ops import (
    linear,
)
def f():
    from ..dispatch.select import Call  # of calls
'''
    assert hub.relative(source, 1) == expected
    assert hub.relative("from pyvit.ops import linear\n", 0) == "from .ops import linear\n"
    with pytest.raises(ValueError, match="line 1: import"):
        hub.relative("import pyvit.ops\n", 0)


def test_operators_get_another_namespace():
    source = 'torch.ops.pyvit.f, torch.ops.pyvit_cuda.f, getattr(torch.ops.pyvit, n), f"pyvit::{n}", "pyvit"'
    expected = 'torch.ops._x.f, torch.ops._x_cuda.f, getattr(torch.ops._x, n), f"_x::{n}", "pyvit"'
    assert hub.renamed(source, "_x") == expected
    assert hub.renamed('Library("pyvit", "FRAGMENT")', "_x") == 'Library("_x", "FRAGMENT")'


def test_the_library_registers_in_one_namespace():
    """That which hub.write_library changes: two libraries that define one operator end the process."""
    for path in (ROOT / "csrc/torch").glob("*.cpp"):
        used = re.findall(r"^STABLE_TORCH_LIBRARY\w*\((\w+),", path.read_text(), re.M)
        assert {*used} <= {"PYVIT_NAMESPACE", "PYVIT_CUDA_NAMESPACE", "aten"}, path.name


@pytest.fixture(scope="session")
def noarch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    hub.write(folder, variants={name: backend for name, backend in hub.VARIANTS.items() if name != hub.COMPILED})
    return folder / "build"


def test_nothing_but_the_standard_library_torch_triton_and_itself_is_imported(noarch):
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for path in (noarch / "torch-cuda").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            assert {name.partition(".")[0] for name in names} <= allowed, f"{path}: {names}"


def run(code, **environment):
    """Run Python in a process in which pyvit cannot be imported."""
    code = "import sys; sys.modules['pyvit'] = None\n" + code
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_triton_kernels(noarch):
    """In Triton's interpreter; tuned tiles know the kernels by the same digests as pyvit's."""
    code = f"""
from pathlib import Path
import torch, kernels
kernel = kernels.get_local_kernel(Path({str(noarch / "torch-cuda")!r}))
tensors = [torch.randn(2, 2, n, 24, requires_grad=True) for n in (9, 13, 13)]
out, naive = (kernel.flash_attention(*tensors, backend=name) for name in ("triton", "reference"))
grads, naive_grads = (torch.autograd.grad(o.square().sum(), tensors) for o in (out, naive))
assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip((out, *grads), (naive, *naive_grads)))
try:
    kernel.flash_attention(*tensors, backend="cpu")
except kernel.BackendError as error:
    assert "the compiled library is missing" in str(error)
from importlib import import_module
digests = import_module(kernel.__name__ + ".triton_kernels.digests")
print(kernel.__name__, digests.kernel("forward_short"), digests.operator("window_attention"))
"""
    name, *found = run(code, TRITON_INTERPRET="1")
    assert name == f"_pyvit_cuda_{hub.unique_id()}"
    assert found == [digests.kernel("forward_short"), digests.operator("window_attention")]


@pytest.fixture(scope="session")
def package():
    """build/hub as "make hub" writes it; made once for all of xdist's workers."""
    folder = ROOT / "build/hub"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if not (folder / "build" / hub.COMPILED / f"_pyvit_cpu_{hub.unique_id()}.abi3.so").exists():
            hub.write(folder)
    return folder


@pytest.fixture(scope="session")
def kernel(package):
    return kernels.get_local_kernel(package)


@pytest.mark.slow
def test_alone_and_by_its_name_on_the_hub(package):
    code = """
import torch, kernels
kernel = kernels.get_kernel("someone/pyvit", version=1)
q = torch.randn(2, 3, 9, 16)
assert kernel.explain("flash_attention", q, q, q).chosen == "cpu"
kernel.flash_attention(q, q, q)
kernel.linear(q, torch.randn(8, 16))
assert not [n for n in sys.modules if n.startswith("pyvit.")]
assert not [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("pyvit")]
print(kernel.__name__, *kernel.__all__)
"""
    name, *names = run(code, LOCAL_KERNELS=f"someone/pyvit={package}")
    assert name == f"_pyvit_cpu_{hub.unique_id()}"
    assert {*pyvit.ops.__all__, "flash_attn_varlen_func", "layers", "BackendError"} <= {*names}


@pytest.mark.slow
def test_operators_beside_pyvit(kernel):
    """The copy computes with its own library, in its own namespace."""
    q, k, v = (torch.randn(2, 3, n, 16) for n in (9, 13, 13))
    check_op(kernel.flash_attention, {"q": q, "k": k, "v": v}, backend="cpu")
    windows = functools.partial(kernel.window_attention, window_size=(4, 4), shift_size=(2, 2), num_heads=2)
    check_op(windows, {"qkv": torch.randn(2, 9, 10, 96), "bias_table": torch.randn(49, 2)}, backend="cpu")
    check_op(kernel.patch_embed, {"images": torch.randn(2, 3, 8, 12), "weight": torch.randn(5, 3, 4, 4)}, backend="cpu")
    operators = getattr(torch.ops, kernel.__name__)
    assert operators.flash_attention.default is not torch.ops.pyvit.flash_attention.default
    assert torch.equal(kernel.flash_attention(q, k, v), pyvit.ops.flash_attention(q, k, v))
    assert kernel.BackendError is not pyvit.BackendError


LAYERS = {
    "ViT": {"vit": {"ViTAttention": "Attention", "ViTMLP": "MLP"}},
    "DINOv2": {"dinov2": {"Dinov2Attention": "Attention", "Dinov2MLP": "MLP"}},
    "CLIP": {"clip": {"CLIPAttention": "Attention", "CLIPMLP": "MLP"}},
    "SigLIP": {"siglip": {"SiglipAttention": "Attention", "SiglipMLP": "MLP"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_kernelized_models(name, package, monkeypatch):
    model, call = MODELS[name]()
    classes = [(nn.LayerNorm, "LayerNorm")]
    for stem, layers in LAYERS[name].items():
        module = importlib.import_module(f"transformers.models.{stem}.modeling_{stem}")
        classes += [(getattr(module, kind), layer) for kind, layer in layers.items()]
    mapping = {}
    for kind, layer in classes:
        for attribute in ("kernel_layer_name", "kernel_condition"):  # removed again after the test
            monkeypatch.setattr(kind, attribute, None, raising=False)
        kernels.replace_kernel_forward_from_hub(kind, kind.__name__)
        mapping[kind.__name__] = {"cpu": kernels.LocalLayerRepository(package, layer_name=layer)}
    exact, theirs = results(copy.deepcopy(model).double(), call), results(copy.deepcopy(model), call)
    mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        kernels.kernelize(model, mode=mode, device="cpu", use_fallback=False)
    for kind, layer in classes:
        forwards = {m.forward.__func__ for m in model.modules() if type(m) is kind}
        assert forwards == {getattr(kernels.get_local_kernel(package).layers, layer).forward}
    check_rule(name, results(model, call), theirs, exact)
    if name == "DINOv2":
        assert relative_error(call(torch.compile(model, fullgraph=True, backend="aot_eager")), theirs[0]) < 1e-4


@pytest.mark.slow
def test_layers_refuse_what_they_cannot_do(kernel):
    model, _ = MODELS["ViT"]()
    attention = next(m for m in model.modules() if type(m).__name__ == "ViTAttention")
    with pytest.raises(ValueError, match="does not support cu_seqlens"):
        kernel.layers.Attention.forward(attention, torch.randn(1, 9, 48), cu_seqlens=torch.tensor([0, 9]))
    attention.q_proj.register_forward_hook(lambda *_: torch.zeros(1, 9, 48))  # an adapter: it still runs
    out, _ = kernel.layers.Attention.forward(attention, torch.randn(1, 9, 48))
    assert torch.equal(out[:, 0], out[:, 8])
