# Everything starts from a bare clone: each target makes the environment and the build it needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TORCH  ?= torch==2.13.0
PYTEST := $(BIN)/python -m pytest -q

.DEFAULT_GOAL := build
.PHONY: build test test-fast bench lint format gpu results docs clean

# The environment, remade when its definition changes. torch first: the rest builds against it.
$(VENV)/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install -q "$(TORCH)" numpy ninja "pybind11>=2.13"
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[test,lint]"
	touch $@

build: $(VENV)/.ready
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python setup.py -q build_ext --inplace

clean:
	rm -rf build pyvit/lib pyvit/_C*.so
