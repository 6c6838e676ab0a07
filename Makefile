# Each target does its own set-up in .venv; PYTHON chooses the interpreter (3.11 or 3.12).
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-faults test-slow test-slurm test-hostfile cluster-packages lint docs bench ui clean

demo: $(INSTALLED)
	$(RUN) launch/demo.py

test: $(INSTALLED)
	$(RUN) -m pytest --numprocesses 2 --dist loadfile --durations 10

test-faults: $(INSTALLED)
	$(RUN) -m pytest -m "faults or counted" --timeout 3000

test-slow: $(INSTALLED)
	$(RUN) -m pytest -m slow

# Real Slurm, and two hosts in namespaces; both take root and the packages below, and say so where they skip.
test-slurm: $(INSTALLED)
	$(RUN) -m pytest -m slurm tests/cluster

test-hostfile: $(INSTALLED)
	$(RUN) -m pytest -m hostfile tests/cluster

cluster-packages:
	tests/cluster/install.sh

lint: $(INSTALLED)
	$(VENV)/bin/ruff check --no-cache .
	$(VENV)/bin/ruff format --no-cache --check .
	$(RUN) -m mypy

# The site, in site/: the table of keys from the schema, the API from the docstrings. A broken link is an error.
docs: $(INSTALLED)
	$(RUN) -m distseg.config.reference docs/keys.md
	$(VENV)/bin/zensical build --clean --strict

bench: $(INSTALLED)
	$(RUN) benchmarks/meta_step.py --json benchmarks/results/meta_step.json
	$(RUN) benchmarks/label_step.py --json benchmarks/results/label_step.json
	$(RUN) benchmarks/kernels.py --json benchmarks/results/kernels_cpu.json --plot benchmarks/results/kernels_cpu.png

# The MLflow server, on this machine only: http://127.0.0.1:5000 (from elsewhere: ssh -L 5000:127.0.0.1:5000 HOST). To train
# through it, and not through the file: MLFLOW_TRACKING_URI=http://127.0.0.1:5000.
STORE ?= sqlite:///mlflow.db
PORT ?= 5000
ui: $(INSTALLED)
	$(VENV)/bin/mlflow server --host 127.0.0.1 --port $(PORT) --backend-store-uri $(STORE) --serve-artifacts

# torch first: the build of DeepSpeed looks for it, in this environment and not in an isolated one.
$(INSTALLED): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(RUN) -m pip install --quiet --constraint constraints.txt torch numpy
	$(RUN) -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[dali,dev,docs]"
	touch $@

clean:
	rm -rf $(VENV) build demo site *.egg-info distseg/*.so
