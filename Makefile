# The one table of commands. `make help` lists them.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
BIN := .venv/bin
# flags for the command that is run: make serve ARGS="--decode 2", make test ARGS="-k sampler"
ARGS ?=

# the caller's own environment must not leak into ours
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

.PHONY: help setup setup-dev serve test test-slow check compose-check bench bench-ops bench-quality bench-peers protos kernel-report gpu-check clean distclean

help: ## show this table
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## make .venv and install what serving needs; does nothing when nothing changed
	@tools/setup

setup-dev: ## the same, with what tests and checks need
	@tools/setup dev

serve: setup ## fetch the default model, start every process, serve until Ctrl-C
	@exec ./tandem up $(ARGS)

# a file's tests stay together: they share models and services
test: setup-dev ## run every test that this machine can run, two files at a time
	@exec $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu" $(ARGS)

test-slow: setup-dev ## run the tests that take minutes
	@exec $(BIN)/python -m pytest -m "slow and not gpu" $(ARGS)

check: setup-dev compose-check ## lint, format, types, contracts, stubs up to date, import rules, container files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/buf lint
	@# against the last release, before the first one against the last commit
	$(BIN)/buf breaking --against ".git#ref=$$(git describe --tags --abbrev=0 2>/dev/null || echo HEAD)"
	tools/protos --check
	$(BIN)/python -m pytest -q tests/test_layout.py tests/test_protos.py

compose-check: setup-dev ## the Dockerfile and compose.yaml against their rules; needs no docker
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec compose.yaml
	$(BIN)/python -m pytest -q tests/test_compose.py

bench: setup ## measure the four standard workloads on the default model
	@exec $(BIN)/python -m benchmarks $(ARGS)

bench-ops: setup ## each CPU op against what the machine could do
	@exec $(BIN)/python -m benchmarks.ops $(ARGS)

bench-quality: setup ## what fewer bits cost in perplexity
	@exec $(BIN)/python -m benchmarks.quality $(ARGS)

bench-peers: setup ## the same beside other servers, by turns: ARGS='--peer "name=command --port {port}"'
	@exec $(BIN)/python -m benchmarks.peers $(ARGS)

protos: setup-dev ## generate the Python stubs beside the .proto files
	@tools/protos

kernel-report: setup-dev ## compile every CUDA kernel ahead of time: registers, spills, matrix instructions
	@exec $(BIN)/python -m kernels.cuda.report --write benchmarks/results/kernels.md $(ARGS)

gpu-check: ## run every test and measurement that needs a CUDA device, into benchmarks/results; installs nothing
	@exec tools/gpu_check $(ARGS)

clean: ## remove caches, builds and results
	rm -rf build results .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 -r rm -rf

distclean: clean ## remove .venv too
	rm -rf .venv protos/*.egg-info
