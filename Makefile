# make book   build the book and print where to open it
# make test   everything that has to hold before a change is published
# make quick  the unit tests but for the slow ones, and one notebook, in under a minute
# make bench  speed and accuracy beside naive code and other libraries
# make mutants change the library in one place at a time and see that a test notices; MODULE=weights for one module
# make accept run the notebooks and store their new outputs, for review in the diff
# make shots  take pictures of every page, light, dark and on a phone: _build/screenshots
# make pdf    print the built book as one PDF: _build/book.pdf
# make flow   run the chapters without their check cells; `make test` only hides from what one reads what checks leave
# make units  the unit tests alone, slow ones too; SALT=x for other random numbers
# make newest the unit tests with the newest versions of all dependencies
# make dist   build wheel and source distribution in dist/ and try them in an empty environment
# make tag    whether version, changelog and citation fit the tag that TAG names, and its release notes
# make clean  remove what the build made, keep .venv
PYTHON ?= python3
BIN := .venv/bin
SHELL := /bin/bash
.SHELLFLAGS := -eo pipefail -c
.DELETE_ON_ERROR:

NOTEBOOKS := $(sort $(wildcard book/*.ipynb))
QUICK := book/tilting.ipynb
SOURCES := $(NOTEBOOKS) $(wildcard tiltlib/*.py) conftest.py requirements.txt
RUN := _build/run.stamp
# A process for each core, up to eight, as each holds torch: about 1 GB.
WORKERS := -n logical --maxprocesses 8
# A notebook is run by one of them. The limit on a cell is for one that hangs, far above what a busy machine needs.
NBVAL := $(WORKERS) --dist loadfile --nbval-cell-timeout 1200 --nbval-current-env
# Tests of the built pages, in a browser.
BROWSER := tests/test_pages.py tests/test_explorables.py tests/test_pdf.py
# Tests that need neither a built book nor a run notebook.
UNITS := $(WORKERS) --dist loadfile $(BROWSER:%=--ignore %) --ignore tests/test_main_flow.py tests
# After a warning the next build starts afresh: Sphinx would not repeat it for a page that has not changed.
build = $(BIN)/jupyter-book build . -W --keep-going $(1) || { rm -rf _build/.doctrees; false; }

.PHONY: book pdf shots test quick flow units newest bench mutants accept dist tag clean
.DEFAULT_GOAL := book

# Without the model of the last line the chapter that reads it shows its stored outputs: see conftest.py.
.venv/.stamp: requirements.txt requirements-language.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-language.txt || test -z "$$CI"
	touch $@

# Fails on errors and verdicts, not on a digit that another processor rounds differently: `make test` compares outputs.
$(RUN): $(SOURCES) | .venv/.stamp
	$(BIN)/pytest --nbval-lax $(NBVAL) $(NOTEBOOKS)
	touch $@

book: $(RUN)
	$(call build,--quiet)
	@echo "Open file://$(CURDIR)/_build/html/index.html"

pdf: book
	$(BIN)/python book/_ext/pdf.py

shots: book
	$(BIN)/python book/_ext/shots.py

# Starts without _build, so that every page shows outputs of this very commit.
test: .venv/.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python book/_ext/nbnorm.py --check
	rm -rf _build
	$(BIN)/pytest --nbval $(NBVAL) $(BROWSER:%=--ignore %) --ignore tests/test_main_flow.py
	touch $(RUN)
	{ $(call build); } > _build/build.log 2>&1 || { cat _build/build.log; exit 1; }
	@! grep "Executing notebook" _build/build.log || { echo "The build ran a notebook that the tests had not."; exit 1; }
	$(BIN)/pytest $(WORKERS) --dist loadgroup $(BROWSER)

quick: .venv/.stamp
	$(BIN)/pytest --nbval $(NBVAL) -m "not slow" $(BROWSER:%=--ignore %) tests $(QUICK)

flow: .venv/.stamp
	$(BIN)/pytest $(WORKERS) tests/test_main_flow.py

units: .venv/.stamp
	$(BIN)/pytest $(UNITS)

# The first block of requirements.txt, without versions. Jupyter Book 2 is another program: it has no Sphinx.
_build/newest.txt: requirements.txt
	mkdir -p _build
	sed -n '/^$$/q; s/^jupyter-book==.*/jupyter-book<2/p; s/==.*//p' requirements.txt > $@

newest: _build/newest.txt
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --disable-pip-version-check -r _build/newest.txt
	.venv-newest/bin/pip install --quiet --disable-pip-version-check --no-deps -e .
	.venv-newest/bin/pip freeze
	.venv-newest/bin/pytest $(UNITS)

.venv-bench/.stamp: requirements-bench.txt pyproject.toml
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet --disable-pip-version-check -r requirements-bench.txt -e .
	.venv-bench/bin/pip install --quiet --disable-pip-version-check --no-deps particles==0.4
	touch $@

# Peers get an environment of their own, so that they cannot change a version the book was checked with.
bench: .venv-bench/.stamp
	.venv-bench/bin/python tests/bench.py

.venv-mutants/.stamp: requirements-mutants.txt requirements-language.txt
	$(PYTHON) -m venv .venv-mutants
	.venv-mutants/bin/pip install --quiet --disable-pip-version-check -r requirements-mutants.txt
	.venv-mutants/bin/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-language.txt
	touch $@

mutants: .venv-mutants/.stamp
	.venv-mutants/bin/python tests/mutants.py $(MODULE)

accept: .venv/.stamp
	$(BIN)/pytest --nbval-lax $(NBVAL) $(NOTEBOOKS)
	$(BIN)/python book/_ext/nbnorm.py --accept
	touch $(RUN)

.venv-dist/.stamp: requirements-dist.txt
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/pip install --quiet --disable-pip-version-check -r requirements-dist.txt
	touch $@

dist: .venv-dist/.stamp
	.venv-dist/bin/python tests/dist.py

tag:
	@$(PYTHON) tests/release.py "$$TAG"

clean:
	rm -rf _build dist *.egg-info build .pytest_cache .ruff_cache .mypy_cache .hypothesis
