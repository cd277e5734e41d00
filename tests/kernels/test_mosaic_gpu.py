"""The Hopper kernels, interpreted on a CPU with race detection.

B batch · N heads · K head dim · Nq, Nkv blocks of queries and keys.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff import kernels
from jvdiff.kernels import BlockCausal, SlidingTile, VideoSparse, block_sparse, tiles, windows
from jvdiff.kernels.block_sparse import mosaic_gpu
from jvdiff.kernels.patterns import WindowTable
from jvdiff.runtime.target import Target, here

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


@new_jax
def test_a_ring_that_nobody_waits_for_is_caught(races, monkeypatch):
    """The check of the check: without the wait for a copy, the interpreter must complain."""
    q, k = jnp.ones((1, 64, 1, 64), jnp.bfloat16), jnp.ones((1, 192, 1, 64), jnp.bfloat16)
    lists = np.arange(3, dtype=np.int32).reshape(1, 1, 1, 3), np.full((1, 1, 1), 3, np.int32), np.full(3, 64, np.int32)
    from jvdiff.kernels.block_sparse import mosaic_kernels

    monkeypatch.setattr(mosaic_kernels.plgpu, "barrier_wait", lambda barrier: None)
    try:
        jax.block_until_ready(kernels.block_sparse_attention(q, k, k, *lists, implementation="mosaic_gpu"))
    except Exception as problem_found:
        assert "phase" in str(problem_found) or "RACE DETECTED" in str(problem_found)
    else:
        assert races()


# (pattern, grid): ragged tiles, and tiles of 72 tokens in blocks of 128
@new_jax
@pytest.mark.parametrize(
    ("pattern", "grid"),
    [(SlidingTile((2, 8, 8), (1, 1, 1)), (3, 8, 12)), (VideoSparse((3, 3, 8), 0.5), (3, 3, 24))],
    ids=str,
)
def test_tiles_are_read_where_they_lie(pattern, grid, races):
    L = int(np.prod(grid))
    q, k, v, gate = (
        jax.random.normal(key, (1, L, 1, 64), jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 4)
    )
    attend = lambda *x, name: pattern.attend(*x, grid=grid, implementation=name)  # noqa: E731
    taken = str(jax.make_jaxpr(lambda *x: attend(*x, None, name="mosaic_gpu"))(q, k, v))
    slots = int(np.prod(tiles.counts(grid, pattern.tile))) * 128
    padded = taken.count(f"bf16[1,{slots},1,64]")  # VSA's means are of padded tiles
    assert slots > L and (padded == 0) == isinstance(pattern, SlidingTile)
    out = np.asarray(attend(q, k, v, gate, name="mosaic_gpu"), np.float32)
    want = attend(*(x.astype(jnp.float32) for x in (q, k, v, gate)), name="reference")
    assert np.linalg.norm(out - want) < 6e-3 * np.linalg.norm(want) and not races()


@new_jax
def test_lists_that_are_numbers_of_the_program(races):
    """A window for each head by a table, and a chunk that sees its own and the slots behind it."""
    table = windows.Windows((1, 8, 8), (2, 8, 16), ((1, 1, 1), (1, 1, 2)), np.array([[[0, 1]]], np.int32), (500.0,))
    pattern, causal = (
        WindowTable("it", "", (500.0,), table),
        BlockCausal(1, 3, 1, near=SlidingTile((1, 8, 8), (3, 1, 1))),
    )
    q, k = (jax.random.normal(key, (1, 256, 2, 64), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))

    def attend(q, k, t, frame, *, implementation):
        chosen = pattern.of_layers(t, 1, 2)[0]
        by_head = pattern.attend(q, k, k, None, grid=(2, 8, 16), chosen=chosen, implementation=implementation)
        frames = jnp.array([0, 5], jnp.int32)
        seen = causal.tiles_seen(jnp.ones((1, 2), bool), frame[None], frames)
        near = causal.attend_near(q[:, :128], k, k, seen, (1, 8, 16), implementation=implementation)
        return jnp.concatenate([by_head, near], axis=1)  # [B,256+128,N,K]

    given = jnp.full((1, 1), 300.0), jnp.int32(7)
    out = np.asarray(jax.jit(functools.partial(attend, implementation="mosaic_gpu"))(q, k, *given), np.float32)
    want = attend(q.astype(jnp.float32), k.astype(jnp.float32), *given, implementation="reference")
    assert np.linalg.norm(out - want) < 6e-3 * np.linalg.norm(want) and not races()


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


def test_needs_a_new_jax_and_a_hopper(monkeypatch, caplog):
    x = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    assert "needs JAX 0.11 or newer" in mosaic_gpu.unsupported(x, x, x, 64)
    assert mosaic_gpu.unavailable(here()) == "needs an NVIDIA GPU, and the backend is 'cpu'"
    assert block_sparse.choose(x, x, x) == "xla"
    block_sparse._say_once.cache_clear()
    with caplog.at_level("WARNING", "jvdiff.kernels"):
        for kind, capability in (("NVIDIA H100", (9, 0)), ("NVIDIA H100", (9, 0)), ("NVIDIA A100", (8, 0))):
            assert block_sparse.choose(x, x, x, target=Target("gpu", kind, capability)) == "triton"
    (said,) = caplog.messages
    assert "on this Hopper sparse attention and rings run on other kernels" in said and "Python 3.12 or newer" in said


@pytest.mark.parametrize("device", ["NVIDIA H200", "NVIDIA H100 80GB HBM3"])
@pytest.mark.parametrize("block", [64, 128, 192, 256, 384])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_block_has_a_cut_that_divides_it(block, head_dim, device):
    for cut in mosaic_gpu.shapes(block, head_dim, "bfloat16", device).values():
        assert block % (64 * cut.warpgroups) == 0 and block % cut.step == 0
        assert cut.producer == (cut.warpgroups > 1)
