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
import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from jvdiff.kernels.block_sparse.lists import Lists, split, transpose

INTERPRET = False  # tests set it: the kernels then run on a CPU, slowly

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
_LOG2_E = math.log2(math.e)
_FLOOR = -1e30  # below all logits, and finite: the running maximum of a row that has seen no key


class Shape(NamedTuple):
    """Rows of the query and key blocks of one kernel, its warps, and the stages of its loads."""

    block_q: int
    block_kv: int
    warps: int
    stages: int


def shapes(block: int, head_dim: int, dtype: Any) -> dict[str, Shape]:
    """The block shapes of each kernel: divisors of `block`, powers of two."""
    limit = min(64, block & -block)  # the largest power of two in it
    if jnp.dtype(dtype) == jnp.float32:  # no tensor cores: products of whole float32 numbers fill the registers
        small = min(32, limit)
        return dict.fromkeys(("forward", "dq", "dkv"), Shape(small, small, 4, 1))
    warps = 4 if head_dim <= 64 else 8
    return {
        "forward": Shape(limit, limit, warps, 2),
        "dq": Shape(limit, limit, warps, 2),
        "dkv": Shape(limit, limit, warps, 2),
    }


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


def unavailable() -> str | None:
    """Why these kernels cannot run here, or None."""
    if INTERPRET:
        return None
    if jax.default_backend() != "gpu":
        return f"needs an NVIDIA GPU, and the backend is {jax.default_backend()!r}"
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    if not capability.replace(".", "").isdigit() or float(capability) < 8:
        return f"needs an NVIDIA GPU of compute capability 8.0 or later, and {jax.devices()[0].device_kind} is not one"
    return None


def forward(q: jax.Array, k: jax.Array, v: jax.Array, lists: Lists, *, block: int) -> tuple[jax.Array, jax.Array]:
    """out [B,L,N,K] in the dtype of q, and the natural log-sum-exp, float32 [B,N,L]."""
    B, L, N, K = q.shape
    shape = shapes(block, K, q.dtype)["forward"]
    lists = _split(lists, block, shape)
    return _call(
        functools.partial(_forward_kernel, block_kv=shape.block_kv, scale=K**-0.5),
        "forward",
        shape,
        grid=(L // shape.block_q, N, B),
        in_specs=[_block(shape.block_q, K), _tokens(k), _tokens(v), *_list_specs(lists)],
        out_specs=[_block(shape.block_q, K), _row(shape.block_q)],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, L), jnp.float32)],
    )(q, k, v, *lists)


