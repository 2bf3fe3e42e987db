# Every target makes .venv on first use and reuses it. PYTHON picks the interpreter, ARGS goes to the command:
#   make run ARGS="03 07 --keep-going"      make test ARGS="-k 03"      make test PYTHON=python3.12
PYTHON ?= python3
ARGS   ?=
VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready
LAB    := $(VENV)/.lab
# two tests at a time, in the order of tests/conftest.py; ARGS="-n 0" runs them in one process
PYTEST := $(PY) -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

.PHONY: help run test cuda bench lab refresh clean
help:
	@echo 'make run      the course, then the other notebooks, each in a fresh kernel (ARGS="03 07" for some)'
	@echo 'make test     all tests; the last line is "N passed, N failed" (ARGS="-k 03" for some)'
	@echo 'make cuda     of these the notebooks and explainers on a simulated CUDA device'
	@echo 'make bench    timings beside the peers'
	@echo 'make lab      JupyterLab on nbs/'
	@echo 'make refresh  export the library, run the notebooks and write their outputs back, clean'
	@echo 'make clean    remove build leftovers and caches; keeps .venv, data/ and figures/'

run: $(READY)
	@$(PY) scripts/run.py $(ARGS)

test: $(READY)
	@$(PYTEST) $(ARGS)

cuda: $(READY)
	@$(PYTEST) tests/test_cuda.py $(ARGS)

bench: $(READY)
	@$(PY) benchmarks/bench.py $(ARGS)

lab: $(LAB)
	@$(PY) -m jupyter lab --notebook-dir=. $(ARGS)

refresh: $(READY)
	@$(VENV)/bin/nbdev_clean && $(VENV)/bin/nbdev_export
	@$(PY) scripts/run.py --refresh $(ARGS)

clean:
	@rm -rf build dist *.egg-info _proc _docs .pytest_cache
	@find . \( -path ./$(VENV) -o -path ./.git -o -path ./data \) -prune -o \
		-type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
	@echo 'removed: build/ dist/ *.egg-info _proc/ _docs/ and the caches of Python, pytest and Jupyter'
	@echo 'kept: $(VENV)/ data/ figures/ (raw data, models, figures and tables are yours to delete)'

# The mark is written last: an install that failed or was cut off is begun again.
$(READY): settings.ini setup.py
	@$(PY) -m pip --version >/dev/null 2>&1 || { echo 'making $(VENV) with $(PYTHON)'; $(PYTHON) -m venv --clear $(VENV); }
	@echo 'installing pcam_tp and what it needs into $(VENV) (the first time 2 to 10 minutes, about 6 GB, no output)'
	@$(PY) -m pip install -q -e '.[dev]'
	@touch $@

$(LAB): $(READY)
	@echo 'installing JupyterLab into $(VENV)'
	@$(PY) -m pip install -q jupyterlab
	@touch $@
