"""Block-sparse attention in plain XLA: only the listed blocks are gathered, a few rows of the lists at a time.

B batch · N heads · L, S tokens · K head dim · Nq, Nkv blocks · M places in a row of a list · b tokens of a key block ·
J = M*b gathered keys · G query blocks of one step, of several heads or rows · p tokens of such a query block, which may
be a part of the caller's.

Never more than `LOGITS` logits exist at once, as far as `_QUERIES` queries of one head allow. The backward pass is one
walk over the query blocks; a step adds to each key block of each head at most once, so that the order is fixed.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jvdiff.kernels.block_sparse.lists import Lists, padded_backward, padded_forward
from jvdiff.runtime.target import Target

# Logits of one step. On a CPU a step should stay in the caches; a GPU needs enough work to fill it.
LOGITS = {"cpu": 2**18, "gpu": 2**28}
_QUERIES = 64  # a step of fewer queries would gather more than it computes
_FLOOR = -1e30  # what a masked logit becomes: finite, so that no difference of two is NaN


def unsupported(q: Any, k: Any, v: Any, block: int) -> str | None:
    """It can do everything."""
    return None


def unavailable(target: Target) -> str | None:
    """It runs everywhere."""
    return None


def parts(q: Any, block: int, target: Target) -> tuple[int, int]:
    """Whole blocks."""
    return block, block


@padded_forward
@jax.named_scope("xla_attention")
def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, lists: Lists, *, block: int, target: Target, scale: float
) -> tuple[jax.Array, jax.Array]:
    """out [B,L,N,K] in the dtype of q, lse float32 [B,N,L]."""
    B, L, N, K = q.shape
    work = _Work(q.shape, k.shape, lists, block, target.platform)
    heads, rows = step_sizes(B * N, work.rows, work.part * work.places * block, target.platform)
    row = jnp.minimum(jnp.arange(-(-work.rows // rows) * rows, dtype=jnp.int32), work.rows - 1)
    row = row.reshape(-1, 1, rows)  # [turns,1,rows], the last row again where they do not divide
    head = jnp.arange(B * N, dtype=jnp.int32).reshape(-1, heads, 1)  # [groups,heads,1]

    @jax.checkpoint  # for derivatives of its tangents, which are all that differentiates this function
    def step(x: Any) -> tuple[jax.Array, jax.Array]:
        h, r = (jnp.broadcast_to(y, (heads, rows)).ravel() for y in x)  # [G]
        blocks, mask = work.listed(h, r)
        logits = _logits(work.queries(q, h, r), work.keys(k, h, blocks), mask, scale)
        top = lax.stop_gradient(jnp.max(logits, axis=1))
        weights = jnp.exp(logits - top[:, None])
        total = jnp.sum(weights, axis=1)
        out = _dot("gjq,gjk->gqk", weights.astype(v.dtype), work.keys(v, h, blocks))
        some = top > _FLOOR
        out = jnp.where(some[..., None], out / total[..., None], 0).astype(q.dtype)
        lse = jnp.where(some, top + jnp.log(total), -jnp.inf)
        return out.reshape(heads, rows * work.part, K), lse.reshape(heads, rows * work.part)  # [G,p,..] by heads

    out, lse = lax.map(lambda h: lax.map(lambda r: step((h, r)), row), head)  # [groups,turns,heads,rows*p,...]
    out, lse = (jnp.moveaxis(x, 1, 2).reshape(B, N, -1, *x.shape[4:])[:, :, :L] for x in (out, lse))  # [B,N,L,..]
    return jnp.swapaxes(out, 1, 2), lse  # [B,L,N,K]


@padded_backward
@jax.named_scope("xla_attention")
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
    """dq, dk, dv in the dtypes of q, k, v."""
    B, _, N, K = q.shape
    work = _Work(q.shape, k.shape, lists, block, target.platform)
    heads, _ = step_sizes(B * N, 1, work.part * work.places * block, target.platform)
    delta = jnp.einsum("blnk,blnk->bnl", dout, out, preferred_element_type=jnp.float32) - dlse  # [B,N,L]
    lse = jnp.where(lse > _FLOOR, lse, -_FLOOR)  # a query that saw nothing weighs nothing
    lse, delta = (x.reshape(B * N, -1, work.part) for x in (lse, delta))  # [B,N,L] -> [B*N,rows,p]
    dout = dout.astype(v.dtype)

    def group(h: jax.Array) -> Any:
        def step(carry: Any, row: jax.Array) -> Any:
            dk, dv = carry
            r = jnp.broadcast_to(row, h.shape)
            blocks, mask = work.listed(h, r)
            rows, drows = work.queries(q, h, r), work.queries(dout, h, r)
            keys, values = work.keys(k, h, blocks), work.keys(v, h, blocks)
            p = jnp.exp(_logits(rows, keys, mask, scale) - lse[h, r][:, None])
            dp = _dot("gjk,gqk->gjq", values, drows)
            ds = (p * (dp - delta[h, r][:, None]) * scale).astype(q.dtype)
            # Places beyond the count name arbitrary blocks: they go out of range, each to a place of its own.
            place = lax.broadcasted_iota(jnp.int32, blocks.shape, 1)
            target = jnp.where(place < work.count[h, r // work.parts][:, None], blocks, dk.shape[1] + place)
            add = jax.vmap(lambda x, i, y: x.at[i].add(y, mode="drop", unique_indices=True))
            parts = lambda x: x.reshape(*blocks.shape, block, K)  # noqa: E731 - [G,J,K] -> [G,M,b,K]
            dk = add(dk, target, parts(_dot("gjq,gqk->gjk", ds, rows)))
            dv = add(dv, target, parts(_dot("gjq,gqk->gjk", p.astype(q.dtype), drows)))
            return (dk, dv), _dot("gjq,gjk->gqk", ds, keys).astype(q.dtype)

        zeros = jnp.zeros((heads, k.shape[1] // block, block, K), jnp.float32)
        (dk, dv), dq = lax.scan(step, (zeros, zeros), jnp.arange(work.rows, dtype=jnp.int32))
        return jnp.moveaxis(dq, 0, 1), dk.astype(k.dtype), dv.astype(v.dtype)  # [heads,rows,p,K], [heads,Nkv,b,K]

    grads = lax.map(group, jnp.arange(B * N, dtype=jnp.int32).reshape(-1, heads))  # [groups,heads,...] each
    dq, dk, dv = (jnp.swapaxes(x.reshape(B, N, -1, K), 1, 2) for x in grads)  # [B,L or S,N,K]
    return dq, dk, dv


def step_sizes(heads: int, rows: int, logits: int, platform: str) -> tuple[int, int]:
    """How many of the heads, and how many of their query blocks with `logits` each, one step holds."""
    limit = max(1, LOGITS.get(platform, LOGITS["gpu"]) // logits)
    group = next(g for g in range(min(heads, limit), 0, -1) if heads % g == 0)
    return group, min(rows, max(1, limit // group))


def query_parts(block: int, keys: int, platform: str) -> int:
    """Into how many parts a query block is cut that sees `keys` of them."""
    limit = LOGITS.get(platform, LOGITS["gpu"])
    enough = lambda n: block // n * keys <= limit or block // n < 2 * _QUERIES  # noqa: E731
    return next(n for n in range(1, block + 1) if block % n == 0 and enough(n))


class _Work:
    """Lists and blocks by the number of a head in 0..B*N-1, without a copy of the operands in another order."""

    def __init__(self, q_shape: Any, k_shape: Any, lists: Lists, block: int, platform: str):
        B, L, N, _ = q_shape
        every = lambda x: jnp.broadcast_to(x, (B, N, *x.shape[2:])).reshape(B * N, *x.shape[2:])  # noqa: E731 - [B*N,..]
        self.q2k, self.count = every(jnp.asarray(lists.q2k)), every(jnp.asarray(lists.q2k_count))
        self.sizes = jnp.asarray(lists.kv_sizes)
        self.heads, self.block, self.places = N, block, self.q2k.shape[-1]
        self.parts = query_parts(block, self.places * block, platform)
        self.part, self.rows = block // self.parts, L // block * self.parts

    def listed(self, head: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        """head [G], row [G] -> key blocks [G,M], and which of their tokens count, bool [G,J]."""
        blocks = self.q2k[head, row // self.parts]
        place = lax.broadcasted_iota(jnp.int32, blocks.shape, 1)
        valid = jnp.where(place < self.count[head, row // self.parts][:, None], self.sizes[blocks], 0)
        mask = lax.broadcasted_iota(jnp.int32, (*blocks.shape, self.block), 2) < valid[..., None]
        return blocks, mask.reshape(head.shape[0], -1)  # [G,M,b] -> [G,J]

    def queries(self, x: jax.Array, head: jax.Array, row: jax.Array) -> jax.Array:
        """x [B,L,N,K], head [G], row [G] -> [G,p,K]."""
        return self._take(x, self.part, head, row)

    def keys(self, x: jax.Array, head: jax.Array, blocks: jax.Array) -> jax.Array:
        """x [B,S,N,K], head [G], blocks [G,M] -> [G,J,K]."""
        rows = self._take(x, self.block, jnp.broadcast_to(head[:, None], blocks.shape), blocks)  # [G,M,b,K]
        return rows.reshape(blocks.shape[0], -1, x.shape[-1])  # [G,J,K]

    def _take(self, x: jax.Array, size: int, head: jax.Array, number: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1, size, *x.shape[2:])  # [B,blocks,size,N,K]
        return x[head // self.heads, number, :, head % self.heads]  # [G,size,K] or [G,M,size,K]


def _logits(q: jax.Array, keys: jax.Array, mask: jax.Array, scale: float) -> jax.Array:
    """q [G,p,K], keys [G,J,K], mask [G,J] -> float32 [G,J,p]: keys first, since so the products run faster on CPUs."""
    return jnp.where(mask[..., None], _dot("gjk,gqk->gjq", keys, q) * scale, _FLOOR)


def _dot(axes: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(axes, x, y, preferred_element_type=jnp.float32)
