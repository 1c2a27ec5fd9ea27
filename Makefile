# make setup | test | aot | demo | lint : each works on a clean clone with Python 3.11 to 3.13.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: setup test aot demo lint clean

setup: $(INSTALLED)

$(INSTALLED): constraints.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) \
		else f"Python 3.11 to 3.13 is needed, {v[0]}.{v[1]} found: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[triton,test,lint]'
	@touch $@

test: setup
	$(BIN)/python -m pytest

aot: setup
	$(BIN)/derta bench resources

demo: setup
	$(BIN)/derta demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
