"""Patterns as values: their text and their answers. Their numbers are in test_sparse.py and test_block_causal.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff.errors import UsageError
from jvdiff.kernels import BlockCausal, Dense, SlidingTile, VideoSparse, attention, patterns
from jvdiff.runtime.target import Target, here

GRID = (3, 4, 5)
TEXTS = {
    "dense": Dense(),
    "sliding_tile:6x8x8:3x3x3": SlidingTile(),
    "sliding_tile:1x2x3:1x1x1,3x5x7": SlidingTile((1, 2, 3), ((1, 1, 1), (3, 5, 7))),
    "video_sparse:4x4x4:0.9": VideoSparse(),
    "video_sparse:2x2x2:0": VideoSparse((2, 2, 2), 0.0),
    "video_sparse:2x2x2:1": VideoSparse((2, 2, 2), 1.0),
    "video_sparse:2x2x2:0.00001": VideoSparse((2, 2, 2), 1e-5),
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_a_pattern_and_a_pattern_is_its_text(text):
    assert patterns.read(text, 2) == TEXTS[text]
    assert str(TEXTS[text]) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "block_causal:3",
            "pattern is 'block_causal:3'; expected 'dense', 'sliding_tile:6x8x8:3x3x3' (tile, window), "
            "'video_sparse:4x4x4:0.9' (tile, sparsity) or 'windows:FILE' (a file of windows).",
        ),
        (
            "sliding_tile:1x1x1:1x1x1,1x1x1,3x3x3",
            "pattern has 3 windows; expected one, or one for each of the 2 heads.",
        ),
        ("video_sparse:2x2x2:1.5", "the sparsity of pattern is 1.5; expected 0 to 1. The nearest is 1."),
        (
            "video_sparse:99x99x99:0.5",
            "the number of tokens in a tile of pattern is 970299; expected 1 to 4096. The nearest is 4096.",
        ),
    ],
)
def test_what_is_not_a_pattern_is_a_sentence(text, message):
    with pytest.raises(UsageError) as error:
        patterns.read(text, 2)
    assert str(error.value) == message


@pytest.mark.parametrize("pattern", [Dense(), SlidingTile((2, 2, 3), (1, 3, 1)), VideoSparse((2, 2, 3), 0.5)])
def test_the_order_of_tokens_comes_back_and_attention_is_that_of_the_choice(pattern):
    x = jnp.arange(2 * 60 * 3).reshape(2, 60, 3)
    there = pattern.ordered(x, GRID)
    assert pattern.raster == bool((there == x).all())
    np.testing.assert_array_equal(pattern.unordered(there, GRID), x)
    q = jax.ShapeDtypeStruct((1, 60, 2, 16), jnp.float32)
    for name in pattern.implementations:
        try:
            chosen = pattern.choose(q, GRID, implementation=name)
        except NotImplementedError:
            continue
        assert chosen == name
        if pattern.unavailable(name, here()) is None:
            run = lambda q, name=name: pattern.attend(q, q, q, None, grid=GRID, implementation=name)  # noqa: E731
            assert jax.eval_shape(run, q).shape == q.shape
    assert pattern.choose(q, GRID) in pattern.implementations


def test_block_causal_attention_is_chosen_for_the_blocks_that_it_takes():
    pattern, q = BlockCausal(1, 2), jax.ShapeDtypeStruct((1, 60, 2, 16), jnp.float32)
    assert pattern.choose(q, GRID, implementation="reference") == "reference"
    assert pattern.frames(3).tolist() == [0, 1, 2] and Dense().frames(3) is None
    every = BlockCausal(3)
    x = jax.random.normal(jax.random.key(0), (1, 60, 2, 16))
    np.testing.assert_allclose(every.attend(x, x, x, None, grid=GRID), attention(x, x, x), atol=1e-5)


def test_a_pattern_that_computes_more_than_dense_attention_says_so_once(caplog):
    """5x5x5 of 4x4x7 tiles with 384 places, which the grid fills badly; each sees 80 of 112."""
    grid, q = (21, 30, 52), jax.ShapeDtypeStruct((1, 32760, 1, 128), jnp.bfloat16)
    pattern, h200 = SlidingTile((6, 8, 8), (5, 5, 5)), Target("gpu", "NVIDIA H200", (9, 0))
    for _ in range(2):
        jax.eval_shape(lambda q: pattern.attend(q, q, q, None, grid=grid), q)
    (line,) = [each.getMessage() for each in caplog.records if "pattern" in each.getMessage()]
    assert line.startswith("pattern sliding_tile:6x8x8:5x5x5: on 21x30x52 tokens it computes 1.23 times what dense")
    on_gpu = pattern.share(q, grid, implementation="triton", target=h200)
    assert on_gpu < pattern.share(q, grid) == pytest.approx((112 * 384) * (80 * 384) / 32760**2)
    assert VideoSparse((4, 4, 4), 0.0).share(q, (20, 28, 52)) == 1
