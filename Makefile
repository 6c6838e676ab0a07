# Each target does its own set-up in .venv; PYTHON chooses the interpreter (3.11 or 3.12).
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-faults test-slow test-slurm test-hostfile cluster-packages lint docs bench gpu gpu-wheels ui clean

demo: $(INSTALLED)
	$(RUN) launch/demo.py

test: $(INSTALLED)
	$(RUN) -m pytest --numprocesses 2 --dist worksteal --durations 10

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

# Everything that one H100 or H200 can say, in under eight minutes: benchmarks/results/gpu/. It needs a Python with torch and
# Triton and nothing of .venv, for instance `make gpu GPU_PYTHON=python3` on a machine without a network.
GPU_PYTHON ?= $(if $(wildcard $(INSTALLED)),$(RUN),$(PYTHON))
gpu:
	$(GPU_PYTHON) benchmarks/gpu.py

# What such a machine may lack beside torch, 7 MB for the Python that it has; take wheels/ there with the tree. DALI is 200 MB:
# `make gpu-wheels GPU_PACKAGES="nvidia-dali-cuda130 …"`.
GPU_PYTHON_VERSION ?= 3.12
GPU_PLATFORMS := $(foreach glibc,2_28 2_27 2_17,--platform manylinux_$(glibc)_x86_64) --platform manylinux2014_x86_64
GPU_PACKAGES ?= annotated-types einops hjson msgpack omegaconf py-cpuinfo pydantic pydantic-core pytest-timeout simplejpeg \
	typing-extensions typing-inspection zlib-ng
gpu-wheels: $(INSTALLED)
	$(RUN) -m pip download --quiet --no-deps --only-binary=:all: --python-version $(GPU_PYTHON_VERSION) $(GPU_PLATFORMS) \
		--constraint constraints.txt --dest wheels $(GPU_PACKAGES)
	DS_BUILD_OPS=0 $(RUN) -m pip wheel --quiet --no-deps --no-build-isolation --constraint constraints.txt --wheel-dir wheels deepspeed

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
