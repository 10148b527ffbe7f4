# npu-zoo: `make demo` runs the bundled checkpoint, `make test` is what CI runs. Both set everything up first.
#
# Needs python3 (3.10 or newer, with venv), make and git.
#
#   PYTHON       the interpreter that the virtual environment is made with
#   VENV         where the virtual environment lies
#   TORCH        which torch is installed, such as torch==2.13.0 for the CUDA build of PyPI
#   TORCH_INDEX  where that torch is looked for when pip's own configuration does not offer it; may be empty
#   VENV_NPU     where the environment with torch_npu lies; it stands on the one of VENV
#   TORCH_NPU    which torch_npu is installed there; none leaves out what runs on simulated NPUs
#   NPU_RANGE    the oldest and the newest release that the simulated runtime is built for in tests
#   ARGS         further arguments of pytest in `make test`, which then leaves out the simulated NPUs
#   NPU_ARGS     those of `make test-npu`
#   SOAK_MINUTES of load in `make soak`
#   JOBS         tests that run at once, on one thread each; as many as cores, four at most, since some measure time

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
VENV_NPU ?= .venv-npu
TORCH_NPU ?= torch-npu==2.13.0
NPU_RANGE ?= 2.9.0 2.14.0
PRODUCTS ?= atlas_800i_a2 atlas_300i_duo
ALL_PRODUCTS := atlas_800i_a2 atlas_800t_a2 atlas_300i_duo
SOAK_MINUTES ?= 2
JOBS ?= $(shell cores=$$(nproc 2>/dev/null || echo 2); echo $$((cores < 4 ? cores : 4)))

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
STAMP := $(VENV)/.installed-$(shell printf %s '$(TORCH)' | tr -c 'A-Za-z0-9.+' -)
NPU_STAMP := $(VENV_NPU)/.installed-$(shell printf %s '$(TORCH)-$(TORCH_NPU)' | tr -c 'A-Za-z0-9.+' -)
PINS := $(VENV)/constraints.txt
REQUIREMENTS := pyproject.toml constraints.txt
DEMO_PROMPT := def add(a, b):
WHEELS := $(VENV_NPU)/wheels
PYTEST = TORCH_NPU_WHEELS="$$(test ! -d $(WHEELS) || echo $(WHEELS))" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test test-npu test-example validate soak verify lint docs evidence clean

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

## make venv     the virtual environment with everything that demo, test and lint need
venv: $(STAMP)-dev

## make demo     run deepseek_coder's bundled demo checkpoint on a built-in prompt
demo: $(STAMP)-run
	@$(BIN)/npu-zoo run --model deepseek_coder --echo --prompt "$(DEMO_PROMPT)" --temperature 0 --max-tokens 48

## make test     all tests but the long ones, every claim of every plugin, and the example plugin as its users have it
test: $(STAMP)-dev $(NPU_STAMP)
	$(PYTEST) $(ARGS)
	@test -n "$(ARGS)" || $(MAKE) --no-print-directory test-npu
	@test -n "$(ARGS)" || $(MAKE) --no-print-directory -j 3 --output-sync=target validate soak test-example

## make test-npu the real torch_npu on a simulated Ascend runtime, one process per product
test-npu: $(NPU_STAMP)
	@test "$(TORCH_NPU)" != none || echo "TORCH_NPU=none: tests on simulated NPUs are left out"
	@test "$(TORCH_NPU)" = none || $(BIN)/python -c 'from npu_zoo.simulator.build import compiler; compiler()' 2>/dev/null \
	  || echo "no C compiler (CC, cc, gcc, clang): tests on simulated NPUs are left out"
	@test "$(TORCH_NPU)" = none || ! $(BIN)/python -c 'from npu_zoo.simulator.build import compiler; compiler()' 2>/dev/null \
	  || for product in $(PRODUCTS); do \
	  echo "tests on a simulated $$product"; \
	  NPU_ZOO_SIMULATE=$$product OMP_NUM_THREADS=1 $(VENV_NPU)/bin/python -m pytest -n $(JOBS) --dist worksteal \
	    tests/npu $(NPU_ARGS) || exit 1; \
	done

## make validate what the plugins claim: specs, shapes, kernels, and every row that a CPU runs
validate: $(STAMP)-dev
	$(BIN)/npu-zoo validate --level run --jobs $(JOBS)

## make test-example  install npu-zoo and the example plugin as their users do, and run what its author runs
test-example: $(STAMP)-dev
	OMP_NUM_THREADS=1 $(BIN)/python scripts/check_example.py

