# Each target does its own set-up in .venv; PYTHON chooses the interpreter (3.11 or 3.12).
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint bench ui clean

demo: $(INSTALLED)
	$(RUN) launch/demo.py

test: $(INSTALLED)
	$(RUN) -m pytest

lint: $(INSTALLED)
	$(VENV)/bin/ruff check --no-cache .

bench: $(INSTALLED)
	$(RUN) benchmarks/meta_step.py --json benchmarks/results/meta_step.json

ui: $(INSTALLED)
	$(VENV)/bin/mlflow ui --host 127.0.0.1 --backend-store-uri sqlite:///mlflow.db

# torch first: csrc/ is built against the torch that it will run with.
$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(RUN) -m pip install --quiet --constraint constraints.txt torch numpy ninja
	$(RUN) -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[dali,dev]"
	touch $@

clean:
	rm -rf $(VENV) build demo *.egg-info distseg/*.so
