"""Block-sparse attention for Hopper through Pallas' Mosaic GPU backend: what it can do, and how its kernels are cut.

B batch · N heads · K head dim · L query tokens · R rows of one step.

The kernels are in `mosaic_kernels`, which is imported when one runs: the import of their backend takes 0.2 s, and most
processes never run one.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jvdiff.kernels.block_sparse import cuts
from jvdiff.kernels.block_sparse.lists import Lists
from jvdiff.runtime.target import Target

INTERPRET: Any = None  # tests set plgpu.InterpretGPUParams(...): the kernels then run on a CPU, slowly

ROWS = 64  # that one warpgroup owns: the height of a wgmma


class Shape(NamedTuple):
    """How a kernel is cut.

    warpgroups: that share a list.
    step: R, the rows of one.
    stages: slots of the ring.
    producer: whether one more warpgroup copies.
    """

    warpgroups: int
    step: int
    stages: int
    producer: bool


SHARED_MEMORY = 232_448  # bytes that a CTA of a Hopper may have
# By device kind, then by block and head dim; where a GPU has no entries, the H200's hold.
SHIPPED = json.loads(Path(__file__).with_name("tuned.json").read_text())["mosaic_gpu"]
# What `jvdiff tune` tries, where it fits: (warpgroups, step, stages). None of them spills registers on an H200; with
# three warpgroups dq and dkv do, and with a third stage dkv does.
CUTS = {
    kernel: tuple(Shape(*cut, producer=cut[0] > 1) for cut in tried)
    for kernel, tried in {
        "forward": (
            *((1, 64, 1), (1, 64, 2), (1, 64, 3), (2, 128, 2), (2, 128, 3), (2, 192, 2), (2, 64, 2), (2, 64, 4)),
            *((3, 128, 2), (3, 64, 4), (3, 64, 3)),
        ),
        "dq": ((1, 64, 1), (1, 64, 2), (2, 64, 2), (2, 64, 3), (2, 64, 4)),
        "dkv": ((1, 64, 2), (2, 64, 2)),
    }.items()
}


def shapes(block: int, head_dim: int, dtype: Any, kind: str) -> dict[str, Shape]:
    """The cut of the kernels "forward", "dq" and "dkv" for a kind of device."""
    return cuts.shapes("mosaic_gpu", block, head_dim, dtype, kind)


def shipped(block: int, head_dim: int, dtype: Any, kind: str) -> dict[str, Shape]:
    """As they ship: the cuts of the largest block in the table that divides `block`."""
    table = SHIPPED.get(kind, SHIPPED["NVIDIA H200"])
    sizes = (tuple(map(int, key.split("x"))) for key in table)
    rows = max(rows for rows, K in sizes if block % rows == 0 and head_dim == K)
    return {kernel: Shape(**cut) for kernel, cut in table[f"{rows}x{head_dim}"].items()}


def too_old(target: Target) -> str | None:
    """A notice where the target is a Hopper, and this JAX has not what these kernels need."""
    if target.capability != (9, 0) or jax.__version_info__ >= (0, 11):
        return None
    return (
        f"notice: on this Hopper sparse attention runs on other kernels than Mosaic's, which need JAX 0.11; "
        f"this is {jax.__version__}. Python 3.12 or newer gets it."
    )


def unfit(kernel: str, cut: Shape, block: int, head_dim: int) -> str | None:
    """Why a kernel cannot be cut so for these blocks, as far as numbers say, or None."""
    warpgroups, step, stages, producer = cut
    if any(type(x) is not int or x < 1 for x in (warpgroups, step, stages)) or type(producer) is not bool:
        return f"warpgroups, step and stages must be whole numbers from 1 on, producer true or false, not {[*cut]}"
    if warpgroups > 3 or block % (ROWS * warpgroups):
        return f"{warpgroups} warpgroups do not divide a block of {block} tokens; expected 1 to 3 times {ROWS}"
    if step % ROWS or step > 256 or block % step:
        return f"a step of {step} rows does not divide a block of {block}; expected multiples of {ROWS} up to 256"
    if producer != (warpgroups > 1):
        return f"producer is {producer} with {warpgroups} warpgroups; expected it from two warpgroups on, and only then"
    own, each, numbers = {"forward": (1, 2, 0), "dq": (2, 2, 0), "dkv": (2, 2, 8)}[kernel]  # arrays of K channels
    held = warpgroups * ROWS * (own * 2 * head_dim + 8) + stages * step * (each * 2 * head_dim + numbers)
    if held > SHARED_MEMORY - 1024:
        return f"it needs {held:,} bytes of shared memory; there are {SHARED_MEMORY:,}"
    return None


def unsupported(q: Any, k: Any, v: Any, block: int) -> str | None:
    """Why these kernels cannot do these shapes and dtypes, or None."""
    if jax.__version_info__ < (0, 11):
        return f"needs JAX 0.11 or newer (Python 3.12 or newer), and this is {jax.__version__}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16 operands, not {q.dtype}"
    if q.shape[-1] not in (64, 128):
        return f"takes head dims 64 and 128, not {q.shape[-1]}"
    if block % ROWS:
        return f"takes blocks that are multiples of {ROWS} tokens, not {block}"
    return None


def unavailable(target: Target) -> str | None:
    """Why these kernels cannot run on the target, or None."""
    if INTERPRET is not None:
        return None
    if target.platform != "gpu":
        return f"needs an NVIDIA GPU, and the backend is {target.platform!r}"
    if target.capability != (9, 0):
        return f"needs an NVIDIA GPU of the Hopper generation (H100, H200), not {target.kind}"
    return None


def parts(q: Any, block: int, target: Target) -> tuple[int, int]:
    """Queries and keys of those parts of blocks that are left out where they hold no tokens."""
    shape = shapes(block, q.shape[-1], q.dtype, target.kind)["forward"]
    return ROWS * shape.warpgroups, shape.step


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lists: Lists,
    *,
    block: int,
    target: Target,
    scale: float,
    cuts: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """out [B,L,N,K] in the dtype of q, and the natural log-sum-exp, float32 [B,N,L]."""
    from jvdiff.kernels.block_sparse import mosaic_kernels

    cuts = cuts or shapes(block, q.shape[-1], q.dtype, target.kind)
    return mosaic_kernels.forward(q, k, v, lists, block=block, scale=scale, cuts=cuts)


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array,
    lists: Lists,
    *,
    block: int,
    target: Target,
    scale: float,
    cuts: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk and dv in the dtypes of q, k and v, from the cotangents of out and of the log-sum-exp."""
    from jvdiff.kernels.block_sparse import mosaic_kernels

    cuts = cuts or shapes(block, q.shape[-1], q.dtype, target.kind)
    return mosaic_kernels.backward(q, k, v, out, lse, dout, dlse, lists, block=block, scale=scale, cuts=cuts)
