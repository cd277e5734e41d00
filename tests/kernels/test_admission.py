"""Hand-written kernels are compared with the reference in a child before a program may hold them."""

import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jvdiff.kernels import admission, block_sparse
from jvdiff.kernels.block_sparse import triton
from jvdiff.runtime import gpus, target

A100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA A100", compute_capability="8.0")
GPU = {"name": "NVIDIA A100", "capability": [8, 0], "memory": 8, "free": None}
DRIVER = {"problem": None, "cuda": 12090, "gpus": [GPU]}
# Children in the place of the one that checks "triton": its kernel adds a little, hangs, takes the process with it, is
# right, or finds no memory.
WRONG = """
from types import SimpleNamespace
import jvdiff.kernels.admission as a
right = a.block_sparse.IMPLEMENTATIONS["xla"]
def forward(*x, **how):
    out, lse = right.forward(*x, **how)
    return out * 1.05, lse
a.block_sparse.IMPLEMENTATIONS["triton"] = SimpleNamespace(**vars(right) | dict(forward=forward))
a.CASES = a.CASES[:1]
a.main(["triton"])
"""
CHILDREN = {
    "wrong": (WRONG, "with tiles of 4x4x4 its out is off by"),
    "hangs": ("import time; time.sleep(60)", "it did not end within"),
    "crashes": ("import os; os.kill(os.getpid(), 11)", "it was ended by SIGSEGV"),
    "does not compile": ("raise NotImplementedError('no ptxas')", "status 1: NotImplementedError: no ptxas"),
}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with an A100, as far as files and its driver's library tell; -> has(what the child runs, limit)."""
    (tmp_path / "nvidia0").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(gpus, "DEVICES", tmp_path)
    monkeypatch.setattr(gpus, "LIMIT", 600.0)
    monkeypatch.setattr(gpus, "LIBCUDA", (sys.executable, "-S", "-c", f"print({json.dumps(json.dumps(DRIVER))})"))
    monkeypatch.setattr(gpus, "unwanted", lambda: False)
    monkeypatch.setattr(gpus, "check_used", lambda: None)

    def has(code, limit=600.0):
        monkeypatch.setattr(target, "_refused", {})
        monkeypatch.setattr(admission, "_known", [])
        monkeypatch.setattr(admission, "COMMAND", (sys.executable, "-c", code))
        monkeypatch.setattr(admission, "LIMIT", limit)

    return has


@pytest.mark.parametrize("fault", CHILDREN)
def test_a_kernel_that_fails_its_check_gives_way_to_the_next(fault, machine):
    code, problem = CHILDREN[fault]
    machine(code, 0.3 if fault == "hangs" else 600.0)
    lines = []
    admission.admit(lines.append)
    admission.admit(lines.append)
    assert lines[0].startswith("checking the attention kernels on NVIDIA A100, once")
    assert len(lines) == 2 and "'triton' is left out on NVIDIA A100: " in lines[1] and problem in lines[1]
    here = target.of([A100])
    x = jax.ShapeDtypeStruct((1, 128, 1, 128), jnp.bfloat16)
    assert block_sparse.choose(x, x, x, target=here) == "xla"
    with pytest.raises(NotImplementedError, match=f"'triton': failed its check on NVIDIA A100: .*{problem}"):
        block_sparse.choose(x, x, x, implementation="triton", target=here)
    assert target.of(jax.devices()).refused == ()  # of GPUs alone
    machine("raise SystemExit")  # another process: what came of it is remembered
    admission.admit(lines.append)
    assert len(lines) == 3 and problem in lines[2] and target.of([A100]).refusal("triton")


def test_a_kernel_that_is_right_is_not_checked_again(machine):
    lines = []
    machine("print('{\"problem\": null}')")
    admission.admit(lines.append)
    machine("raise SystemExit")
    admission.admit(lines.append)
    assert len(lines) == 1 and target.of([A100]).refused == ()
    machine("raise MemoryError('RESOURCE_EXHAUSTED')")  # for other kernels: not remembered, since memory may be there
    found = gpus.driver()._replace(version="600.1")
    assert "RESOURCE_EXHAUSTED" in str(admission.results(found, lines.append)["triton"])
    machine("print('{\"problem\": null}')")
    assert admission.results(found, lines.append) == {"triton": None}


def test_without_a_gpu_nothing_is_checked(machine, tmp_path):
    machine("raise SystemExit")
    (tmp_path / "nvidia0").unlink()
    admission.admit(pytest.fail)


def test_the_case_finds_a_right_kernel_right():
    assert next(admission.differences("xla", admission.CASES[:1], head_dim=16), None) is None


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="once is enough: make kernels does it, on Python 3.12")
def test_the_case_finds_the_interpreted_kernel_right(monkeypatch):
    monkeypatch.setattr(triton, "INTERPRET", True)
    assert next(admission.differences("triton", admission.CASES[:1], head_dim=16), None) is None
