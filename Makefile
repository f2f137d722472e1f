PY := .venv/bin/python
OLDER_VLLM := $(CURDIR)/.cache/vllm-0.23.0
ASCEND := $(CURDIR)/tests/ascend/stub:$(CURDIR)/.cache/vllm-ascend-0.23.0:$(OLDER_VLLM)
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help run test upstream ascend lint fmt bench wheel clean

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: ## Serve a small real model with the plugins and try it (ARGS="--once")
	@.ci/setup
	@$(PY) examples/quickstart.py $(ARGS)

test: lint ## Check and test everything, on vLLM 0.23.0 and vllm-ascend too (ARGS="-k name")
	@.ci/setup-023
	PYTHONPATH=$(OLDER_VLLM) XLLM_EXPECT_VLLM=0.23.0 $(PY) -m pytest tests/contract
	.ci/upstream-tests
	$(PY) -m pytest $(ARGS)
	@$(MAKE) ascend ARGS=

upstream: ## Run vLLM's own tests with our scheduler, connectors and EPLB policy, 3 minutes
	@.ci/setup --dev
	.ci/upstream-tests

ascend: ## Test on vllm-ascend 0.23.0, without an NPU (ARGS="-k name")
	@.ci/setup --dev
	@.ci/setup-ascend
	PYTHONPATH=$(ASCEND) $(PY) -m pytest tests/ascend $(ARGS)

lint: ## Check style and types
	@.ci/setup --dev
	$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

fmt: ## Format the code and fix what ruff can
	@.ci/setup --dev
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

bench: ## Measure online SLOs beside an offline batch, about 90 minutes (ARGS="--requests 40")
	@.ci/setup
	$(PY) -m benchmarks.colocation $(ARGS)

wheel: ## Build and check dist/*.whl and the source package
	@.ci/setup --dev
	rm -rf dist
	$(PY) -m build --no-isolation
	$(PY) -m check_wheel_contents --ignore W009 dist # one wheel, several packages

clean: ## Remove everything that these commands made: .venv, .cache, dist, caches, results
	rm -rf .venv .cache dist benchmarks/results .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
