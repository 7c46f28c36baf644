# `make demo` and `make test` are all the set-up there is: each makes the virtual environment that it needs.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt

.PHONY: help demo test lint format types docs bench trial constraints clean
.DELETE_ON_ERROR:

help: ## say what each target does
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.installed-demo ## train a small GPT on the embedded corpus and value every document of it
	$(BIN)/assay demo $(ARGS)

test: $(VENV)/.installed-dev ## run every test and doctest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal $(ARGS)

lint: $(VENV)/.installed-dev ## check format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/.installed-dev ## put the code into the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(VENV)/.installed-dev ## check the types
	$(BIN)/mypy

docs: $(VENV)/.installed-dev ## build the documentation into site/
	$(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.installed-dev ## measure what assay adds to a training step on this machine
	$(BIN)/assay bench overhead $(ARGS)

LOOPS := loop trainer sft lightning_module accelerate_loop

trial: $(VENV)/.installed-dev ## install the built wheel into an empty environment, and run every loop's example there
	rm -rf build/trial && $(PYTHON) -m venv build/trial/venv
	$(BIN)/python -m hatchling build --target wheel --directory build/trial
	build/trial/venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		"$$(ls $(CURDIR)/build/trial/*.whl)[train,trainer,lightning]" trl
	cd build/trial && for loop in $(LOOPS); do \
		echo "--- $$loop" && venv/bin/python $(CURDIR)/examples/$$loop.py || exit 1; done
	cd build/trial && venv/bin/assay --version && venv/bin/assay demo --quick --out runs/demo

constraints: ## pin the newest versions that pyproject.toml allows, with torch and its triton as they are pinned now
	rm -rf build/pin && $(PYTHON) -m venv build/pin
	grep -E '^(torch|triton)==' constraints.txt > build/torch.txt
	build/pin/bin/python -m pip install --quiet --constraint build/torch.txt '.[dev,store]'
	build/pin/bin/python scripts/pin.py > build/constraints.txt && mv build/constraints.txt constraints.txt

clean: ## remove the virtual environment and every cache
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis dist build

# A stamp is newer than the two files that say what to install, or the install runs again.
# The build backend comes from constraints.txt too: without build isolation nothing unpinned is fetched.
$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/.python
	$(INSTALL) hatchling editables
	$(INSTALL) --no-build-isolation --editable '.[$*]'
	touch $@
