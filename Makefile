# make demo, make test, make check, make docs: each sets up what it needs and asks for nothing but Python 3.11 to 3.13.

SHELL := /bin/bash
BIN := .venv/bin
# The first of these that is a Python this project runs on; set PYTHON=... to choose another.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
LFW ?= $(abspath ../shared/data/lfw)

.PHONY: demo test slow gpu-program notebooks docs check format lock sbom audit clean

demo: .venv/installed
	$(BIN)/python scripts/train.py configs/demo.py --workdir runs/demo

test: check
	ARCFACE_JAX_LFW="$$([ -d "$(LFW)" ] && echo "$(LFW)")" $(BIN)/python -m pytest -n 2

slow: .venv/installed
	ARCFACE_JAX_LFW="$$([ -d "$(LFW)" ] && echo "$(LFW)")" $(BIN)/python -m pytest -m slow

# Compiles the train step for an H100, without one; 1.2 GB of packages in an environment of its own.
gpu-program: .venv-gpu/installed
	.venv-gpu/bin/python -m pytest -n 0 -m gpu_program tests/machine/test_gpu_program.py

notebooks: .venv/installed
	[ -d "$${ARCFACE_JAX_WORKDIR:-runs/demo}" ] || $(MAKE) demo
	$(BIN)/python scripts/notebooks.py

# The site, in site/index.html.
docs: .venv-docs/installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Hashes of the releases in constraints.txt, for every environment below. Without torch, whose build for CPUs
# or CUDA is the choice of whoever installs it.
lock: .venv-tools/installed
	mkdir -p locks
	$(call lock,.venv)
	$(call lock,.venv-gpu)
	$(call lock,.venv-docs)

comma := ,
lock = printf 'hatchling\neditables\n' | .venv-tools/bin/uv pip compile --quiet --universal --python-version 3.11.5 \
	--generate-hashes --no-annotate --no-header --constraints constraints.txt \
	--overrides <(echo "torch; python_version < '3'") \
	$(addprefix --extra ,$(subst $(comma), ,$(EXTRAS_$1))) pyproject.toml - -o locks/$(LOCK_$1)

# What the wheel brings into an environment, as CycloneDX, from an environment that has nothing else.
sbom: .venv-tools/installed
	rm -rf .venv-sbom && $(or $(PYTHON),python3) -m venv .venv-sbom
	.venv-sbom/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt .
	.venv-tools/bin/cyclonedx-py environment --pyproject pyproject.toml --of JSON -o sbom.json .venv-sbom/bin/python
	rm -rf .venv-sbom

# Known vulnerabilities of the versions in constraints.txt; asks pypi.org.
audit: .venv-tools/installed
	.venv-tools/bin/pip-audit --strict --disable-pip --no-deps -r constraints.txt

.venv-tools/installed:
	$(or $(PYTHON),python3) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check cyclonedx-bom==7.5.0 pip-audit==2.10.1 uv==0.13.9
	@touch $@

EXTRAS_.venv := jax2onnx,lmdb,onnx,parquet,tfds,test
EXTRAS_.venv-gpu := gpu-plan-cuda12,test
EXTRAS_.venv-docs := docs
LOCK_.venv := test.txt
LOCK_.venv-gpu := gpu-plan.txt
LOCK_.venv-docs := docs.txt

.venv/installed .venv-gpu/installed .venv-docs/installed: pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && apt-get install -y -qq python3 python3-venv; fi
	@[ -n "$(PYTHON)" ] || python3 -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "error: no Python 3.11 to 3.13 found; install one, or name it: make PYTHON=/path/to/python3.12"; exit 2; }
	@$(or $(PYTHON),python3) -c 'import ensurepip' 2>/dev/null || apt-get install -y -qq python3-venv \
		|| { echo "error: Python lacks its venv module; on Debian: apt-get install python3-venv"; exit 2; }
	$(or $(PYTHON),python3) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r locks/$(LOCK_$(@D))
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt \
		-e '.[$(EXTRAS_$(@D))]'
	@touch $@

clean:
	rm -rf .venv .venv-gpu .venv-docs .venv-tools .venv-sbom sbom.json runs site
