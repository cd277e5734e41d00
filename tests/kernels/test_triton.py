"""The portable GPU kernels, interpreted on a CPU against the definition in float64, and lowered for GPUs.

B batch · L query tokens · S key tokens · N heads · K head dim · I, J query and key blocks.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff import kernels
from jvdiff.kernels.block_sparse import triton

TOLERANCES = {"float32": (2e-6, 2e-6, 5e-6), "bfloat16": (6e-3, 1e-2, 2e-3), "float16": (1e-3, 2e-3, 1e-3)}
# B, I, J, N, K, block, dtype, lists shared by batch and heads
CASES = {
    "float32": (2, 3, 2, 2, 32, 16, "float32", False),
    "bfloat16, two parts": (1, 2, 3, 2, 128, 64, "bfloat16", True),
    "float16, tiles of several blocks": (1, 1, 2, 1, 64, 192, "float16", False),
}


@pytest.fixture
def interpret(monkeypatch):
    monkeypatch.setattr(triton, "INTERPRET", True)


def problem(B, I, J, N, K, block, dtype, shared, seed=0):  # noqa: E741
    """Operands with zero padding, lists with an empty row and an unlisted block, and cotangents."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, block + 1, J)
    sizes[0], sizes[-1] = block, max(1, block // 3)
    valid = (np.arange(block) < sizes[:, None]).reshape(J * block, 1, 1)
    q, dout = (jnp.asarray(rng.standard_normal((B, I * block, N, K)), dtype) for _ in range(2))
    k, v = (jnp.asarray(rng.standard_normal((B, J * block, N, K)) * valid, dtype) for _ in range(2))
    batch, heads = (1, 1) if shared else (B, N)
    q2k = np.argsort(rng.random((batch, heads, I, J)), axis=-1).astype(np.int32)
    count = rng.integers(1, J + 1, (batch, heads, I)).astype(np.int32)
    if I > 1:
        count[0, 0, 0] = 0
    dlse = jnp.asarray(rng.standard_normal((B, N, I * block)), jnp.float32)
    return (q, k, v), (q2k, count, sizes.astype(np.int32)), (dout, dlse)


def seen(B, N, S, block, q2k, count, sizes):
    """Which keys each query sees, bool [B,N,L,S]."""
    mask = np.zeros((B, N, q2k.shape[2] * block, S), bool)
    for b, n, i in np.ndindex(B, N, q2k.shape[2]):
        at = b % q2k.shape[0], n % q2k.shape[1], i
        for j in q2k[at][: count[at]]:
            mask[b, n, i * block : (i + 1) * block, j * block : j * block + sizes[j]] = True
    return mask


def definition(operands, mask, cotangents):
    """out, lse, dq, dk, dv in float64."""
    q, k, v, dout, dlse = (np.asarray(x, np.float64) for x in (*operands, *cotangents))
    scale = q.shape[-1] ** -0.5
    logits = np.where(mask, np.einsum("blnk,bsnk->bnls", q, k) * scale, -np.inf)
    top = np.maximum(logits.max(-1), -1e300)
    weights = np.exp(logits - top[..., None])
    total = weights.sum(-1)
    weights /= np.where(total, total, 1)[..., None]
    lse = np.where(total, top + np.log(np.where(total, total, 1)), -np.inf)
    out = np.einsum("bnls,bsnk->blnk", weights, v)
    delta = np.einsum("blnk,blnk->bnl", dout, out) - dlse
    dlogits = weights * (np.einsum("blnk,bsnk->bnls", dout, v) - delta[..., None]) * scale
    gradients = [("bnls,bsnk->blnk", dlogits, k), ("bnls,blnk->bsnk", dlogits, q), ("bnls,blnk->bsnk", weights, dout)]
    return out, lse, *(np.einsum(*x) for x in gradients)


def error(found, expected):
    return np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected)


def attend(block):
    def f(operands, lists, cotangents):
        attention = lambda *x: kernels.block_sparse_attention(  # noqa: E731
            *x, *lists, block=block, return_lse=True, implementation="triton"
        )
        (out, lse), gradient = jax.vjp(attention, *operands)
        return out, lse, *gradient(cotangents)

    return f


@pytest.mark.parametrize("case", CASES)
def test_both_directions_agree_with_the_definition(case, interpret):
    B, _, J, N, _, block, dtype, _ = CASES[case]
    operands, lists, cotangents = problem(*CASES[case])
    found = jax.jit(attend(block))(operands, lists, cotangents)
    mask = seen(B, N, J * block, block, *lists)
    expected = definition(operands, mask, cotangents)
    forward, backward, lse = TOLERANCES[dtype]
    assert found[0].dtype == dtype and found[1].dtype == jnp.float32
    assert error(found[0], expected[0]) < forward
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=lse)
    for got, want in zip(found[2:], expected[2:], strict=True):
        assert got.dtype == dtype and error(got, want) < backward
    rows = mask.any(-1).swapaxes(1, 2)  # queries that see something
    keys = mask.any(2).swapaxes(1, 2)  # keys that are seen: padding and unlisted blocks are not
    for x, some in zip((found[0], *found[2:]), (rows, rows, keys, keys), strict=True):
        assert not np.asarray(x, np.float32)[~some].any()  # exactly zero, and no NaN


def test_padding_beside_keys_that_all_point_away(interpret):
    """Padded keys have logit 0; beside valid ones near -1000 they would take everything, or overflow."""
    shape = (1, 1, 1, 1, 16, 16, "float32", True)
    (q, k, v), lists, cotangents = problem(*shape)
    operands = (jnp.abs(q) * 40, -jnp.abs(k) * 40, v)
    found = jax.jit(attend(16))(operands, lists, cotangents)
    expected = definition(operands, seen(1, 1, 16, 16, *lists), cotangents)
    assert error(found[0], expected[0]) < 1e-3
    for got, want in zip(found[2:], expected[2:], strict=True):
        assert np.isfinite(got).all() and error(got, want) < 1e-2


# L, N, K, block, places in a row: video sparse and sliding tile attention, Wan 1.3B at 480p, 14B at 720p, Hunyuan.
PRODUCTION = [(39_936, 12, 128, 64, 63), (92_160, 40, 128, 64, 144), (115_200, 24, 128, 384, 27)]


@pytest.mark.parametrize("gpu", ["NVIDIA A100", "NVIDIA L40", "NVIDIA H200"])
@pytest.mark.parametrize(("L", "N", "K", "block", "places"), PRODUCTION)
def test_lowers_for_gpus_that_are_not_there(gpu, L, N, K, block, places):
    x = jax.ShapeDtypeStruct((1, L, N, K), jnp.bfloat16)
    heads, blocks = 1 if block == 384 else N, L // block
    lists = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((1, heads, blocks, places), (1, heads, blocks), (blocks,))]
    row = jax.ShapeDtypeStruct((1, N, L), jnp.float32)
    with triton.lowering(gpu):
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
    operands, lists, _ = problem(1, 1, 1, 1, 16, 16, "float32", True)
    with pytest.raises(NotImplementedError, match="'triton': needs an NVIDIA GPU, and the backend is 'cpu'"):
        kernels.block_sparse_attention(*operands, *lists, block=16, implementation="triton")
