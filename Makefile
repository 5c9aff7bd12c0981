# `make help` lists the targets. Variables, on the command line or in the environment:
#   PYTHON  interpreter that .venv is made with (3.11 to 3.13)
#   LOCK    lock file that .venv is filled from: envs/cpu.txt or envs/cuda.txt
#   ARGS    more arguments for snakemake (`make run`), pytest (`make test`) or the target's script
#   CORES   cores that `make run` may use; more than there are slow it down

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help env .venv run plan status recommend export clean-orphans prune bench .cache/peer test slurm \
	test-slurm lint lock clean

PIP_VERSION := 26.3
UV_VERSION := 0.13.9
CORES ?= all
ARGS ?=

# The first Python that runs (a shim may not), has a supported version and can make a venv.
CHECK := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	if "$$p" -c '$(CHECK)' >/dev/null 2>&1; then echo "$$p"; break; fi; done)
NEED_PYTHON = @"$(PYTHON)" -c '$(CHECK)' >/dev/null 2>&1 || { echo "make: \
	'$(PYTHON)' is no working Python 3.11 to 3.13 with venv: set PYTHON=/path/to/python" >&2; exit 1; }

LOCK ?= $(shell if nvidia-smi -L 2>/dev/null | grep GPU >/dev/null; then \
	echo envs/cuda.txt; else echo envs/cpu.txt; fi)

# Commands that the workflow starts find the environment's programs first.
IN_ENV := export PATH="$(CURDIR)/.venv/bin:$$PATH" &&
UV := .cache/uv/bin/uv
COMPILE := $(UV) pip compile --quiet --universal --python-version 3.11 \
	--custom-compile-command "make lock"
# The packages that only torch's CUDA build needs, in the lock that is given.
WITHOUT_CUDA = $$(sed -nE 's/^((nvidia|cuda|triton)[^=]*)==.*/--no-emit-package \1/p' $(1))

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: ## make .venv from the lock if it is missing or the lock changed
	@lock="$(LOCK)"; cmp -s "$$lock" .venv/installed.txt || \
		$(MAKE) --no-print-directory .venv LOCK="$$lock"

# installed.txt is written last: without it, or with another lock in it, .venv is made anew.
.venv:
	$(NEED_PYTHON)
	"$(PYTHON)" -m venv --clear .venv
	.venv/bin/python -m pip install --quiet "pip==$(PIP_VERSION)"
	.venv/bin/python -m pip install --requirement "$(LOCK)"
	cp "$(LOCK)" .venv/installed.txt

run: env ## run the workflow (ARGS="--configfile my.yaml", CORES=4)
	$(IN_ENV) snakemake --cores $(CORES) --resources gpu=1 $(ARGS)

plan: env ## memory, disk and hours before anything runs (ARGS="--config my.yaml --card rtx-4090")
	$(IN_ENV) python scripts/plan.py $(ARGS)

status: env ## what is done, missing or stale, and why (ARGS="--config my.yaml")
	$(IN_ENV) python scripts/status.py $(ARGS)

clean-orphans: env ## list results that the config no longer names (ARGS=--yes deletes them)
	$(IN_ENV) python scripts/clean_orphans.py $(ARGS)

recommend: env ## the cheapest that is good enough (ARGS="--budget 120" or "--recover 0.9")
	$(IN_ENV) python scripts/recommend.py $(ARGS)

export: env ## an adapter as a folder for a hub (ARGS="results/adapters/... --out my-adapter")
	$(IN_ENV) python scripts/export.py $(ARGS)

prune: env ## list kept results that no present result uses (ARGS=--yes deletes them)
	$(IN_ENV) python scripts/prune.py $(ARGS)

# GPTQModel wants other versions than we do: it has an environment of its own, made as .venv is.
# --no-deps: the lock is complete, and its torch is ours (see benchmarks/peer.in).
.cache/peer:
	$(NEED_PYTHON)
	@cmp -s benchmarks/peer.txt .cache/peer/installed.txt || { set -x; \
		"$(PYTHON)" -m venv --clear .cache/peer; \
		.cache/peer/bin/python -m pip install --quiet "pip==$(PIP_VERSION)"; \
		.cache/peer/bin/python -m pip install --no-deps --requirement benchmarks/peer.txt; \
		cp benchmarks/peer.txt .cache/peer/installed.txt; }

# Not empty where the benchmarks that are asked for need GPTQModel.
PEER = $(if $(findstring --without-peer,$(ARGS)),,$(if $(findstring --only,$(ARGS)),$(findstring peer,$(ARGS)),yes))

bench: env $(if $(PEER),.cache/peer) ## measure against others and limits (ARGS=--without-peer)
	$(IN_ENV) python benchmarks/run.py $(ARGS)

test: env lint ## lint, then run the tests; those on SLURM where it is installed (ARGS="-k name")
	$(IN_ENV) pytest --numprocesses auto $(ARGS)

# A real SLURM for the tests that run on it, which are skipped without. Debian's packages start
# nothing by themselves where no systemd runs.
slurm: ## install Debian's SLURM, for test-slurm (as root)
	@PATH="$$PATH:/usr/sbin"; type slurmctld slurmd munged >/dev/null 2>&1 || { \
		[ "$$(id -u)" = 0 ] || { echo "make: SLURM's packages want root to install" >&2; exit 1; }; \
		command -v apt-get >/dev/null || { echo "make: no apt-get; install SLURM by hand" >&2; exit 1; }; \
		apt-get update -qq; \
		DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends \
			slurmctld slurmd slurm-client munge; }

test-slurm: env slurm ## run the tests on a real SLURM of one node, started for them
	$(IN_ENV) pytest tests/slurm $(ARGS)

lint: env ## check style and format of scripts, tests and rules
	$(IN_ENV) ruff check
	$(IN_ENV) ruff format --check
	$(IN_ENV) snakefmt --check $(wildcard Snakefile) workflow
	$(IN_ENV) snakemake --lint

$(UV): Makefile
	$(NEED_PYTHON)
	"$(PYTHON)" -m venv --clear .cache/uv
	.cache/uv/bin/python -m pip install --quiet "uv==$(UV_VERSION)"
	touch $(UV)

# The CPU lock is the CUDA lock less the packages that only torch's CUDA build needs.
lock: $(UV) ## remake all locks (LOCKFLAGS=--upgrade for newer indirect packages)
	$(COMPILE) envs/requirements.in --output-file envs/cuda.txt $(LOCKFLAGS)
	cp envs/cuda.txt envs/cpu.txt
	$(COMPILE) envs/requirements.in --output-file envs/cpu.txt \
		$(call WITHOUT_CUDA,envs/cuda.txt)
	$(COMPILE) benchmarks/peer.in --override benchmarks/peer.in \
		--output-file benchmarks/peer.txt $(call WITHOUT_CUDA,envs/cuda.txt) $(LOCKFLAGS)

clean: ## remove .venv and caches; results stay
	rm -rf .venv .cache .pytest_cache .ruff_cache .hypothesis
	find $(wildcard scripts tests workflow) -name __pycache__ -type d -prune -exec rm -rf {} +
