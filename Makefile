# Each target does all the set-up it needs: a virtual environment, the install, then the job.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-all check bench tables tables-full starter-table starter clean

demo: $(READY)
	$(BIN)/medgraft demo --out demo

test: $(READY)
	$(BIN)/python -m pytest -q -m "not slow" --durations=5

test-all: $(READY)
	$(BIN)/python -m pytest -q --durations=15

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_import_direction.py

bench: $(READY)
	$(BIN)/python -m benchmarks.house

# Short form of the committed tables (two cores, about half an hour); tables-full: the papers' steps.
tables: $(READY)
	$(BIN)/python -m benchmarks.few_shot

tables-full: $(READY)
	$(BIN)/python -m benchmarks.few_shot --full

# Starter features against random ones on every pack.
starter-table: $(READY)
	$(BIN)/python -m benchmarks.starter

# Retrains medgraft:starter-vit from nothing but its recipe.
starter: $(READY)
	$(BIN)/python -m medgraft.recipes.starter_vit medgraft/weights/starter_vit.safetensors

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable ".[volumes,plots,sign,serve,onnx]" --group dev
	touch $(READY)

clean:
	rm -rf $(VENV) demo runs build *.egg-info
