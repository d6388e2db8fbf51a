# Trireme. `make help` lists what there is.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
STAMP := $(VENV)/.stamp
PY := $(VENV)/bin/python
# Further arguments for pytest, e.g. make unit ARGS="-k recovery"
ARGS ?=
NODES ?= 3

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: venv
venv: $(STAMP) ## the Python environment with pinned dependencies (.venv)

$(STAMP): pyproject.toml constraints.txt
	@.ci/venv $(VENV)

.PHONY: test
test: venv ## every check and suite, with the time of each (what CI runs)
	@$(PY) .ci/suites.py

.PHONY: lint unit simulation trainer apiserver monitoring e2e
lint: venv ## ruff and mypy
unit: venv ## pure logic, contracts, manifests, house rules
simulation: venv ## reconcile against a model cluster, the agent with real processes
trainer: venv ## torch on the CPU, several ranks
apiserver: venv ## the operator against a real API server
monitoring: venv ## rules, alerts and dashboards against a real Prometheus
e2e: venv ## the real cluster: train, break, recover
lint unit simulation trainer apiserver monitoring e2e:
	@$(PY) .ci/suites.py $@ --pytest="$(ARGS)"

.PHONY: cluster cluster-down
cluster: venv ## a real Kubernetes on this machine (or check the one of KUBECONFIG); NODES=3
	@$(PY) cluster/cluster.py up --nodes $(NODES)

cluster-down: venv ## remove the local cluster and everything it left
	@$(PY) cluster/cluster.py down

.PHONY: images install demo
images: venv ## build the operator and trainer images; rebuilds only what changed
	@$(PY) demo/steps.py images

install: venv ## cluster, images and operator, ready for kubectl apply
	@$(PY) demo/steps.py install

demo: venv ## train OPT-8M on the local cluster, kill a rank, watch it continue exactly
	@$(PY) demo/demo.py

.PHONY: bench
bench: venv ## training benchmarks beside Hugging Face Accelerate on whatever device is here
	@$(PY) benchmarks/train/compare.py $(ARGS)

.PHONY: bench-alma bench-alma-lm
bench-alma: venv ## ALMA in miniature: error against waiting time, growth; ARGS=--quick for under a minute
	@$(PY) benchmarks/papers/alma/run.py $(ARGS)

bench-alma-lm: venv ## the same of language models that grow; ARGS=--quick for seconds
	@$(PY) benchmarks/papers/alma/language.py $(ARGS)

.PHONY: papers
papers: venv ## every paper in miniature, with the time of each; ARGS="opt moe" for some, --quick: do they run?
	@$(PY) benchmarks/papers/all.py $(ARGS)

.PHONY: chaos chaos-local
N ?= 5
chaos: venv ## break a job on the local cluster in every way, N=5 times each; table in docs/chaos.md
	@$(PY) tests/chaos/run.py cluster --n $(N) $(ARGS)

chaos-local: venv ## the same with local processes instead of containers: faster, some faults fewer
	@$(PY) tests/chaos/run.py local --n $(N) $(ARGS)

.PHONY: accounts
MINUTES ?= 20
accounts: venv ## a job with two failures on the local cluster: do its figures agree, everywhere and with a witness?
	@$(PY) tests/accounts/run.py --minutes $(MINUTES) $(ARGS)

.PHONY: report-check
report-check: venv ## the logbook page of a real run in Chromium: desk, phone, dark, paper; screenshots in docs/images
	@$(PY) tests/browser/report_check.py $(ARGS)

.PHONY: docs
docs: venv ## regenerate what is generated: the CRD, the references of API and metrics
	@$(PY) -m trireme_api.crd

.PHONY: dashboards dashboard-pictures
dashboards: venv ## regenerate the Grafana dashboards from dashboards/*.py
	@$(PY) -m dashboards

dashboard-pictures: venv ## train here for minutes and draw the panels from a real Prometheus into docs/images
	@$(PY) tests/monitoring/pictures.py $(ARGS)

.PHONY: clean
clean: ## remove the environment, caches and build results (the local cluster: make cluster-down)
	rm -rf $(VENV) build dist .demo .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -not -path './.cluster/*' -prune -exec rm -rf {} +
