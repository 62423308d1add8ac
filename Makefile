# make demo | faces | towers | labels | docstrings | test | bench | lint | format | clean. Each makes .venv first and
# installs what it needs, once.
# make test runs the files of tests in JOBS processes; their threads wait without spinning, so as to share the cores.
# make gpu uses $(PYTHON) as it is and installs nothing; STAGES: of build, test, bench, report, sanitize, host, tune.

PYTHON ?= python3
VENV ?= .venv
TRITON ?= triton==3.6.0
DEMO ?=
FACES ?=
TESTS ?= tests
JOBS ?= 2
BENCH ?=
STAGES ?=
GPU_OUT ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
EDITABLE := FLASHPAIR_BUILD_NATIVE=0 $(PIP) --no-build-isolation -e
PACKAGING := constraints.txt pyproject.toml
SOURCES := setup.py $(wildcard csrc/*)
CPP := $(wildcard csrc/*.cpp csrc/*.cu csrc/*.h tests/cpp/*.cpp tests/cpp/*.h)

.PHONY: demo faces towers labels docstrings test bench gpu lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.native $(VENV)/.demo
	$(BIN)/python examples/digits.py $(DEMO)

faces: $(VENV)/.native $(VENV)/.demo
	$(BIN)/python examples/faces.py $(FACES)

towers: $(VENV)/.native $(VENV)/.demo
	$(BIN)/torchrun --nproc-per-node=2 examples/two_towers.py $(TOWERS)

labels: $(VENV)/.native $(VENV)/.demo
	$(BIN)/python examples/labels.py $(LABELS)

docstrings: $(VENV)/.native $(VENV)/.demo
	$(BIN)/python examples/docstrings.py $(DOCSTRINGS)

test: $(VENV)/.native $(VENV)/.test
	$(BIN)/python -m flashpair
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(TESTS)

bench: $(VENV)/.native $(VENV)/.bench
	$(BIN)/python bench/run.py $(BENCH)
	$(BIN)/python bench/run.py --preset sweep --allocator warm
	$(BIN)/python bench/memory.py
	$(BIN)/python bench/memory.py --sweep
	$(BIN)/python bench/report.py

gpu:
	$(PYTHON) bench/gpu.py $(STAGES) $(if $(GPU_OUT),--out "$(GPU_OUT)")

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf build dist out .pytest_cache .ruff_cache python/*.egg-info python/flashpair/*.so $(VENV)/.native
	find python kernels tests examples bench -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Triton's wheels exist for Linux only; without it the package serves CPU tensors.
$(VENV)/.base: $(PACKAGING) | $(BIN)/python
	$(PIP) torch numpy setuptools wheel ninja pybind11
	$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) "$(TRITON)" || echo "triton: no wheel for this platform"
	$(EDITABLE) .
	@touch $@

$(VENV)/.native: $(SOURCES) $(VENV)/.base
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

$(VENV)/.test: $(VENV)/.base
	$(EDITABLE) ".[test]"
	$(PIP) --no-deps open_clip_torch lightly sentence-transformers
	@touch $@

$(VENV)/.demo $(VENV)/.bench: $(VENV)/.%: $(VENV)/.base
	$(EDITABLE) ".[$*]"
	@touch $@

$(VENV)/.lint: $(PACKAGING) | $(BIN)/python
	$(PIP) ruff clang-format
	@touch $@
