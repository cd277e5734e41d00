"""Sequence parallelism: any local attention, made to work on tokens that are spread over devices.

B batch · L video tokens · S text tokens · N heads · K head dim · U devices that exchange heads · R devices in a ring.

Ulysses (arXiv 2309.14509): an all-to-all gives each of U devices all tokens of a share of the heads, the local
function does its work, and an all-to-all brings the tokens back. A ring (arXiv 2310.01889): queries stay, keys and
values go round R devices, and the results are merged by their log-sum-exp. Both together (arXiv 2405.07719): each of
the R devices of a ring holds, after the exchange, a part of the tokens of its heads.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jvdiff import kernels
from jvdiff.sharding.placement import Split
from jvdiff.types import Array

# (q, k, v, gate, first head) -> out, all [B,L,n,K]; the gate may be None. The n heads are those from `first head` on.
# With a text behind the tokens its lengths take the place of the gate. Numbers of all heads, if any, come last.
Local = Callable[..., Array]


def self_attention(
    local: Local,
    split: Split,
    q: Array,
    k: Array,
    v: Array,
    gate: Array | None,
    implementation: str | None = None,
    numbers: Array | None = None,
) -> Array:
    """`local` over whole sequences, for operands [B,L,N,K] divided as `split` says, L padded; the result likewise.

    Where `split` has a ring, dense attention (`implementation` of `jvdiff.kernels.attention`) takes the place of
    `local`. Heads that U does not divide are padded. At most four all-to-alls: a gate travels with the values.
    numbers: int32 [B,N] of all heads, which every device of a clip has.
    """
    whole = P(split.batch, split.ring + split.heads, split.tensor)
    body = partial(_exchanged, local, split, implementation)
    specs = (whole, whole, whole, whole, P(split.batch))  # None has no leaf that would need one
    run = jax.shard_map(body, mesh=split.mesh, in_specs=specs, out_specs=whole, check_vma=False)
    return run(q, k, v, gate, numbers)


def joint_attention(
    local: Local,
    split: Split,
    video: tuple[Array, Array, Array],
    text: tuple[Array, Array, Array],
    lengths: Array,
    implementation: str | None = None,
    numbers: Array | None = None,
) -> tuple[Array, Array]:
    """Attention of video tokens and the rows of a text to one another: `self_attention` with a text behind the tokens.

    video: queries, keys and values [B,L,N,K] divided as `split` says, L padded. text: the same [B,S,N,K], which all
    devices of a clip have. lengths: int32 [B], how many rows of the text count as keys.

    Returns:
        what video and text become, divided as they are.
    """
    tokens, rows = P(split.batch, split.ring + split.heads, split.tensor), P(split.batch, None, split.tensor)
    body = partial(_exchanged_joint, local, split, implementation)
    specs = (tokens,) * 3, (rows,) * 3, P(split.batch), P(split.batch)
    run = jax.shard_map(body, mesh=split.mesh, in_specs=specs, out_specs=(tokens, rows), check_vma=False)
    return run(video, text, lengths, numbers)


def cross_attention(local: Callable[[Array, Array, Array], Array], split: Split, q: Array, k: Array, v: Array) -> Array:
    """`local` of queries [B,L,N,K], divided as `split` says, to keys [B,S,N,K] that all devices of a clip have."""
    tokens, text = P(split.batch, split.ring + split.heads, split.tensor), P(split.batch, None, split.tensor)
    run = jax.shard_map(local, mesh=split.mesh, in_specs=(tokens, text, text), out_specs=tokens, check_vma=False)
    return run(q, k, v)


def cached_attention(
    local: Callable[[Array, Array, Array, Any, Any], Array],
    split: Split,
    q: Array,
    k: Array,
    v: Array,
    past: Any,
    common: Any,
) -> tuple[Array, tuple[Array, Array]]:
    """`local(q, k, v, past, common)` for tokens [B,L,N,K] divided as `split` says, L padded, and a past that is kept.

    past: arrays [B,...,M,K] with the heads of `by_heads`, each device the whole past of its own; or None.
    common: what every device has, arrays or None.

    Returns:
        (attention [B,L,N,K] divided as q is, (keys, values) [B,tokens,M,K] divided by heads, to be kept).
    """
    tokens = P(split.batch, split.ring + split.heads, split.tensor)
    memory = by_heads(split)
    body = partial(_exchanged_past, local, split)
    old = jax.tree.map(lambda x: P(*memory[:1], *(None,) * (x.ndim - 3), *memory[2:]), past)
    specs = (tokens, tokens, tokens, old, jax.tree.map(lambda _: P(), common))
    run = jax.shard_map(body, mesh=split.mesh, in_specs=specs, out_specs=(tokens, (memory, memory)), check_vma=False)
    return run(q, k, v, past, common)


def by_heads(split: Split) -> P:
    """Where keys [B,S,M,K] of whole sequences live: heads divided over all devices of a clip."""
    return P(split.batch, None, split.tensor + split.heads)


def padded_heads(split: Split, heads: int) -> int:
    """M: the number of heads, padded so that every device has the same number."""
    devices = split.devices(split.heads)
    each = heads // split.devices(split.tensor)
    return split.devices(split.tensor) * -(-each // devices) * devices


def _exchanged_past(local: Any, split: Split, q: Array, k: Array, v: Array, past: Any, common: Any) -> Any:
    """On each device: q, k, v [B,L/U,n,K] -> out [B,L/U,n,K], and its own heads' (k, v) [B,L,M/U,K]."""
    U, heads = split.devices(split.heads), q.shape[2]
    padding = ((0, 0), (0, 0), (0, -heads % U), (0, 0))

    def scatter_heads(x: Array) -> Array:
        if U > 1:  # [B,L/U,n,K] -> [B,L,n/U,K], n and L padded
            x = lax.all_to_all(jnp.pad(x, padding), split.heads, split_axis=2, concat_axis=1, tiled=True)
        return x[:, : split.tokens]

    q, k, v = scatter_heads(q), scatter_heads(k), scatter_heads(v)
    out = local(q, k, v, past, common)
    if U > 1:
        out = jnp.pad(out, ((0, 0), (0, split.padding), (0, 0), (0, 0)))  # [B,L,n/U,K], L padded
        out = lax.all_to_all(out, split.heads, split_axis=1, concat_axis=2, tiled=True)[:, :, :heads]  # [B,L/U,n,K]
    return out, (k, v)


