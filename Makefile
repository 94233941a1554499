# The environment is made by whichever target needs it first; `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
RUNS := runs/demo-$(shell date +%Y%m%d-%H%M%S)
SOURCES := src tests $(wildcard tools benchmarks)

.DEFAULT_GOAL := help
SHELL := bash
.PHONY: help demo test test-deploy fuzz audit check static bench bench-peers docs venv clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(READY) ## Local, FedAvg and FLEx on the embedded model and four Dolly clients, then a table (no download)
	@mkdir -p $(RUNS); set -o pipefail; \
	run() { $(BIN)/fedgraft run demo "$$@" 2>&1 >/dev/null | sed -u "s|^|$$name  |"; }; \
	plain() { name="$$1 "; run --set method.name=$$1 --set graft=null --set evaluation.models='[personal]' --out $(RUNS)/$$1; }; \
	(plain local && plain fedavg) & others=$$!; \
	name="flex "; run --out $(RUNS)/flex && wait $$others
	@$(BIN)/fedgraft compare $(RUNS)/local $(RUNS)/fedavg $(RUNS)/flex

test: static ## Everything `check` does, then unit and contract tests
	$(BIN)/python -m pytest

test-deploy: $(READY) ## What starts Ray or Flower's servers; takes minutes
	$(BIN)/python -m pytest -m deploy

fuzz: $(READY) ## Damaged and forged inputs for every reader, up to a million each; hours (FUZZ="--times 0.01" for minutes)
	$(BIN)/python -m tests.fuzz.long $(FUZZ)

audit: ## Known vulnerabilities of the tested versions; asks PyPI about each, so it needs the network
	$(PYTHON) -m venv build/audit && build/audit/bin/python -m pip --disable-pip-version-check -qq install pip-audit
	build/audit/bin/pip-audit -r constraints.txt --no-deps --disable-pip

check: static ## Format, lint, types and the architecture tests
	$(BIN)/python -m pytest tests/architecture

bench: $(READY) ## A round beside a plain PyTorch loop, memory and time with many clients beside 4, Flower beside its floor; writes docs/benchmarks.md
	$(BIN)/python benchmarks/plain_loop.py
	$(BIN)/python benchmarks/cohort.py
	$(BIN)/python benchmarks/dp_sgd.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/merge.py
	$(BIN)/python benchmarks/flower_overhead.py
	$(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/serve.py
	$(BIN)/python benchmarks/start.py && $(BIN)/python benchmarks/selection.py
	for size in qwen1.5-moe-a2.7b qwen3-30b-a3b; do $(BIN)/python benchmarks/full_size.py tests/account/configs/$$size.json --small; done
	$(BIN)/python benchmarks/stream.py --layers 4 --limit 5
	$(BIN)/python benchmarks/report.py

bench-peers: $(READY) ## fedgraft beside Trainer, TRL, Flower and NVFlare on the same tokens; installs them from PyPI into build/peers (PEERS="--small" to try)
	$(BIN)/python benchmarks/peers.py $(PEERS)
	$(BIN)/python benchmarks/report.py

docs: $(READY) ## Write the generated pages of docs/ and build the site in build/site
	$(BIN)/python -m tools.docs.reference
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

venv: $(READY) ## Make or refresh .venv with the tested versions

clean: ## Remove caches and build output; keeps .venv and runs
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info

static: $(READY)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy

# One thread: faster than two on models this small. The malloc settings (glibc) keep freed big tensors mapped, so each step does not fault them in anew.
demo test test-deploy fuzz check bench: export OMP_NUM_THREADS := 1
demo test test-deploy check bench: export MALLOC_MMAP_THRESHOLD_ := 1073741824
demo test test-deploy check bench: export MALLOC_TRIM_THRESHOLD_ := 17179869184
demo test test-deploy check bench: export MALLOC_TOP_PAD_ := 268435456

# torch first, alone and pinned: a resolver left to choose may fetch another build with gigabytes of CUDA packages.
$(READY): pyproject.toml constraints.txt
	@echo "making $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch==2.13.0
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@
