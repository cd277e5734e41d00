"""The attention benchmark's rivals under PyTorch compute what ours does, so that their times can be compared."""

import importlib
import shutil
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import pytest

pytest.importorskip("torch")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


@pytest.fixture
def attention(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("attention")


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_dense(attention, direction):
    problem = attention.problem(attention.Shape("ragged", (3, 6, 10), 2, 16), "dense", jnp.float32)
    notes = []
    rivals = {"torch sdpa": partial(attention.sdpa, problem, direction, "cpu")}
    admitted = attention.admit(problem, direction, rivals, notes.append)
    assert notes == [] and admitted["torch sdpa"][1] < 2e-6


@pytest.mark.skipif(shutil.which("g++") is None, reason="FlexAttention on a CPU is compiled by g++")
@pytest.mark.parametrize("pattern", ["sliding_tile:2x4x4:1x1x3", "video_sparse:2x4x4:0.5"])
def test_sparse(attention, pattern):
    """Ragged tiles, a list for each head."""
    problem = attention.problem(attention.Shape("ragged", (3, 6, 18), 2, 16), pattern, jnp.float32)
    notes = []
    rivals = {"flex attention": partial(attention.flex, problem, "forward", "cpu")}
    admitted = attention.admit(problem, "forward", rivals, notes.append)
    assert notes == [] and admitted["flex attention"][1] < 2e-6
