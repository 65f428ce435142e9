# make replicate    installs into .venv, then draws the toy figures (minutes on a CPU)
# make test         installs into .venv, then runs the tests
# ARGS passes flags on: make replicate ARGS="--preset full"
PYTHON ?= python3
PY = .venv/bin/python

.PHONY: replicate test lint

replicate: .venv/installed
	$(PY) replicate_toy_models.py $(ARGS)

test: .venv/installed-tests
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(PY) -m pytest $(ARGS)

lint: .venv/installed-tests
	$(PY) -m ruff check
	$(PY) -m ruff format --check

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/installed-tests: .venv/installed tests/requirements.txt
	$(PY) -m pip install --quiet --requirement tests/requirements.txt
	touch $@
