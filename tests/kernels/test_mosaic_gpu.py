"""The Hopper kernels, interpreted on a CPU with race detection.

B batch · N heads · K head dim · Nq, Nkv blocks of queries and keys.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff import kernels
from jvdiff.kernels import block_sparse
from jvdiff.kernels.block_sparse import mosaic_gpu

TOLERANCES = {"bfloat16": (6e-3, 1e-2, 2e-3), "float16": (1e-3, 2e-3, 1e-3)}
# B, Nq, Nkv, N, K, block, places in a row, dtype, lists shared by batch and heads
CASES = {
    "lists of their own": (2, 2, 3, 2, 128, 64, 3, "bfloat16", False),
    "shared lists, float16": (1, 3, 2, 2, 64, 64, 2, "float16", True),
    "two warpgroups": (1, 2, 3, 1, 128, 128, 2, "bfloat16", False),
    "two warpgroups, several parts": (1, 1, 2, 2, 64, 384, 2, "float16", True),
    "one warpgroup, several parts": (1, 2, 1, 1, 64, 192, 1, "bfloat16", False),
}
new_jax = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Mosaic's interpreter needs JAX 0.11 (Python 3.12)")


@pytest.fixture
def races(monkeypatch):
    """Interprets the kernels; afterwards no two accesses may have raced."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
    from jax.experimental.pallas import mosaic_gpu as plgpu

    monkeypatch.setattr(mosaic_gpu, "INTERPRET", plgpu.InterpretGPUParams(detect_races=True))
    interpreter.reset_gpu_interpret_mode_state()
    yield lambda: interpreter.get_races().races_found
    interpreter.reset_gpu_interpret_mode_state()


def problem(B, Nq, Nkv, N, K, block, places, dtype, shared):
    """Operands with zero padding, lists with an empty row if there are several, and cotangents."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, block + 1, Nkv).astype(np.int32)
    sizes[0] = block
    valid = (np.arange(block) < sizes[:, None]).reshape(Nkv * block, 1, 1)
    q, dout = (jnp.asarray(rng.standard_normal((B, Nq * block, N, K)), dtype) for _ in range(2))
    k, v = (jnp.asarray(rng.standard_normal((B, Nkv * block, N, K)) * valid, dtype) for _ in range(2))
    rows = (1, 1, Nq) if shared else (B, N, Nq)
    q2k = np.argsort(rng.random((*rows, Nkv)), axis=-1)[..., :places].astype(np.int32)
    count = rng.integers(1, places + 1, rows).astype(np.int32)
    if Nq > 1:
        count[0, 0, 0] = 0
    dlse = rng.standard_normal((B, N, Nq * block)).astype(np.float32)
    return (q, k, v), (q2k, count, sizes), (dout, jnp.asarray(dlse * np.repeat(count > 0, block, axis=-1)))


def run(operands, lists, cotangents, block, implementation):
    """out, lse, dq, dk, dv."""

    def attend(*operands):
        return kernels.block_sparse_attention(
            *operands, *lists, block=block, return_lse=True, implementation=implementation
        )

    @jax.jit
    def both(operands, cotangents):
        (out, lse), pull = jax.vjp(attend, *operands)
        return out, lse, *pull(cotangents)

    return both(operands, cotangents)


def error(found, expected):
    expected = np.asarray(expected, np.float64)
    return np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected)


@new_jax
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_both_directions_agree_with_the_reference_and_nothing_races(case, races):
    block, dtype = case[5], case[7]
    operands, lists, cotangents = problem(*case)
    found = run(operands, lists, cotangents, block, "mosaic_gpu")
    assert not races()
    exact = lambda xs: tuple(x.astype(jnp.float32) for x in xs)  # noqa: E731
    expected = run(exact(operands), lists, exact(cotangents), block, "reference")
    forward, backward, lse = TOLERANCES[dtype]
    assert found[0].dtype == dtype and found[1].dtype == jnp.float32
    assert error(found[0], expected[0]) < forward
    np.testing.assert_array_equal(np.isneginf(found[1]), np.isneginf(expected[1]))
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=lse)
    for x, want in zip(found[2:], expected[2:], strict=True):
        assert x.dtype == dtype and error(x, want) < backward
        assert not np.asarray(x, np.float32)[np.asarray(want) == 0].any()  # unlisted and padded keys: exactly, no NaN


@new_jax
def test_padding_beside_keys_that_all_point_away(races):
    """Padded keys have logit 0; beside valid ones far below they would take everything, or overflow."""
    (q, k, v), (q2k, count, _), cotangents = problem(1, 1, 2, 1, 64, 64, 2, "bfloat16", True)
    operands, lists = (jnp.abs(q) * 30, -jnp.abs(k) * 30, v), (q2k, count * 0 + 2, np.array([3, 40], np.int32))
    found = run(operands, lists, cotangents, 64, "mosaic_gpu")
    exact = lambda xs: tuple(x.astype(jnp.float32) for x in xs)  # noqa: E731
    expected = run(exact(operands), lists, exact(cotangents), 64, "reference")
    assert error(found[0], expected[0]) < 6e-3 and not races()
    for x, want in zip(found[2:], expected[2:], strict=True):
        assert np.isfinite(np.asarray(x, np.float32)).all() and error(x, want) < 2e-2


@new_jax
def test_a_ring_that_nobody_waits_for_is_caught(races, monkeypatch):
    """The check of the check: without the wait for a copy, the interpreter must complain."""
    operands, lists, cotangents = problem(1, 1, 3, 1, 64, 64, 3, "bfloat16", True)
    monkeypatch.setattr(mosaic_gpu.plgpu, "barrier_wait", lambda barrier: None)
    try:
        run(operands, lists, cotangents, 64, "mosaic_gpu")
    except Exception as problem_found:
        assert "phase" in str(problem_found)
    else:
        assert races()


@pytest.mark.parametrize(
    ("shape", "dtype", "block", "reason"),
    [
        ((1, 128, 2, 96), "bfloat16", 64, "head dims 64 and 128, not 96"),
        ((1, 96, 2, 64), "bfloat16", 32, "multiples of 64 tokens, not 32"),
        ((1, 128, 2, 64), "float32", 64, "bfloat16 and float16 operands, not float32"),
    ],
)
def test_says_what_it_cannot_do(shape, dtype, block, reason, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
    x = jax.ShapeDtypeStruct(shape, dtype)
    with pytest.raises(NotImplementedError, match=f"'mosaic_gpu': takes .*{reason}"):
        block_sparse.choose(x, x, x, block=block, implementation="mosaic_gpu")


def test_needs_a_new_jax_and_a_hopper(monkeypatch):
    x = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    assert "needs JAX 0.11 or newer" in mosaic_gpu.unsupported(x, x, x, 64)
    assert mosaic_gpu.unavailable() == "needs an NVIDIA GPU, and the backend is 'cpu'"
    assert block_sparse.choose(x, x, x) == "xla"


@pytest.mark.parametrize("device", ["NVIDIA H200", "NVIDIA H100 80GB HBM3"])
@pytest.mark.parametrize("block", [64, 128, 192, 256, 384])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_block_has_a_cut_that_divides_it(block, head_dim, device, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=device)])
    for cut in mosaic_gpu.shapes(block, head_dim).values():
        assert block % (64 * cut.warpgroups) == 0 and block % cut.step == 0
        assert cut.producer == (cut.warpgroups > 1)
