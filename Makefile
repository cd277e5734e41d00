# Everything happens in .venv (and .venv312); nothing is installed anywhere else, and a second run installs nothing.
#
#   make sample    a prompt becomes a video in out/, with the checkpoint that ships
#   make test      the tests, without torch
#   make parity    live comparisons with torch, diffusers and transformers
#   make kernels   the tests of attention and of meshes on Python 3.12 and the newest JAX, with the CUDA compiler (0.7 GB,
#                  no GPU needed)
#   make lint      ruff and pyright
#   make clean     removes the environments
#
# PYTHON=python3.13 chooses another interpreter; TORCH="torch --index-url ..." another build of torch, for instance the
# one for CPUs, which is much smaller.

PYTHON ?= python3
TORCH ?= torch==2.13.0
PYTEST ?= # more arguments for pytest, for instance -x or a file
WORKERS ?= -n auto --dist loadfile

PIP = -m pip install --quiet --disable-pip-version-check
RUN = .venv/bin/python

.PHONY: sample test parity kernels lint clean

sample: .venv/.sample
	$(RUN) -m jvdiff.sample --config configs/digits.py --config.prompt="a red seven moving left" --config.seed=3 --config.output=out

# The time goes into compiling, so it is done quickly rather than well; make kernels and make parity do it well.
test: .venv/.test
	XLA_FLAGS=--xla_backend_optimization_level=0 $(RUN) -m pytest $(WORKERS) $(PYTEST)

parity: .venv/.parity
	$(RUN) -m pytest -m parity tests $(PYTEST)

lint: .venv/.test
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m pyright --pythonpath $(RUN)

# Without a Python 3.12 there is nothing to compare with: that is said, and is no failure.
kernels:
	@python=$$(.ci/find_python 3.12) || { echo "kernels: skipped, no Python 3.12 on this machine"; exit 0; }; \
	$(MAKE) --no-print-directory .venv312/.kernels PYTHON312="$$python" && \
	.venv312/bin/python -m pytest tests/kernels tests/sharding tests/models/test_wan_mesh.py $(PYTEST)

# A stamp says that what pyproject.toml asks for is installed; the package itself is used from where it lies.
.venv/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "jvdiff needs Python 3.11 or newer; $(PYTHON) is not. Name one with: make PYTHON=..."; exit 1; }
	@echo "setting up .venv, once; this takes a few minutes"
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.sample: .venv/.made pyproject.toml
	$(RUN) $(PIP) --editable .
	@touch $@

.venv/.test: .venv/.sample
	$(RUN) $(PIP) --editable ".[dev,train]"
	@touch $@

.venv/.parity: .venv/.test
	$(RUN) $(PIP) $(TORCH)
	$(RUN) $(PIP) --editable ".[parity]"
	@touch $@

.venv312/.kernels: pyproject.toml
	$(PYTHON312) -m venv .venv312
	.venv312/bin/python $(PIP) --editable . "jax>=0.11" pytest
	.venv312/bin/python $(PIP) --no-deps nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-nvdisasm \
		$$(.venv312/bin/python -c 'from jax import __version__ as v; print(f"jax-cuda13-plugin=={v} jax-cuda13-pjrt=={v}")')
	@touch $@

clean:
	rm -rf .venv .venv312
