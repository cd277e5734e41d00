"""Block-sparse attention for any NVIDIA GPU with tensor cores (Ampere and later), through Pallas' Triton backend.

B batch · N heads · K head dim · L query tokens · S key tokens · Q, C rows of one query and of one key block ·
I, J query and key blocks · E length of a row of a list.

Three kernels, each one launch for all heads and batch entries: the forward pass and dq, where a program owns a query
block and walks over its row of `q2k`, and dk with dv, where a program owns a key block and walks over the query blocks
that selected it. Nothing is added across programs, so results are the same bit by bit in every run. Tokens stay where
they are, [B,L,N,K]: a program reads the rows of its head with a stride.

JAX calls this backend deprecated since 0.11 (Mosaic GPU is to replace it), which is why all that touches it is in this
file.
"""

import contextlib
import functools
import importlib
import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jvdiff.kernels.block_sparse import cuts
from jvdiff.kernels.block_sparse.lists import Lists, padded_backward, padded_forward, split, transpose
from jvdiff.runtime.target import Target

INTERPRET = False  # tests set it: the kernels then run on a CPU, slowly

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
_LOG2_E = math.log2(math.e)
_FLOOR = -1e30  # below all logits, and finite: the running maximum of a row that has seen no key


class Shape(NamedTuple):
    """How one kernel is cut.

    block_q, block_kv: rows of a query and of a key block.
    channels: of a part.
    warps: of a program.
    stages: of its loads.

    A program holds [rows,K] as parts of at most `channels`. The compiler gives each warp whole rows of the logits as
    long as accumulators are no wider than they are high; otherwise it spreads a row over warps, which then exchange
    their weights through shared memory, but need fewer registers.
    """

    block_q: int
    block_kv: int
    channels: int
    warps: int
    stages: int


# What `jvdiff tune` tries, where it divides.
CUTS = {
    "forward": tuple(
        Shape(*cut)
        for cut in (
            *((64, 64, 64, 4, 2), (64, 64, 64, 4, 3), (64, 64, 64, 4, 4), (64, 64, 128, 4, 3), (64, 64, 128, 8, 3)),
            *((128, 64, 64, 8, 3), (128, 64, 64, 8, 4), (128, 64, 128, 8, 2), (128, 128, 64, 8, 2), (64, 32, 64, 4, 4)),
        )
    ),
} | dict.fromkeys(
    ("dq", "dkv"),
    tuple(Shape(*cut) for cut in ((64, 64, 128, 8, 2), (64, 64, 128, 8, 3), (64, 64, 128, 4, 2), (64, 64, 64, 4, 2))),
)


def shapes(block: int, head_dim: int, dtype: Any, kind: str) -> dict[str, Shape]:
    """The cut of each kernel, for a kind of device; `block` is a multiple of both of its block sizes."""
    return cuts.shapes("triton", block, head_dim, dtype, kind)


def shipped(block: int, head_dim: int, dtype: Any, kind: str) -> dict[str, Shape]:
    """As they ship, by registers and shared memory: half-width ones do not spill on compute capability 8.0."""
    rows = min(64, block & -block)
    if jnp.dtype(dtype) == jnp.float32:  # without tensor cores, whose products are not of whole float32 numbers
        rows = min(32, rows)
        return dict.fromkeys(("forward", "dq", "dkv"), Shape(rows, rows, 32, 4, 1))
    if head_dim <= 64:
        return dict.fromkeys(("forward", "dq", "dkv"), Shape(rows, rows, 64, 4, 3))
    wide = block % 128 == 0
    return {
        "forward": Shape(128 if wide else rows, rows, 64, 8 if wide else 4, 3),
        "dq": Shape(rows, rows, 128, 8, 3),
        "dkv": Shape(rows, rows, 128, 8, 3),
    }


def unfit(kernel: str, cut: Shape, block: int, head_dim: int) -> str | None:
    """Why a kernel cannot be cut so for these blocks, as far as numbers say, or None."""
    if any(type(x) is not int or x < 1 or x & (x - 1) for x in cut[:4]) or type(cut.stages) is not int:
        return f"expected powers of two, and a whole number of stages, found {[*cut]}"
    if min(cut[:3]) < 16 or block % cut.block_q or block % cut.block_kv:
        return f"blocks of {cut.block_q} and {cut.block_kv} rows do not divide one of {block}; expected 16 or more"
    if cut.warps > 16 or not 1 <= cut.stages <= 8:
        return f"{cut.warps} warps and {cut.stages} stages; expected at most 16, and 1 to 8"
    return None


