# make demo    the whole pipeline on real digits, from nothing: five to eight minutes on two cores after the install
# make test    what a change can break: every promise once, at most 12 minutes on two idle cores
#              make test PYTEST='-x tests/unit'
# make test-rest       the tests that are marked thorough
# make test-all        both, at most 30 minutes; make test-all PYTEST=tests/chaos
# make test-durations  both, and what each file took into tests/durations.json
# make gpu     what a machine with one, two or eight GPUs runs first, the most important first; what it skips, and why
#              make gpu MINUTES=20          ten minutes otherwise
#              make gpu PYTEST=--on-cpus    the tests themselves, without a GPU
# make ui      MLflow's page on what was run  make ui PORT=5001
# make check   lint, format, types, make test
# make chaos   disturb a run on a real Slurm with every kind of fault, and compare it with one left alone: half an hour
# make docs    docs/configuration.md from the code
# make clean   remove what the demo, the tests and the install made
#
# The interpreter is the first of python3, python3.13, python3.12 and python3.11 that is 3.11 or newer;
# make demo PYTHON=python3.12 chooses another.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test test-rest test-all test-durations gpu ui check chaos docs clean interpreter

VENV := .venv
BIN := $(VENV)/bin
PORT := 5000
PYTEST :=
# Processes that share the tests: many of them wait for a Slurm, a server or a timeout.
WORKERS := 2
# After so many minutes make gpu ends, with what it has seen.
MINUTES := 10
CHAOS :=
NEEDS := pyproject.toml constraints.txt $(VENV)/.made
# ninja, accelerate and torchrun must be found as in an activated environment.
export PATH := $(CURDIR)/$(BIN):$(PATH)

help:
	@sed -n '/^#/!q; s/^# \?//p' Makefile

demo: $(VENV)/.installed
	@since=$$(date +%s); export OMP_NUM_THREADS=1; \
	$(BIN)/foveal data pack digits --out data/digits; \
	$(BIN)/python slurm/submit.py configs/pipelines/demo.yaml --cluster local; \
	$(BIN)/python -m foveal.commands.summary runs/demo --since $$since; \
	printf 'report    '; $(BIN)/foveal report runs/demo

test: TIER := -m 'not thorough'
test-rest: TIER := -m thorough
test-durations: TIER := --write-durations
test test-rest test-all test-durations: $(VENV)/.installed-test
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -q --durations=10 -n $(WORKERS) $(TIER) $(PYTEST)

# Also the files of other folders with a test for a GPU. One process: two would share the GPUs.
gpu: $(VENV)/.installed-test
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} timeout --foreground --signal=INT --kill-after=60s $(MINUTES)m \
		$(BIN)/python -m pytest -v -rs --durations=10 -p no:xdist -m gpu tests/gpu \
		$$(grep -rl --include='test_*.py' 'pytest\.mark\.gpu' tests | grep -v '^tests/gpu/' | sort || true) $(PYTEST)

ui: $(VENV)/.installed
	@[ -f runs/mlflow.db ] || { echo "make ui: nothing was run yet (no runs/mlflow.db); run make demo first" >&2; exit 2; }
	@echo "http://127.0.0.1:$(PORT) in a few seconds (choose Model training at the top left); Ctrl-C ends it"
	@$(BIN)/mlflow ui --backend-store-uri sqlite:///runs/mlflow.db --host 127.0.0.1 --port $(PORT) --workers 1

check: $(VENV)/.installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright
	@$(MAKE) test

chaos: $(VENV)/.installed-test
	@OMP_NUM_THREADS=1 $(BIN)/python tests/chaos/drive.py --report build/chaos.md $(CHAOS)

docs: $(VENV)/.installed
	@$(BIN)/python -m foveal.commands.reference > docs/.configuration.md
	@mv docs/.configuration.md docs/configuration.md

# What other runs left in runs/ is kept, and with it the store that they share.
clean:
	@rm -rf $(VENV) data/digits runs/demo build *.egg-info .pytest_cache .hypothesis .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@rmdir data 2>/dev/null || true
	@[ -d runs ] || exit 0; \
	kept=$$(find runs -mindepth 1 -maxdepth 1 ! -name 'mlflow.db*' ! -name mlartifacts); \
	if [ -z "$$kept" ]; then rm -rf runs; else printf 'kept, with their MLflow store:\n%s\n' "$$kept"; fi

# --- the environment ---

# $(call install,EXTRAS): one call of pip; the large downloads show that it moves, errors go to stderr as they are.
define install
	@echo "installing foveal and what it needs into $(VENV): minutes and about 6 GB the first time"
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.$(1)' \
		| sed -u -n -E 's/^ *((Downloading|Using cached) [^ ]+ \([0-9]{2,}\.[0-9] [MG]B\)).*/  \1/p; s/^Installing collected packages.*/  unpacking/p'
endef

$(VENV)/.installed: $(NEEDS)
	$(call install)
	@touch $@

$(VENV)/.installed-test: $(NEEDS)
	$(call install,[s3$(,)test])
	@touch $(VENV)/.installed $@

$(VENV)/.installed-dev: $(NEEDS)
	$(call install,[s3$(,)test$(,)dev])
	@touch $(VENV)/.installed $(VENV)/.installed-test $@

, := ,

$(VENV)/.made: | interpreter
	@$(find-python); \
	"$$python" -c 'import ensurepip, venv' 2>/dev/null || { \
		version=$$("$$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])'); \
		echo "make: $$python cannot make a virtual environment; install its venv module (Debian, Ubuntu: apt-get install $$version-venv)" >&2; \
		exit 2; }; \
	"$$python" -m venv $(VENV)
	@touch $@

# An environment that stands was made with one interpreter; asking for another must not be overheard.
interpreter:
ifneq ($(PYTHON),)
	@[ ! -e $(VENV)/.made ] || [ "$$($(BIN)/python -V)" = "$$($(PYTHON) -V)" ] || { \
		echo "make: $(VENV) was made with $$($(BIN)/python -V), not with $(PYTHON); run make clean first" >&2; exit 2; }
endif

define find-python
	python=; \
	for candidate in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
		if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	[ -n "$$python" ] || { \
		echo "make: foveal needs Python 3.11 or newer, and none of $(or $(PYTHON),python3 python3.13 python3.12 python3.11) is; install one or name it: make PYTHON=/path/to/python3" >&2; \
		exit 2; }
endef
