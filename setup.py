"""Builds the native code for the machine at hand (packaging/native.py has the rules).

Environment: PYVIT_NATIVE=0|1 (install without native code, or require it; by default it is required on Linux and left
out, with a message, where macOS or Windows have no compiler for it), PYVIT_CUDA=0|1 (forbid or require CUDA, which is
compiled in where nvcc is found, whether or not the torch at hand is a CUDA build), TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "packaging"))
import native  # noqa: E402

NATIVE = os.environ.get("PYVIT_NATIVE", "")
REQUIRED = NATIVE == "1" or sys.platform == "linux"


class Ninja(build_ext):
    def run(self) -> None:
        try:
            self.build()
        except subprocess.CalledProcessError as error:
            if REQUIRED:
                sys.exit(f"the native code does not build: {error}; PYVIT_NATIVE=0 installs pyvit without it")
            print(f"pyvit: installed without its compiled library, which does not build: {error}", file=sys.stderr)

    def build(self) -> None:
        cxx = native.compiler()
        if cxx is None:
            sys.exit("no C++ compiler is found (g++, or CXX); PYVIT_NATIVE=0 installs pyvit without its native code")
        import pybind11
        import torch
        from torch.utils.cpp_extension import include_paths

        if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 10):
            sys.exit(f"pyvit needs torch >= 2.10 (stable ABI), found {torch.__version__}")
        in_tree = self.editable_mode or self.inplace
        package = (ROOT if in_tree else Path(self.build_lib).resolve()) / "pyvit"
        headers = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
        windows = [f"-L{sys.base_prefix}/libs", f"-lpython{sys.version_info.major}{sys.version_info.minor}"]
        os.environ.setdefault("MACOSX_DEPLOYMENT_TARGET", "11.0")
        native.Build(
            folder=ROOT / "build/native" if in_tree else Path(self.build_temp).resolve(),
            library=package / "lib" / native.SYSTEMS[sys.platform].library,
            modules={
                package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}": (
                    headers,
                    windows if sys.platform == "win32" else [],
                )
            },
            cxx=cxx,
            torch_includes=include_paths(),
            libraries=[f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"],
            system=sys.platform,
            machine=native.machine(),
            archs=native.cuda_archs(),
        ).run()

    def get_outputs(self) -> list[str]:
        return []


wanted = NATIVE != "0" and (REQUIRED or native.compiler() is not None)
if NATIVE != "0" and not wanted:
    print("pyvit: no C++ compiler is found (clang++, or CXX): installing without native code", file=sys.stderr)
setup(ext_modules=[Extension("pyvit._C", sources=[])] if wanted else [], cmdclass={"build_ext": Ninja})
