# The project's two commands: `make demo` and `make test`. Both set up what they need in a virtual environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint check docs clean compose-test hashes licences audit

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

# Everything but PyTorch, of files whose hashes are known, if they are known for this Python and platform. Before the rest,
# which then finds it installed.
$(VENV)/.hashed: constraints.sha256
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python tools/supply.py install
	touch $@

$(VENV)/.core: pyproject.toml constraints.txt
	@echo "Setting up $(VENV). Installing PyTorch takes a minute or more, and says nothing meanwhile."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e . \
		$$($(BIN)/python -c "import editables, hatchling" 2>/dev/null && echo --no-build-isolation)
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' \
		$$($(BIN)/python -c "import editables, hatchling" 2>/dev/null && echo --no-build-isolation)
	touch $@

# A server and two clients in containers, where docker exists: the run must end by itself with status 0.
compose-test:
	docker compose -f deploy/compose.yaml up --build --exit-code-from server
	docker compose -f deploy/compose.yaml down --volumes

docs: $(VENV)/.dev
	$(BIN)/python tools/site.py

# After a change of constraints.txt, with everything of it installed.
hashes licences: $(VENV)/.dev
	$(BIN)/python tools/supply.py $@

# Known vulnerabilities of the pins: asks a service on the network, from an environment of its own, and fails without it.
audit:
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	build/audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt

clean:
	rm -rf $(VENV) build dist site .pytest_cache .hypothesis .ruff_cache