## make soak     a server under mixed load, where nothing may be lost, wrong or kept; SOAK_MINUTES=2
soak: $(STAMP)-dev
	$(BIN)/python benchmarks/soak.py --minutes $(SOAK_MINUTES) --check

## make verify   the long round: every test, more examples of each property, every change of a matrix, the linters
# Ranks that are killed fifty times have ten seconds each to be found.
verify: JOBS := 2
verify: SOAK_MINUTES := 30
verify: $(STAMP)-dev $(NPU_STAMP)
	$(PYTEST) -m "long or not long" --hypothesis-profile verify $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python scripts/mutate_matrices.py --list --check docs/mutations.md
	$(MAKE) --no-print-directory test-npu PRODUCTS="$(ALL_PRODUCTS)" NPU_ARGS='-m "long or not long"'
	$(MAKE) --no-print-directory validate test-example soak lint

## make lint     ruff and mypy
lint: $(STAMP)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

## make docs     rewrite the generated pages
docs: $(STAMP)-dev
	$(BIN)/python scripts/generate_docs.py
	$(BIN)/python benchmarks/performance.py

## make evidence run the matrix rows that up to four simulated NPUs can run, and rewrite the families' evidence.json
evidence: $(NPU_STAMP)
	OMP_NUM_THREADS=1 $(VENV_NPU)/bin/python -m npu_zoo validate --level simulate --only
	$(MAKE) --no-print-directory docs

## make clean    remove the virtual environment and all caches
clean:
	rm -rf $(VENV) $(VENV_NPU) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find npu_zoo tests scripts benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

# The base and what running a model takes. torch comes first, so that nothing else decides which build it is; what pip
# is configured with is asked before TORCH_INDEX, which is not reachable everywhere.
$(STAMP)-run: $(REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "error: npu-zoo needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1 || true)." \
	    "Choose one with: make PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "error: '$(PYTHON)' cannot make a virtual environment; on Debian: apt install python3-venv" >&2; exit 1; }
	@echo "installing npu-zoo and $(TORCH) into $(VENV)"
	@grep -v '^torch==' constraints.txt >$(PINS)
	@$(PIP) install -c $(PINS) "$(TORCH)" setuptools >/dev/null 2>&1 || \
	  $(PIP) install -c $(PINS) $(addprefix --extra-index-url ,$(TORCH_INDEX)) "$(TORCH)" setuptools || { \
	  echo "error: pip cannot install $(TORCH) for $$($(BIN)/python -V). Name another build or place with" \
	    "TORCH and TORCH_INDEX, or another interpreter with PYTHON after make clean" >&2; exit 1; }
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >>$(PINS)
	@$(PIP) install -c $(PINS) --no-build-isolation -e '.[run]'
	@$(BIN)/npu-zoo kernels build || echo "note: the CPU kernels in plain torch serve instead"
	@touch $@

$(STAMP)-dev: $(STAMP)-run
	@echo "installing the development tools into $(VENV)"
	@$(PIP) install -c $(PINS) --no-build-isolation -e '.[run,dev]'
	@touch $@

# torch_npu breaks `import torch` for everything beside it where CANN is missing, so it lies in an environment of its own,
# which sees the packages of the first.
$(NPU_STAMP): $(STAMP)-dev
	@rm -rf $(VENV_NPU)
	@mkdir -p $(VENV_NPU)
	@test "$(TORCH_NPU)" = none || $(MAKE) --no-print-directory npu-environment || { rm -rf $(VENV_NPU); exit 1; }
	@touch $@

.PHONY: npu-environment
npu-environment:
	@echo "installing $(TORCH_NPU) into $(VENV_NPU)"
	@$(BIN)/python -m venv --without-pip $(VENV_NPU)
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(" + repr(sysconfig.get_path("purelib")) + ")")' \
	  >"$$($(VENV_NPU)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/npu-zoo.pth"
	@$(PIP) --python $(VENV_NPU)/bin/python install --no-deps "$(TORCH_NPU)" || { \
	  echo "error: pip cannot install $(TORCH_NPU) here; TORCH_NPU=none leaves out the tests on simulated NPUs" >&2; exit 1; }
	@for release in $(NPU_RANGE); do \
	  $(PIP) download --no-deps -d $(WHEELS)/$$release "torch-npu==$$release" \
	    && $(BIN)/python -m zipfile -e $(WHEELS)/$$release/*.whl $(WHEELS)/$$release && rm $(WHEELS)/$$release/*.whl \
	    || { echo "note: torch-npu $$release is not there for $$($(BIN)/python -V); it is left out of the tests"; \
	         rm -rf $(WHEELS)/$$release; }; \
	done
