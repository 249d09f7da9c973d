# The project's two commands: `make demo` and `make test`. Both set up what they need in a virtual environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint check docs clean compose-test

demo: $(VENV)/.core
	$(BIN)/cutlayer demo

test: lint check docs
	# One thread a process: two OpenMP pools on two cores spin against each other.
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

check: $(VENV)/.dev
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

$(VENV)/.core: pyproject.toml constraints.txt
	@echo "Setting up $(VENV). Installing PyTorch takes a minute or more, and says nothing meanwhile."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# A server and two clients in containers, where docker exists: the run must end by itself with status 0.
compose-test:
	docker compose -f deploy/compose.yaml up --build --exit-code-from server
	docker compose -f deploy/compose.yaml down --volumes

docs: $(VENV)/.dev
	$(BIN)/python tools/site.py

clean:
	rm -rf $(VENV) build dist site .pytest_cache .hypothesis .ruff_cache
