"""The GPU kernels, compiled for an H200 and an A100 that are not there: nothing spills, everything fits."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not (find_spec("jax_plugins") and find_spec("jax_plugins.xla_cuda13")),
    reason="the CUDA compiler is not installed (make kernels installs it)",
)
# target, implementation, head dim, dtype, models and patterns of benchmarks/compile_gpu.py (none: all), rows
LARGEST, TWO = ["--model=Wan 14B 720p"], ["--pattern=STA 6x8x8", "--pattern=VSA 4x4x4"]
CASES = {
    "h200": ("h200", "mosaic_gpu", 128, "bfloat16", [], 5 * 4 * 3),
    "h200, head dim 64": ("h200", "mosaic_gpu", 64, "float16", LARGEST + TWO, 2 * 3),
    "a100": ("a100", "triton", 128, "bfloat16", LARGEST + TWO, 2 * 3),
}


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
