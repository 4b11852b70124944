# Everything happens in .venv, which `make install` creates and every other target brings up to date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := sb3_dppo hyperparams _sb3_dppo_autoload.py examples benchmarks tests

.PHONY: install lock demo docs test test-slow test-oldest lint type format clean

install: $(VENV)/.installed

# What is locked is checked against its hashes. The second step adds what is not: this project, PyTorch in the build that the
# machine offers, and for Python 3.10 the packages that have left it behind. The last one compiles on all cores, where pip would
# use one; some packages have files for other versions of Python.
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --require-hashes --no-deps --only-binary :all: --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	touch $@

# After a change of constraints.txt: the hashes of all files of each version, so that the lock serves every Python and platform.
lock: $(BIN)/pip-compile
	CUSTOM_COMPILE_COMMAND='make lock' $(BIN)/pip-compile --quiet --generate-hashes --strip-extras --no-annotate \
		--no-emit-options --no-emit-index-url --no-emit-find-links --unsafe-package torch \
		--output-file requirements.lock constraints.txt

$(BIN)/pip-compile:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip-tools

# The site, in docs/_build: warnings are errors.
docs: install $(BIN)/sphinx-build
	$(BIN)/sphinx-build -q -E -a -W --keep-going docs docs/_build

$(BIN)/sphinx-build: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[docs]'
	touch $@

demo: install
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

test: install
	$(BIN)/python -m pytest -n 2

test-slow: install
	$(BIN)/python -m pytest -m slow

# The oldest version of each dependency that setup.cfg allows, but for PyTorch, which is that of constraints.txt.
test-oldest:
	test -x $(VENV)-oldest/bin/python || $(PYTHON) -m venv $(VENV)-oldest
	grep '^torch==' constraints.txt > $(VENV)-oldest/constraints.txt
	sed -nE '/torch/d; s/^    ([A-Za-z0-9_-]+)(\[.*\])?>=([0-9.]+).*/\1==\3/p' setup.cfg | sort -u >> $(VENV)-oldest/constraints.txt
	$(VENV)-oldest/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint $(VENV)-oldest/constraints.txt --editable '.[dev]'
	$(VENV)-oldest/bin/python -m pytest -n 2

lint: install
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

type: install
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf $(VENV) $(VENV)-oldest build dist *.egg-info
