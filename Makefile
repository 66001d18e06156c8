# Each target does all the set-up it needs: a virtual environment, the install, then the job.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-all check bench bench-kernels tables tables-full starter-table starter starter-universeg starter-sam clean

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
	set -e; for t in house universeg_speed sam_many sliding_window; do $(BIN)/python -m benchmarks.$$t; done

# The fused operations beside their baselines: on a GPU where there is one, else on the CPU.
bench-kernels: $(READY)
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.kernels_attention
	$(BIN)/python -m benchmarks.kernel_resources

# Short form of the committed tables (two cores, about three and a half hours; `make tables TABLES=in_context SHORT=` for one of them); tables-full: more
# steps, more images, larger ones. Most keep their finished cells until the table is written, so an interrupted one goes on.
TABLES := few_shot in_context label_dropout retina_matrix sam fseft
SHORT := soup gpt4mia sam_interactive

tables: $(READY)
	set -e; for t in $(TABLES) $(SHORT); do $(BIN)/python -m benchmarks.$$t; done

tables-full: $(READY)
	set -e; for t in $(TABLES); do $(BIN)/python -m benchmarks.$$t --full; done
	$(BIN)/python -m benchmarks.sam_interactive --steps 480 --name sam_interactive_full

# Starter features against random ones on every pack.
starter-table: $(READY)
	$(BIN)/python -m benchmarks.starter

# Retrain the shipped weights from nothing but their recipes.
starter: $(READY)
	$(BIN)/python -m medgraft.recipes.starter_vit medgraft/weights/starter_vit.safetensors

starter-universeg: $(READY)
	$(BIN)/python -m medgraft.recipes.starter_universeg medgraft/weights/starter_universeg.safetensors

starter-sam: $(READY)
	$(BIN)/python -m medgraft.recipes.starter_sam medgraft/weights/starter_sam.safetensors

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable ".[volumes,dicom,plots,sign,serve,onnx]" --group dev
	touch $(READY)

clean:
	rm -rf $(VENV) demo runs build *.egg-info
