# Everything starts from a bare clone: each target makes the environment and the build it needs, except "make gpu
# PY=python3", which runs with what it finds and installs nothing.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
PY     := $(BIN)/python
JOBS   ?= $(shell nproc)
# One thread per worker: the suite runs on all cores already.
PYTEST := OMP_NUM_THREADS=1 PYVIT_TEST_PEERS=required PYTHONPATH=. $(PY) -m pytest -q
SPREAD := -n $(JOBS) --dist worksteal
NATIVE := PATH="$(abspath $(BIN)):$$PATH" $(PY) setup.py -q build_ext --inplace

.DEFAULT_GOAL := build
.PHONY: help build wheel wheel-test test test-fast test-torch test-triton rehearse fuzz sanitize mutation reliability bench gpu hub results \
	coverage docs docs-site lint format clean

help:             ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */ \t/' | sort

# The environment, remade when its definition changes. torch first: the rest builds against it.
$(VENV)/.ready: pyproject.toml tests/peers.txt benchmarks/torchvision_operators.py
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -c 'import sys; assert sys.version_info >= (3, 10), f"pyvit needs Python >= 3.10, found {sys.version}"'
	$(PY) -m pip install -q --upgrade pip "setuptools>=77" wheel
	$(PY) -m pip install -q "$(TORCH)" numpy ninja "pybind11>=2.13"
	PATH="$(abspath $(BIN)):$$PATH" PYTHONWARNINGS=ignore::UserWarning $(PY) -m pip install -q --no-build-isolation -e ".[test,lint]"
	$(PY) -m pip install -q --no-deps -r tests/peers.txt
	cp benchmarks/torchvision_operators.py "$$($(PY) -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
	echo "import torchvision_operators" > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/torchvision_operators.pth"
	touch $@

build: $(VENV)/.ready ## the environment and the compiled library
	@$(NATIVE)

wheel: $(VENV)/.ready ## wheels and the source distribution, in dist/; make wheel [ARGS="linux-x86_64 macos-arm64"], PYVIT_CUDA=1
	$(PY) -m pip install -q "auditwheel>=6" ziglang wheel
	PATH="$(abspath $(BIN)):$$PATH" $(PY) packaging/wheels.py $(ARGS)

wheel-test:       ## a wheel in fresh environments without a compiler: make wheel-test ARGS="dist/NAME.whl --torch 2.10.0"
	$(PY) packaging/wheel_test.py $(ARGS)

test: build       ## everything that needs no GPU
	$(PYTEST) $(SPREAD) tests --ignore tests/triton
	$(MAKE) test-triton

test-triton: build ## Triton kernels in the interpreter, then compiled ahead of time: inspected, and run as PTX
	TRITON_INTERPRET=1 $(PYTEST) $(SPREAD) tests/triton
	PYVIT_NO_LIBRARY=1 TRITON_INTERPRET=1 $(PYTEST) $(SPREAD) tests/ops/test_contract.py \
		-k "triton and (opcheck or low_level or compile or export or jit or autocast or double)"
	$(PYTEST) $(SPREAD) tests/triton

rehearse: build   ## what a GPU's run does and its tests check, with Triton's kernels run on a CPU: 2 and 40 minutes
	$(PY) -m benchmarks.gpu --device fake --out build/rehearsal
	PYVIT_TEST_PTX=sm_90 PYVIT_NO_LIBRARY=1 $(PYTEST) $(SPREAD) tests/ops tests/losses -k triton

test-torch: build ## the operators' contract under another torch, the library as it was built: make test-torch VERSION=2.10.0
	tests/other_torch.sh $(VERSION)

test-fast: build  ## the quick part, under three minutes
	$(PYTEST) $(SPREAD) -m "not slow" tests/ops tests/models tests/losses tests/test_dispatch.py tests/test_library.py

fuzz: build       ## random calls of every operator, 2000 per backend and dtype, and beside guard pages: make fuzz [CASES=N]
	PYVIT_FUZZ_CASES=$(or $(CASES),2000) PYVIT_TEST_SEED=random $(PYTEST) $(SPREAD) tests/fuzz
	PYVIT_FUZZ_CASES=$(or $(CASES),2000) PYVIT_TEST_SEED=random TRITON_INTERPRET=1 $(PYTEST) $(SPREAD) tests/fuzz -k triton

sanitize: build   ## the CPU library with AddressSanitizer and UBSan (gcc on Linux): random calls on every instruction set; 15 minutes; make sanitize [CASES=25]
	PATH="$(abspath $(BIN)):$$PATH" $(PY) tests/fuzz/sanitize.py $(CASES)

mutation: build   ## which of 64 planted defects the tests notice, benchmarks/results/mutation.md; an hour; make mutation [ARGS=PATTERN]
	$(PY) -m tests.mutation $(ARGS)

reliability: build ## long training and large tensors: an hour, 12 GiB; only what is not recorded, make reliability [ARGS="--parts soak --minutes 5"]
	PYTHONPATH=. $(PY) -m benchmarks.reliability $(ARGS)
	$(PY) -m benchmarks.docs

bench: build      ## check and time every operator and both models on this machine; results/
	$(PY) -m benchmarks --busy

gpu: $(if $(filter command%,$(origin PY)),,build) ## an hour on a GPU: make gpu [PY=python3] [ARGS="--parts 1 --resume"]
	PYTHONPATH=. $(PY) -m benchmarks.gpu $(ARGS)

hub: build       ## the package for Hugging Face's kernels, build/hub
	$(PY) packaging/hub.py

results: build    ## docs/results.md: what each recipe reaches on real images; only the missing runs, make results [ARGS=--all]
	$(PY) -m benchmarks.learning $(ARGS)
	$(PY) -m benchmarks.learning.losses

coverage: build   ## docs/coverage.md: how much of timm and transformers runs on pyvit; hours; make coverage [ARGS=--again]
	PYTHONPATH=. $(PY) -m pyvit.integrations.coverage --out docs/coverage.md $(ARGS)

docs: build       ## regenerate the tables in docs/ (compiles every GPU kernel: half an hour)
	$(PY) -m pyvit.triton_kernels.tools.compile_report --dtype bf16 fp32
	$(PY) csrc/cuda/resources.py
	$(PY) -m benchmarks.docs

docs-site: $(VENV)/.ready ## the documentation as a website: build/site
	$(PY) -c "import zensical, mkdocstrings" 2> /dev/null || $(PY) -m pip install -q --no-build-isolation -e ".[docs]"
	$(PY) -m benchmarks.html_report
	$(PY) docs/assemble.py
	$(BIN)/zensical build --clean --strict

lint: $(VENV)/.ready ## ruff, mypy, clang-format, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'examples/*.cpp')

format: $(VENV)/.ready ## rewrite sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'examples/*.cpp')

clean:            ## remove what was built
	rm -rf build pyvit/lib pyvit/_C*.so