def unsupported(q: Any, k: Any, v: Any, block: int) -> str | None:
    """Why these kernels cannot do these shapes and dtypes, or None."""
    K = q.shape[-1]
    if q.dtype not in DTYPES:
        return f"takes bfloat16, float16 and float32 operands, not {q.dtype}"
    if K not in (16, 32, 64, 128):
        return f"takes head dims 16, 32, 64 and 128, not {K}"
    if block % 16:
        return f"takes blocks that are multiples of 16 tokens, not {block}"
    return None


def unavailable(target: Target) -> str | None:
    """Why these kernels cannot run on the target, or None."""
    if INTERPRET:
        return None
    if target.platform != "gpu":
        return f"needs an NVIDIA GPU, and the backend is {target.platform!r}"
    if target.capability is None or target.capability < (8, 0):
        return f"needs an NVIDIA GPU of compute capability 8.0 or later, and {target.kind} is not one"
    return None


def parts(q: Any, block: int, target: Target) -> tuple[int, int]:
    """Queries and keys of those parts of blocks that are left out where they hold no tokens."""
    return shapes(block, q.shape[-1], q.dtype, target.kind)["forward"][:2]


@padded_forward
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
    B, L, N, K = q.shape
    shape = (cuts or shapes(block, K, q.dtype, target.kind))["forward"]
    lists = _split(lists, block, shape)
    return _call(
        functools.partial(_forward_kernel, shape=shape, scale=scale),
        "forward",
        shape,
        grid=(L // shape.block_q, N, B),
        in_specs=[_block(shape.block_q, K), _tokens(k), _tokens(v), *_list_specs(lists)],
        out_specs=[_block(shape.block_q, K), _row(shape.block_q)],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, L), jnp.float32)],
    )(q, k, v, *lists[:3])


def _forward_kernel(q_ref, k_ref, v_ref, list_ref, count_ref, size_ref, out_ref, lse_ref, *, shape, scale):
    """q, out [Q,K]; k, v [S,K]; list [I,E]; count [I]; size [J]; lse [Q]."""
    i, load = pl.program_id(0), functools.partial(_load, channels=shape.channels)
    q = load(q_ref)
    rows = q[0].shape[0]

    def step(j, carry):
        top, total, out = carry
        block = list_ref[i, j]
        keys = pl.ds(block * shape.block_kv, shape.block_kv)
        logits = _mask(_inner(q, load(k_ref, keys)) * (scale * _LOG2_E), size_ref[block])
        new = jnp.maximum(top, jnp.max(logits, axis=1))
        weights = jnp.exp2(logits - new[:, None])
        fade = jnp.exp2(top - new)
        out = _add(tuple(x * fade[:, None] for x in out), weights, load(v_ref, keys))
        return new, total * fade + jnp.sum(weights, axis=1), out

    start = jnp.full((rows,), _FLOOR, jnp.float32), jnp.zeros((rows,), jnp.float32), _zeros(q)
    top, total, out = lax.fori_loop(0, count_ref[i], step, start)
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    _store(out_ref, tuple(x / total[:, None] for x in out))
    lse_ref[...] = jnp.where(seen, (top + jnp.log2(total)) / _LOG2_E, -jnp.inf)


