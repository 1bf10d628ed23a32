# `make demo` and `make test` are all that a newcomer needs; each makes .venv if it is missing. `make gpu` takes $(PYTHON) as it is.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test quick check format docs docs-serve notebooks clean gpu

demo: $(INSTALLED)  ## train, export, generate and plot
	$(BIN)/bdh demo

test: $(INSTALLED)  ## the whole test suite
	$(PYTEST) $(PYTEST_ARGS)

quick: $(INSTALLED)  ## the tests but for those marked slow
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

check: $(INSTALLED)  ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Without the environment: on a machine with a GPU and no network, PyTorch is in its own Python.
gpu:  ## what a GPU computes, and how fast, in OUT (gpu.json): about 6 minutes; WHEELS=DIR has missing packages; DEVICE=cpu
	$(PYTHON) benchmarks/gpu.py --device $(or $(DEVICE),cuda) --out $(or $(OUT),gpu.json) $(if $(WHEELS),--wheels $(WHEELS))

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)  ## the documentation as a site, in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(INSTALLED)  ## the same at http://127.0.0.1:8001, built again at each change
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --dev-addr 127.0.0.1:8001

notebooks: $(INSTALLED)  ## runs notebooks/*.py and writes the .ipynb files: 20 to 25 minutes; NAMES="01 05"
	$(BIN)/python scripts/notebooks.py $(NAMES)

clean:  ## removes the environment and caches; leaves runs/ alone
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing PyTorch and the test tools into $(VENV): some minutes"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@
