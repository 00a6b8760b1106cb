# The newcomer's two commands: `make demo` and `make test`. Each makes .venv first if it is missing or stale.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP_INSTALL_ARGS ?=
CONSTRAINTS ?= constraints.txt

.PHONY: demo test test-all check install clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "mezzo needs Python 3.11 or newer: make PYTHON=python3.12 …"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the locked dependencies into $(VENV) (once, about two minutes; PyTorch, JAX and TensorFlow) …"
	@$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_INSTALL_ARGS) -c $(CONSTRAINTS) -e '.[torch,jax,tensorflow-cpu,tensorboard,proof,report,dev]'
	@touch $@

demo: install
	@$(BIN)/mezzo demo

test: install
	@$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile -m 'not slow'

test-all: install check
	@$(BIN)/python -m pytest -q

check: install
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache *.egg-info
