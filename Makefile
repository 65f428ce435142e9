# make replicate    installs into .venv, then draws the toy figures (minutes on a CPU)
# make demo         installs into .venv, then trains autoencoders on a small language model
# make real         the same on SmolLM2-135M, which a Python package holds, and Python's documentation
# make test         installs into .venv, then runs the tests that take minutes at most
# make test-all     runs more of them: schedules of faults of rented machines, older Tritons
# make torture      fuzzes, kills, damages, fills disks and lets rented machines fail, for an hour
# make test-peers   installs SAELens, dictionary_learning, sparsify and circuit-tracer beside it, compares
# ARGS passes flags on: make replicate ARGS="--preset full"
PYTHON ?= python3
PY = .venv/bin/python
# waiting threads sleep: on a busy machine spinning ones slow small GEMMs tenfold (LOG.md)
PASSIVE = OMP_WAIT_POLICY=PASSIVE
QUIET = OMP_NUM_THREADS=1 $(PASSIVE)
# most of the tests' time is waiting, for processes and for rented machines: three share two cores
PYTEST = $(QUIET) $(PY) -m pytest --numprocesses 3 --dist worksteal

# sized for 10 minutes on two cores: most of it is the model's forward pass
REAL = --model smollm2 --layer 12 --site resid_post --dataset pydoc --context-length 256 \
	--max-text-tokens 130000 --held-out 0.3 --n-tokens 280000 --n-eval-tokens 2048 \
	--n-page-tokens 20000 --arch relu batchtopk matryoshka --target-l0 16 32 --page-l0 40 \
	--expansion-exp-low 1 --expansion-exp-high 2 --batch-size 512 --lr 3e-3 --lm-batch-size 4

.PHONY: replicate demo real test test-all torture test-peers lint

replicate: .venv/installed
	$(PASSIVE) $(PY) replicate_toy_models.py $(ARGS)

demo: .venv/installed
	$(PASSIVE) $(PY) run.py --preset demo $(ARGS)

real: .venv/installed-real
	$(PASSIVE) $(PY) run.py $(REAL) $(ARGS)

test: .venv/installed-tests
	$(PYTEST) $(ARGS)

test-all: .venv/installed-tests
	$(PYTEST) --long $(ARGS)

torture: .venv/installed-tests
	$(PYTEST) --torture tests/torture tests/rental tests/test_vastai_utils.py $(ARGS)

test-peers: .venv-peers/installed
	$(QUIET) .venv-peers/bin/python -m pytest tests/test_peers*.py $(ARGS)

lint: .venv/installed-tests
	$(PY) -m ruff check
	$(PY) -m ruff format --check

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --requirement requirements.txt
	touch $@

# --no-deps: see there
.venv/installed-real: .venv/installed requirements-real.txt
	$(PY) -m pip install --quiet --no-deps --requirement requirements-real.txt
	touch $@

.venv/installed-tests: .venv/installed tests/requirements.txt requirements-vast.txt
	$(PY) -m pip install --quiet --requirement tests/requirements.txt
	touch $@

# these without their dependencies: see tests/requirements-peers.txt
.venv-peers/installed: requirements.txt tests/requirements.txt tests/requirements-peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --requirement tests/requirements-peers.txt
	.venv-peers/bin/pip install --quiet --no-deps dictionary-learning==0.1.0 nnsight==0.3.7 circuit-tracer==0.5.0
	touch $@
