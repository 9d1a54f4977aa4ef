# Each target sets up what it needs; the first run downloads packages, later ones do not.
# PYTHON=… chooses the interpreter, ARGS=… is passed on (make test ARGS="-k rotation").

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
UV := uv==0.13.9
# By name, so that a resolver does not go looking for another build of it.
TORCH := torch==2.13.0
# vLLM's CPU build wants another transformers than ours: an environment of its own, of 3.4 GB.
VLLM_VENV := .venv-vllm
VLLM_PYTHON := $(VLLM_VENV)/bin/python
VLLM_READY := $(VLLM_VENV)/.ready
VLLM_TORCH := torch==2.13.0+cpu
ARGS ?=

# The newest of these that runs; a shim that only prints an error is passed over.
NEW_ENOUGH := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for name in python3.14 python3.13 python3.12 python3.11 python3 python; do \
	"$$name" -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && { command -v "$$name"; break; }; done)

# Real servers and tools for the tests. Where their builds lie beside the checkout they are unpacked; elsewhere
# PATH or ANAMORPH_TEST_BIN offers them, and tests whose server is missing say what to install.
UNPACK := $(wildcard ../shared/bin/unpack)
SERVERS := vault toxiproxy-server etcd kube-apiserver otelcol helm helm-docs helm-unittest kubectl
KUBERAY := $(or $(ANAMORPH_TEST_KUBERAY),$(abspath $(wildcard ../shared/cluster/kuberay/kuberay-operator)))
WITH_SERVERS = $(if $(UNPACK),ANAMORPH_TEST_BIN="$${ANAMORPH_TEST_BIN:-$$("$(PYTHON)" $(UNPACK) $(SERVERS))}") \
	$(if $(KUBERAY),ANAMORPH_TEST_KUBERAY="$(KUBERAY)")

# Every process of a test or demo imports large packages: compiled once, they load faster.
unexport PYTHONDONTWRITEBYTECODE

SIDE_BY_SIDE := -n 2 --dist loadfile
REPORT = $(if $(REPORTS),--junitxml=$(REPORTS)/$(1).xml)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-unit test-vllm bench-vllm images test-images chart test-chart test-cluster test-cluster-faults servers-image lint format bench bench-long docs clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(READY)  ## make the virtual environment

