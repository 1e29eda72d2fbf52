# Two commands do all the set-up:  make demo  (the main job)  and  make test.
# Everything is installed into .venv; nothing outside this folder is touched.

PYTHON ?= python3.11
EXTRAS ?= experiments,test
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
DEMO ?= runs/demo
SMOLLM2 ?= runs/smollm2
DATA ?=

BIN := .venv/bin
# The stamp's name carries a checksum of pyproject.toml and of the Python asked for, so
# that a change of the dependencies, or make test PYTHON=python3.12, installs again.
STAMP := .venv/.installed-$(shell { cat pyproject.toml; echo "$(EXTRAS) $(PYTHON)"; } | cksum | cut -d ' ' -f 1)
SOURCES := sbr_jax experiments tools tests $(wildcard benchmarks)
PAGES := $(filter-out docs/reference,$(wildcard *.md docs/*.md docs/methods)) experiments/README.md $(wildcard tests/*.md tests/*/README.md)
# What needs no language model: the mathematics, in about a minute.
CORE := sbr_jax/subspace sbr_jax/transforms sbr_jax/fisher sbr_jax/losses.py $(addprefix tests/core/test_,subspace.py subspace_geometry.py transforms.py losses.py trust_region.py)

.DEFAULT_GOAL := help
.PHONY: help venv demo report smollm2 test test-all test-core cases parity bench bench-venv lint style types format docs clean

help: ## list the targets
	@echo "Targets of this Makefile:"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile \
	  | awk -F '|' '{ printf "%-14s %s\n", $$1, $$2 }'

venv: $(STAMP) ## make .venv and install what is needed
	@echo "==> .venv is ready"

$(STAMP): pyproject.toml
	@set -eu; \
	newer='import sys; sys.exit(sys.version_info < (3, 11))'; \
	python=""; \
	for candidate in "$(PYTHON)" python3; do \
	  if "$$candidate" -c "$$newer" >/dev/null 2>&1; then \
	    python="$$candidate"; break; \
	  fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "error: expected Python 3.11 or newer, found neither '$(PYTHON)' nor a recent enough 'python3'; install one, or name it: make PYTHON=/path/to/python3.12" >&2; \
	  exit 1; \
	fi; \
	if [ "$$("$(BIN)/python" --version 2>/dev/null)" != "$$("$$python" --version)" ]; then \
	  echo "==> making .venv with $$("$$python" --version)"; \
	  "$$python" -m venv --clear .venv || { \
	    echo "error: '$$python -m venv' failed; on Debian and Ubuntu install the package python3-venv (or python3.11-venv) first" >&2; \
	    exit 1; \
	  }; \
	fi; \
	echo "==> installing sbr_jax[$(EXTRAS)] into .venv (a few minutes the first time)"; \
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check \
	  --editable ".[$(EXTRAS)]"; \
	rm -f .venv/.installed-*; \
	touch "$@"; \
	echo "==> installed"

demo: $(STAMP) ## plain LoRA, SafeAnchor and lean on the testbed, then the report
	@echo "==> running the preset 'demo' into $(DEMO) (some 3 minutes on two cores; finished stages are kept)"
	@$(BIN)/python -m experiments.run demo --workdir "$(DEMO)" --jobs auto
	@$(MAKE) --no-print-directory report

report: $(STAMP) ## tables and report.html from the results of make demo
	@echo "==> writing the report of $(DEMO)"
	@$(BIN)/python -m experiments.report "$(DEMO)"

# Without a data folder the sets come from the hub, which has a part of them.
COMMA := ,
FROM_DATA = $(if $(DATA),--data "$(DATA)")
FROM_HUB = $(if $(DATA),,--domains medical code --study.benchmarks advbench jailbreakbench xstest)

smollm2: ## a real chat model fetched, taught to refuse and fine-tuned: DATA=FOLDER
	@$(MAKE) --no-print-directory EXTRAS="$(EXTRAS),gguf$(if $(DATA),,$(COMMA)eval)" venv
	@echo "==> making a chat model in $(SMOLLM2)-model, then running the preset 'smollm2' into $(SMOLLM2) (about half an hour on two cores; what is finished is kept)"
	@$(BIN)/python -m experiments.smollm2 --output "$(SMOLLM2)-model" $(FROM_DATA)
	@$(BIN)/python -m experiments.run smollm2 --workdir "$(SMOLLM2)" --model "$(SMOLLM2)-model/aligned" --seed 0 --methods plain lean safegrad --study.limit 24 --study.held-out 30 $(FROM_DATA) $(FROM_HUB)
	@$(BIN)/python -m experiments.report "$(SMOLLM2)"

PYTEST = JAX_PLATFORMS="$${JAX_PLATFORMS:-cpu}" $(BIN)/python -m pytest -n $(WORKERS)

# Pyright has one thread: the tests need not wait for it.
test: style ## lint, types, doctests and tests; the last line counts them
	@$(MAKE) --no-print-directory -j 2 types cases

test-all: style ## every case of every table too: what make test leaves out
	@$(MAKE) --no-print-directory -j 2 types cases EVERY=yes

cases: $(STAMP)
	@echo "==> doctests and tests, $(WORKERS) at a time"
	@$(PYTEST) $(if $(EVERY),-m "") --dist loadfile --no-loadscope-reorder \
	  --doctest-modules sbr_jax experiments tools tests $(ARGS)

test-core: $(STAMP) ## the mathematics alone: any pytree, no language model
	@$(PYTEST) --dist loadfile --doctest-modules $(CORE) $(ARGS)

# PyTorch's package index also has wheels for CPUs only, which are much smaller: name it
# with PIP_EXTRA_INDEX_URL, for this and for bench-venv.
parity: ## model families against PyTorch, scores against lm-eval; both are installed
	@$(MAKE) --no-print-directory EXTRAS="$(EXTRAS),parity,eval" venv
	@echo "==> comparing with PyTorch, peft and lm-eval (about a quarter of an hour on one core)"
	@JAX_PLATFORMS=cpu $(BIN)/python -m pytest tests/parity tests/evaluation/test_harness.py \
	  tests/models/test_qwix.py $(ARGS)

# Peers have a venv of their own: what they ask for is nobody else's.
PEERS := .venv-peers/.installed-$(shell { echo torch 2.13.0; "$(BIN)/python" --version 2>&1; } | cksum | cut -d ' ' -f 1)
BENCH ?= lora_step fisher methods projection quantize generation gcg seeds startup growth

bench-venv: $(PEERS) ## make .venv-peers with what the benchmarks compare with
	@echo "==> .venv-peers is ready"

$(PEERS): $(STAMP)
	@echo "==> installing torch, transformers and peft into .venv-peers"
	@"$(BIN)/python" -m venv --clear .venv-peers
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check \
	  "torch==2.13.0" "transformers>=5.0,<6" "peft>=0.17"
	@touch "$@"

bench: $(STAMP) $(PEERS) ## tables of speed and memory, beside peers; BENCH="lora_step gcg" for some
	@set -e; for name in $(BENCH); do \
	  echo "==> python -m benchmarks.$$name $(ARGS)"; \
	  JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(BIN)/python -m benchmarks.$$name $(ARGS); \
	done

lint: style types ## ruff, mdformat, shellcheck and pyright, changing nothing

style: $(STAMP)
	@echo "==> ruff check and format --check"
	@$(BIN)/ruff check --quiet $(SOURCES)
	@$(BIN)/ruff format --check --quiet $(SOURCES)
	@echo "==> mdformat --check"
	@$(BIN)/mdformat --check $(PAGES)
	@echo "==> shellcheck"
	@$(BIN)/shellcheck --external-sources tpu_setup/*.sh

types: $(STAMP)
	@echo "==> pyright"
	@$(BIN)/basedpyright --level error

format: $(STAMP) ## ruff and mdformat, mending what they can
	@echo "==> ruff check --fix and format, mdformat"
	@$(BIN)/ruff check --fix $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)
	@$(BIN)/mdformat $(PAGES)

docs: $(STAMP) ## the documentation as a site in site/, refusing broken links
	@echo "==> installing sbr_jax[docs] into .venv"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[docs]"
	@echo "==> building site/"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "==> site/index.html is ready"

clean: ## remove caches and build products; keeps runs/ and the venvs
	@echo "==> removing caches and build products (runs/ and the venvs stay)"
	@rm -rf build dist site .pytest_cache .ruff_cache .jax_cache
	@find . -path './.venv*' -prune -o -name __pycache__ -type d -print | xargs rm -rf
