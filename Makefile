# On a machine with Python >= 3.11 and make, every target first builds the environment it needs.
PYTHON ?= python3
# A folder of your own images for `make quickstart`, and whether to ask again where this package is absent, by running
# the code that it saves: make quickstart IMAGES=some/folder TRUST=yes
IMAGES ?=
TRUST ?=
# The folder of LLaVA's data for `make reproduce-7b`, and further options: make reproduce-7b ARGS=--dry-run
DATA ?= data
ARGS ?=
# Test processes, one more than two cores, since some tests wait for processes of their own; and further pytest options:
# make test PYTEST_ARGS="-k router"
WORKERS ?= 3
PYTEST_ARGS ?=

ENVIRONMENT := .venv
ENVIRONMENT_4 := .venv-transformers-4
ENVIRONMENT_LMMS := .venv-lmms
ENVIRONMENT_DEMO := .venv-demo
ENVIRONMENT_TORCHVISION := .venv-torchvision
LINKS := $(ENVIRONMENT)/package_links/adaptive_llava

# One thread per test process: two processes that each start a thread per core only get in each other's way.
TEST_SETTINGS := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
# The interpreter of the other environment, if it is there: checkpoints saved by one are loaded by the other.
other = ADAPTIVE_LLAVA_OTHER_PYTHON=$(addprefix $(CURDIR)/,$(wildcard $(1)/bin/python))
PYTEST = -m pytest -n $(WORKERS) --dist worksteal --timeout 600 --durations 10

.PHONY: quickstart study demo test-demo reproduce-7b test test-transformers-4 lmms-environment test-lmms matrix
.PHONY: test-torchvision
.PHONY: suites test-suites hostile style check clean

## Ask the shipped model, teach it a new kind of document, save it, ask again in a fresh process.
quickstart: $(ENVIRONMENT)/installed
	$(ENVIRONMENT)/bin/python -m adaptive_llava.training.quickstart $(if $(IMAGES),--images "$(IMAGES)") \
		$(if $(TRUST),--trust-remote-code)

## Does per-image routing pay? Trains small models for 80 minutes on two cores; goes on where it was stopped.
study: $(ENVIRONMENT)/installed
	OMP_WAIT_POLICY=PASSIVE $(ENVIRONMENT)/bin/python -m adaptive_llava.training.study --config training/study/cpu.yaml --workers 2

## LLaVA-1.5-7B with each preset, on 8 GPUs and with the Hub; `make reproduce-7b ARGS=--dry-run` prints the commands.
reproduce-7b: $(ENVIRONMENT)/installed
	$(ENVIRONMENT)/bin/python -m adaptive_llava.training.reproduce_7b --data "$(DATA)" $(ARGS)

## Chat with images in a browser, on a CPU; MODEL=user/name for another model than the shipped one.
demo: $(ENVIRONMENT_DEMO)/installed
	$(ENVIRONMENT_DEMO)/bin/python -m adaptive_llava.hub_cards.space.app $(if $(MODEL),--model "$(MODEL)")

## All tests.
test: $(ENVIRONMENT)/installed
	$(TEST_SETTINGS) $(call other,$(ENVIRONMENT_4)) $(ENVIRONMENT)/bin/python $(PYTEST) $(PYTEST_ARGS)

## The demo's tests, those in a browser too where chromium is installed.
test-demo: $(ENVIRONMENT_DEMO)/installed
	$(TEST_SETTINGS) $(ENVIRONMENT_DEMO)/bin/python -m pytest --timeout 1200 tests/test_demo.py tests/test_demo_browser.py tests/test_push_space.py $(PYTEST_ARGS)

## The compatibility tests, with transformers 4.57.
test-transformers-4: $(ENVIRONMENT_4)/installed
	$(TEST_SETTINGS) $(call other,$(ENVIRONMENT)) $(ENVIRONMENT_4)/bin/python $(PYTEST) -m compat $(PYTEST_ARGS)

## The environment in which lmms-eval runs these models: .venv-lmms/bin/python -m lmms_eval --model adaptive_llava ...
lmms-environment: $(ENVIRONMENT_LMMS)/installed

## lmms-eval, started as a user does.
test-lmms: $(ENVIRONMENT)/installed $(ENVIRONMENT_LMMS)/installed
	$(TEST_SETTINGS) ADAPTIVE_LLAVA_LMMS_PYTHON="$(CURDIR)/$(ENVIRONMENT_LMMS)/bin/python" \
		$(ENVIRONMENT)/bin/python -m pytest --timeout 600 tests/test_lmms_eval.py $(PYTEST_ARGS)

