#!/usr/bin/env bash
# The contract of the operators and the recorded API under another torch, and with PYTHON=... another Python, than the
# library was built with: nothing is compiled again.
#   tests/other_torch.sh VERSION [DIRECTORY=build/torch-VERSION]
# Downloads that torch into an environment of its own, which is kept (several GB where the index has CUDA builds only).
set -euo pipefail

version=${1:?usage: tests/other_torch.sh VERSION, for example 2.10.0}
root=$(cd "$(dirname "$0")/.." && pwd)
environment=${2:-$root/build/torch-$version}
python=$environment/bin/python
test -f "$root/pyvit/lib/libpyvit_ops.so" || { echo "build the library first: make build" >&2; exit 2; }

if ! "$python" -c "import torch, pytest, xdist; assert torch.__version__.startswith('$version')" 2>/dev/null; then
  "${PYTHON:-python3}" -m venv "$environment"
  "$python" -m pip install -q "torch==$version" numpy pytest pytest-xdist setuptools
  # The checkout as an editable install maps it; installing it would build it again.
  site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
  cat > "$site/pyvit_checkout.py" <<PYTHON
import importlib.util
import sys


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "pyvit.triton_kernels":
            return None
        folder = "$root/triton_kernels"
        return importlib.util.spec_from_file_location(name, folder + "/__init__.py", submodule_search_locations=[folder])


sys.meta_path.append(Finder)
PYTHON
  echo "import pyvit_checkout" > "$site/pyvit_checkout.pth"
fi
cd "$root"
export OMP_NUM_THREADS=1 PYTHONPATH=$root
"$python" -c "import torch, pyvit; assert pyvit.library.problem() is None, pyvit.library.problem(); print('torch', torch.__version__)"
"$python" -m pytest -q -n "${JOBS:-$(nproc)}" --dist worksteal -p no:cacheprovider \
  tests/ops/test_contract.py tests/ops/test_torch_tools.py tests/ops/test_low_level.py tests/ops/test_prepacked.py \
  tests/models/test_fused_branches.py tests/integrations/test_sdpa_override.py tests/test_torch_private.py tests/test_library.py \
  tests/test_api.py