def _exchanged(
    local: Local,
    split: Split,
    implementation: str | None,
    q: Array,
    k: Array,
    v: Array,
    gate: Array | None,
    numbers: Array | None,
) -> Array:
    """On each device: [B,L/(R U),n,K] -> the same."""
    tokens, U = split.tokens, split.devices(split.heads)
    heads, K = q.shape[2:]
    share = -(-heads // U)
    first = _rank(split.tensor) * heads + _rank(split.heads) * share

    def scatter_heads(x: Array) -> Array:
        if U == 1:
            return x
        x = jnp.pad(x, ((0, 0), (0, 0), (0, share * U - heads), (0, 0)))  # n a multiple of U
        return lax.all_to_all(x, split.heads, split_axis=2, concat_axis=1, tiled=True)  # [B,L/R,n/U,K]

    values = scatter_heads(v if gate is None else jnp.concatenate([v, gate], axis=-1))  # [B,L/R,n/U,K or 2K]
    q, k, length = scatter_heads(q), scatter_heads(k), values.shape[1]
    if not split.ring:
        gates = None if gate is None else values[:, :tokens, :, K:]
        more = () if numbers is None else (numbers,)
        out = local(q[:, :tokens], k[:, :tokens], values[:, :tokens, :, :K], gates, first, *more)
        out = jnp.pad(out, ((0, 0), (0, length - tokens), (0, 0), (0, 0)))  # [B,L,n/U,K], L padded
    else:
        out = _ring(q, k, values, split, implementation)
    if U == 1:
        return out
    out = lax.all_to_all(out, split.heads, split_axis=1, concat_axis=2, tiled=True)  # [B,L/(R U),n,K]
    return out[:, :, :heads]


def _exchanged_joint(
    local: Local, split: Split, implementation: str | None, video: Any, text: Any, lengths: Array, numbers: Array | None
) -> tuple[Array, Array]:
    """On each device: video [B,L/(R U),n,K] and text [B,S,n,K], three of each -> one of each."""
    tokens, U, heads = split.tokens, split.devices(split.heads), video[0].shape[2]
    share = -(-heads // U)
    first = _rank(split.tensor) * heads + _rank(split.heads) * share
    padded = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, share * U - heads), (0, 0)))  # noqa: E731 - n a multiple of U
    if U > 1:  # [B,L/R,n/U,K] and [B,S,n/U,K]
        video = [lax.all_to_all(padded(x), split.heads, split_axis=2, concat_axis=1, tiled=True) for x in video]
        text = [lax.dynamic_slice_in_dim(padded(x), _rank(split.heads) * share, share, axis=2) for x in text]
    length = video[0].shape[1]
    if split.ring:
        queries = jnp.concatenate([video[0], text[0]], axis=1)
        out = _ring(queries, video[1], video[2], split, implementation, (*text[1:], lengths))
        of_video, of_text = out[:, :length], out[:, length:]
    else:
        q, k, v = (jnp.concatenate([x[:, :tokens], y], axis=1) for x, y in zip(video, text, strict=True))
        out = local(q, k, v, lengths, first, *(() if numbers is None else (numbers,)))  # [B,L+S,n/U,K]
        of_video = jnp.pad(out[:, :tokens], ((0, 0), (0, length - tokens), (0, 0), (0, 0)))
        of_text = out[:, tokens:]
    if U > 1:  # [B,L/(R U),n,K] and [B,S,n,K]
        of_video = lax.all_to_all(of_video, split.heads, split_axis=1, concat_axis=2, tiled=True)[:, :, :heads]
        of_text = lax.all_gather(of_text, split.heads, axis=2, tiled=True)[:, :, :heads]
    return of_video, of_text


def _ring(q: Array, k: Array, v: Array, split: Split, implementation: str | None, text: Any = None) -> Array:
    """Dense attention of a device's queries [B,c,n,K] to the keys [B,c',n,K] of R devices, padding excepted; and to
    those of a text that each has, of which some count: keys and values [B,S,n,K], and int32 [B]."""
    R, tokens = split.devices(split.ring), split.tokens
    length, rank = k.shape[1], _rank(split.ring)
    how: Any = dict(return_lse=True, implementation=implementation, target=split.target)
    onwards = [(i, (i + 1) % R) for i in range(R)]
    parts = []
    for step in range(R):
        valid = None
        if R * length != tokens:
            valid = jnp.clip(tokens - (rank - step) % R * length, 0, length)
        held = k, v
        if step < R - 1:  # sent before the work, so that both can go on at once
            k, v = lax.ppermute((k, v), split.ring, onwards)
        out, lse = kernels.attention(q, *held, kv_length=valid, **how)
        parts.append((out.astype(jnp.float32), lse))
    if text is not None:
        out, lse = kernels.attention(q, *text[:2], kv_length=text[2], **how)
        parts.append((out.astype(jnp.float32), lse))
    out, _ = reduce(lambda one, two: kernels.merge(*one, *two), parts)
    return out.astype(q.dtype)


def _rank(axes: tuple[str, ...]) -> Any:
    """This device's place along some axes."""
    return lax.axis_index(axes) if axes else 0
