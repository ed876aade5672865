# Everything from a clean checkout on Debian 12: `make demo` and `make test` do all set-up first.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Debian's own interpreter: built with PGO and LTO, and the one that python3-bpfcc belongs to.
# Another python3 may come first on PATH.
PYTHON3 ?= /usr/bin/python3
VENV := .venv
# A virtual environment that has everything, on a machine that has everything, as in a guest of the
# test bed: nothing is installed or built then.
PREPARED ?=
BIN := $(or $(PREPARED),$(VENV))/bin
PYTHON := $(abspath $(BIN))/python
SETUP := $(if $(PREPARED),,setup)

# auto | bpf | tc | nftables | iptables; NOBPF=1 makes bpf(2) fail, as on a kernel without it.
BACKEND ?= auto
NOBPF ?=

# Caches outside git: what is downloaded or built once and kept through `make clean`.
PYAMBIENT_CACHE ?= $(HOME)/.cache/pyambient
PIP_CACHE_DIR ?= $(PYAMBIENT_CACHE)/pip
export PYAMBIENT_CACHE PIP_CACHE_DIR

PACKAGES := clang llvm libbpf-dev libc6-dev linux-libc-dev make \
            python3-bpfcc linux-headers-$(shell dpkg --print-architecture) \
            iptables nftables iproute2 procps util-linux tcpdump curl python3-venv

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort | \
	    awk -F'\t' '{ printf "make %-15s %s\n", $$1, $$2 }'

.PHONY: demo
demo: $(SETUP) ## the main job on real traffic, checked (BACKEND=auto|bpf|tc|nftables|iptables, NOBPF=1)
	$(BIN)/python -m examples.demo --backend $(BACKEND) $(if $(NOBPF),--without-bpf)

# Tests mostly wait, for a deadline or a peer: more processes than cores. Each has namespaces and
# a cgroup of its own.
TEST_PROCESSES ?= 4

# bcc: the tests of interception by BPF, whose programs are compiled anew for each test; not those
# that make a kernel look older, for which the programs are the same.
LOADER ?= libbpf
OF_BPF := -k 'not nftables and not iptables and not Linux' \
	tests/integration tests/intercept/test_{bpf,dns_queries,exclu,fence,tc}*.py

# COMPILED=1: of the byte path as mypyc builds it, in a folder where nothing else is found.
COMPILED ?=
IN := $(if $(COMPILED),cd build/compiled && PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/build/compiled)
OF_BYTE_PATH := -m 'not interpreted' tests/hbone tests/engine tests/observe tests/mesh tests/proxy

.PHONY: compiled
compiled: $(SETUP) ## the byte path as C extensions, in build/compiled
	scripts/system-packages gcc python3-dev
	PYAMBIENT_COMPILE=1 $(BIN)/pip install --quiet --disable-pip-version-check --no-deps \
	    --no-build-isolation --upgrade --target build/compiled .
	cp -r tests examples pyproject.toml build/compiled

.PHONY: test
test: $(SETUP) $(if $(COMPILED),compiled) ## all tests (root; PYTEST_ARGS=, LOADER=bcc, COMPILED=1)
	$(IN) PYAMBIENT_TEST_LOADER=$(LOADER) $(PYTHON) -m pytest -n $(TEST_PROCESSES) \
	    --dist worksteal $(if $(filter bcc,$(LOADER)),$(OF_BPF)) $(if $(COMPILED),$(OF_BYTE_PATH)) \
	    $(PYTEST_ARGS)

# Guests of the test bed that `make test-kernels` boots; a subset is tested faster.
KERNELS ?= 5.10 6.1 6.12 nobpf
# 1: every interception test, which takes most of a day where CPUs have to be emulated.
ALL ?=

.PHONY: test-kernels
test-kernels: bpf ## interception and demo on other kernels (KERNELS="5.10 6.1 6.12 nobpf")
	vagrant/test-kernels $(if $(ALL),--all) $(KERNELS)

# SHORT=1, QUICK=1: a quick pass over everything; CHECK=1: exit 1 and name what misses its bar.
SHORT ?=
QUICK ?=
CHECK ?=
ENGINE_ARGS ?= $(if $(SHORT),--rounds 1 --seconds 0.5 --idle 1000)

.PHONY: bench-engine
bench-engine: $(SETUP) $(if $(COMPILED),compiled) ## beside Envoy (root; SHORT=1, CHECK=1, COMPILED=1)
	$(IN) $(PYTHON) -m pyambient.bench.engine $(ENGINE_ARGS) $(if $(CHECK),--check)

.PHONY: bench-intercept
bench-intercept: $(SETUP) ## what each interception costs (root; QUICK=1, CHECK=1)
	$(BIN)/python -m pyambient bench intercept $(if $(QUICK),--quick) $(if $(CHECK),--check)
	$(BIN)/python -m pyambient bench report

.PHONY: conformance
conformance: $(SETUP) ## the HBONE port against h2spec, which Go builds (root)
	$(BIN)/python -m pytest -o faulthandler_timeout=0 tests/integration/conformance.py

# How long, each target.
SECONDS ?= 600

.PHONY: fuzz
fuzz: $(SETUP) ## fuzz frames and CONNECT requests (SECONDS=600); findings are in build/fuzz
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[fuzz]'
	nice $(BIN)/python -m tests.fuzz --seconds $(SECONDS)

.PHONY: setup
setup: packages $(VENV)/installed bpf ## system packages, virtual environment, BPF objects

.PHONY: packages
packages:
	@scripts/system-packages $(PACKAGES)

$(VENV)/made: | packages
	$(PYTHON3) -m venv --clear $(VENV)
	@touch $@

$(VENV)/installed: $(VENV)/made pyproject.toml setup.cfg
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev,interop]'
	@touch $@

.PHONY: bpf
bpf: packages ## compile bpf/*.c to the objects that ship in the package
	@$(MAKE) --silent -C bpf

.PHONY: lint
lint: $(VENV)/installed ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: types
types: $(VENV)/installed ## mypy, strict
	$(BIN)/mypy

.PHONY: floors
floors: $(VENV)/installed ## imports go down the floors, never up
	$(BIN)/lint-imports

.PHONY: wheel
wheel: $(VENV)/installed bpf ## dist/pyambient-*.whl, BPF objects included
	rm -rf build dist
	$(BIN)/python -m build --wheel --outdir dist .

.PHONY: clean
clean: ## remove what make built; caches outside git stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis \
	    .import_linter_cache
	$(MAKE) --no-print-directory -C bpf clean
