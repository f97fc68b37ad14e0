# make            prints the targets
# The environment is made again only when the pins change.
.DEFAULT_GOAL := help
.ONESHELL:
.SHELLFLAGS := -euo pipefail -c
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
NOTEBOOKS := 00_train_liar 01_make_dataset 02_check_lie_rate 03_extract 04_extract_grads 05_probe_ablations 06_detect 07_traps 08_carry_over 09_pairs_and_votes 10_headlines
PARAMETERS ?=
ORDER := run-05_probe_ablations run-09_pairs_and_votes run-00_train_liar run-07_traps $(NOTEBOOKS:%=run-%)
TO := book/notebooks
# The small size that the check runs, and what a notebook takes besides.
SMALL := -p n_examples 16
SMALL_00_train_liar := -p n_examples 8
SMALL_02_check_lie_rate := -p n_grid 4
SMALL_03_extract := -p audit_rows 4
SMALL_05_probe_ablations := -p layer_stride 10
SMALL_06_detect := -p layer_stride 10
SMALL_08_carry_over := -p layer_stride 10
SMALL_09_pairs_and_votes := -p layer_stride 10 -p n_draws 4
SMALL_10_headlines := -p layer_stride 10 -p n_draws 4
# Those that nbval runs again, to compare what they show: prompts, stores and figures, kept tables.
COMPARED := 01_make_dataset 04_extract_grads 05_probe_ablations
PAPERMILL := $(BIN)/papermill --no-progress-bar
export PATH := $(BIN):$(PATH)
export PYTHONUNBUFFERED := 1

.PHONY: help setup book test nbval bench bench-peers organism lab lint clean clean-runs

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
	@mkdir -p book/notebooks book/_assets build
	cp $$($(BIN)/python -c "import importlib.util as u; print(u.find_spec('plotly').submodule_search_locations[0])")/package_data/plotly.min.js book/_assets/
	$(MAKE) -s -j 2 $(ORDER)
	rm -rf _build  # a page that once failed to build is not looked at again by an incremental build
	$(BIN)/jupyter-book build book -W --keep-going > build/book.log 2>&1 || { tail -40 build/book.log; exit 1; }
	echo "open _build/html/index.html"

# Two at a time, and a notebook after those whose files it reads. Each may use all cores, but waits without holding one (two that spin share them badly).
run-%: parameters = $(strip $(PARAMETERS) $(if $(CHECK),$(SMALL) $(SMALL_$*)))
run-%:
	@echo "$* $(parameters)"
	(cd notebooks && OMP_WAIT_POLICY=PASSIVE $(PAPERMILL) $*.ipynb ../build/$*.ipynb $(parameters)) > build/$*.log 2>&1 || { tail -30 build/$*.log; exit 1; }
	mv build/$*.ipynb $(TO)/$*.ipynb

run-02_check_lie_rate: run-01_make_dataset
run-07_traps: run-00_train_liar  # so that 02, for which most others wait, is not last
run-03_extract run-04_extract_grads run-06_detect run-08_carry_over: run-02_check_lie_rate
run-05_probe_ablations: run-03_extract
run-09_pairs_and_votes: run-05_probe_ablations
run-10_headlines: run-08_carry_over run-09_pairs_and_votes

test: setup lint  ## everything that CI runs: lint, unit tests, all notebooks, some of them twice
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder --durations 12
	$(MAKE) --no-print-directory nbval

nbval: setup
	@mkdir -p build/nbval
	TQDM_DISABLE=1 $(MAKE) -s -j 2 CHECK=1 TO=build/nbval $(ORDER)
	TQDM_DISABLE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbval --nbval-cell-timeout=600 -n 2 --dist loadfile $(COMPARED:%=build/nbval/%.ipynb)

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
organism: setup  ## train the liar again (about two hours on two cores) into runs/organisms/ and print its held-out figures
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
