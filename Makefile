# Everything happens in .venv (and .venv312), but for the CUDA compiler, which lies in the user's cache, and the wheel,
# which is tried in a temporary folder. A second run installs nothing, but for the wheel.
#
#   make sample    a prompt becomes a video in out/, with the checkpoint that ships
#   make test      the tests, without torch
#   make parity    live comparisons with torch, diffusers and transformers
#   make kernels   the tests of attention and of meshes on Python 3.12 and the JAX below, with the CUDA compiler (0.7 GB
#                  in ~/.cache/jvdiff/compiler, no GPU needed)
#   make wheel     the wheel, in an empty environment elsewhere, makes a clip
#   make lint      ruff and pyright
#   make clean     removes the environments
#
# PYTHON=python3.13 chooses another interpreter; TORCH="torch --index-url ..." another build of torch, for instance the
# one for CPUs, which is much smaller.

PYTHON ?= python3
TORCH ?= torch==2.13.0
PYTEST ?= # more arguments for pytest, for instance -x or a file
JAX = 0.12.0.1# of make kernels: a newer one changes what kernels compile to, and is tried before it stands here
WORKERS ?= -n auto --dist loadfile --no-loadscope-reorder

# How XLA compiles for tests: soon, each program in one piece, and so that a loop has the bits of its steps (no fused
# multiplications; on x86 only).
QUICKLY = --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 $(if $(filter x86_64,$(shell uname -m)),--xla_cpu_use_fusion_emitters=false --xla_cpu_max_isa=AVX)

PIP = -m pip install --quiet --disable-pip-version-check
RUN = .venv/bin/python

.PHONY: sample test parity kernels wheel lint clean

sample: .venv/.sample
	$(RUN) -m jvdiff.sample --config configs/digits.py --config.prompt="a red seven moving left" --config.seed=3 --config.output=out

# The time goes into compiling, so it is done quickly rather than well; make kernels and make parity do it well.
test: .venv/.test
	XLA_FLAGS="$(QUICKLY)" $(RUN) -m pytest $(WORKERS) $(PYTEST)

# One after another, unlike the others: torch and JAX together fill the memory of a small machine.
parity: .venv/.parity
	$(RUN) -m pytest -m parity tests $(PYTEST)

lint: .venv/.test
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m pyright --pythonpath $(RUN)

# Without a Python 3.12 there is nothing to compare with: that is said, and is no failure.
kernels:
	@python=$$(.ci/find_python 3.12) || { echo "kernels: skipped, no Python 3.12 on this machine"; exit 0; }; \
	$(MAKE) --no-print-directory .venv312/.kernels-$(JAX) PYTHON312="$$python" && \
	.venv312/bin/python -m jvdiff.commands.compiler --install && \
	.venv312/bin/python -m jvdiff.commands.compiler -m pytest $(WORKERS) \
		tests/kernels tests/sharding $(addprefix tests/models/wan/test_,mesh.py dit_compiled.py vae_compiled.py \
		windows.py causal_tiles.py) $(addprefix tests/models/hunyuan_video/test_,mesh.py vae_compiled.py) \
		tests/benchmarks/test_first_gpu_hour.py $(PYTEST)

wheel:
	@.ci/wheel $(PYTHON)

# A stamp says that what pyproject.toml asks for is installed; the package itself is used from where it lies.
.venv/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "jvdiff needs Python 3.11 or newer; $(PYTHON) is not. Name one with: make PYTHON=..."; exit 1; }
	@echo "setting up .venv, once; this takes a few minutes"
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.sample: .venv/.made pyproject.toml setup.py
	$(RUN) $(PIP) --editable .
	@touch $@

.venv/.test: .venv/.sample
	$(RUN) $(PIP) --editable ".[dev]"
	@touch $@

.venv/.parity: .venv/.test
	$(RUN) $(PIP) $(TORCH)
	$(RUN) $(PIP) --editable ".[parity]"
	@touch $@

.venv312/.kernels-$(JAX): pyproject.toml setup.py
	$(PYTHON312) -m venv --clear .venv312
	.venv312/bin/python $(PIP) --editable . "jax==$(JAX)" pytest pytest-xdist safetensors
	@touch $@

clean:
	rm -rf .venv .venv312
