# make            prints the targets
# The environment is made again only when the pins change.
.DEFAULT_GOAL := help
.ONESHELL:
.SHELLFLAGS := -euo pipefail -c
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
PARAMETERS ?=
# Those that nbval runs again, to compare what they show: prompts, stores and figures, kept tables.
COMPARED := 01_make_dataset 04_extract_grads 05_probe_ablations
BOOK := $(BIN)/python -m dlk_utils.lab.book $(PARAMETERS)
export PATH := $(BIN):$(PATH)
export PYTHONUNBUFFERED := 1

.PHONY: help setup demo book picture test nbval bench bench-peers organism lab lint clean clean-runs

help:  ## print the targets
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(VENV)/made  ## make the environment .venv from the pins, and the model smollm2

$(VENV)/made: pyproject.toml constraints.txt
	@rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	if command -v uv >/dev/null; then
		UV_FIND_LINKS="$${PIP_FIND_LINKS:-}" uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[notebooks,dev,quant,ray]'
	else
		$(BIN)/pip install --quiet -c constraints.txt -e '.[notebooks,dev,quant,ray]'
		$(BIN)/pip check
	fi
	$(BIN)/python -m dlk_utils.models.embedded_model  # so that no notebook waits for it
	touch $@

book: setup  ## run the notebooks and build the HTML book: _build/html/index.html
	@$(BOOK)

demo: setup  ## fit a lie detector on fewer examples, and judge a few claims: build/demo.ipynb
	@mkdir -p build
	(cd notebooks && $(BIN)/papermill --no-progress-bar 06_detect.ipynb ../build/demo.ipynb -p n_examples 48 $(PARAMETERS))
	echo "open build/demo.ipynb"

test: setup lint  ## everything that CI runs: lint, unit tests, all notebooks, some of them twice
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder --durations 12
	$(MAKE) --no-print-directory nbval

nbval: setup
	@TQDM_DISABLE=1 $(BOOK) --small --to build/nbval
	TQDM_DISABLE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p nbval --nbval --nbval-cell-timeout=600 -n 2 --dist loadfile $(COMPARED:%=build/nbval/%.ipynb)

bench: setup .venv-peers/made  ## time one way of computing against another and other libraries, print the goals, and write the book's page on speed
	$(BIN)/python bench/extraction.py
	$(BIN)/python bench/probes.py
	$(MAKE) --no-print-directory bench-peers

bench-peers: setup .venv-peers/made  ## time the other libraries alone, and write that page again
	.venv-peers/bin/python bench/peers.py
	$(BIN)/python bench/page.py

.venv-peers/made: pyproject.toml constraints.txt  # the other libraries, in an environment of their own
	@rm -rf .venv-peers
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet -c constraints.txt -e . nnsight==0.8.1 transformer-lens==4.3.0 lmprobe==0.10.3
	touch $@

ORGANISM := smollm2-liar
picture:  ## take the README's picture of the front page, after make book
	PYTHONPATH=tests $(BIN)/python book/picture.py

organism: setup  ## train the liar again (four trainings, two hours each on two cores) into runs/organisms/ and print its held-out figures
	@mkdir -p build
	(cd notebooks && $(BIN)/papermill --log-output 00_train_liar.ipynb ../build/organism.ipynb -p train True -p model $(ORGANISM) $(PARAMETERS))
	$(BIN)/python -m dlk_utils.organisms runs/organisms/$(ORGANISM)

lab: setup  ## open the notebooks in JupyterLab
	cd notebooks && $(BIN)/jupyter lab

lint: setup  ## check format and rules (ruff)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

clean-runs: setup  ## remove kept results that other code or other library versions made
	$(BIN)/python -m dlk_utils.lab.cache runs --remove

clean:  ## remove what was built and run, but not the environment
	rm -rf _build build runs book/notebooks book/_assets
