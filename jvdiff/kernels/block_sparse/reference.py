"""Block-sparse attention written as its definition: float32, a dense mask, all logits at once. Small shapes only.

B batch · L query tokens · S key tokens · N heads · K head dim · Nq, Nkv blocks of queries and keys.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jvdiff.kernels.block_sparse.lists import Lists, listed, padded_backward, padded_forward
from jvdiff.runtime.target import Target

_PRECISION = jax.lax.Precision.HIGHEST


def unsupported(q: Any, k: Any, v: Any, block: int) -> str | None:
    """It can do everything that fits in memory."""
    return None


def unavailable(target: Target) -> str | None:
    """It runs everywhere."""
    return None


def parts(q: Any, block: int, target: Target) -> tuple[int, int]:
    """Whole blocks."""
    return block, block


@padded_forward
def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, lists: Lists, *, block: int, target: Target, scale: float
) -> tuple[jax.Array, jax.Array]:
    """out [B,L,N,K] in the dtype of q, lse float32 [B,N,L]."""
    qf, kf, vf = (x.astype(jnp.float32) for x in (q, k, v))
    out, lse = _attention(qf, kf, vf, _mask(q, lists, block), scale)
    return out.astype(q.dtype), lse


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
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk, dv in the dtypes of q, k, v, by differentiating the definition."""
    f = lambda q, k, v: _attention(q, k, v, _mask(q, lists, block), scale)  # noqa: E731
    _, pull = jax.vjp(f, *(x.astype(jnp.float32) for x in (q, k, v)))
    dq, dk, dv = pull((dout.astype(jnp.float32), dlse))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
    logits = jnp.einsum("blnk,bsnk->bnls", q, k, precision=_PRECISION) * scale  # [B,N,L,S]
    some = jnp.any(mask, axis=-1)  # a row that sees nothing must have no part in any gradient either
    logits = jnp.where(mask, logits, jnp.where(some, -jnp.inf, 0.0)[..., None])
    lse = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.where(mask, jnp.exp(logits - lse[..., None]), 0)
    out = jnp.einsum("bnls,bsnk->blnk", weights, v, precision=_PRECISION)  # [B,L,N,K]
    return out, jnp.where(some, lse, -jnp.inf)


def _mask(q: jax.Array, lists: Lists, block: int) -> jax.Array:
    """bool [B,N,L,S]: which keys each query sees."""
    q2k, sizes = jnp.asarray(lists.q2k), jnp.asarray(lists.kv_sizes)
    Nkv = sizes.shape[0]
    hits = (q2k[..., None] == jnp.arange(Nkv, dtype=jnp.int32)[None, None, None, None]) & listed(lists)[..., None]
    blocks = jnp.repeat(jnp.any(hits, axis=-2), block, axis=-2)  # [B,N,L,Nkv]
    inside = jnp.arange(block, dtype=jnp.int32)[None] < sizes[:, None]  # [Nkv,block]
    mask = blocks[..., None] & inside[None, None, None]  # [B,N,L,Nkv,block]
    mask = mask.reshape(*blocks.shape[:-1], Nkv * block)  # [B,N,L,S]
    return jnp.broadcast_to(mask, (q.shape[0], q.shape[2], *mask.shape[2:]))
