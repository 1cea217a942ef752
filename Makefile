# make repro | verify | reference | test | export | book | run | benchmarks | lab | readme | clean-env | help
# Every job first sets up what it needs (see tools/env.sh): an active environment that has the packages is used as it is,
# otherwise .venv is made with the newest of Python 3.13, 3.12 and 3.11 that is found. PYTHON=/path/to/python names one.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help env repro verify reference test export book run benchmarks lab readme clean-env

PYTHON ?=
export PYTHON
# a file in profiles/, without .yaml; empty: the default pipeline, in this folder
PROFILE ?=
# a file in experiments/, without .yaml
STUDY ?= comparison
# further words for `dvc repro` or `unirec run`, for example ARGS='finetune@sample'
ARGS ?=

SETUP = set -eo pipefail; source tools/env.sh
# dvc.lock holds what this machine computed, and git keeps the empty one: its checkout stays clean, and pulling never conflicts.
# Without git (a source archive) DVC is told so.
DVC = if [ -e .git ]; then git update-index --skip-worktree dvc.lock; dvc config --local --unset core.no_scm 2>/dev/null || true; else dvc config --local core.no_scm true; fi
# tables and vectors of the sets that the pipeline makes
VECTORS = $(DVC); dvc repro $$(python -c 'import yaml; print(*("embed@" + d for d in yaml.safe_load(open("params.yaml"))["datasets"]))')

help:  ## this list
	@echo "make TARGET, where TARGET is one of"
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1|\2/' | awk -F'|' '{printf "%-12s %s\n", $$1, $$2}'

env:  ## set up the environment, nothing else
	@$(SETUP)

repro:  ## raw data to reports/index.html, whatever is not up to date; PROFILE=paper or paper-tiny: in runs/PROFILE
	@$(SETUP); \
	if [ -n "$(PROFILE)" ]; then exec python -m unirec.cli profile "$(PROFILE)" $(ARGS); fi; \
	$(DVC); python tools/repro.py $(ARGS); \
	echo "The page of results: $(CURDIR)/reports/index.html"

verify:  ## compare the results of `make repro` with the committed reference (tolerance: params.yaml)
	@$(SETUP); python -m unirec.cli verify

reference:  ## make the results of `make repro` the committed reference, results/reference/
	@$(SETUP); python -m unirec.cli verify --write

test:  ## notebooks and tests; the last line counts them
	@$(SETUP); python -u tests/run_all.py $(ARGS)

export:  ## write unirec/ from the notebooks and the list of rooms in ARCHITECTURE.md
	@$(SETUP); python tools/export.py

book:  ## the notebooks as a site that needs no network: _book/index.html
	@NEEDS=book; $(SETUP); python tools/book.py $(ARGS)

run:  ## do the runs of a study that are not recorded yet, and judge it (resumes): make run STUDY=comparison
	@$(SETUP); $(VECTORS); python -m unirec.cli run $(STUDY) $(ARGS)

benchmarks:  ## measure speed side by side (half an hour, on a quiet machine)
	@$(SETUP); $(DVC); dvc repro embed@movielens; for name in prepare encode qformer finetune growth evaluation training; do python benchmarks/$$name.py; done

lab:  ## open JupyterLab on the index of the notebooks
	@$(SETUP); if [ "$$(id -u)" = 0 ]; then root=--allow-root; fi; exec jupyter lab nbs/index.ipynb $$root $(ARGS)

readme:  ## write README.md from nbs/index.ipynb
	@$(SETUP); python tools/readme.py


clean-env:  ## remove .venv (data, models and results stay)
	rm -rf .venv unirec_companion.egg-info
