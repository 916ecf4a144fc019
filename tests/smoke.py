"""Whether an installed pyvit works: ``python tests/smoke.py``, from any directory, with nothing installed but pyvit and
torch. ``packaging/wheel_test.py`` runs it in fresh environments. Exits with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import platform
import sys
import traceback
from collections.abc import Callable

import torch
import torch.nn.functional as F

import pyvit
from pyvit import library, ops
from pyvit.testing import check_op


def raised(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def compiled() -> str:
    assert library.problem() is None, library.problem()
    return f"{library.PATH.name}, {torch.ops.pyvit.cpu_isa()}, CUDA for {library.cuda_archs() or 'nothing'}"


def extension_module() -> str:
    module = importlib.import_module("pyvit._C")
    assert module.fma_peak("float32", 1, 0.01) > 0
    message = raised(lambda: module.fma_peak("float64"))
    assert message == "ValueError: dtype must be float32, bfloat16 or int8, got float64", message
    return f"built by {module.compiler}"


def attention(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 3, 197, 64).to(dtype) for _ in range(3))
    bias = torch.randn(1, 3, 197, 197).to(dtype)
    check_op(ops.flash_attention, {"q": q, "k": k, "v": v}, backend="cpu")
    check_op(ops.flash_attention, {"q": q, "k": k, "v": v, "bias": bias}, backend="cpu", is_causal=True)


def windows(dtype: torch.dtype) -> None:
    tensors = {"qkv": torch.randn(2, 15, 14, 288).to(dtype), "bias_table": torch.randn(169, 3)}
    check_op(ops.window_attention, tensors, backend="cpu", dtype=dtype, window_size=7, shift_size=3, num_heads=3)


def patches(dtype: torch.dtype) -> None:
    tensors = {"images": (2, 3, 64, 48), "weight": (40, 3, 16, 16), "bias": (40,), "pos_embed": (12, 40)}
    check_op(ops.patch_embed, {name: torch.randn(shape).to(dtype) for name, shape in tensors.items()}, backend="cpu")


def loss(dtype: torch.dtype) -> None:
    a, b = (torch.nn.functional.normalize(torch.randn(70, 48), dim=1).to(dtype) for _ in range(2))
    check_op(ops.info_nce, {"a": a, "b": b}, backend="cpu", scale=10.0)


def model() -> None:
    """A forward pass and a training step agree with those of PyTorch's operators."""
    found = {}
    for backend in (None, "reference"):
        torch.manual_seed(0)
        with pyvit.use_backend(backend):
            for name in ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"):
                net = pyvit.create_model(name, num_classes=5, img_size=224).eval()
                out = net(torch.randn(1, 3, 224, 224))
                out.square().sum().backward()
                found[backend, name] = out, next(net.parameters()).grad
    for (_, name), ours in found.items():
        for got, want in zip(ours, found["reference", name], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def prepacked() -> None:
    net = pyvit.create_model("vit_tiny_patch16_224").eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        want = net(images)
        pyvit.pack_weights(net)
        torch.testing.assert_close(net(images), want, rtol=1e-3, atol=1e-4)


def sdpa() -> None:
    """PyTorch's function runs on pyvit's kernels, and a call that they do not serve on PyTorch's."""
    q = torch.randn(1, 3, 50, 64, dtype=torch.float64)
    want = F.scaled_dot_product_attention(q, q, q)
    with pyvit.activate_sdpa() as active:
        assert F.scaled_dot_product_attention(q, q, q).equal(want)
        torch.testing.assert_close(F.scaled_dot_product_attention(q.float(), q.float(), q.float()), want.float())
        counted = (0, 0) if active.devices["cpu"].startswith("left to PyTorch") else (1, 1)
        assert active.calls == counted, active


def error() -> None:
    """An exception of the library reaches Python with its message."""
    q = torch.randn(1, 2, 5, 8)
    message = raised(lambda: torch.ops.pyvit.flash_attention(q, q, q, None, False, 1.0, 0.5, None, "cpu"))
    assert message.startswith("RuntimeError: "), message
    assert "the cpu kernels have no dropout" in message, message


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-extension-module", action="store_true", help="of a Python that the wheel has none for")
    options = parser.parse_args()
    print(
        f"pyvit {pyvit.__version__} in {pyvit.__path__[0]}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, {platform.machine()}"
    )
    kernels = (attention, windows, patches, loss)
    checks: dict[str, Callable[[], object]] = {"compiled library": compiled, "error": error}
    if not options.no_extension_module:
        checks["extension module"] = extension_module
    for dtype in (torch.float32, torch.bfloat16):
        checks |= {f"{kernel.__name__} {dtype}": functools.partial(kernel, dtype) for kernel in kernels}
    checks |= {"prepacked weights": prepacked, "activate_sdpa": sdpa, "model": model}
    failed = 0
    for name, check in checks.items():
        try:
            print("passed", name, check() or "", flush=True)
        except Exception:
            failed += 1
            print("FAILED", name, flush=True)
            traceback.print_exc(file=sys.stdout)
    print(f"{len(checks) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
