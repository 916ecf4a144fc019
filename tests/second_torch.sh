#!/usr/bin/env bash
# The library under another torch than the one it was built with: the stable ABI, shown.
#   tests/second_torch.sh [VERSION=2.10.0] [DIRECTORY=a temporary one, removed]
# Downloads that torch from the package index into a scratch environment (several GB where the index has CUDA builds only), loads the same
# libpyvit_ops.so there, and runs the operators, their gradients and the compiler on it. Nothing is compiled.
set -euo pipefail

version=${1:-2.10.0}
root=$(cd "$(dirname "$0")/.." && pwd)
library=$root/pyvit/lib/libpyvit_ops.so
test -f "$library" || { echo "build the library first: make build" >&2; exit 2; }

if [ $# -ge 2 ]; then
  scratch=$2
else
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
fi
if ! "$scratch/bin/python" -c "import torch; assert torch.__version__.startswith('$version')" 2>/dev/null; then
  "${PYTHON:-python3}" -m venv "$scratch"
  "$scratch/bin/pip" install -q "torch==$version" numpy
fi

cd "$scratch"
PYTHONPATH=$root "$scratch/bin/python" - "$library" <<'PYTHON'
import sys

import torch
import torch.nn.functional as F

import pyvit
from pyvit import ops
from pyvit.testing import check_op

assert pyvit.library.problem() is None, pyvit.library.problem()
assert str(pyvit.library.PATH) == sys.argv[1]
print(f"torch {torch.__version__}, {torch.ops.pyvit.cpu_isa()}")

for dtype in (torch.float32, torch.bfloat16):
    q, k, v = (torch.randn(2, 3, 77, 64).to(dtype) for _ in range(3))
    cases = {
        "flash_attention": (ops.flash_attention, {"q": q, "k": k, "v": v, "bias": torch.randn(77, 77)}, {"return_lse": True}),
        "attention_map": (lambda **kw: ops.attention_map(rows=[0, 5], **kw), {"q": q, "k": k}, {}),
        "window_attention": (
            ops.window_attention,
            {"qkv": torch.randn(2, 15, 17, 96).to(dtype), "bias_table": torch.randn(169, 2)},
            {"window_size": 7, "shift_size": 3, "num_heads": 2},
        ),
        "patch_embed": (ops.patch_embed, {"images": torch.randn(2, 3, 32, 48).to(dtype), "weight": torch.randn(40, 3, 16, 16).to(dtype)}, {}),
    }
    for name, (op, tensors, options) in cases.items():
        if "cpu" in pyvit.backends.CAPABILITIES[name]:
            for line in check_op(op, tensors, backend="cpu", name=f"{name} {dtype}", **options):
                print(line)

q, k, v = (torch.randn(2, 3, 77, 64) for _ in range(3))
torch.library.opcheck(torch.ops.pyvit.flash_attention.default, (q.requires_grad_(), k, v, None, True, 0.1, 0.0, None, "cpu"))
compiled = torch.compile(lambda *t: ops.flash_attention(*t), fullgraph=True, backend="aot_eager")
torch.testing.assert_close(compiled(q, k, v), F.scaled_dot_product_attention(q, k, v), rtol=1e-4, atol=1e-5)
print("the same library works")
PYTHON