## The compatibility tests where torchvision is installed: transformers then reads images with it instead of PIL.
test-torchvision: $(ENVIRONMENT_TORCHVISION)/installed
	$(TEST_SETTINGS) $(ENVIRONMENT_TORCHVISION)/bin/python $(PYTEST) -m compat $(PYTEST_ARGS)

## One checkpoint under every supported transformers, each in a fresh environment (.venv-matrix); prints a table.
matrix: $(ENVIRONMENT)/installed
	$(ENVIRONMENT)/bin/python -m tests.version_matrix

## Hugging Face's own tests on every preset and on stock LLaVA, with both transformers; writes results/suites.json.
suites: $(ENVIRONMENT)/installed $(ENVIRONMENT_4)/installed
	$(TEST_SETTINGS) $(ENVIRONMENT)/bin/python -m tests.suites.run --output results
	$(TEST_SETTINGS) $(ENVIRONMENT_4)/bin/python -m tests.suites.run --output results

## The same on three presets, in about two minutes.
test-suites: $(ENVIRONMENT)/installed
	$(TEST_SETTINGS) $(ENVIRONMENT)/bin/python -m tests.suites.run --presets llava dfmr llava-mini

## Ten times the cases of hostile input that a test run takes, each anew; writes results/hostile_cases.json.
hostile: $(ENVIRONMENT)/installed
	$(TEST_SETTINGS) $(ENVIRONMENT)/bin/python -m tests.hostile_cases

## Rewrite the code in the project's style.
style: $(ENVIRONMENT)/installed
	$(ENVIRONMENT)/bin/python -m ruff format .
	$(ENVIRONMENT)/bin/python -m ruff check --fix .

## Style, lint and types; changes nothing.
check: $(ENVIRONMENT)/installed
	$(ENVIRONMENT)/bin/python -m ruff format --check .
	$(ENVIRONMENT)/bin/python -m ruff check .
	rm -rf $(LINKS) && mkdir -p $(LINKS)
	ln -s "$(CURDIR)"/adaptive_llava/*.py "$(CURDIR)"/adaptive_llava/py.typed $(LINKS)
	for folder in modeling processing training hub_cards; do ln -s "$(CURDIR)/$$folder" $(LINKS); done
	$(ENVIRONMENT)/bin/python -m mypy

## Remove the environments, the caches and what a build left behind.
clean:
	rm -rf $(ENVIRONMENT) $(ENVIRONMENT_4) $(ENVIRONMENT_LMMS) $(ENVIRONMENT_DEMO) $(ENVIRONMENT_TORCHVISION)
	rm -rf .venv-matrix build dist *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(ENVIRONMENT)/installed: constraints.txt setup.cfg pyproject.toml
	$(call install,$(ENVIRONMENT),constraints.txt,dev)

$(ENVIRONMENT_4)/installed: constraints-transformers-4.57.txt setup.cfg pyproject.toml
	$(call install,$(ENVIRONMENT_4),constraints-transformers-4.57.txt,dev)

# torchvision's wheels only fit the torch that is built with CUDA, several gigabytes: `===` asks for exactly that one.
$(ENVIRONMENT_TORCHVISION)/installed: constraints.txt setup.cfg pyproject.toml
	$(call install,$(ENVIRONMENT_TORCHVISION),constraints.txt,dev,,torch===$$(sed -n 's/^torch==//p' constraints.txt) torchvision)

$(ENVIRONMENT_DEMO)/installed: constraints.txt setup.cfg pyproject.toml
	$(call install,$(ENVIRONMENT_DEMO),constraints.txt,demo-test)

# lmms-eval without its requirements: they would bring another torch (training/lmms_eval_plugin/README.md).
$(ENVIRONMENT_LMMS)/installed: constraints.txt setup.cfg pyproject.toml
	$(call install,$(ENVIRONMENT_LMMS),constraints.txt,lmms,lmms-eval)

# $(1): the environment's folder, $(2): its constraints, $(3): the package's extra, $(4): what goes in by itself, $(5):
# another torch. torch goes first, pinned: resolved along with the others it may bring gigabytes of CUDA packages.
define install
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python >= 3.11 is needed, $(PYTHON) is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.11 ...")'
	@echo "Building $(1) (torch and transformers; a few minutes, once)"
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --constraint $(2) $(or $(5),torch)
	$(1)/bin/python -m pip install --quiet --constraint $(2) --editable ".[$(3)]"
	$(if $(4),$(1)/bin/python -m pip install --quiet --constraint $(2) --no-deps $(4))
	@touch $@
endef
