"""Which key blocks each query block sees: lists of block numbers, their division into smaller blocks, their transpose.

B batch · N heads · Nq query blocks · Nkv key blocks · M places in a row of a list · L rows of an operand. Plain integer
arithmetic, jittable.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Lists(NamedTuple):
    """The key blocks of every query block, as integer arrays; B and N may be 1, which stands for all.

    q2k: int32 [B,N,Nq,M], distinct key blocks; in range everywhere, meaningless from q2k_count on.
    q2k_count: int32 [B,N,Nq].
    kv_sizes: int32 [Nkv], valid tokens of each key block; they come first in it.
    q_sizes: int32 [Nq], those of each query block; None: whatever is not told to be empty is computed.
    q_first, kv_first: int32 [Nq] and [Nkv], ascending: the row of each block's first token. None: blocks are padded,
      and block i begins at row i * block. With q_first there are q_sizes.
    q_map, kv_map: where rows and places lie then, for kernels that take padded blocks alone.
    """

    q2k: Any
    q2k_count: Any
    kv_sizes: Any
    q_sizes: Any = None
    q_first: Any = None
    kv_first: Any = None
    q_map: "Map | None" = None
    kv_map: "Map | None" = None


def listed(lists: Lists) -> jax.Array:
    """bool [B,N,Nq,M]: which places of the rows count."""
    return jax.lax.broadcasted_iota(jnp.int32, lists.q2k.shape, 3) < lists.q2k_count[..., None]


def split(lists: Lists, block: int, block_q: int, block_kv: int) -> Lists:
    """The same attention in smaller blocks: each query block of `block` tokens becomes block / block_q, likewise keys.

    Key blocks left without valid tokens are dropped from the rows (whether or not anything is divided), the rest stays
    in order; query blocks left without any see nothing. Both sizes must divide `block`.
    """
    parts_q, parts_kv = block // block_q, block // block_kv
    q2k, sizes = jnp.asarray(lists.q2k), jnp.asarray(lists.kv_sizes)
    B, N, Nq, M = q2k.shape
    part = jnp.arange(parts_kv, dtype=jnp.int32)
    sizes = parts_of(sizes, block, block_kv).reshape(-1, parts_kv)  # [Nkv,parts]
    valid = listed(lists)[..., None] & (sizes > 0)[q2k]  # [B,N,Nq,M,parts]
    children = q2k[..., None] * parts_kv + part[None, None, None, None]  # [B,N,Nq,M,parts]
    children = children.reshape(B, N, Nq, M * parts_kv)  # [B,N,Nq,M*parts]
    valid = valid.reshape(children.shape)  # [B,N,Nq,M*parts]
    place = jnp.where(valid, jnp.cumsum(valid, axis=-1, dtype=jnp.int32) - 1, M * parts_kv)
    put = lambda row, place: jnp.zeros_like(row).at[place].set(row, mode="drop")  # noqa: E731
    # A row at a time, [B*N*Nq,M*parts]
    children = jax.vmap(put)(children.reshape(-1, M * parts_kv), place.reshape(-1, M * parts_kv))
    count = jnp.repeat(jnp.sum(valid, axis=-1, dtype=jnp.int32), parts_q, axis=2)  # [B,N,Nq*parts_q]
    q_sizes = None if lists.q_sizes is None else parts_of(lists.q_sizes, block, block_q)
    return Lists(
        jnp.repeat(children.reshape(B, N, Nq, M * parts_kv), parts_q, axis=2),  # [B,N,Nq*parts_q,M*parts]
        count if q_sizes is None else jnp.where(q_sizes[None, None] > 0, count, 0),
        sizes.reshape(-1),  # [Nkv*parts]
        q_sizes,
        None if lists.q_first is None else starts_of(lists.q_first, block, block_q),
        None if lists.kv_first is None else starts_of(lists.kv_first, block, block_kv),
        lists.q_map,
        lists.kv_map,
    )


def starts_of(first: Any, block: int, part: int) -> jax.Array:
    """int32 [blocks*block/part]: the first row of each part of each block, from int32 [blocks]."""
    return (jnp.asarray(first)[:, None] + jnp.arange(0, block, part, dtype=jnp.int32)[None]).reshape(-1)


def parts_of(sizes: Any, block: int, part: int) -> jax.Array:
    """int32 [blocks*block/part]: how many tokens each part of each block holds, from int32 [blocks]."""
    starts = jnp.arange(0, block, part, dtype=jnp.int32)
    return jnp.clip(jnp.asarray(sizes)[:, None] - starts[None], 0, part).reshape(-1)


def transpose(lists: Lists) -> tuple[jax.Array, jax.Array]:
    """The query blocks that see each key block, as (offsets, queries).

    offsets int32 [B,N,Nkv+1] and queries int32 [B,N,Nq*M]: key block j is seen by the query blocks
    queries[offsets[j]:offsets[j+1]], in ascending order. Places beyond offsets[Nkv] hold numbers in range.
    """
    q2k = jnp.asarray(lists.q2k)
    (B, N, Nq, M), Nkv = q2k.shape, lists.kv_sizes.shape[0]
    # One number per entry, by key block and then by query block: sorting numbers is cheaper than sorting pairs.
    code = q2k * Nq + jax.lax.broadcasted_iota(jnp.int32, q2k.shape, 2)
    code = jnp.sort(jnp.where(listed(lists), code, Nkv * Nq).reshape(B, N, Nq * M), axis=-1)  # [B,N,Nq*M]
    starts = jnp.arange(Nkv + 1, dtype=jnp.int32) * Nq
    offsets = jax.vmap(lambda row: jnp.searchsorted(row, starts))(code.reshape(-1, Nq * M))  # [B*N,Nkv+1]
    return offsets.reshape(B, N, Nkv + 1).astype(jnp.int32), code % Nq  # [B,N,Nkv+1], [B,N,Nq*M]


class Map(NamedTuple):
    """Blocks that are not padded, and the same ones padded.

    row: int32 [blocks*block], the row of each place; L where no token lies.
    place: int32 [L], the place of each row; blocks*block for rows in no block.
    """

    row: Any
    place: Any

    def padded(self, x: jax.Array, axis: int = 1) -> jax.Array:
        """The rows of x on an axis -> blocks*block places, zero where no token lies."""
        return jnp.take(x, jnp.asarray(self.row), axis=axis, mode="fill", fill_value=0)

    def packed(self, x: jax.Array, axis: int = 1) -> jax.Array:
        """The inverse: places on an axis -> rows, zero for those in no block."""
        return jnp.take(x, jnp.asarray(self.place), axis=axis, mode="fill", fill_value=0)


def map_of(first: np.ndarray, sizes: np.ndarray, block: int, length: int) -> Map:
    """That of blocks of `block` places in an operand of `length` rows."""
    place = np.arange(block)
    row = np.where(place < sizes[:, None], first[:, None] + place, length).ravel()
    places = np.full(length, row.size)
    places[row[row < length]] = np.flatnonzero(row < length)
    return Map(row.astype(np.int32), places.astype(np.int32))


def padded_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """An implementation's `forward` for padded blocks -> one for blocks that begin anywhere, too."""

    @functools.wraps(forward)
    def anywhere(q, k, v, lists: Lists, **how: Any) -> tuple[jax.Array, jax.Array]:
        if lists.q_first is None:
            return forward(q, k, v, lists, **how)
        queries, keys, plain = _maps(lists)
        out, lse = forward(queries.padded(q), keys.padded(k), keys.padded(v), plain, **how)
        return queries.packed(out), queries.packed(lse, axis=2)

    return anywhere


def padded_backward(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The same for `backward`."""

    @functools.wraps(backward)
    def anywhere(q, k, v, out, lse, dout, dlse, lists: Lists, **how: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        if lists.q_first is None:
            return backward(q, k, v, out, lse, dout, dlse, lists, **how)
        queries, keys, plain = _maps(lists)
        of_queries = queries.padded(q), keys.padded(k), keys.padded(v), queries.padded(out), queries.padded(lse, axis=2)
        cotangents = queries.padded(dout), queries.padded(dlse, axis=2)
        dq, dk, dv = backward(*of_queries, *cotangents, plain, **how)
        return queries.packed(dq), keys.packed(dk), keys.packed(dv)

    return anywhere


def _maps(lists: Lists) -> tuple[Map, Map, Lists]:
    """Where queries and keys lie, and the lists of the same blocks when they are padded."""
    assert lists.q_map is not None and lists.kv_map is not None
    return lists.q_map, lists.kv_map, Lists(*lists[:4])
