# Thin: each target is the command that you could type. Targets make their own environment in .venv.
# Python 3.10 or later; .venv is made again for a PYTHON or a TORCH other than its own.
PYTHON ?= python3
# What pip installs: torch==VERSION; `cpu` is the CPU build; `torch` is the one that PYTHON has already, where requirements.txt allows it.
# Without TORCH a .venv of one of these words stays one.
MADE_WITH := $(shell cat .venv/ready 2> /dev/null)
TORCH ?= $(if $(filter-out cpu torch,$(MADE_WITH)),torch==2.13.0,$(or $(MADE_WITH),torch==2.13.0))
CUDA_TORCH ?= torch==2.9.1  # the contest's: on Linux the package index gives its CUDA build (about 6 GB)

LOG ?= logs/2026-11-29_demo.txt  # `make submission` reads this log

TORCH_PIP := $(TORCH)
TORCH_NOTE := pip fetches $(TORCH): 2.7 GB for the CUDA build on Linux. Without an NVIDIA GPU: `make $(MAKECMDGOALS) TORCH=cpu`, 0.2 GB
ifeq ($(strip $(TORCH)),cpu)
TORCH_PIP := torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
TORCH_NOTE := pip fetches the CPU build of torch, 0.2 GB
endif
ifeq ($(strip $(TORCH)),torch)
TORCH_PIP := torch -c requirements.txt
TORCH_NOTE := The torch of $(PYTHON) is used; pip fetches another one, 2.7 GB, only where there is none or requirements.txt excludes it
SYSTEM_PACKAGES := --system-site-packages
endif

VERSION_OF := -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null
VERSION := $(shell $(PYTHON) $(VERSION_OF))
ifneq ($(VERSION),$(shell .venv/bin/python $(VERSION_OF)))
REMAKE := --clear
endif
ifneq ($(origin TORCH),file)  # given by the user, and not what .venv was made with
ifneq ($(strip $(TORCH)),$(MADE_WITH))
REMAKE := --clear
endif
endif

.PHONY: demo test test-all test-cuda mutants check-gpu python compiler bench submission lint clean remake

.venv/ready: requirements.txt requirements-dev.txt $(if $(REMAKE),remake) | python
	$(PYTHON) -m venv $(REMAKE) $(SYSTEM_PACKAGES) .venv
ifdef SYSTEM_PACKAGES  # those of a virtual environment whose Python PYTHON is
	$(PYTHON) -c 'import site; print("\n".join(site.getsitepackages()))' > "$$(.venv/bin/python -c 'import site; print(site.getsitepackages()[0])')/parent.pth"
endif
	@echo '$(TORCH_NOTE)'
	.venv/bin/python -m pip install $(TORCH_PIP)
	.venv/bin/python -m pip install -r requirements.txt -r requirements-dev.txt
	echo '$(strip $(TORCH))' > $@

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed; $(PYTHON) is %d.%d: give another, as in `make PYTHON=python3.12 ...`" % sys.version_info[:2])'

demo: .venv/ready
	.venv/bin/python data/prepare.py demo
	rm -f demo/logs/demo.txt
	VARIANT=demo RUN_ID=demo OUTPUT_DIR=demo VAL_LOSS_EVERY=50 .venv/bin/python train_gpt.py
	.venv/bin/python -m tools.plot demo/logs/demo.txt -o demo/curve.png

test: .venv/ready
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check --line-length 120 train_gpt.py
	.venv/bin/python -m pytest

test-all: test
	.venv/bin/python -m pytest -m slow

compiler:
	@for tool in gcc g++ nm; do command -v $$tool > /dev/null || { echo "make test-cuda needs $$tool: install g++ and binutils"; exit 1; }; done
	@$(PYTHON) -c "import os, sysconfig; os.stat(sysconfig.get_paths()['include'] + '/Python.h')" 2> /dev/null \
		|| { echo "make test-cuda needs Python.h: install the headers of $(PYTHON) (python3-dev)"; exit 1; }

.venv-cuda/$(strip $(CUDA_TORCH)): requirements.txt requirements-dev.txt $(if $(filter-out $(VERSION),$(shell .venv-cuda/bin/python $(VERSION_OF))),remake) | python
	$(PYTHON) -m venv --clear .venv-cuda
	@echo 'pip fetches $(strip $(CUDA_TORCH)): 3 GB for the CUDA build on Linux, 6 GB on disk'
	.venv-cuda/bin/python -m pip install $(CUDA_TORCH)
	.venv-cuda/bin/python -m pip install -r requirements.txt -r requirements-dev.txt
	touch $@

test-cuda: compiler .venv-cuda/$(strip $(CUDA_TORCH))
	CUDA_VISIBLE_DEVICES= .venv-cuda/bin/python -m pytest
	.venv-cuda/bin/python -m pytest tests/nullgpu --dist load --maxschedchunk 1

mutants: .venv/ready  # which planted mistakes the default tests notice; long
	.venv/bin/python -m tests.mutants

check-gpu: python  # with the torch of the machine: it needs nothing else
	$(PYTHON) -m tools.bench.check_gpu

bench: .venv/ready
	.venv/bin/python -m tools.bench

submission: .venv/ready  # writes submission.json from LOG; the script comes from the commit that wrote it
	.venv/bin/python -m tools.record $(LOG) --non-record --submission-only submission.json --name "One readable file, CPU check run" \
		--author "the founder-engineer of this project" \
		--blurb "Not an entry: nothing has been run on 8xH100 or on FineWeb. A run on CPU cores that shows that every stage works."

lint: .venv/ready
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check --line-length 120 train_gpt.py

clean:
	rm -rf .venv .venv-cuda demo
