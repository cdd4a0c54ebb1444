# make demo | test | test-slow | test-long | lint | docs | venv | slurm-tools | clean
#
# STACK=oldest         the versions of constraints/oldest.txt, in a folder of their own, .venv-oldest; without it the
#                      newest tested versions that pip can install, in .venv
# PYTHON=python3.12    the interpreter that .venv is made with (3.10 or newer)
# TORCH_INDEX=URL      a package index with another build of torch and torchvision (an older CUDA, or CPU only);
#                      it is remembered in .venv, and giving another one rebuilds .venv
# JOBS=2               test processes at a time

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

JOBS ?= 2
STACK ?= newest
PYTHON ?= $(if $(filter oldest,$(STACK)),$(shell python3.10 -c 'print("python3.10")' 2>/dev/null || echo python3),python3)
VENV := .venv$(if $(filter-out newest,$(STACK)),-$(STACK))
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# Nothing is compiled, at installation or later.
export DS_BUILD_OPS := 0
# Except by Python, for itself: hundreds of processes import the same modules, and read them faster so.
export PYTHONDONTWRITEBYTECODE :=

# .venv is made anew for another TORCH_INDEX and when its interpreter is gone; TORCH_INDEX not given keeps what is there.
HAVE_INDEX := $(shell cat $(VENV)/.torch-index 2>/dev/null)
INDEX := $(or $(TORCH_INDEX),$(HAVE_INDEX))
STALE := $(if $(filter-out $(HAVE_INDEX),$(INDEX)),yes) $(shell $(RUN) -c '' 2>/dev/null || echo yes)

.PHONY: help demo test test-slow test-long lint docs venv slurm-tools clean FORCE

help:
	@sed -n '1,9s/^# \{0,1\}//p' Makefile

demo: venv
	@cat $(VENV)/.stack
	@$(RUN) -m esvit_scale demo --out runs/demo
	@echo "The report: $(CURDIR)/runs/demo/report.html"

# One thread a process: two test processes with torch's own threads on top only wait for each other.
# TESTS chooses some of them: make test STACK=oldest TESTS="tests/models tests/objective".
test: venv
	@cat $(VENV)/.stack
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not slow" -n $(JOBS) --dist loadfile $(TESTS)

# Exit status 5: none of the chosen TESTS is of that kind, which is an error only if it is so for both kinds.
test-slow: venv
	@together=0; alone=0; \
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "slow and not alone and not long" -n $(JOBS) --dist loadfile --durations=15 $(TESTS) || together=$$?; \
	[ $$together = 0 ] || [ $$together = 5 ] || exit $$together; \
	$(RUN) -m pytest -m "slow and alone and not long" --durations=15 $(TESTS) || alone=$$?; \
	[ $$alone = 0 ] || { [ $$alone = 5 ] && [ $$together = 0 ]; } || exit $$alone

# Trainings that take many minutes each; not part of .ci/run.
test-long: venv
	@$(RUN) -m pytest -m "slow and long" --durations=15 $(TESTS)

lint: venv
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check
	@$(RUN) -m mypy

# A page that docs/README.md does not list, or a dead link, is an error (with --quiet it would not be).
docs: venv
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict
	@echo "The documentation: $(CURDIR)/site/index.html"

# What tests/slurm needs (Debian, Ubuntu; as root). Without it these tests are skipped.
slurm-tools:
	@for tool in slurmctld slurmd sbatch munged shellcheck ip; do command -v $$tool >/dev/null || missing=1; done; \
	[ -z "$${missing:-}" ] || { apt-get -qq update \
	  && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
	    slurmctld slurmd slurm-client munge shellcheck iproute2 >/dev/null; }

venv: $(STAMP)

# .venv/.installing lives as long as an installation does: after an interrupted one the next starts from an empty .venv.
$(STAMP): pyproject.toml $(wildcard constraints/*) $(if $(strip $(STALE)),FORCE)
	@command -v $(PYTHON) >/dev/null \
	  || { echo "$(PYTHON): not found. Install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "$(PYTHON) is $$($(PYTHON) -V 2>&1), and 3.10 or newer is needed. Name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "$(PYTHON) cannot make virtual environments (Debian, Ubuntu: sudo apt-get install python3-venv)" >&2; exit 1; }
	@echo "Installing torch, DeepSpeed and what they need into $(VENV): about 6 GB, some minutes, once." >&2
	@rm -f $(STAMP); \
	if [ -e $(VENV)/.installing ] || [ -n "$(strip $(STALE))" ] || ! $(RUN) -c 'import pip' 2>/dev/null; then \
	  rm -rf $(VENV); mkdir $(VENV); touch $(VENV)/.installing; $(PYTHON) -m venv $(VENV); \
	fi; \
	touch $(VENV)/.installing
	@[ -z "$(INDEX)" ] || echo "$(INDEX)" > $(VENV)/.torch-index
	@$(RUN) constraints/install.py $(STACK) dev,tracking,export,opencv,browser,tiff,modalities,s3,docs $(INDEX) || { \
	  [ -z "$(INDEX)" ] || echo "torch was asked from TORCH_INDEX=$(INDEX); give another, or 'make clean' forgets it" >&2; \
	  echo "The installation failed; the lines above say why. 'make venv' starts it again." >&2; exit 1; }
	@rm $(VENV)/.installing; touch $(STAMP)

clean:
	rm -rf .venv .venv-* .mypy_cache .ruff_cache .pytest_cache build dist site *.egg-info
