"""Attention in plain XLA, a block of queries of a few heads at a time, with bounded memory forwards and backwards.

B batch · L query tokens · S key tokens · N heads · K head dim · G heads of one block · Q queries of one block.

Never more than `LOGITS` logits exist at once. The backward pass recomputes each block's logits instead of keeping
them, so a gradient needs no more than the operands' own size beside that.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jvdiff.runtime.target import Target

# Logits of one block. On a CPU a block should stay in the caches, and one head at a time runs fastest; a GPU needs
# enough work to fill it.
LOGITS = {"cpu": 2**20, "gpu": 2**28}


def unsupported(q: Any, k: Any, v: Any, return_lse: bool, target: Target) -> str | None:
    """It can do everything."""
    return None


@jax.named_scope("xla_attention")
def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, return_lse: bool, kv_length: jax.Array | None, target: Target
) -> tuple[jax.Array, jax.Array | None]:
    """The contract of `jvdiff.kernels.attention`."""
    B, L, N, K = q.shape
    heads, queries = block_sizes(B * N, L, k.shape[1], target.platform)
    q, k, v = (jnp.swapaxes(x, 1, 2).reshape(B * N, -1, K) for x in (q, k, v))  # [B*N,L or S,K]
    length = None if kv_length is None else jnp.repeat(jnp.broadcast_to(kv_length, (B,)), N)  # [B*N]
    if heads == B * N and queries == L:
        out, lse = _block(q, k, v, length)
    else:
        group = lambda x: x.reshape(B * N // heads, heads, *x.shape[1:])  # noqa: E731 - [groups,G,...]
        operands = jax.tree.map(group, (q, k, v, length))
        out, lse = lax.map(lambda x: _queries_in_turn(x[:3], x[3], queries), operands)
    out = jnp.swapaxes(out.reshape(B, N, L, K), 1, 2)  # [B,L,N,K]
    return out, lse.reshape(B, N, L) if return_lse else None  # [B,L,N,K], [B,N,L]


def block_sizes(heads: int, queries: int, keys: int, platform: str) -> tuple[int, int]:
    """(G, Q): how many of the B*N heads, and how many queries, one block holds. G divides the heads."""
    limit = LOGITS.get(platform, LOGITS["gpu"])
    if heads * queries * keys <= limit:
        return heads, queries
    group = 1 if platform == "cpu" else heads
    blocks = -(-queries * group * keys // limit)
    return group, -(-queries // min(blocks, queries))


def _queries_in_turn(
    operands: tuple[jax.Array, jax.Array, jax.Array], kv_length: jax.Array | None, size: int
) -> tuple[jax.Array, jax.Array]:
    """q [G,L,K], k and v [G,S,K], kv_length [G] -> out [G,L,K], lse [G,L], `size` queries at a time."""
    q, k, v = operands
    G, L, K = q.shape
    n = -(-L // size)
    blocks = jnp.pad(q, ((0, 0), (0, n * size - L), (0, 0))).reshape(G, n, size, K)  # [G,n,Q,K], L padded
    blocks = jnp.moveaxis(blocks, 1, 0)  # [n,G,Q,K]
    out, lse = lax.map(lambda x: jax.checkpoint(_block)(x, k, v, kv_length), blocks)
    out, lse = jnp.moveaxis(out, 0, 1), jnp.moveaxis(lse, 0, 1)  # [G,n,Q,K], [G,n,Q]
    return out.reshape(G, n * size, K)[:, :L], lse.reshape(G, n * size)[:, :L]  # [G,L,K], [G,L]


def _block(q: jax.Array, k: jax.Array, v: jax.Array, kv_length: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Plain attention: q [G,Q,K], k and v [G,S,K], kv_length [G] -> out [G,Q,K], lse float32 [G,Q]."""
    logits = jnp.einsum("gqk,gsk->gqs", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5  # [G,Q,S]
    if kv_length is not None:
        valid = lax.broadcasted_iota(jnp.int32, logits.shape, 2) < kv_length[:, None, None]
        logits = jnp.where(valid, logits, -jnp.inf)
    top = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("gqs,gsk->gqk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)  # [G,Q,K]
    return (out / total).astype(q.dtype), (top + jnp.log(total))[..., 0]
