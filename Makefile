# Everything runs in .venv, which is built from requirements.lock the first time and whenever the lock or
# pyproject.toml changes. `make demo` is the place to start.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.set-up
PEERS  := .venv-peers

.PHONY: help demo test agreement lint types setup wheel clean

help:
	@echo "make demo           compile the emoji denoiser and compare it with the uncached one (QUICK=1: a shorter run)"
	@echo "make test           run the tests (ARGS='-k layout -x' is passed on to pytest)"
	@echo "make agreement      compare with the peers' own code, in $(PEERS) (ARGS as for test)"
	@echo "make lint           ruff: rules and formatting"
	@echo "make types          mypy over the package"
	@echo "make setup          only build $(VENV)"
	@echo "make wheel          build the wheel and check what it holds"
	@echo "make clean          remove caches and build output (not $(VENV))"

demo: $(STAMP)
	$(BIN)/python -m demo $(if $(QUICK),--quick)

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

agreement: $(PEERS)/.set-up
	$(PEERS)/bin/python -m pytest benchmarks/agreement $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

wheel: $(STAMP)
	rm -rf dist build
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@$(BIN)/python -m zipfile --list dist/diffcache-*.whl | awk 'NR > 1 && $$1 !~ /^diffcache(-[0-9.]+\.dist-info)?\// \
	  { print "not part of diffcache: " $$1; bad = 1 } END { exit bad }'
	@echo "dist/ holds a wheel with diffcache and nothing else"

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "diffcache needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another interpreter: make setup PYTHON=python3.12"; exit 1; }
	@echo "Setting up $(VENV) from requirements.lock (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# The peers get an environment of their own; the lock constrains them, so that both sides run on one torch.
$(PEERS)/.set-up: requirements.lock benchmarks/agreement/requirements.txt pyproject.toml
	@echo "Setting up $(PEERS) from requirements.lock and the peers (a few minutes the first time)"
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check \
	  -r requirements.lock -r benchmarks/agreement/requirements.txt -c requirements.lock
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis out
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './$(PEERS)/*' -prune -exec rm -rf {} +
