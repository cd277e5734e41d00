"""What `jvdiff doctor` has examined in processes of their own, since JAX may hang, crash, or take a GPU's memory.

    python -m jvdiff.commands.examinations devices '{"triton": "..."}'     what JAX finds; kernels that are refused
    python -m jvdiff.commands.examinations reduce                          1 MB summed over the devices

B batch · L tokens · N heads · K head dim.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jvdiff.kernels import patterns
from jvdiff.runtime import children, target

# What attention is asked for: 81 frames of 480x832 in a model of 1.3 billion parameters.
GRID, HEADS, HEAD_DIM = (21, 30, 52), 12, 128
PATTERNS = ("dense", "sliding_tile:6x8x8:3x3x3", "video_sparse:4x4x4:0.9")
RING = "dense, in a ring"
MEGABYTE = 2**18  # numbers of float32


def devices(refused: dict[str, str]) -> dict[str, Any]:
    """What JAX computes on, and which implementation each kind of attention gets there."""
    for kernel, reason in refused.items():
        target.refuse(kernel, reason)
    there, here = jax.devices(), target.here()
    found, needed = _cudnn() if here.platform == "gpu" else (None, None)
    return {
        "platform": here.platform,
        "kind": here.kind,
        "capability": here.capability,
        "count": len(there),
        "pool": (there[0].memory_stats() or {}).get("bytes_limit"),
        "cudnn": {"found": found, "needed": needed},
        "attention": attention(here),
    }


def attention(here: target.Target) -> dict[str, list[Any]]:
    """{kind of attention: [its implementation, {one that would come before it: why not}]} on a target."""
    dtype = jnp.bfloat16 if here.platform == "gpu" else jnp.float32
    q = jax.ShapeDtypeStruct((1, int(np.prod(GRID)), HEADS, HEAD_DIM), dtype)
    told: dict[str, list[Any]] = {}
    for name in (*PATTERNS, RING):
        pattern: Any = patterns.read("dense" if name == RING else name)
        how: dict[str, Any] = {"lse": name == RING, "target": here}
        chosen, reasons = pattern.choose(q, GRID, **how), {}
        for other in pattern.implementations[: pattern.implementations.index(chosen)]:
            try:
                pattern.choose(q, GRID, implementation=other, **how)
                reason = str(pattern.unavailable(other, here))
            except NotImplementedError as error:
                reason = str(error)
            reasons[other] = reason.rpartition(f"implementation {other!r}: ")[2]
        told[name] = [chosen, reasons]
    return told


def _cudnn() -> tuple[int | None, int | None]:
    """The version of cuDNN that is loaded, and the one that JAX was built with and needs at least: 91200 for 9.12."""
    from jax._src.lib import cuda_versions  # what JAX itself compares as it starts

    if cuda_versions is None:
        return None, None
    return cuda_versions.cudnn_get_version(), cuda_versions.cudnn_build_version()


def reduce() -> dict[str, Any]:
    """The sum of 1 MB of each device, on all of them: how many they are, ms at best, whether it is right."""
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    count = mesh.size
    divided, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("devices",), ()))
    values = np.ones((count, MEGABYTE), np.float32)
    x = jax.make_array_from_callback(values.shape, divided, lambda index: values[index])
    add = jax.jit(lambda x: x.sum(axis=0), out_shardings=everywhere)
    right, best = bool((np.asarray(add(x)) == count).all()), float("inf")
    for _ in range(5):
        began = time.perf_counter()
        add(x).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return {"devices": count, "ms": best * 1e3, "right": right}


def main(words: list[str]) -> int:
    """The child: one examination, its result as a line of JSON."""
    children.end_with_parent()
    children.answer(devices(json.loads(words[1])) if words[0] == "devices" else reduce())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
