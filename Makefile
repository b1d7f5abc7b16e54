# make train | test | test-full | lint | bench
#
# VENV=      (empty) uses the running python3 as it is: nothing but sparring itself is installed
# ARGS="..." is passed on to the job, e.g. make train ARGS="--seq-len 16384 --pattern dense"
# PIP_ARGS   is passed on to pip, e.g. an index of CPU wheels
VENV ?= .venv
ARGS ?=
PIP_ARGS ?=
BENCH ?= copy_task

GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')

# Keep the checkout off sys.path: transformers would take the folder kernels/ for a package of its own.
export PYTHONSAFEPATH := 1

ifeq ($(strip $(VENV)),)
PYTHON := python3
READY := in-place
else
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.installed
endif

ifeq ($(GPUS),0)
CONSTRAINTS := constraints-cpu.txt
PROCESSES := 2
JOB_ENV := OMP_NUM_THREADS=1
else
CONSTRAINTS := constraints-cuda.txt
PROCESSES := $(GPUS)
JOB_ENV :=
endif

.PHONY: train test test-full lint bench in-place

train: $(READY)
	$(JOB_ENV) $(PYTHON) -m torch.distributed.run --standalone --nproc-per-node $(PROCESSES) \
		-m sparring.launch.train $(ARGS)

test: $(READY)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests -m "not full" -n 3 --dist loadfile $(ARGS)

test-full: $(READY)
	$(JOB_ENV) $(PYTHON) benchmarks/proof.py $(ARGS)

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

bench: $(READY)
	$(JOB_ENV) $(PYTHON) benchmarks/$(BENCH).py $(ARGS)

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install -q $(PIP_ARGS) -c $(CONSTRAINTS) torch
	$(PYTHON) -m pip install -q $(PIP_ARGS) -c $(CONSTRAINTS) -e ".[dev]"
	touch $@

in-place:
	@$(PYTHON) -c "import sparring.launch" 2>/dev/null || \
		$(PYTHON) -m pip install -q $(PIP_ARGS) --no-deps --no-build-isolation -e .
