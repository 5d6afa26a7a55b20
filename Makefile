# Two commands do everything on a fresh machine: `make sweep` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: install install-tests sweep test test-fast test-all lint ui weights support cluster-test test-oldest gpu-check

install: $(VENV)/installed

install-tests: $(VENV)/installed-tests

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cpu]'
	touch $@

# With what jobs do without: linters, a browser, NVIDIA's parser and builder, and others that only tests use.
$(VENV)/installed-tests: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cpu,dev]'
	touch $(VENV)/installed $@

sweep: install
	$(BIN)/python launch.py -m pruner=l1_global pruner.amount=0.1,0.5,0.9

# One worker more than two cores: whoever has the tests of the cluster waits most of the time. What waits for other
# threads leaves its core to the others.
WORKERS ?= 3
PARALLEL := --numprocesses $(WORKERS)
test-all test-fast test-oldest: export OMP_WAIT_POLICY := PASSIVE
# Hundreds of processes would compile the same code.
test-all test-fast test-oldest: export PYTHONDONTWRITEBYTECODE :=

# The linters use the core that the tests leave idle at their start and end.
test: install-tests
	@$(MAKE) --no-print-directory --jobs 2 lint test-all

test-all: install-tests
	$(BIN)/pytest $(PARALLEL) --durations 30 --durations-min 5

# While working on something: what takes seconds; less than two minutes on two cores.
test-fast: install-tests
	$(BIN)/pytest --numprocesses 2 -m "not slow and not slurm"

lint: install-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Prints the address of MLflow's table of the jobs; PORT is the port instead of 5000.
ui: install
	$(BIN)/python -m pq_sweep.tracking ui $(if $(PORT),--port $(PORT))

weights: install
	$(BIN)/python -m benchmarks.train_digits pq_sweep/inputs/weights/digits_cnn.safetensors

# Hours of work: every model in every way. IMAGES and WEIGHTS name folders of photographs and trained weights.
support: install-tests
	$(BIN)/python -m benchmarks.support docs/support.md $(if $(IMAGES),--images $(IMAGES)) $(if $(WEIGHTS),--weights $(WEIGHTS))

# A real SLURM, PostgreSQL and MLflow server on the loopback; see docs/cluster.md for what to install.
cluster-test: install-tests
	$(BIN)/pytest -m slurm tests/cluster

# The oldest versions that pyproject.toml allows, which are those of V100 nodes, on a CPU; 8 GB of disk.
test-oldest: .venv-oldest/installed
	.venv-oldest/bin/pytest $(PARALLEL) -m "not slurm" --ignore tests/test_photographs.py

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --constraint constraints-oldest.txt --editable '.[cpu,dev]'
	touch $@

# On any CUDA machine with torch; installs nothing. OUTPUT is the folder of the report instead of docs/results, BUDGET_S
# the seconds that all may take instead of 480.
SEES_CUDA := import sys, torch; sys.exit(not torch.cuda.is_available())
gpu-check:
	@python=$(PYTHON); \
	if $(BIN)/python -c '$(SEES_CUDA)' 2>/dev/null || ! $$python -c 'import torch' 2>/dev/null && [ -x $(BIN)/python ]; \
	then python=$(BIN)/python; fi; \
	$$python -m pq_sweep.gpu_check $(if $(OUTPUT),--output '$(OUTPUT)') $(if $(BUDGET_S),--budget-s '$(BUDGET_S)')
