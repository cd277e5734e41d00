"""The best scores of a row, found without sorting: exactly those that `lax.top_k` finds."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jvdiff import kernels
from jvdiff.kernels.best import chosen


@pytest.mark.parametrize(("n", "k"), [(1, 1), (33, 5), (96, 96), (140, 31)])
def test_the_choice_is_that_of_top_k(n, k):
    random = np.random.default_rng(n)
    scores = random.standard_normal((14, n)).astype(np.float32)
    scores[0] = 0
    scores[1] = np.where(np.arange(n) % 3, 0.0, -0.0)
    scores[2] = -np.inf
    scores[3] = np.nan
    scores[4, ::2], scores[5, ::3], scores[6, 1::2] = np.nan, np.inf, -np.inf
    scores[7, ::2] = -np.float32(np.nan)
    scores[8] = np.round(scores[8])
    scores[9] = scores[9] * 1e-42  # denormal
    scores[10, n // 2 :] = scores[10, : n - n // 2]
    scores[11] = np.finfo(np.float32).min
    scores = jnp.asarray(scores.reshape(2, 7, n))
    found, want = jax.jit(lambda x: (chosen(x, k), lax.top_k(x, k)[1]))(scores)
    np.testing.assert_array_equal(found, np.sort(want, axis=-1))


def test_nothing_is_sorted_on_a_gpu():
    x = jax.ShapeDtypeStruct((1, 512, 1, 16), jnp.bfloat16)
    attend = lambda x: kernels.video_sparse_attention(  # noqa: E731
        x, x, x, x, grid=(8, 8, 8), tile=(1, 2, 2), sparsity=0.9, implementation="xla"
    )
    text = jax.jit(attend).trace(x).lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.while" in text and not re.search(r"top_?k|stablehlo.sort", text, re.IGNORECASE)
