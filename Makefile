PY := .venv/bin/python
OLDER_VLLM := $(CURDIR)/.cache/vllm-0.23.0
ASCEND := $(CURDIR)/tests/ascend/stub:$(CURDIR)/.cache/vllm-ascend-0.23.0:$(OLDER_VLLM)
BESIDE := -n 3 --no-loadscope-reorder
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help run test upstream zoo ascend lint fmt bench wheel clean

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: ## Serve a small real model with the plugins and try it (ARGS="--once")
	@.ci/setup
	@$(PY) examples/quickstart.py $(ARGS)

test: lint ## Check and test everything, on vLLM 0.23.0 and vllm-ascend too (ARGS="-k name")
	@.ci/setup-vllm 0.23.0
	PYTHONPATH=$(OLDER_VLLM) XLLM_EXPECT_VLLM=0.23.0 $(PY) -m pytest $(BESIDE) tests/contract
	.ci/upstream-tests
	$(PY) -m pytest $(BESIDE) $(ARGS)
	@$(MAKE) ascend ARGS=

upstream: ## Run vLLM's own tests with our scheduler, connectors and EPLB policy, 3 minutes
	@.ci/setup --dev
	.ci/upstream-tests

ascend: ## Test on vllm-ascend 0.23.0, without an NPU (ARGS="-k name")
	@.ci/setup --dev
	@.ci/setup-ascend
	PYTHONPATH=$(ASCEND) $(PY) -m pytest $(BESIDE) tests/ascend $(ARGS)

zoo: ## Hold a tiny model of each family against vLLM alone, 10 minutes (ARGS="Qwen3")
	@.ci/setup
	$(PY) -m tests.zoo $(ARGS)

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

.PHONY: upstream-023 seams
upstream-023: ## Run the unit tests of vLLM 0.23.0 and vllm-ascend 0.23.0 without us, with us, and with us on
	@.ci/setup --dev
	@.ci/setup-ascend
	@.ci/setup-tests vllm 0.23.0 760269db3d9611e12e524681df1bca0977d5d2f5fcb4481cc34d33efc4ae7ff5
	@.ci/setup-tests vllm-ascend 0.23.0 a58db76eaffcf328b13b315a0db3a57d381a8947d01057ddcefe4ad02372b242
	PYTHONPATH=$(OLDER_VLLM) $(PY) -m tests.upstream.suites vllm .cache/vllm-0.23.0-tests
	PYTHONPATH=$(ASCEND) $(PY) -m tests.upstream.suites vllm-ascend .cache/vllm-ascend-0.23.0-tests

seams: ## Hold every seam against another vLLM, and renew its column in the docs (VERSION=0.33.0 WITH=orjson)
	@.ci/setup --dev
	@case "$(VERSION)" in 0.23.0) .ci/setup-ascend ;; *) .ci/setup-vllm "$(VERSION)" $(WITH) ;; esac
	$(PY) -m tests.upstream.seams $(VERSION)

wheel: ## Build and check dist/*.whl and the source package
	@.ci/setup --dev
	rm -rf dist
	$(PY) -m build --no-isolation
	$(PY) -m check_wheel_contents --ignore W009 dist # one wheel, several packages

clean: ## Remove everything that these commands made: .venv, .cache, dist, caches, results
	rm -rf .venv .cache dist benchmarks/results .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