def _forward_kernel(q_ref, k_ref, v_ref, list_ref, count_ref, size_ref, out_ref, lse_ref, *, block_kv, scale):
    """q, out [Q,K]; k, v [S,K]; list [I,E]; count [I]; size [J]; lse [Q]."""
    i = pl.program_id(0)
    q = q_ref[...]
    Q, K = q.shape

    def step(j, carry):
        top, total, out = carry
        block = list_ref[i, j]
        rows = pl.ds(block * block_kv, block_kv)
        logits = _dot(q, k_ref[rows, :].T) * (scale * _LOG2_E)
        logits = _mask(logits, size_ref[block])
        new = jnp.maximum(top, jnp.max(logits, axis=1))
        weights = jnp.exp2(logits - new[:, None])
        fade = jnp.exp2(top - new)
        v = v_ref[rows, :]
        out = out * fade[:, None] + _dot(weights.astype(v.dtype), v)
        return new, total * fade + jnp.sum(weights, axis=1), out

    start = jnp.full((Q,), _FLOOR, jnp.float32), jnp.zeros((Q,), jnp.float32), jnp.zeros((Q, K), jnp.float32)
    top, total, out = lax.fori_loop(0, count_ref[i], step, start)
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    lse_ref[...] = jnp.where(seen, (top + jnp.log2(total)) / _LOG2_E, -jnp.inf)


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
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk and dv in the dtypes of q, k and v, from the cotangents of out and of the log-sum-exp."""
    B, L, N, K = q.shape
    products = dout.astype(jnp.float32) * out.astype(jnp.float32)
    delta = jnp.swapaxes(jnp.sum(products, axis=-1), 1, 2) - dlse
    # Of a query without keys exp2(logit - lse) must be 0.
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse * _LOG2_E)
    scale = K**-0.5
    shape = shapes(block, K, q.dtype)

    rows, keys, *_ = shape["dq"]
    parts = _split(lists, block, shape["dq"])
    dq = _call(
        functools.partial(_dq_kernel, block_kv=keys, scale=scale),
        "dq",
        shape["dq"],
        grid=(L // rows, N, B),
        in_specs=[
            *(_block(rows, K), _tokens(k), _tokens(v), _block(rows, K), _row(rows), _row(rows)),
            *_list_specs(parts),
        ],
        out_specs=_block(rows, K),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    )(q, k, v, dout, lse, delta, *parts)

    rows, keys, *_ = shape["dkv"]
    parts = _split(lists, block, shape["dkv"])
    offsets, ids = transpose(parts)
    dk, dv = _call(
        functools.partial(_dkv_kernel, block_q=rows, scale=scale),
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
    q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, list_ref, count_ref, size_ref, dq_ref, *, block_kv, scale
):
    """q, dout, dq [Q,K]; k, v [S,K]; lse (to base 2), delta [Q]; list [I,E]; count [I]; size [J]."""
    i = pl.program_id(0)
    q, dout = q_ref[...], dout_ref[...]
    lse, delta = lse_ref[...], delta_ref[...]

    def step(j, dq):
        block = list_ref[i, j]
        rows = pl.ds(block * block_kv, block_kv)
        k = k_ref[rows, :]
        logits = _dot(q, k.T) * (scale * _LOG2_E)
        weights = jnp.exp2(_mask(logits, size_ref[block]) - lse[:, None])
        dlogits = weights * (_dot(dout, v_ref[rows, :].T) - delta[:, None])
        return dq + _dot(dlogits.astype(k.dtype), k)

    dq = lax.fori_loop(0, count_ref[i], step, jnp.zeros(q.shape, jnp.float32))
    dq_ref[...] = (dq * scale).astype(dq_ref.dtype)


def _dkv_kernel(
    k_ref, v_ref, q_ref, dout_ref, lse_ref, delta_ref, offset_ref, list_ref, size_ref, dk_ref, dv_ref, *, block_q, scale
):
    """k, v, dk, dv [C,K]; q, dout [L,K]; lse (to base 2), delta [L]; offset [J+1]; list [all E]; size [J]."""
    k, v = k_ref[...], v_ref[...]
    j = pl.program_id(0)

    def step(e, carry):
        dk, dv = carry
        rows = pl.ds(list_ref[e] * block_q, block_q)
        q, dout = q_ref[rows, :], dout_ref[rows, :]
        weights = jnp.exp2(_dot(k, q.T) * (scale * _LOG2_E) - lse_ref[rows][None, :])
        dv = dv + _dot(weights.astype(dout.dtype), dout)
        dlogits = weights * (_dot(v, dout.T) - delta_ref[rows][None, :])
        return dk + _dot(dlogits.astype(q.dtype), q), dv

    zero = jnp.zeros(k.shape, jnp.float32)
    dk, dv = lax.fori_loop(offset_ref[j], offset_ref[j + 1], step, (zero, zero))
    # A row of these products is one key: what is computed of padded ones stays theirs, and is dropped here.
    valid = lax.broadcasted_iota(jnp.int32, k.shape, 0) < size_ref[j]
    dk_ref[...] = jnp.where(valid, dk * scale, 0.0).astype(dk_ref.dtype)
    dv_ref[...] = jnp.where(valid, dv, 0.0).astype(dv_ref.dtype)


def _dot(a, b):
    return lax.dot(a, b, precision=_precision(a.dtype), preferred_element_type=jnp.float32)


def _precision(dtype):
    """Whole float32 products; a tensor core's of half-width operands have no other precision."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


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
    return pl.pallas_call(
        kernel,
        name=f"block_sparse_{name}",
        compiler_params=plt.CompilerParams(num_warps=shape.warps, num_stages=shape.stages),
        interpret=INTERPRET,
        **arguments,
    )


@contextlib.contextmanager
def lowering(device_kind: str, mesh: AbstractMesh | None = None) -> Iterator[None]:
    """Within it, programs with these kernels can be lowered for a GPU that is not there.

    Since 0.11 JAX asks an abstract device which GPU that is, and warns that the Triton backend is deprecated: which
    this file knows, and answers for by itself.

    Args:
      device_kind: as the driver names it: "NVIDIA A100", "NVIDIA H200".
      mesh: of the devices that the program is sharded over; None for one.
    """
    mesh = mesh or AbstractMesh((1,), ("device",), axis_types=(AxisType.Auto,))
    device = AbstractDevice(device_kind=device_kind, num_cores=None, platform="gpu")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        with use_abstract_mesh(mesh.update(abstract_device=device)):
            yield