$(READY): pyproject.toml constraints.txt
	@"$(PYTHON)" -c '$(NEW_ENOUGH)' || { \
	  echo "Python 3.11 or newer, with venv, is needed; name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $(UV) $(TORCH)
	$(BIN)/uv pip install --python $(BIN)/python -c constraints.txt -e '.[dev]'
	@touch $(READY)

demo: $(READY)  ## the whole product on this machine, with a real model
	$(BIN)/anamorph demo $(ARGS)

# Most tests run side by side; what starts Ray or the whole system has the machine to itself.
# REPORTS=folder keeps what happened there, for programs. 5: ARGS has chosen nothing of this half.
test: $(READY)  ## every test
	$(WITH_SERVERS) $(BIN)/pytest -m "not alone" $(SIDE_BY_SIDE) $(call REPORT,shared) $(ARGS) || [ $$? -eq 5 ]
	$(WITH_SERVERS) $(BIN)/pytest -m alone $(call REPORT,alone) $(ARGS) || [ $$? -eq 5 ]

test-unit: $(READY)  ## the quick tests
	$(BIN)/pytest -m "not slow and not real" $(SIDE_BY_SIDE) $(ARGS)

# PyTorch's CPU build comes from where pip is told to look, else from PyTorch's own index, which uv knows.
$(VLLM_READY): $(READY) constraints-vllm.txt
	"$(PYTHON)" -m venv $(VLLM_VENV)
	$(VLLM_PYTHON) -m pip install --disable-pip-version-check --quiet --no-deps $(VLLM_TORCH) || \
	  $(BIN)/uv pip install --python $(VLLM_PYTHON) --no-deps --torch-backend cpu $(VLLM_TORCH)
	$(BIN)/uv pip install --python $(VLLM_PYTHON) --no-deps -r constraints-vllm.txt -e .
	@touch $(VLLM_READY)

test-vllm: $(VLLM_READY)  ## the tests of the vLLM engine and of stock vLLM, in an environment of their own
	ANAMORPH_VLLM_PYTHON=$(VLLM_PYTHON) $(BIN)/pytest tests/vllm $(call REPORT,vllm) $(ARGS)

bench-vllm: $(VLLM_READY)  ## encrypted against plaintext on the vLLM engine
	ANAMORPH_VLLM_PYTHON=$(VLLM_PYTHON) $(BIN)/python benchmarks/vllm_overhead.py $(ARGS)

# Container images: built by what lies beside the checkout, else by docker where its daemon answers, else by buildah.
CLUSTER := $(wildcard ../shared/cluster/cluster)
BUILDER ?= $(if $(CLUSTER),"$(PYTHON)" $(CLUSTER) build,$(if $(shell docker info >/dev/null 2>&1 && echo yes),docker build,buildah build))
IMAGES ?= keysvc operator materializer compute client
BASE ?= $(if $(CLUSTER),localhost/python:3.11-slim,python:3.11-slim)
PREFIX ?= localhost/anamorph
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
TAG ?= $(VERSION)
REVISION = $(shell git describe --always --dirty --abbrev=40 2>/dev/null || echo unknown)
DOCKERFILE = $(wildcard $(1)/Dockerfile $(1)s/Dockerfile platform/images/$(1).Dockerfile)

images:  ## container images PREFIX-role:TAG from BASE; IMAGES="keysvc compute-vllm" chooses roles
	$(if $(CLUSTER),"$(PYTHON)" $(CLUSTER) base-image)
	@set -e; $(foreach one,$(IMAGES),echo "== $(one)"; $(BUILDER) -f $(call DOCKERFILE,$(one)) -t $(PREFIX)-$(one):$(TAG) \
	  --build-arg BASE=$(BASE) --build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) $(BUILD_ARGS) .;)

test-images: $(READY)  ## what the built images hold, and that they start; as root, with buildah
	ANAMORPH_TEST_IMAGES='$(PREFIX)-{}:$(TAG)' $(BIN)/pytest tests/images $(call REPORT,images) $(ARGS)

chart: $(READY)  ## write what the charts have of sources: CRDs, schema, dashboards, alerts, values table
	$(WITH_SERVERS) $(BIN)/python helm/generate.py

# Part of make test, too: lint of both charts, unit tests, generated files, rights, dry runs on a real API server.
test-chart: $(READY)  ## every check of the charts
	$(WITH_SERVERS) $(BIN)/pytest tests/helm $(call REPORT,chart) $(ARGS)

# What the evaluation profile takes from public registries, and KubeRay's operator, as one image of the tests.
SERVERS_IMAGE := localhost/anamorph-test-servers:1
IN_CLUSTER = "$(PYTHON)" $(CLUSTER) exec
CLUSTER_TOOLS = $(if $(UNPACK),$$("$(PYTHON)" $(UNPACK) helm kubectl):)
# $(1) is the mark of the tests, $(2) what pytest is told besides.
CLUSTER_TESTS = PATH="$(CURDIR)/$(BIN):$(CLUSTER_TOOLS)$$PATH" ANAMORPH_TEST_CLUSTER=1 ANAMORPH_TEST_KUBERAY="$(KUBERAY)" \
	ANAMORPH_TEST_ETCD="$${ANAMORPH_TEST_ETCD:-$(HOME)/.cache/anamorph/cluster/run/etcd}" \
	$(if $(KEEP),ANAMORPH_TEST_KEEP="$(abspath $(KEEP))") $(BIN)/pytest -m $(1) tests/cluster $(2) $(call REPORT,$(1)) $(ARGS)

