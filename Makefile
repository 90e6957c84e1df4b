# Everything runs in .venv in this checkout; every target sets it up first.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint bench clean

demo: .venv/demo.done
	$(BIN)/lowrank-optim demo $(ARGS)

test: .venv/test.done
	$(BIN)/python -m pytest -q $(ARGS)

lint: .venv/test.done .venv/lint.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/test.done
	$(BIN)/python benchmarks/tune_demo.py $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/%.done: .venv/bin/python pyproject.toml tests/constraints.txt
	$(BIN)/pip install -q -c tests/constraints.txt torch numpy
	$(BIN)/pip install -q -c tests/constraints.txt -e ".[$*]"
	touch $@
