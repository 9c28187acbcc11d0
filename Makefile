# Thin: each target is the command that you could type. Targets make their own environment in .venv.
PYTHON ?= python3
TORCH ?= torch==2.13.0  # the version that the tests ran with; on the contest's image use TORCH=torch

CUDA_TORCH ?= torch==2.9.1  # the contest's: on Linux the package index gives its CUDA build (about 6 GB)

LOG ?= logs/2026-11-22_demo.txt  # the committed log that submission.json is made of

.PHONY: demo test test-all test-cuda mutants check-gpu compiler bench submission lint clean

.venv/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet $(TORCH)
	.venv/bin/python -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	touch $@

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

.venv-cuda/$(strip $(CUDA_TORCH)): requirements.txt requirements-dev.txt
	$(PYTHON) -m venv --clear .venv-cuda
	.venv-cuda/bin/python -m pip install --quiet $(CUDA_TORCH)
	.venv-cuda/bin/python -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	touch $@

test-cuda: compiler .venv-cuda/$(strip $(CUDA_TORCH))
	CUDA_VISIBLE_DEVICES= .venv-cuda/bin/python -m pytest
	.venv-cuda/bin/python -m pytest tests/nullgpu --dist load --maxschedchunk 1

mutants: .venv/ready  # which planted mistakes the default tests notice; long
	.venv/bin/python -m tests.mutants

check-gpu:  # with the torch of the machine: it needs nothing else
	$(PYTHON) -m tools.bench.check_gpu

bench: .venv/ready
	.venv/bin/python -m tools.bench

submission: .venv/ready  # submission.json from LOG and the commit that it tells
	.venv/bin/python -m tools.record $(LOG) --non-record --submission-only submission.json --name "One readable file, CPU check run" \
		--author "the founder-engineer of this project" \
		--blurb "Not an entry: nothing has been run on 8xH100 or on FineWeb. A run on CPU cores that shows that every stage works."

lint: .venv/ready
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check --line-length 120 train_gpt.py

clean:
	rm -rf .venv .venv-cuda demo
