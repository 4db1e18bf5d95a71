# Everything runs in a virtual environment of its own, .venv, which the first command creates.
# Another Python: make book PYTHON=python3.12

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

CORPUS ?= debian-docs
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python -m
INSTALLED := $(VENV)/.installed
OLDEST := .venv-oldest
# The contract with PEFT and transformers: every family, method and placement.
MATRIX := $(addprefix tests/test_,peft_method.py families.py quantised.py weights.py hub.py)

# The same bytes on every machine, whatever its locale; no question asked, no window opened.
export PYTHONUTF8 := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export MPLBACKEND := agg

PROFILE_debian-docs := laptop
PROFILE_synthetic := smoke
PROFILE := $(PROFILE_$(CORPUS))
LIMIT ?= 0

.PHONY: help venv book pdf browser links test fast matrix lint reproduce bench dist colab constraints clean

help:  ## list the commands
	@sed -n 's/^\([a-z]*\):.*  ## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'
	@echo
	@echo '  make book CORPUS=synthetic   needs no network after installation, minutes instead of real text'
	@echo '  make book PYTHON=python3.12  choose the Python (3.10 to 3.13) the first time'

venv: $(INSTALLED)  ## create .venv and install the pinned versions, if anything changed

# python3 may be too old where a newer one lies beside it, so the first that fits is taken.
$(INSTALLED): pyproject.toml constraints.txt
	@set -e; \
	for candidate in $(if $(PYTHON),"$(PYTHON)",python3 python3.13 python3.12 python3.11 python3.10 python); do \
	  if "$$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; then \
	    python=$$candidate; break; \
	  fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "No Python from 3.10 to 3.13 was found$(if $(PYTHON), under the name $(PYTHON)). Name one: make PYTHON=/path/to/python3.12" >&2; \
	  exit 1; \
	fi; \
	if ! [ -x "$(BIN)/python" ] || ! "$(BIN)/python" -m pip --version >/dev/null 2>&1; then \
	  echo "Creating $(VENV) with $$("$$python" -V)"; \
	  "$$python" -m venv --clear "$(VENV)" || { \
	    echo "Could not create a virtual environment. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }; \
	fi
	@echo 'Installing (the first time takes minutes)'
	@$(RUN) pip install --quiet -c constraints.txt -e '.[book,dev]'
	@touch $@

book: $(INSTALLED)  ## execute the notebooks, build the book, print the page to open
	@$(if $(PROFILE),,echo "CORPUS = $(CORPUS) is unknown. Allowed: debian-docs (real text, the default), synthetic." >&2; exit 1)
	@$(RUN) nrlib.book --profile $(PROFILE)

pdf: $(INSTALLED)  ## the book, with all of it as a PDF for download; needs Chromium or Chrome
	@$(RUN) nrlib.book --profile $(PROFILE) --pdf

browser: $(INSTALLED)  ## read the built book in Chromium or Chrome: every page, both themes, phone and desktop
	@NRLIB_BOOK=build/book $(RUN) pytest -m browser

links: $(INSTALLED)  ## ask every link of the book to another host whether it still leads somewhere
	@$(RUN) nrlib.book --profile smoke --links

test: lint  ## all checks and tests, with every notebook and a strict build of the book
	@$(RUN) pytest

fast: $(INSTALLED)  ## all tests but the slow ones, a few minutes
	@$(RUN) pytest -m 'not slow'

matrix: $(OLDEST)/.installed  ## all model families on the oldest supported PEFT and transformers
	@$(OLDEST)/bin/python -m pytest $(MATRIX)

$(OLDEST)/.installed: $(INSTALLED) constraints-oldest.txt
	@$(RUN) venv --clear $(OLDEST)
	@echo 'Installing the oldest supported versions (the first time takes minutes)'
	@$(OLDEST)/bin/python -m pip install --quiet -e '.[quantised]' pytest -c constraints-oldest.txt
	@touch $@

lint: $(INSTALLED)  ## style, types, spelling, stripped notebooks
	@$(RUN) ruff check
	@$(RUN) ruff format --check
	@$(RUN) mypy
	@$(BIN)/codespell
	@find notebooks -name '*.ipynb' -exec $(BIN)/nbstripout --verify --extra-keys 'metadata.papermill cell.metadata.papermill' {} +

reproduce: $(INSTALLED)  ## train all published runs again and report the differences (hours)
	@$(RUN) nrlib.cli reproduce --limit $(LIMIT)

bench: $(INSTALLED)  ## speed and memory of training and inference, method against method
	@$(RUN) nrlib.cli bench

dist: $(INSTALLED)  ## the package as it would be uploaded, checked
	@rm -rf dist
	@$(RUN) build --outdir dist
	@$(RUN) twine check --strict dist/*

colab: export GIT_INDEX_FILE := $(CURDIR)/build/colab.index
colab:  # for a release: notebooks with an installing cell (nrlib/launch.py) to the branch that the Colab buttons open
	@rm -f $(GIT_INDEX_FILE)
	@git --work-tree=build/colab add --force --all
	@git push --force origin "$$(git -c user.name=nrlib -c user.email=nrlib@users.noreply.github.com \
	  commit-tree -m 'Notebooks of the release' "$$(git write-tree)")":refs/heads/colab

constraints: $(INSTALLED)  ## write constraints.txt anew from pyproject.toml, keeping versions that still fit
	@$(RUN) pip install --quiet uv
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --all-extras --no-annotate \
	  --custom-compile-command 'make constraints' -o constraints.txt pyproject.toml

clean:  ## delete what was built; texts, backbones and runs in data/cache stay
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache nrlib.egg-info
	find nrlib tests -name __pycache__ -type d -exec rm -rf {} +
