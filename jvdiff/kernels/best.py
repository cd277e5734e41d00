"""The k best of each row of scores, without sorting the row.

R rows · n scores of a row · W words of 32 bits.

XLA sorts whole rows on a GPU, whatever k is. Here the k-th best score is found digit by digit, each by counting scores;
what is above it is chosen, and of those equal to it the first ones. A set of a row's numbers is a bit for each of them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_DIGIT = 4  # bits that are found at once: each digit costs a walk over all scores, with 2**_DIGIT - 1 comparisons
_WORD = 32
_BITS = (np.uint32(1) << np.arange(_WORD, dtype=np.uint32))[None, None]  # [1,1,32]


def best(scores: jax.Array, k: int) -> jax.Array:
    """int32 [...,k]: the numbers of the k best float32 scores [...,n] of each row, in any order.

    They are those of `lax.top_k`: equal scores in the order of their numbers, NaN (without a sign) above infinity, and
    0 above -0. On a CPU it is `lax.top_k`, which selects there and does not sort.
    """
    choose = lambda scores: lax.top_k(scores, k)[1]  # noqa: E731
    return lax.platform_dependent(scores, cpu=choose, default=lambda scores: chosen(scores, k))


def chosen(scores: jax.Array, k: int) -> jax.Array:
    """`best` on any device but a CPU; in ascending order."""
    *rows, n = scores.shape
    bits = lax.bitcast_convert_type(scores.reshape(-1, n), jnp.int32)  # [R,n]
    order = lax.bitcast_convert_type(jnp.where(bits < 0, ~bits, bits ^ np.int32(-(2**31))), jnp.uint32)
    # More places, below everything and behind everything that is equal, up to whole words.
    order = jnp.pad(order, ((0, 0), (0, -n % _WORD)))  # [R,32 W]
    last = _kth(order, k)[:, None]
    above, ties = _set(order > last), _set(order == last)
    missing = k - jnp.sum(lax.population_count(above), axis=1, dtype=jnp.int32)  # [R]: how many ties are chosen
    earlier = lax.population_count(ties[..., None] & (_BITS - 1)).astype(jnp.int32)  # [R,W,32]: in the same word
    first = (ties[..., None] & _BITS > 0) & (_before(ties)[..., None] + earlier < missing[:, None, None])
    members = above | jnp.sum(jnp.where(first, _BITS, 0), axis=2, dtype=jnp.uint32)
    return _members(members, k).reshape(*rows, k)


def _kth(order: jax.Array, k: int) -> jax.Array:
    """uint32 [R]: the k-th largest of each row of order uint32 [R,n], from its highest digit to its lowest."""

    def digit(i: Any, found: jax.Array) -> jax.Array:
        low = (_WORD - _DIGIT * (i + 1)).astype(jnp.uint32)
        enough = lambda d: jnp.sum(order >= (found | (d << low))[:, None], axis=1, dtype=jnp.int32) >= k  # noqa: E731
        return found | (sum(enough(np.uint32(d)).astype(jnp.uint32) for d in range(1, 2**_DIGIT)) << low)

    return lax.fori_loop(0, _WORD // _DIGIT, digit, jnp.zeros(order.shape[0], jnp.uint32))


def _set(mask: jax.Array) -> jax.Array:
    """bool [R,n] -> uint32 [R,W]."""
    mask = mask.reshape(len(mask), -1, _WORD)  # [R,W,32]
    return jnp.sum(jnp.where(mask, _BITS, 0), axis=2, dtype=jnp.uint32)


def _before(words: jax.Array) -> jax.Array:
    """int32 [R,W]: how many members of a set the words before each one hold."""
    counts = lax.population_count(words).astype(jnp.int32)
    return jnp.cumsum(counts, axis=1) - counts


def _members(words: jax.Array, k: int) -> jax.Array:
    """int32 [R,k]: the k members of a set uint32 [R,W], in ascending order."""
    before, number = _before(words)[:, None], np.arange(k, dtype=np.int32)[None]  # [R,1,W], [1,k]
    word = jnp.sum(before <= number[..., None], axis=2, dtype=jnp.int32) - 1  # [R,k]: the last with few enough before
    here = word[..., None] == np.arange(words.shape[1], dtype=np.int32)[None, None]  # [R,k,W]
    pick = lambda x: jnp.sum(jnp.where(here, x, 0), axis=2, dtype=x.dtype)  # noqa: E731
    bits, rest, place = pick(words[:, None]), number - pick(before), word * _WORD  # [R,k] each
    for half in (16, 8, 4, 2, 1):  # halves the part of the word in which the member with `rest` members before it lies
        low = lax.population_count(bits & np.uint32(2**half - 1)).astype(jnp.int32)
        upper = rest >= low
        rest, place = jnp.where(upper, rest - low, rest), jnp.where(upper, place + half, place)
        bits = jnp.where(upper, bits >> np.uint32(half), bits)
    return place
