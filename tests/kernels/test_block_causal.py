"""Block-causal attention against a dense mask in float64, and what its pattern says.

B batch · L tokens · T frames · N heads · K head dim.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff.errors import UsageError
from jvdiff.kernels import BlockCausal, SlidingTile, block_causal_attention
from jvdiff.kernels.block_causal import visible

slower = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="more of the same, for make kernels")


def operands(frames, tokens, seed=0):
    random = np.random.default_rng(seed)
    return [random.standard_normal((2, frames * tokens, 2, 16), np.float32) for _ in range(4)]


def dense(mask, q, k, v, dout):
    """The attention and its three gradients in float64; rows that see nothing give 0."""
    tokens = q.shape[1] // len(mask)  # 1 for a mask of tokens
    seen = np.repeat(np.repeat(mask, tokens, 0), tokens, 1)
    q, k, v, dout = (x.astype(np.float64) for x in (q, k, v, dout))
    scale = q.shape[-1] ** -0.5
    scores = np.where(seen, np.einsum("blnk,bmnk->bnlm", q, k) * scale, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True, initial=-1e30))
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    out = np.einsum("bnlm,bmnk->blnk", weights, v)
    inner = np.einsum("blnk,bmnk->bnlm", dout, v)
    dscores = weights * (inner - (weights * inner).sum(-1, keepdims=True)) * scale
    grads = (
        np.einsum("bnlm,bmnk->blnk", dscores, k),
        np.einsum("bnlm,blnk->bmnk", dscores, q),
        np.einsum("bnlm,blnk->bmnk", weights, dout),
    )
    return out, *grads


def found(q, k, v, dout, mask, traced):
    """The same of ours; `traced`: the matrix is worked out in the program."""

    @jax.jit
    def run(q, k, v, dout, computed):
        out, back = jax.vjp(lambda *x: block_causal_attention(*x, computed if traced else mask), q, k, v)
        return out, *back(dout)

    return run(q, k, v, dout, jnp.asarray(mask))


# Frames smaller and larger than a GPU's block of 64 tokens.
@pytest.mark.parametrize(("tokens", "traced"), [(6, True), (70, False)])
@pytest.mark.parametrize(
    ("pattern", "frames"),
    [(BlockCausal(3, None), 6), (BlockCausal(1, 2, 1), 6), (BlockCausal(2, 3, 1, teacher_forcing=True), 8)],
    ids=["all of the past", "window and sink", "two copies"],
)
def test_against_a_dense_mask(pattern, frames, tokens, traced):
    given, mask = operands(frames, tokens), pattern.visible(frames)
    for one, other in zip(found(*given, mask, traced), dense(mask, *given), strict=True):
        assert np.linalg.norm(one - other) <= 2e-6 * np.linalg.norm(other)


@pytest.mark.parametrize("traced", [False, True])
def test_a_frame_that_sees_nothing_gives_nothing(traced):
    """As those slots of a cache that are not filled yet."""
    mask = np.tril(np.ones((5, 5), bool))
    mask[3:], mask[:, 3:] = False, False
    given = operands(5, 6)
    for one, other in zip(found(*given, mask, traced), dense(mask, *given), strict=True):
        assert np.isfinite(one).all() and not np.asarray(one[:, 18:]).any()
        assert np.linalg.norm(one - other) <= 2e-6 * np.linalg.norm(other)


def test_who_sees_whom():
    """The definition, frame by frame."""
    for chunk, window, sink in [(1, None, 0), (1, 3, 1), (2, 2, 0), (3, 4, 5), (3, 3, 1), (3, 7, 0)]:
        seen = BlockCausal(chunk, window, sink).visible(12)
        for query in range(12):
            end = (query // chunk + 1) * chunk
            expected = [f < end and (window is None or f < sink or f >= end - window) for f in range(12)]
            assert seen[query].tolist() == expected, (chunk, window, sink, query)
        frames = np.arange(12, dtype=np.int32)
        computed = jax.jit(lambda f, *span: visible(f, f, *span), static_argnums=(1, 2, 3))
        np.testing.assert_array_equal(computed(frames, chunk, window, sink), seen)


def test_a_noisy_copy_sees_itself_and_the_clean_past():
    seen = BlockCausal(2, 4, 1, teacher_forcing=True).visible(12)
    once = BlockCausal(2, 4, 1).visible(6)
    own = np.kron(np.eye(3, dtype=bool), np.ones((2, 2), bool))
    np.testing.assert_array_equal(seen, np.block([[once, np.zeros((6, 6), bool)], [once & ~own, own]]))
    np.testing.assert_array_equal(BlockCausal(2, teacher_forcing=True).frames(12), [*range(6), *range(6)])


@pytest.mark.parametrize(
    "bad", [dict(chunk=0), dict(chunk=2.0), dict(window=2), dict(window=0), dict(sink=-1), dict(window="all")]
)
def test_a_pattern_that_cannot_be_is_refused(bad):
    with pytest.raises(UsageError, match="expected whole numbers, chunk from 1, sink from 0, and a window of at least"):
        BlockCausal(**bad)


def test_what_does_not_fit_is_told():
    with pytest.raises(UsageError, match="7 latent frames are not a video in chunks of 3; expected a multiple of 3"):
        BlockCausal(3).visible(7)
    with pytest.raises(
        UsageError, match="9 latent frames are not 2 copies of a video in chunks of 3; expected a multiple of 6"
    ):
        BlockCausal(3, teacher_forcing=True).visible(9)
    q = jnp.zeros((1, 12, 1, 8))
    with pytest.raises(ValueError, match="5 frames do not divide the 12 tokens of q"):
        block_causal_attention(q, q, q, np.ones((5, 5), bool))
    with pytest.raises(ValueError, match=r"k is float32\[1, 6, 1, 8\] beside q"):
        block_causal_attention(q, q[:, :6], q, np.ones((3, 3), bool))


def by_tiles(pattern, count, frame):
    """bool [L,L] from the definition, token by token: what chunks see, and of that the sink and the tiles nearby."""
    place = np.stack(np.meshgrid(pattern.frames(count), *map(np.arange, frame), indexing="ij"), -1).reshape(-1, 3)
    seen = np.repeat(np.repeat(pattern.visible(count), np.prod(frame), 0), np.prod(frame), 1)
    (wt, *window), (a, *tile) = pattern.near.window, pattern.near.tile
    time = place[:, 0] // a
    seen &= (abs(time[:, None] - time) <= wt // 2) | (place[:, 0] < pattern.sink)
    for axis, n, size, w in zip((1, 2), frame, tile, window, strict=True):
        own, tiles = place[:, axis] // size, -(-n // size)
        width = min(2 * (w // 2) + 1, tiles)
        first = np.clip(own - w // 2, 0, tiles - width)[:, None]
        seen &= (first <= own) & (own < first + width)
    return seen


@pytest.mark.parametrize(
    ("pattern", "frames", "frame"),
    [
        (BlockCausal(2, 6, 2, near=SlidingTile((2, 2, 3), (3, 1, 3))), 12, (3, 7)),
        pytest.param(BlockCausal(3, None, near=SlidingTile((1, 2, 2), (5, 3, 1))), 6, (5, 4), marks=slower),
        pytest.param(
            BlockCausal(2, 4, 2, teacher_forcing=True, near=SlidingTile((2, 3, 2), (3, 1, 1))), 8, (4, 5), marks=slower
        ),
    ],
    ids=["sink", "all of the past", "two copies"],
)
@pytest.mark.parametrize("traced", [False, True])
def test_tiles_nearby_against_a_dense_mask(pattern, frames, frame, traced):
    given, grid = operands(frames, int(np.prod(frame))), (frames, *frame)
    mask = by_tiles(pattern, frames, frame)
    assert not mask.all(axis=1).any() and mask.any(axis=1).all()

    def attend(seen, q, k, v):
        if not traced:
            return pattern.attend(q, k, v, None, grid=grid)
        numbers = jnp.asarray(pattern.frames(frames))
        return pattern.attend_near(q, k, v, pattern.tiles_seen(seen, numbers, numbers), grid)

    @jax.jit
    def run(q, k, v, dout, seen):
        out, back = jax.vjp(functools.partial(attend, seen), q, k, v)
        return out, *back(dout)

    for ours, want in zip(run(*given, jnp.asarray(pattern.visible(frames))), dense(mask, *given), strict=True):
        np.testing.assert_allclose(ours, want, atol=3e-6 * np.abs(want).max())


def test_tiles_that_a_causal_model_cannot_have():
    for bad, message in (
        (
            dict(chunk=3, near=SlidingTile((2, 2, 2), (1, 1, 1))),
            "tiles have 2 frames, which do not divide the chunk of 3",
        ),
        (dict(chunk=2, sink=1, near=SlidingTile((2, 2, 2), (1, 1, 1))), "and the sink of 1; expected a divisor"),
        (dict(chunk=2, near=SlidingTile((1, 2, 2), ((1, 1, 1),) * 2)), "takes one window for all heads, not 2"),
    ):
        with pytest.raises(UsageError, match=message):
            BlockCausal(**bad)
