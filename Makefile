# Every target makes or reuses a virtual environment inside this clone.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
# In containers it runs as whoever calls make, but not as root.
USER_ID = $(shell id -u | sed 's/^0$$/1000/')
GROUP_ID = $(shell id -g | sed 's/^0$$/1000/')
QUICK = $(addprefix tests/,protocol model server deployment vectors repository)
TABLES = glue emotion ner sent intents skew tasks generation desk
COMPOSE = GRAMFUSE_UID=$(USER_ID) GRAMFUSE_GID=$(GROUP_ID) docker compose --file docker/compose.yaml

.PHONY: help demo test deployed containers check bench bench-quick api hashes compose clean

help: ## Show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

demo: $(READY) ## Merge four front desks, simulated on this machine (2 to 4 minutes)
	$(BIN)/gramfuse demo

test: $(READY) ## Run the tests but for the next two (under 10 minutes on two cores)
	$(BIN)/pytest -n 3 --dist worksteal --ignore tests/deployed --ignore tests/containers

deployed: $(READY) ## Test whole deployments on loopback, and their bad days (25 minutes; needs nginx)
	$(BIN)/pytest -n 2 --dist worksteal tests/deployed $(PYTEST_OPTIONS)

containers: $(READY) ## Test the compose demo (15 minutes; needs Docker)
	$(BIN)/pytest tests/containers $(PYTEST_OPTIONS)

check: $(READY) ## Format, lint, dependency rule, types, unit tests (under a minute)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/pytest -q -n 2 $(QUICK)

bench-quick: $(READY) ## Every table and chart of accuracy, small, in 17 minutes: make bench-quick DATA=PATH/TO/SETS
	@test -n "$(DATA)" || { echo "give the folder of the sets: make bench-quick DATA=PATH/TO/SETS" >&2; exit 2; }
	$(BIN)/python benchmarks/accuracy $(TABLES) --quick --seeds 1 --data "$(DATA)" --out benchmarks/out/quick
	$(BIN)/python benchmarks/accuracy/charts.py --out benchmarks/out/quick --to benchmarks/out/quick/charts

bench: $(READY) ## Accuracy of the demo, secure against open, cost of a secure sum, memory (about 35 minutes)
	$(BIN)/python benchmarks/accuracy desk
	$(BIN)/python benchmarks/accuracy/equality.py desk
	$(BIN)/python benchmarks/secure_cost
	$(BIN)/python benchmarks/memory.py

api: $(READY) ## Make docs/api.md from the docstrings, and docs/report.md from the schema of report.json
	$(BIN)/python docs/make_api.py
	$(BIN)/python docs/make_report.py

hashes: $(READY) ## Write what the images install, by version and SHA-256, after a change of constraints.txt
	$(BIN)/python docker/lock.py

compose: ## Merge four silos in containers of their own; the model is in ./runs (needs Docker)
	mkdir -p runs
	$(COMPOSE) build
	$(COMPOSE) up
	exit $$(docker inspect --format '{{.State.ExitCode}}' $$($(COMPOSE) ps --all --quiet flower-server))

clean: ## Remove the environment, caches and benchmark results; keep runs/
	rm -rf $(VENV) dist benchmarks/out benchmarks/cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gramfuse needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	touch $(READY)
