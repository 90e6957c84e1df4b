# Everything runs in .venv in this checkout; every target sets it up first.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

DEVICE ?= $(if $(wildcard /dev/nvidia0),cuda,cpu)

.PHONY: demo test test-long mutants lint bench gpu clean

demo: .venv/demo.done
	$(BIN)/lowrank-optim demo $(ARGS)

test: .venv/test.done
	$(BIN)/python -m pytest -q -n auto -m "not long" $(ARGS)

# What is too long for every change; CONTRIBUTING says when to run it.
test-long: .venv/test.done
	$(BIN)/python -m pytest -q -n auto -m long $(ARGS)

# Whether the suite finds the faults of tests/mutants/faults.py.
mutants: .venv/test.done
	$(BIN)/python tests/mutants/run.py $(ARGS)

lint: .venv/test.done .venv/lint.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/bench.done
	$(BIN)/python benchmarks/step_time.py --out benchmarks/results/step_time_$(DEVICE).csv $(ARGS)
	$(BIN)/python benchmarks/refresh.py

# On a machine with a CUDA device, whose torch is installed already: every test that needs it.
gpu:
	$(PYTHON) -m pytest -q -m gpu $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/%.done: .venv/bin/python pyproject.toml tests/constraints.txt
	$(BIN)/pip install -q -c tests/constraints.txt torch numpy
	$(BIN)/pip install -q -c tests/constraints.txt -e ".[$*]"
	touch $@