@padded_backward
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
    B, L, N, K = q.shape
    products = dout.astype(jnp.float32) * out.astype(jnp.float32)
    delta = jnp.swapaxes(jnp.sum(products, axis=-1), 1, 2) - dlse  # [B,L,N] -> [B,N,L]
    # Of a query without keys exp2(logit - lse) must be 0.
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse * _LOG2_E)
    shape = cuts or shapes(block, K, q.dtype, target.kind)

    rows, keys, *_ = shape["dq"]
    parts = _split(lists, block, shape["dq"])
    dq = _call(
        functools.partial(_dq_kernel, shape=shape["dq"], scale=scale),
        "dq",
        shape["dq"],
        grid=(L // rows, N, B),
        in_specs=[
            *(_block(rows, K), _tokens(k), _tokens(v), _block(rows, K), _row(rows), _row(rows)),
            *_list_specs(parts),
        ],
        out_specs=_block(rows, K),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    )(q, k, v, dout, lse, delta, *parts[:3])

    rows, keys, *_ = shape["dkv"]
    parts = _split(lists, block, shape["dkv"])
    offsets, ids = transpose(parts)
    dk, dv = _call(
        functools.partial(_dkv_kernel, shape=shape["dkv"], scale=scale),
        "dkv",
        shape["dkv"],
        grid=(k.shape[1] // keys, N, B),
        in_specs=[
            *(_block(keys, K), _block(keys, K), _tokens(q), _tokens(dout), _head(lse), _head(delta)),
            *(_head(offsets), _head(ids), _all(parts.kv_sizes)),
        ],
        out_specs=[_block(keys, K), _block(keys, K)],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
    )(k, v, q, dout, lse, delta, offsets, ids, parts.kv_sizes)
    return dq, dk, dv


def _dq_kernel(
    q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, list_ref, count_ref, size_ref, dq_ref, *, shape, scale
):
    """q, dout, dq [Q,K]; k, v [S,K]; lse (to base 2), delta [Q]; list [I,E]; count [I]; size [J]."""
    i, load = pl.program_id(0), functools.partial(_load, channels=shape.channels)
    q, dout = load(q_ref), load(dout_ref)
    lse, delta = lse_ref[...], delta_ref[...]

    def step(j, dq):
        block = list_ref[i, j]
        keys = pl.ds(block * shape.block_kv, shape.block_kv)
        k = load(k_ref, keys)
        logits = _mask(_inner(q, k) * (scale * _LOG2_E), size_ref[block])
        weights = jnp.exp2(logits - lse[:, None])
        return _add(dq, weights * (_inner(dout, load(v_ref, keys)) - delta[:, None]), k)

    dq = lax.fori_loop(0, count_ref[i], step, _zeros(q))
    _store(dq_ref, tuple(x * scale for x in dq))


def _dkv_kernel(
    k_ref, v_ref, q_ref, dout_ref, lse_ref, delta_ref, offset_ref, list_ref, size_ref, dk_ref, dv_ref, *, shape, scale
):
    """k, v, dk, dv [C,K]; q, dout [L,K]; lse (to base 2), delta [L]; offset [J+1]; list [all E]; size [J]."""
    j, load = pl.program_id(0), functools.partial(_load, channels=shape.channels)
    k, v = load(k_ref), load(v_ref)

    def step(e, carry):
        dk, dv = carry
        queries = pl.ds(list_ref[e] * shape.block_q, shape.block_q)
        q, dout = load(q_ref, queries), load(dout_ref, queries)
        weights = jnp.exp2(_inner(k, q) * (scale * _LOG2_E) - lse_ref[queries][None, :])
        dv = _add(dv, weights, dout)
        return _add(dk, weights * (_inner(v, dout) - delta_ref[queries][None, :]), q), dv

    dk, dv = lax.fori_loop(offset_ref[j], offset_ref[j + 1], step, (_zeros(k), _zeros(v)))
    # A row of these products is one key: what is computed of padded ones stays theirs, and is dropped here.
    valid = lax.broadcasted_iota(jnp.int32, k[0].shape, 0) < size_ref[j]
    _store(dk_ref, tuple(jnp.where(valid, x * scale, 0.0) for x in dk))
    _store(dv_ref, tuple(jnp.where(valid, x, 0.0) for x in dv))


def _load(ref: Any, rows: Any = slice(None), *, channels: int) -> tuple[jax.Array, ...]:
    """The parts of ref [...,K]: see Shape."""
    K = ref.shape[-1]
    return tuple(ref[rows, pl.ds(c, min(channels, K))] for c in range(0, K, channels))


def _store(ref, parts):
    for n, x in enumerate(parts):
        ref[:, pl.ds(n * x.shape[1], x.shape[1])] = x.astype(ref.dtype)


def _zeros(parts):
    return tuple(jnp.zeros(x.shape, jnp.float32) for x in parts)


def _inner(a, b):
    """a [Q,K], b [C,K] -> float32 [Q,C]."""
    return functools.reduce(jnp.add, (_dot(x, y.T) for x, y in zip(a, b, strict=True)))


def _add(total, weights, x):
    """total [Q,K] + weights [Q,C] x [C,K]."""
    return tuple(t + _dot(weights.astype(part.dtype), part) for t, part in zip(total, x, strict=True))


def _dot(a, b):
    """Float32 operands in whole float32 products; a tensor core's of half-width ones are exact anyway."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _mask(logits, size):
    """logits [Q,C], those of keys at and beyond `size` set to -inf."""
    return jnp.where(lax.broadcasted_iota(jnp.int32, logits.shape, 1) < size, logits, -jnp.inf)


def _split(lists: Lists, block: int, shape: Shape) -> Lists:
    whole = shape.block_q == shape.block_kv == block
    return lists if whole else split(lists, block, shape.block_q, shape.block_kv)


def _block(rows: int, head_dim: int) -> Any:
    """Of x [B,L,N,K]: the rows [rows,K] of program (i, n, b)."""
    return pl.BlockSpec((None, rows, None, head_dim), lambda i, n, b: (b, i, n, 0))


def _tokens(x: jax.Array) -> Any:
    """Of x [B,L,N,K]: all tokens [L,K] of the program's head."""
    return pl.BlockSpec((None, x.shape[1], None, x.shape[3]), lambda i, n, b: (b, 0, n, 0))


def _head(x: jax.Array) -> Any:
    """Of x [B or 1,N or 1,...]: everything of the program's head."""
    shared = [size == 1 for size in x.shape[:2]]
    zeros = (0,) * (x.ndim - 2)
    index = lambda i, n, b: (0 if shared[0] else b, 0 if shared[1] else n, *zeros)  # noqa: E731
    return pl.BlockSpec((None, None, *x.shape[2:]), index)


def _all(x: jax.Array) -> Any:
    return pl.BlockSpec(x.shape, lambda i, n, b: (0,) * x.ndim)


def _row(rows: int) -> Any:
    """Of x [B,N,L]: the rows [rows] of program (i, n, b)."""
    return pl.BlockSpec((None, None, rows), lambda i, n, b: (b, n, i))


def _list_specs(lists: Lists) -> list[Any]:
    return [_head(lists.q2k), _head(lists.q2k_count), _all(lists.kv_sizes)]


def _call(kernel: Any, name: str, shape: Shape, **arguments: Any) -> Any:
    from jax.experimental.pallas import triton as plt  # 0.1 s, which most processes never need

    _answer_deprecation()
    return pl.pallas_call(
        kernel,
        name=f"block_sparse_{name}",
        compiler_params=plt.CompilerParams(num_warps=shape.warps, num_stages=shape.stages),
        interpret=INTERPRET,
        **arguments,
    )


def _answer_deprecation() -> None:
    """JAX warns of its Triton backend where a program is lowered. This file knows, and nobody who runs one can help it.

    Mosaic GPU, its successor, has no such kernels yet (docs/sparse_attention.md). For programs that are lowered later
    than they were traced, under other filters, there is `lowering`.
    """
    warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)


@contextlib.contextmanager
def lowering(target: Target) -> Iterator[None]:
    """Within it, programs with these kernels can be lowered for a GPU that is not there.

    Since 0.11 JAX works out the compute capability by the name of the GPU at hand, or of an abstract one, of which it
    knows a few: the target's is the answer. And it warns of the Triton backend.
    """
    with warnings.catch_warnings():
        _answer_deprecation()
        if target.capability is None or jax.__version_info__ < (0, 11):
            yield
            return
        private: Any = importlib.import_module("jax._src.pallas.triton.gpu_info")
        major, minor = target.capability
        info = private.GpuInfo(gpu_version=None, arch_name=f"{major}.{minor}", compute_capability=10 * major + minor)
        asked = private.get_gpu_info
        private.get_gpu_info = lambda: info
        try:
            yield
        finally:
            private.get_gpu_info = asked