# Where nothing that makes a cluster lies beside the checkout, KUBECONFIG names one that may be changed in any way,
# with the images of tests/cluster/values.yaml on its nodes, and ANAMORPH_TEST_KUBERAY the folder of KubeRay's chart.
# KEEP=folder leaves the cluster up, with what the walk has written in that new folder; once its set-up has ended,
# make test-cluster-faults with the same KEEP goes on there, without a set-up.
KEPT := $(and $(KEEP),$(wildcard $(KEEP)/walked))
CLUSTER_IMAGES := $(if $(CLUSTER),$(if $(KEPT),,images servers-image))
ifneq ($(CLUSTER),)
define ON_A_CLUSTER
	$(BIN)/python -c 'from anamorph.cli.smollm2 import fetch_smollm2; fetch_smollm2()'
	@set -e; $(if $(KEEP),,trap '"$(PYTHON)" $(CLUSTER) down' EXIT;) \
	  $(if $(KEPT),,"$(PYTHON)" $(CLUSTER) up; \
	  "$(PYTHON)" $(CLUSTER) load $(SERVERS_IMAGE) $(foreach one,$(IMAGES),$(PREFIX)-$(one):$(TAG));) \
	  $(IN_CLUSTER) env $(call CLUSTER_TESTS,$(1),$(2))
endef
else
ON_A_CLUSTER = $(call CLUSTER_TESTS,$(1),$(2))
endif

test-cluster: $(READY) $(CLUSTER_IMAGES)  ## the guide and its faults on a real Kubernetes, about 25 min
	$(call ON_A_CLUSTER,cluster,-x)

# One case alone: ARGS="-k operator-folding".
test-cluster-faults: $(READY) $(CLUSTER_IMAGES)  ## each part lost at each step of a rotation there, about 90 min
	$(call ON_A_CLUSTER,cluster_faults,--maxfail=3)

servers-image: $(READY)
	"$(PYTHON)" $(CLUSTER) base-image
	@set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	  "$(PYTHON)" $(UNPACK) --to "$$folder" vault kuberay-operator >/dev/null; cp $(BIN)/weed "$$folder"; \
	  $(BUILDER) -f tests/cluster/servers.Dockerfile -t $(SERVERS_IMAGE) --build-arg BASE=$(BASE) "$$folder"

lint: $(READY)  ## ruff, mypy, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)  ## rewrite sources as lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Minutes on two quiet cores, about. vllm_overhead.py needs an environment of its own: make bench-vllm.
BENCH := keys=1 memory=1 exactness=2 fold=1 cold_start=2 simulate=3 service_times=2 serving_path=4 sharding=3 \
  neighbours=3 load=2 keysvc_outage=2 keysvc_release=2 applications=4
BENCH_LONG := slots=7 keysvc_scale=7 overhead=21 rotations=12 chaos=23 kubernetes_objects=15
SUM = $$(( 0$(foreach one,$(1), + $(lastword $(subst =, ,$(one)))) ))
RUN_EACH = @echo "$(1): about $(call SUM,$(1)) minutes"; set -e; $(foreach one,$(1),\
	  echo "== $(subst =,.py: about ,$(one)) min"; $(WITH_SERVERS) $(BIN)/python benchmarks/$(firstword $(subst =, ,$(one))).py $(ARGS);)

bench: $(READY)  ## the short benchmarks, one after the other
	$(call RUN_EACH,$(BENCH))

bench-long: $(READY)  ## the long ones, for a quiet machine: slots, rotations, chaos and others
	$(call RUN_EACH,$(BENCH_LONG))

docs: $(READY)  ## the documentation as a site, in build/docs; fails on a dead link
	$(BIN)/python -m anamorph_keysvc.reference docs/api.md
	$(BIN)/uv tool run --python $(BIN)/python --with-requirements docs/requirements.txt zensical build --strict --clean

clean:  ## remove what the other targets made here; the models stay in ~/.cache/anamorph
	rm -rf $(VENV) $(VLLM_VENV) build dist reports .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
