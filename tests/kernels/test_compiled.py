"""The GPU kernels, compiled for an H200 and an A100 that are not there: nothing spills, everything fits."""

import functools
import json
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff import kernels, plan
from jvdiff.kernels import BlockCausal, SlidingTile, windows
from jvdiff.kernels.patterns import WindowTable

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not (find_spec("jax_plugins") and find_spec("jax_plugins.xla_cuda13")),
    reason="the CUDA compiler is not installed (make kernels installs it)",
)
# target, implementation, head dim, dtype, models and patterns (none: all) of benchmarks/compile_gpu.py, rows
GPUS = {"h100": "mosaic_gpu", "h200": "mosaic_gpu"} | dict.fromkeys(("a100", "b200", "rtx_4090", "rtx_5090"), "triton")
LARGEST, TWO = ["--model=Wan 14B 720p"], ["--pattern=STA 6x8x8", "--pattern=VSA 4x4x4"]
GRIDS = [*LARGEST, "--model=Wan 1.3B 480p", "--model=HunyuanVideo 768p"]  # the others have one of these, of other heads
CASES = {
    "h200": ("h200", "mosaic_gpu", 128, "bfloat16", GRIDS, 3 * 4 * 3),
    "h200, head dim 64": ("h200", "mosaic_gpu", 64, "float16", LARGEST + TWO, 2 * 3),
    "a100": ("a100", "triton", 128, "bfloat16", LARGEST + TWO, 2 * 3),
}


@pytest.mark.parametrize("gpu", GPUS)
def test_each_gpu_gets_its_kernels_forwards_and_backwards(gpu):
    """As docs/sparse_attention.md has it; JAX's word on the Triton backend is answered, and no error."""
    plan.check_target(gpu)
    placement = plan.target_placement(gpu)
    x = jax.ShapeDtypeStruct((1, 512, 2, 128), jnp.bfloat16, sharding=placement.everywhere)

    def attend(x):
        x = kernels.attention(x, x, x, target=placement.target)
        where = dict(grid=(8, 8, 8), tile=(4, 4, 4), window=(1, 1, 1), target=placement.target)
        return kernels.sliding_tile_attention(x, x, x, **where)

    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        text = plan.compile_for(placement, jax.jit(lambda x: jax.vjp(attend, x)[1](x)), x).as_text() or ""
    assert set(plan.attention_in(text)) == {"cudnn", GPUS[gpu]}


def test_windows_of_a_table_and_streams_of_tiles_take_the_sparse_kernel():
    """Forwards and backwards, with lists that the program works out."""
    placement = plan.target_placement("h200")
    table = windows.Windows((4, 4, 4), (8, 8, 8), ((1, 1, 1), (1, 2, 2)), np.array([[[0, 1]]], np.int32), (500.0,))
    by_head, causal = (
        WindowTable("it", "", (500.0,), table),
        BlockCausal(4, 8, 4, near=SlidingTile((4, 4, 4), (3, 1, 1))),
    )
    struct = functools.partial(jax.ShapeDtypeStruct, sharding=placement.everywhere)
    given = struct((1, 512, 2, 128), jnp.bfloat16), struct((1, 1), jnp.float32), struct((8,), jnp.int32)

    def attend(x, t, frames):
        how = dict(target=placement.target)
        x = by_head.attend(x, x, x, None, grid=(8, 8, 8), chosen=by_head.of_layers(t, 1, 2)[0], **how)
        seen = causal.tiles_seen(jnp.ones((8, 8), bool), frames, frames)
        return causal.attend_near(x, x, x, seen, (8, 8, 8), **how)

    run = jax.jit(lambda x, *more: jax.vjp(lambda x: attend(x, *more), x)[1](x))
    assert plan.attention_in(plan.compile_for(placement, run, *given).as_text() or "") == ("mosaic_gpu",)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_nothing_spills_and_everything_fits(case, tmp_path):
    target, implementation, head_dim, dtype, some, count = case
    arguments = [f"--target={target}", f"--implementation={implementation}", f"--head-dim={head_dim}"]
    arguments += [f"--dtype={dtype}", *some]
    command = [sys.executable, ROOT / "benchmarks/compile_gpu.py", *arguments, "--output", tmp_path / "rows.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=1200)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert len(rows) == count
    for row in rows:
        assert row["spills"] == 0 and row["shared_memory"] <= {"h200": 232_448, "a100": 166_912}[target]
        # On Hopper, CTAs of one warpgroup hide each other's waits: the cut of small blocks counts on several.
        alone = target == "h200" and row["shape"].endswith("4x4x4")
        least = {"forward": 4, "dq": 2, "dkv": 2}[row["kernel"]]
        assert row["ctas"] >= (least if alone else 1), row
