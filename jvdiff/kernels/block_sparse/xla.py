"""Block-sparse attention in plain XLA: only the listed blocks are gathered, a few rows of the lists at a time.

B batch · N heads · H = B*N heads of all batch entries · L, S tokens · K head dim · Nq, Nkv blocks · M places in a row
of a list · G heads and R query blocks of one step · b tokens of a block.

Never more than `LOGITS` logits exist at once, as far as one query block of one head allows. The backward pass is one
walk over the query blocks; a step adds to each key block of each head at most once, so that the order is fixed.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jvdiff.kernels.block_sparse.lists import Lists

# Logits of one step. On a CPU a step should stay in the caches; a GPU needs enough work to fill it.
LOGITS = {"cpu": 2**20, "gpu": 2**28}
_FLOOR = -1e30  # what a masked logit becomes: finite, so that no difference of two is NaN


def unsupported(q: Any, k: Any, v: Any, block: int) -> str | None:
    """It can do everything."""
    return None


def unavailable() -> str | None:
    """It runs everywhere."""
    return None


def forward(q: jax.Array, k: jax.Array, v: jax.Array, lists: Lists, *, block: int) -> tuple[jax.Array, jax.Array]:
    """out [B,L,N,K] in the dtype of q, lse float32 [B,N,L]."""
    B, L, N, _ = q.shape
    q2k, count, sizes = _per_head(lists, B, N)
    Nq, M = q2k.shape[1:]
    heads, rows = step_sizes(B * N, Nq, block * M * block)
    q, k, v = (_blocks(x, block) for x in (q, k, v))

    def group(x: Any) -> Any:  # G heads, R of their query blocks at a time
        q, k, v, q2k, count = x
        pad = -Nq % rows
        q, q2k, count = (jnp.pad(y, ((0, 0), (0, pad), *[(0, 0)] * (y.ndim - 2))) for y in (q, q2k, count))
        turns = lambda y: jnp.moveaxis(y.reshape(heads, -1, rows, *y.shape[2:]), 1, 0)  # noqa: E731
        out, lse = lax.map(lambda y: _attend(y[0], k, v, y[1], y[2], sizes), (turns(q), turns(q2k), turns(count)))
        back = lambda y: jnp.moveaxis(y, 0, 1).reshape(heads, Nq + pad, *y.shape[3:])[:, :Nq]  # noqa: E731
        return back(out), back(lse)

    groups = lambda x: x.reshape(-1, heads, *x.shape[1:])  # noqa: E731
    out, lse = lax.map(group, tuple(groups(x) for x in (q, k, v, q2k, count)))
    return _tokens(out.reshape(B * N, L, -1), B), lse.reshape(B, N, L)


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
    """dq, dk, dv in the dtypes of q, k, v."""
    B, _, N, _ = q.shape
    q2k, count, sizes = _per_head(lists, B, N)
    Nq, M = q2k.shape[1:]
    heads, _ = step_sizes(B * N, 1, block * M * block)
    delta = jnp.einsum("blnk,blnk->bnl", dout, out, preferred_element_type=jnp.float32) - dlse
    lse = jnp.where(lse > _FLOOR, lse, -_FLOOR)  # a query that saw nothing weighs nothing
    rows = lambda x: x.reshape(B * N, Nq, block)  # noqa: E731
    operands = (*(_blocks(x, block) for x in (q, k, v, dout)), rows(lse), rows(delta), q2k, count)
    scale = q.shape[-1] ** -0.5

    def group(x: Any) -> Any:
        q, k, v, *rest = x

        def step(carry: Any, x: Any) -> Any:
            dk, dv = carry
            q, dout, lse, delta, q2k, count = x
            keys, values = _gather(k, q2k), _gather(v, q2k)
            p = jnp.exp(_logits(q, keys, q2k, count, sizes) - lse[..., None])
            dp = jnp.einsum("gqk,gsk->gqs", dout, values, preferred_element_type=jnp.float32)
            ds = (p * (dp - delta[..., None]) * scale).astype(q.dtype)
            dq = jnp.einsum("gqs,gsk->gqk", ds, keys, preferred_element_type=jnp.float32)
            dkeys = jnp.einsum("gqs,gqk->gsk", ds, q, preferred_element_type=jnp.float32)
            dvalues = jnp.einsum("gqs,gqk->gsk", p.astype(q.dtype), dout, preferred_element_type=jnp.float32)
            # Places beyond the count name arbitrary blocks: they go out of range, each to a place of its own.
            place = lax.broadcasted_iota(jnp.int32, q2k.shape, 1)
            target = jnp.where(place < count[:, None], q2k, dk.shape[1] + place)
            add = jax.vmap(lambda x, i, y: x.at[i].add(y, mode="drop", unique_indices=True))
            parts = lambda y: y.reshape(heads, M, block, -1)  # noqa: E731
            return (add(dk, target, parts(dkeys)), add(dv, target, parts(dvalues))), dq.astype(q.dtype)

        turns = tuple(jnp.moveaxis(y, 1, 0) for y in (q, *rest))
        zeros = jnp.zeros(k.shape, jnp.float32)
        (dk, dv), dq = lax.scan(step, (zeros, zeros), turns)
        return jnp.moveaxis(dq, 0, 1), dk.astype(k.dtype), dv.astype(v.dtype)

    groups = lambda x: x.reshape(-1, heads, *x.shape[1:])  # noqa: E731
    grads = lax.map(group, tuple(groups(x) for x in operands))
    dq, dk, dv = (_tokens(x.reshape(B * N, -1, x.shape[-1]), B) for x in grads)
    return dq, dk, dv


def step_sizes(heads: int, rows: int, logits: int) -> tuple[int, int]:
    """(G, R): how many of the heads, and how many of their query blocks with `logits` each, one step holds."""
    limit = max(1, LOGITS.get(jax.default_backend(), LOGITS["gpu"]) // logits)
    group = next(g for g in range(min(heads, limit), 0, -1) if heads % g == 0)
    return group, min(rows, max(1, limit // group))


def _attend(q: Any, k: Any, v: Any, q2k: Any, count: Any, sizes: Any) -> tuple[jax.Array, jax.Array]:
    """q [G,R,b,K], k and v [G,Nkv,b,K], q2k [G,R,M] -> out [G,R,b,K], lse float32 [G,R,b]."""
    G, R, b, K = q.shape
    M = q2k.shape[-1]
    keys, values = (_gather(x, q2k.reshape(G, R * M)).reshape(G * R, M * b, K) for x in (k, v))
    logits = _logits(q.reshape(G * R, b, K), keys, q2k.reshape(G * R, M), count.reshape(G * R), sizes)
    top = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("gqs,gsk->gqk", weights.astype(v.dtype), values, preferred_element_type=jnp.float32)
    some = top > _FLOOR
    out, lse = jnp.where(some, out / total, 0), jnp.where(some, top + jnp.log(total), -jnp.inf)
    return out.astype(q.dtype).reshape(q.shape), lse.reshape(G, R, b)


def _logits(q: jax.Array, keys: jax.Array, q2k: jax.Array, count: jax.Array, sizes: jax.Array) -> jax.Array:
    """q [G,b,K], keys [G,M*b,K], q2k [G,M], count [G] -> float32 [G,b,M*b], masked."""
    G, M = q2k.shape
    b = keys.shape[1] // M
    logits = jnp.einsum("gqk,gsk->gqs", q, keys, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    valid = jnp.where(lax.broadcasted_iota(jnp.int32, q2k.shape, 1) < count[:, None], sizes[q2k], 0)
    mask = (lax.broadcasted_iota(jnp.int32, (G, M, b), 2) < valid[..., None]).reshape(G, 1, M * b)
    return jnp.where(mask, logits, _FLOOR)


def _gather(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [G,Nkv,b,K], index [G,M] -> [G,M*b,K]."""
    found = jax.vmap(lambda x, i: jnp.take(x, i, axis=0, mode="clip"))(x, index)
    return found.reshape(x.shape[0], -1, x.shape[-1])


def _per_head(lists: Lists, B: int, N: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q2k [H,Nq,M], count [H,Nq], sizes [Nkv]."""
    q2k, count, sizes = (jnp.asarray(x) for x in lists)
    every = lambda x: jnp.broadcast_to(x, (B, N, *x.shape[2:])).reshape(B * N, *x.shape[2:])  # noqa: E731
    return every(q2k), every(count), sizes


def _blocks(x: jax.Array, block: int) -> jax.Array:
    """[B,L,N,K] -> [H,blocks,b,K]."""
    B, L, N, K = x.shape
    return jnp.swapaxes(x, 1, 2).reshape(B * N, L // block, block, K)


def _tokens(x: jax.Array, B: int) -> jax.Array:
    """[H,L,K] -> [B,L,N,K]."""
    return jnp.swapaxes(x.reshape(B, -1, *x.shape[1:]), 1, 2)
