# Every target sets itself up in .venv first. Needed: make and Python 3.11 or newer, nothing else.
VENV    ?= .venv
PYTHON  ?=
WORKERS ?= 2
ARGS    ?=
BIN     := $(VENV)/bin
# Two warnings of older libraries, which newer ones don't give: a decorator that torch deprecates, a file left open.
LOWEST_WARNINGS := -W 'ignore:`torch.jit.script` is deprecated:DeprecationWarning' \
	-W ignore::pytest.PytestUnraisableExceptionWarning
LOWEST_TESTS := $(addprefix tests/test_,$(addsuffix .py,storage storage_peft fold export_peft export_safetensors \
	export_onnx_adapters export_onnx_multi integrations_transformers integrations_accelerate integrations_lightning \
	peft_parity peft_random golden_adapters bad_use transform))
PIP     := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo docs test coverage lowest check format lint types imports setup clean

help:  ## these lines
	@sed -n 's/^\([a-z]*\):.*##/make \1 /p' Makefile

demo: $(VENV)/.installed-demo  ## adapt a small vision transformer, fold and export it (ARGS="--seed 1")
	@$(BIN)/lora2fx demo $(ARGS)

test: $(VENV)/.installed-dev  ## run the tests (ARGS="-k fold")
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

coverage: $(VENV)/.installed-dev  ## the tests, and how many lines and branches they run; fails below what is asked for
	$(BIN)/python -m coverage erase
	OMP_NUM_THREADS=1 $(BIN)/python -m coverage run -m pytest -n $(WORKERS) --dist loadfile --timeout 900 $(ARGS)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m tests.covered

lowest: $(BIN)/python  ## tests of files, exporters and libraries at the lowest versions allowed, in .venv-lowest
	$(BIN)/python -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt -e ".[dev]"
	OMP_NUM_THREADS=1 $(VENV)-lowest/bin/python -m pytest $(LOWEST_WARNINGS) $(LOWEST_TESTS) $(ARGS)

docs: $(VENV)/.installed-dev  ## the documentation as a site, in site/
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.installed-dev  ## step time, operations and memory beside PEFT; writes benchmarks/results, prints tables
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/count_ops.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/count_ops.py --precision autocast
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/count_ops.py --precision bfloat16
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_memory.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_memory.py --precision autocast
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_memory.py --precision bfloat16
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_memory.py --dropout 0.1
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_fused.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_property.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_step.py $(ARGS)

check: lint types imports test  ## everything that CI runs

format: $(VENV)/.installed-dev  ## rewrite the sources as CI wants them
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

lint: $(VENV)/.installed-dev  ## ruff: formatting and rules
	$(BIN)/ruff format --check
	$(BIN)/ruff check

types: $(VENV)/.installed-dev  ## mypy --strict
	$(BIN)/mypy --strict

imports: $(VENV)/.installed-dev  ## the import directions, as pyproject.toml states them
	$(BIN)/lint-imports --no-logo

setup: $(VENV)/.installed-dev  ## .venv with everything that development needs

clean:  ## remove .venv, caches and build outputs
	rm -rf $(VENV) $(VENV)-lowest build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage*

$(VENV)/.installed-demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing lora2fx[demo] into $(VENV) (once; the first time downloads PyTorch)"
	@$(PIP) -e ".[demo]"
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing lora2fx[dev] into $(VENV) (once; the first time downloads PyTorch)"
	@$(PIP) -e ".[dev]"
	@touch $@ $(VENV)/.installed-demo

$(BIN)/python:
	@for python in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python); do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    $$python -m venv $(VENV) && exit 0; \
	    rm -rf $(VENV); \
	    echo "$$python can't make a virtual environment (on Debian or Ubuntu: apt install python3-venv)." >&2; \
	    exit 1; \
	  fi; \
	done; \
	echo "lora2fx needs Python 3.11 or newer, and $(or $(PYTHON),python3) is" \
	  "$$($(or $(PYTHON),python3) --version 2>/dev/null || echo missing)." \
	  "Install a newer one, or name it: make PYTHON=/path/to/python3.11" >&2; \
	exit 1
