"""What the benchmarks share: runs timed in turn, the rate of a matrix product, reports that are written whole."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jvdiff.runtime.files import atomic

RESULTS = Path(__file__).parent / "results"


def in_turn(runs: Sequence[Callable[[], Any]], repeats: int) -> list[list[float]]:
    """Seconds of each run, `repeats` of them, taken in turn, so that what slows the machine slows all alike.

    A run returns when its work is done. Warm up before.
    """
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, mine in zip(runs, seconds, strict=True):
            began = time.perf_counter()
            run()
            mine.append(time.perf_counter() - began)
    return seconds


def matmul_peak(size: int = 8192, repeats: int = 20, dtype: Any = jnp.bfloat16) -> float:
    """FLOP/s of one large square product: the most that a real program can hope for."""
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=dtype)).lower(a, a).compile()
    product(a, a).block_until_ready()

    def run() -> None:
        out = a
        for _ in range(repeats):  # queued, so that the launch is not what is timed
            out = product(a, a)
        out.block_until_ready()

    return 2.0 * size**3 * repeats / statistics.median(in_turn([run], 5)[0])


def short(number: float) -> float:
    """Four digits."""
    return float(f"{number:.4g}")


def write(path: Path, report: Any) -> None:
    """`report` as JSON, whole or not at all."""
    with atomic(path) as part:
        part.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {path}")
