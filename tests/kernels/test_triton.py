"""The portable GPU kernels, lowered for GPUs that are not there; test_sparse.py runs them, interpreted.

L tokens · N heads · K head dim.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff import kernels
from jvdiff.kernels.block_sparse import triton
from jvdiff.runtime.target import Target


def attend(block):
    def f(operands, lists, cotangents):
        attention = lambda *x: kernels.block_sparse_attention(  # noqa: E731
            *x, *lists, block=block, return_lse=True, implementation="triton"
        )
        (out, lse), gradient = jax.vjp(attention, *operands)
        return out, lse, *gradient(cotangents)

    return f


# L, N, K, block, places in a row: video sparse and sliding tile attention, Wan 1.3B at 480p, 14B at 720p, Hunyuan.
PRODUCTION = [(39_936, 12, 128, 64, 63), (92_160, 40, 128, 64, 144), (115_200, 24, 128, 384, 27)]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (12, 0)])
@pytest.mark.parametrize(("L", "N", "K", "block", "places"), PRODUCTION)
def test_lowers_for_gpus_that_are_not_there(capability, L, N, K, block, places):
    x = jax.ShapeDtypeStruct((1, L, N, K), jnp.bfloat16)
    heads, blocks = 1 if block == 384 else N, L // block
    lists = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((1, heads, blocks, places), (1, heads, blocks), (blocks,))]
    row = jax.ShapeDtypeStruct((1, N, L), jnp.float32)
    with triton.lowering(Target("gpu", "NVIDIA of any name", capability)):
        lowered = jax.jit(attend(block)).trace((x, x, x), lists, (x, row)).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert text.count("@__gpu$xla.gpu.triton(") == 3  # all heads at once: the forward pass, dq, and dk with dv
    transposes = [line for line in text.splitlines() if "stablehlo.transpose" in line]
    assert not [line for line in transposes if f"x{K}xbf16" in line]  # tokens stay where they are


@pytest.mark.parametrize(
    ("shape", "dtype", "block", "reason"),
    [
        ((1, 128, 2, 96), "bfloat16", 64, "head dims 16, 32, 64 and 128, not 96"),
        ((1, 120, 2, 64), "bfloat16", 40, "multiples of 16 tokens, not 40"),
        ((1, 128, 2, 64), "float64", 64, "not float64"),
    ],
)
def test_says_what_it_cannot_do(shape, dtype, block, reason):
    x = jax.ShapeDtypeStruct(shape, dtype)
    with pytest.raises(NotImplementedError, match=f"'triton': .*{reason}"):
        kernels.block_sparse.choose(x, x, x, block=block, implementation="triton")
    assert kernels.block_sparse.choose(x, x, x, block=block) == "xla"


def test_needs_a_gpu_to_run():
    x = jnp.ones((1, 16, 1, 16))
    lists = np.zeros((1, 1, 1, 1), np.int32), np.ones((1, 1, 1), np.int32), np.full(1, 16, np.int32)
    with pytest.raises(NotImplementedError, match="'triton': needs an NVIDIA GPU, and the backend is 'cpu'"):
        kernels.block_sparse_attention(x, x, x, *lists, block=16, implementation="triton")
