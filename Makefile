# A newcomer needs two: `make demo` and `make test`. Both set up what they need first.
.DEFAULT_GOAL := help
.PHONY: help setup demo test golden check bench bench-kafka faults kafka-up kafka-down format schemas clean
SHELL := /bin/sh
PY := .venv/bin/python

# On the command line: PYTHON=python3.12, EXTRAS=producers,detector-gpu,trainer,dev (GPU host), ARGS='...', WORKERS=0
export PYTHON EXTRAS
ARGS ?=
WORKERS ?= 2
GOLDEN_DIR ?= ../shared/golden
DATA_DIR ?= ../shared/data
override GOLDEN_DIR := $(abspath $(GOLDEN_DIR))
override DATA_DIR := $(abspath $(DATA_DIR))
export GOLDEN_DIR DATA_DIR

# In CI a test that is skipped for want of a tool fails.
PYTEST := $(PY) -m pytest $(if $(filter true,$(CI)),-p tests.no_missing_tool)

help:  ## Show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

setup:  ## Make .venv with everything in it; quick to repeat
	@deploy/setup.sh

demo: setup  ## Hear a synthetic city for 40 s on this machine; ends by itself (ARGS=--serve keeps it running)
	.venv/bin/detector demo $(ARGS)

test: setup  ## Run all tests in two processes (ARGS='-k bus' for some; WORKERS=0 for one process)
	$(PYTEST) $(if $(filter-out 0,$(WORKERS)),-n $(WORKERS) --dist loadfile) $(ARGS)

golden: setup  ## Run the golden tests alone, on the folder GOLDEN_DIR
	@test -d "$(GOLDEN_DIR)" || { echo "GOLDEN_DIR=$(GOLDEN_DIR) is no folder: name the one that holds the golden vectors."; exit 1; }
	$(PYTEST) -m golden $(ARGS)

check: setup  ## Check style, types, import rules, configuration and deployment files
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m mypy deploy/validate.py
	.venv/bin/lint-imports
	$(PY) deploy/validate.py

bench: setup  ## Measure, one figure after the other (BENCH=bench_bus for one)
	@for file in $(filter-out $(if $(BENCH),,%/bench_kafka.py),$(wildcard tests/benchmarks/$(or $(BENCH),bench_*).py)); do \
		echo "== $$file"; PYTHONPATH=. $(PY) "$$file" $(ARGS) || exit 1; \
	done

bench-kafka: setup  ## Measure throughput with a Kafka broker of its own on this machine (needs Java)
	PYTHONPATH=. $(PY) tests/benchmarks/bench_kafka.py $(ARGS)

faults: setup  ## Kill detectors and brokers, fill disks, and balance the account (needs Java; ARGS=--long: 100 kills, an hour)
	@$(PY) -m tests.faults.table $(ARGS)

kafka-up: setup  ## Start Kafka on this machine for trials (NODES=3, SECURE=1); prints settings and what comes next
	@$(PY) deploy/kafka/broker.py start --data var/kafka --nodes $(or $(NODES),1) $(if $(SECURE),--secure) $(ARGS)

kafka-down:  ## Stop it; the data stays in var/kafka (ARGS=--wipe removes it)
	@$(or $(wildcard $(PY)),python3) deploy/kafka/broker.py stop --data var/kafka $(ARGS)

format: setup  ## Put the source in its one form
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

schemas: setup  ## Write detector/schemas/config.schema.json anew
	$(PY) -m detector.config > .config.schema.json.new
	mv .config.schema.json.new detector/schemas/config.schema.json

clean:  ## Remove .venv and everything built (not var/)
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find detector producers trainer tests deploy -name __pycache__ -type d -prune -exec rm -rf {} +
