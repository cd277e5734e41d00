"""Which key blocks each query block sees: lists of block numbers, their division into smaller blocks, their transpose.

B batch · N heads · Nq query blocks · Nkv key blocks · M places in a row of a list. Plain integer arithmetic, jittable.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Lists(NamedTuple):
    """The key blocks of every query block, as integer arrays; B and N may be 1, which stands for all.

    q2k: int32 [B,N,Nq,M], distinct key blocks; in range everywhere, meaningless from q2k_count on.
    q2k_count: int32 [B,N,Nq].
    kv_sizes: int32 [Nkv], valid tokens of each key block; they come first in it.
    """

    q2k: Any
    q2k_count: Any
    kv_sizes: Any


def listed(lists: Lists) -> jax.Array:
    """bool [B,N,Nq,M]: which places of the rows count."""
    return jax.lax.broadcasted_iota(jnp.int32, lists.q2k.shape, 3) < lists.q2k_count[..., None]


def split(lists: Lists, block: int, block_q: int, block_kv: int) -> Lists:
    """The same attention in smaller blocks: each query block of `block` tokens becomes block / block_q, likewise keys.

    Key blocks left without valid tokens are dropped from the rows (whether or not anything is divided), the rest stays
    in order. Both sizes must divide `block`.
    """
    parts_q, parts_kv = block // block_q, block // block_kv
    q2k, _, sizes = lists = Lists(*map(jnp.asarray, lists))
    B, N, Nq, M = q2k.shape
    part = jnp.arange(parts_kv, dtype=jnp.int32)
    sizes = jnp.clip(sizes[:, None] - part[None] * block_kv, 0, block_kv)  # [Nkv,parts]
    valid = listed(lists)[..., None] & (sizes > 0)[q2k]  # [B,N,Nq,M,parts]
    children = q2k[..., None] * parts_kv + part[None, None, None, None]  # [B,N,Nq,M,parts]
    children = children.reshape(B, N, Nq, M * parts_kv)  # [B,N,Nq,M*parts]
    valid = valid.reshape(children.shape)  # [B,N,Nq,M*parts]
    place = jnp.where(valid, jnp.cumsum(valid, axis=-1, dtype=jnp.int32) - 1, M * parts_kv)
    put = lambda row, place: jnp.zeros_like(row).at[place].set(row, mode="drop")  # noqa: E731
    # A row at a time, [B*N*Nq,M*parts]
    children = jax.vmap(put)(children.reshape(-1, M * parts_kv), place.reshape(-1, M * parts_kv))
    count = jnp.sum(valid, axis=-1, dtype=jnp.int32)
    return Lists(
        jnp.repeat(children.reshape(B, N, Nq, M * parts_kv), parts_q, axis=2),  # [B,N,Nq*parts_q,M*parts]
        jnp.repeat(count, parts_q, axis=2),  # [B,N,Nq*parts_q]
        sizes.reshape(-1),  # [Nkv*parts]
    )


def transpose(lists: Lists) -> tuple[jax.Array, jax.Array]:
    """The query blocks that see each key block, as (offsets, queries).

    offsets int32 [B,N,Nkv+1] and queries int32 [B,N,Nq*M]: key block j is seen by the query blocks
    queries[offsets[j]:offsets[j+1]], in ascending order. Places beyond offsets[Nkv] hold numbers in range.
    """
    q2k, _, sizes = lists = Lists(*map(jnp.asarray, lists))
    B, N, Nq, M = q2k.shape
    Nkv = sizes.shape[0]
    # One number per entry, by key block and then by query block: sorting numbers is cheaper than sorting pairs.
    code = q2k * Nq + jax.lax.broadcasted_iota(jnp.int32, q2k.shape, 2)
    code = jnp.sort(jnp.where(listed(lists), code, Nkv * Nq).reshape(B, N, Nq * M), axis=-1)  # [B,N,Nq*M]
    starts = jnp.arange(Nkv + 1, dtype=jnp.int32) * Nq
    offsets = jax.vmap(lambda row: jnp.searchsorted(row, starts))(code.reshape(-1, Nq * M))  # [B*N,Nkv+1]
    return offsets.reshape(B, N, Nkv + 1).astype(jnp.int32), code % Nq  # [B,N,Nkv+1], [B,N,Nq*M]
