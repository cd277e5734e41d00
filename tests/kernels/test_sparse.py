"""Sparse attention, forwards and backwards: every implementation against a dense mask in float64.

B batch · L tokens · N heads · K head dim.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jvdiff import kernels
from jvdiff.kernels import (
    BlockCausal,
    Dense,
    SlidingTile,
    VideoSparse,
    block_sparse,
    linear,
    mask_search,
    sliding_tile,
    tiles,
)
from jvdiff.kernels.block_sparse import mosaic_gpu, triton, xla

ON_CPU = ["reference", "xla"]
F32 = {"out": 2e-6, "grad": 2e-6, "lse": 5e-6}
BF16 = {"out": 6e-3, "grad": 1e-2, "lse": 2e-3}
F16 = {"out": 1e-3, "grad": 2e-3, "lse": 1e-3}
BOUNDS = {"float32": F32, "bfloat16": BF16, "float16": F16}

# (B, query blocks, key blocks, N, K, block, places, heads and batch share one list)
BLOCKS = {
    "square": (2, 4, 4, 2, 16, 8, 3, False),
    "more keys": (1, 3, 7, 2, 64, 16, 4, False),
    "pairs": (1, 9, 9, 1, 8, 2, 4, False),
    "shared": (2, 4, 4, 3, 32, 8, 2, True),
    "one block": (1, 1, 1, 1, 4, 5, 1, False),
    "long block": (1, 2, 3, 1, 16, 256, 2, False),
    "head dim 128": (2, 2, 3, 2, 128, 64, 3, False),
    "shared, head dim 64": (1, 3, 2, 2, 64, 64, 2, True),
    "two warpgroups": (1, 2, 3, 1, 128, 128, 2, False),
    "two warpgroups, several parts": (1, 1, 2, 2, 64, 384, 2, False),
    "one warpgroup, several parts": (1, 2, 1, 1, 64, 192, 1, False),
}
HALF = ("shared, head dim 64", "two warpgroups, several parts")  # those that are tried in float16 too, by all
OLD = jax.__version_info__ < (0, 11)  # where fewer of a kind are tried: make kernels does all, on Python 3.12
FEWER = (*HALF, "square", "pairs", "one block", "head dim 128")
slower = pytest.mark.skipif(OLD, reason="more of the same, for make kernels")


def able():
    """Every shape with every implementation and dtype that can do it; below float32 only Hopper's have more than two.

    Small steps of `xla` count as one more.
    """
    for label, (B, Nq, Nkv, N, K, block, *_) in BLOCKS.items():
        if OLD and label not in FEWER:
            continue
        for dtype in ("float32", "bfloat16", *(["float16"] if label in HALF else [])):
            q, k = (jax.ShapeDtypeStruct((B, n * block, N, K), dtype) for n in (Nq, Nkv))
            for name, implementation in block_sparse.IMPLEMENTATIONS.items():
                left_out = name != "mosaic_gpu" and dtype != "float32" and label not in HALF
                if not left_out and implementation.unsupported(q, k, k, block) is None:
                    yield pytest.param(name, label, dtype, None, id=f"{label}-{dtype}-{name}")
            if block < 64 and dtype == "float32":
                yield pytest.param("xla", label, dtype, 64, id=f"{label}-{dtype}-xla in small steps")


@pytest.fixture
def interpreted(request, monkeypatch):
    """The GPU kernels run on a CPU; of Mosaic's, no two accesses may race."""
    name = request.node.callspec.params["name"]
    if name == "triton":
        monkeypatch.setattr(triton, "INTERPRET", True)
    if name != "mosaic_gpu" or jax.__version_info__ < (0, 11):  # an older JAX cannot, and `unsupported` says so
        yield
        return
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
    from jax.experimental.pallas import mosaic_gpu as plgpu

    monkeypatch.setattr(mosaic_gpu, "INTERPRET", plgpu.InterpretGPUParams(detect_races=True))
    interpreter.reset_gpu_interpret_mode_state()
    yield
    raced = interpreter.get_races().races_found
    interpreter.reset_gpu_interpret_mode_state()
    assert not raced


def error(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)


def normal(seed, *shape, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(jnp.dtype(dtype))


def definition(q, k, v, mask, dout, dlse, scale=None):
    """out, lse and the gradients of sum(out*dout) + sum(lse*dlse), in float64; mask bool [B,N,L,S]."""
    q, k, v, dout, dlse = (np.asarray(x, np.float64) for x in (q, k, v, dout, dlse))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = np.where(mask, np.einsum("blnk,bsnk->bnls", q, k) * scale, -np.inf)
    top = np.maximum(logits.max(-1, keepdims=True), -1e300)
    total = np.exp(logits - top).sum(-1, keepdims=True)
    p = np.exp(logits - top) / np.maximum(total, 1e-300)
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0, top + np.log(total), -np.inf)[..., 0]
    out = np.einsum("bnls,bsnk->blnk", p, v)
    delta = np.einsum("blnk,blnk->bnl", dout, out) - dlse
    ds = p * (np.einsum("blnk,bsnk->bnls", dout, v) - delta[..., None]) * scale
    grads = np.einsum("bnls,bsnk->blnk", ds, k), np.einsum("bnls,blnk->bsnk", ds, q)
    return out, lse, (*grads, np.einsum("bnls,blnk->bsnk", p, dout))


def pushed(q, k, v, mask, dots):
    """The tangents of out and lse, in float64, for those of q, k and v."""
    q, k, v, dq, dk, dv = (np.asarray(x, np.float64) for x in (q, k, v, *dots))
    scale = q.shape[-1] ** -0.5
    logits = np.where(mask, np.einsum("blnk,bsnk->bnls", q, k) * scale, -1e300)
    p = np.where(mask, np.exp(logits - logits.max(-1, keepdims=True)), 0)
    p /= np.maximum(p.sum(-1, keepdims=True), 1e-300)
    ds = p * (np.einsum("blnk,bsnk->bnls", dq, k) + np.einsum("blnk,bsnk->bnls", q, dk)) * scale
    dlse = ds.sum(-1)
    return np.einsum("bnls,bsnk->blnk", p, dv) + np.einsum("bnls,bsnk->blnk", ds - p * dlse[..., None], v), dlse


def results(f, operands, dout, dlse):
    """out, lse and gradients of f(*operands) -> (out, lse)."""

    @jax.jit
    def run(*operands):
        (out, lse), pull = jax.vjp(f, *operands)
        return out, lse, pull((dout.astype(out.dtype), dlse))

    return run(*operands)


def compare(got, want, bounds, valid=slice(None)):
    (out, lse, grads), (want_out, want_lse, want_grads) = got, want
    assert error(out[:, valid], want_out[:, valid]) < bounds["out"]
    finite = np.isfinite(want_lse[..., valid])
    np.testing.assert_array_equal(np.isfinite(lse[..., valid]), finite)
    difference = np.where(finite, np.where(finite, lse[..., valid], 0) - np.where(finite, want_lse[..., valid], 0), 0)
    assert np.abs(difference).max() < bounds["lse"]
    for name, a, b in zip("qkv", grads, want_grads, strict=True):
        assert np.isfinite(np.asarray(a, np.float32)).all(), f"d{name}"
        assert error(a, b) < bounds["grad"] or np.abs(b).max() < 1e-12, f"d{name}"
        np.testing.assert_array_equal(np.asarray(a)[np.asarray(b) == 0], 0)


def random_lists(shape, seed=0):
    B, Nq, Nkv, N, _, block, places, shared = shape
    rng = np.random.default_rng(seed)
    B, N = (1, 1) if shared else (B, N)
    q2k = np.stack([rng.permutation(Nkv)[:places] for _ in range(B * N * Nq)]).reshape(B, N, Nq, places)
    count = rng.integers(0, places + 1, (B, N, Nq))
    sizes = rng.integers(1, block + 1, Nkv)
    return tuple(x.astype(np.int32) for x in (q2k, count, sizes))


def block_mask(B, N, q2k, count, sizes, block):
    """bool [B,N,L,S]."""
    Nq, Nkv = q2k.shape[2], len(sizes)
    allowed = np.zeros((B, N, Nq, Nkv), bool)
    for i in np.ndindex(B, N, Nq):
        j = tuple(min(a, n - 1) for a, n in zip(i, q2k.shape[:3], strict=True))
        allowed[i][q2k[j][: count[j]]] = True
    inside = (np.arange(block) < sizes[:, None]).ravel()
    return allowed.repeat(block, axis=2).repeat(block, axis=3) & inside


def block_operands(shape, dtype=np.float32):
    B, Nq, Nkv, N, K, block, _, _ = shape
    q, dout = (normal(s, B, Nq * block, N, K, dtype=dtype) for s in (1, 2))
    k, v = (normal(s, B, Nkv * block, N, K, dtype=dtype) for s in (3, 4))
    return q, k, v, dout, normal(5, B, N, Nq * block)


@pytest.mark.parametrize(("name", "label", "dtype", "logits"), list(able()))
def test_block_lists(name, label, dtype, logits, interpreted, monkeypatch):
    if logits:
        monkeypatch.setitem(xla.LOGITS, jax.default_backend(), logits)
    shape = BLOCKS[label]
    q, k, v, dout, dlse = block_operands(shape, dtype)
    lists, block = random_lists(shape), shape[5]
    mask = block_mask(q.shape[0], q.shape[2], *lists, block)
    f = lambda q, k, v: kernels.block_sparse_attention(  # noqa: E731
        q, k, v, *lists, block=block, return_lse=True, implementation=name
    )
    dlse = np.where(mask.any(-1), dlse, np.float32(0))
    got = results(f, (q, k, v), dout, dlse)
    assert got[0].dtype == q.dtype and got[1].dtype == jnp.float32 and all(x.dtype == q.dtype for x in got[2])
    compare(got, definition(q, k, v, mask, dout, dlse), BOUNDS[dtype])


@pytest.mark.parametrize(("name", "label"), [("xla", "square"), ("triton", "shared, head dim 64")])
def test_tangents_of_block_lists(name, label, interpreted, caplog):
    """And a word, once, where they are not the kernel's; queries that see nothing have none."""
    shape = BLOCKS[label]
    operands, block, (q2k, count, sizes) = block_operands(shape)[:3], shape[5], random_lists(shape)
    count[..., 0] = 0
    dots = tuple(normal(6 + i, *x.shape) for i, x in enumerate(operands))
    f = lambda *x: kernels.block_sparse_attention(  # noqa: E731
        *x, q2k, count, sizes, block=block, return_lse=True, implementation=name
    )
    linear.say_left.cache_clear()
    for _ in range(2):
        got = jax.jit(lambda x, dots: jax.jvp(f, x, dots)[1])(operands, dots)
    for a, b in zip(
        got, pushed(*operands, block_mask(*operands[0].shape[::2], q2k, count, sizes, block), dots), strict=True
    ):
        assert error(a, b) < F32["grad"]
        np.testing.assert_array_equal(np.asarray(a)[np.asarray(b) == 0], 0)
    assert [r.args for r in caplog.records] == ([(name,)] if name == "triton" else [])


EVERYTHING = {
    "sliding tiles": SlidingTile((2, 2, 2), (5, 5, 5)),
    "best tiles": VideoSparse((2, 2, 2), 0.0),
    "causal": BlockCausal(3),
}


def test_tangents_of_patterns_that_see_everything_are_those_of_dense_attention():
    """Each in its own order of tokens."""
    grid = (3, 3, 2)
    x, dots = (tuple(normal(seed + i, 2, 18, 2, 4) for i in range(3)) for seed in (0, 3))

    def pushed(pattern):
        ordered = lambda x: tuple(pattern.ordered(a, grid) for a in x)  # noqa: E731
        attend = lambda *x: pattern.unordered(pattern.attend(*ordered(x), None, grid=grid), grid)  # noqa: E731
        return jax.jvp(attend, x, dots)[1]

    want, *got = jax.jit(lambda: [pushed(p) for p in (Dense(), *EVERYTHING.values())])()
    for name, tangent in zip(EVERYTHING, got, strict=True):
        assert error(tangent, want) < F32["grad"], name


def test_derivatives_of_first_and_second_order_are_differences():
    """Best tiles, the same on both sides, with a gate; forwards over backwards, and the other way round."""
    x, dots = (tuple(normal(seed + i, 1, 27, 2, 4) for i in range(4)) for seed in (135, 139))
    weights = normal(143, *x[0].shape)
    f = lambda *x: jnp.vdot(  # noqa: E731
        weights, kernels.video_sparse_attention(*x, grid=(3, 3, 3), tile=(2, 2, 2), sparsity=0.6)
    )

    @jax.jit
    def derivatives(x):
        along = lambda x: jax.jvp(f, x, dots)  # noqa: E731
        return *along(x), *jax.jvp(jax.grad(f, (0, 1, 2, 3)), x, dots), jax.grad(lambda x: along(x)[1])(x)

    inner = lambda grads: sum(np.vdot(a, dot) for a, dot in zip(grads, dots, strict=True))  # noqa: E731
    step = 3e-3
    above, below = (derivatives(tuple(a + s * dot for a, dot in zip(x, dots, strict=True))) for s in (step, -step))
    _, slope, gradient, *seconds = derivatives(x)
    np.testing.assert_allclose(slope, (above[0] - below[0]) / (2 * step), rtol=1e-3)
    np.testing.assert_allclose(inner(gradient), slope, rtol=1e-5)
    for second in seconds:
        np.testing.assert_allclose(inner(second), (above[1] - below[1]) / (2 * step), rtol=1e-3)
    for a, b in zip(*seconds, strict=True):
        assert error(a, b) < F32["grad"]


def able_at_64():
    """(implementation, dtype), of those that take blocks of 64 tokens and head dim 64."""
    for name, implementation in block_sparse.IMPLEMENTATIONS.items():
        for dtype in ("float32", "bfloat16"):
            x = jax.ShapeDtypeStruct((1, 64, 1, 64), dtype)
            if implementation.unsupported(x, x, x, 64) is None:
                yield name, dtype


# (sizes of blocks, of which the keys of the last two are no keys; block)
RAGGED = {"of one warpgroup": ([64, 24, 8, 40, 64, 16], 64), "shared": ([384, 72, 192, 136], 384)}


def ragged():
    """Those implementations that do it in their own way; the others' is `xla`'s."""
    yield from (("mosaic_gpu", "bfloat16", label) for label in RAGGED if jax.__version_info__ >= (0, 11))
    yield "xla", "float32", "of one warpgroup"


@pytest.mark.parametrize(("name", "dtype", "label"), list(ragged()))
def test_blocks_that_are_not_padded(name, dtype, label, interpreted):
    """Blocks behind each other, forwards and backwards, are padded blocks of which only the tokens are asked for."""
    tokens, block = RAGGED[label]
    sizes, L = np.array(tokens, np.int32), sum(tokens)
    first = np.cumsum(sizes, dtype=np.int32) - sizes
    keys = sizes.copy()
    keys[-2:] = [8, 0]
    n = len(tokens)
    q2k, count, _ = random_lists((1, n, n, 1, 64, block, 3, False), 1)
    count = np.maximum(count, 1)
    q, k, v, dout = (normal(s, 1, L, 1, 64, dtype=dtype) for s in range(4))
    dlse = normal(9, 1, 1, L)
    f = lambda q, k, v: kernels.block_sparse_attention(  # noqa: E731
        q, k, v, q2k, count, keys, q_sizes=sizes, q_first=first, kv_first=first, block=block, scale=0.2,
        return_lse=True, implementation=name,
    )  # fmt: skip
    number = np.repeat(np.arange(n), sizes)
    mask = np.zeros((1, 1, L, L), bool)
    for i in range(n):
        for j in q2k[0, 0, i, : count[0, 0, i]]:
            mask[0, 0, number == i, first[j] : first[j] + keys[j]] = True
    dlse = np.where(mask.any(-1), dlse, np.float32(0))
    compare(results(f, (q, k, v), dout, dlse), definition(q, k, v, mask, dout, dlse, 0.2), BOUNDS[dtype])


def test_blocks_that_are_not_padded_must_lie_behind_each_other():
    x, one = normal(0, 1, 32, 1, 8), np.ones((1, 1, 2), np.int32)
    lists = np.zeros((1, 1, 2, 1), np.int32), one, np.array([8, 16], np.int32)
    for q_first, kv_first in (([0, 12], [0, 8]), ([0, 16], [0, 20]), ([0, 8], [0, 8])):
        with pytest.raises(ValueError, match="begin and end at multiples of 8 rows"):
            kernels.block_sparse_attention(
                x, x, x, *lists, q_sizes=np.array([8, 16]), q_first=np.array(q_first), kv_first=np.array(kv_first)
            )


@pytest.mark.parametrize(("name", "dtype"), list(able_at_64()))
def test_padding_beside_keys_that_repel_and_large_logits(name, dtype, interpreted):
    """Padded keys have logit 0; beside valid ones far below they would take everything, or overflow."""
    q, k, v, dout, dlse = block_operands((1, 1, 3, 1, 64, 64, 2, False), dtype)
    q2k, count, sizes = np.array([[[[2, 0]]]], np.int32), np.array([[[2]]], np.int32), np.array([3, 1, 40], np.int32)
    valid = np.arange(3 * 64) % 64 < sizes.repeat(64)
    q, k = np.abs(q) * q.dtype.type(6), -np.abs(k) * valid.astype(k.dtype)[:, None, None]
    f = lambda q, k, v: kernels.block_sparse_attention(  # noqa: E731
        q, k, v, q2k, count, sizes, return_lse=True, implementation=name
    )
    mask = block_mask(1, 1, q2k, count, sizes, 64)
    bounds = {"out": 2e-5, "grad": 2e-5, "lse": 1e-4} if dtype == "float32" else BF16 | {"grad": 2e-2}
    compare(results(f, (q, k, v), dout, dlse), definition(q, k, v, mask, dout, dlse), bounds)


def test_blocks_that_nobody_sees_have_no_gradient_and_sizes_may_be_zero():
    q, k, v, dout, dlse = block_operands((1, 3, 4, 1, 8, 4, 2, False))
    q2k = np.array([[[[0, 2], [2, 0], [3, 3]]]], np.int32)
    count, sizes = np.array([[[2, 1, 1]]], np.int32), np.array([4, 4, 2, 0], np.int32)
    mask = block_mask(1, 1, q2k, count, sizes, 4)
    for name in ON_CPU:
        for lists in ((q2k, count, sizes), tuple(map(jnp.asarray, (q2k, count, sizes)))):
            f = lambda q, k, v, lists=lists, name=name: kernels.block_sparse_attention(  # noqa: E731
                q, k, v, *lists, block=4, return_lse=True, implementation=name
            )
            got = results(f, (q, k, v), dout, dlse)
            assert not np.asarray(got[2][1])[:, 4:8].any() and not np.asarray(got[0])[:, 8:].any()
            compare(got, definition(q, k, v, mask, dout, np.where(mask.any(-1), dlse, np.float32(0))), F32)


def test_lists_split_and_transposed():
    """Parts of blocks see what the blocks saw, but those that hold no queries see nothing."""
    shape = BLOCKS["square"]
    lists = block_sparse.Lists(*random_lists(shape), np.array([8, 3, 8, 1], np.int32))
    whole = block_mask(2, 2, *lists[:3], 8)
    for part_q, part_kv in [(8, 8), (4, 2), (2, 8), (1, 4)]:
        asked = np.arange(0, 8, part_q) < np.asarray(lists.q_sizes)[:, None]
        mask = whole & asked.ravel().repeat(part_q)[:, None]
        part = jax.jit(block_sparse.split, static_argnums=(1, 2, 3))(lists, 8, part_q, part_kv)
        part = jax.tree.map(np.asarray, part)
        valid = np.arange(part.q2k.shape[-1]) < part.q2k_count[..., None]
        assert (part.kv_sizes[part.q2k][valid] > 0).all()
        allowed = np.zeros((2, 2, 32 // part_q, 32 // part_kv), bool)
        for i in np.ndindex(*allowed.shape[:3]):
            allowed[i][part.q2k[i][valid[i]]] = True
        inside = (np.arange(part_kv) < part.kv_sizes[:, None]).ravel()
        np.testing.assert_array_equal(allowed.repeat(part_q, 2).repeat(part_kv, 3) & inside, mask)
    offsets, queries = jax.jit(block_sparse.transpose)(lists)
    for b, n, j in np.ndindex(2, 2, 4):
        want = [i for i in range(4) if j in lists.q2k[b, n, i, : lists.q2k_count[b, n, i]]]
        assert queries[b, n, offsets[b, n, j] : offsets[b, n, j + 1]].tolist() == want


def tile_of(grid, tile):
    """The tile number of each token in raster order."""
    counts = tiles.counts(grid, tile)
    t, h, w = np.unravel_index(np.arange(np.prod(grid)), grid)
    return np.ravel_multi_index((t // tile[0], h // tile[1], w // tile[2]), counts)


def sliding_mask(grid, tile, windows, slots, text):
    """bool [1,heads,L,L]."""
    counts = tiles.counts(grid, tile)
    place = np.stack(np.unravel_index(tile_of(grid, tile), counts))  # [3,L]
    video, total = place.shape[1], place.shape[1] + slots
    mask = np.zeros((1, len(windows), total, total), bool)
    for n, window in enumerate(windows):
        seen = np.ones((video, video), bool)
        for axis, (size, width) in enumerate(zip(counts, window, strict=True)):
            half = width // 2
            centre = np.clip(place[axis], half, max(size - 1 - half, half))
            if 2 * half + 1 < size:
                seen &= np.abs(place[axis][None] - centre[:, None]) <= half
        mask[0, n, :video, :video] = seen
    mask[:, :, video:, :video] = True
    mask[..., video : video + text] = True
    return mask


# (grid, tile, windows: one or one per head, text slots, valid text)
SLIDING = {
    "one token": ((1, 1, 1), (2, 2, 2), (3, 3, 3), 0, 0),
    "ragged": ((5, 6, 7), (2, 3, 2), (1, 3, 3), 0, 0),
    "ragged with text": ((7, 5, 13), (3, 2, 4), (3, 1, 2), 11, 7),
    "per head": ((4, 6, 6), (2, 2, 2), ((1, 1, 1), (3, 3, 3), (9, 2, 1)), 9, 9),
    "pairs": ((1, 1, 12), (1, 1, 2), (1, 1, 3), 3, 1),
}


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("case", SLIDING.values(), ids=SLIDING)
def test_sliding_tiles(name, case):
    grid, tile, window, slots, text = case
    heads = 3 if np.ndim(window) == 2 else 1
    windows = window if np.ndim(window) == 2 else (window,)
    L, video = int(np.prod(grid)) + slots, int(np.prod(grid))
    B = 2 if L < 300 else 1
    q, k, v, dout = (normal(s, B, L, heads, 8) for s in range(4))
    dlse = normal(9, B, heads, L)
    valid = np.float32(np.arange(L) < video + text)  # later text slots are no keys, and nobody uses them as queries
    dout, dlse = dout * valid[None, :, None, None], dlse * valid[None, None]
    f = partial(kernels.sliding_tile_attention, grid=grid, tile=tile, window=window, text_length=text)
    got = results(lambda *x: f(*x, return_lse=True, implementation=name), (q, k, v), dout, dlse)
    mask = np.broadcast_to(sliding_mask(grid, tile, windows, slots, text), (B, heads, L, L))
    compare(got, definition(q, k, v, mask, dout, dlse), F32, slice(0, video + text))
    if name == "xla":
        order = np.concatenate([tiles.partition_indices(grid, tile), np.arange(video, L)])
        tiled = jax.jit(lambda n, *x: f(*x, tiled=True, return_lse=True, **({"text_length": n} if slots else {})))
        out, lse = tiled(np.int32(text), *(x[:, order] for x in (q, k, v)))
        used = video + text if slots else None  # rows of a text that nobody uses are anything
        np.testing.assert_allclose(out[:, :used], np.asarray(got[0])[:, order][:, :used], atol=1e-6)
        np.testing.assert_allclose(lse[..., :used], np.asarray(got[1])[..., order][..., :used], atol=1e-6)


def test_text_behind_chosen_tiles_is_a_prefix_before_them():
    """All see those of its rows that count, whose number is traced, and it sees everything."""
    grid, tile, text = (3, 4, 5), (2, 2, 2), 3
    q, k, v = (normal(s, 1, 60 + 5, 2, 8) for s in range(3))
    f = partial(kernels.video_sparse_attention, gate=None, grid=grid, tile=tile, sparsity=0.7)
    got = jax.jit(lambda n, *x: f(*x, text_length=n))(np.int32(text), q, k, v)[:, : 60 + text]
    order = np.concatenate([np.arange(60, 60 + text), np.arange(60)])
    want = jax.jit(partial(f, prefix_lengths=(text,)))(*(x[:, order] for x in (q, k, v)))
    np.testing.assert_allclose(got[:, order], want, atol=1e-6)
    with pytest.raises(ValueError, match="a gate does not go with text"):
        kernels.video_sparse_attention(q, k, v, q, grid=grid, tile=tile, sparsity=0.7, text_length=3)


def video_sparse_definition(q, k, v, gate, tile_ids, sizes, kept, P, policy):
    """out in float64 and the mask; `tile_ids` [L] is the block of each token, prefix blocks first."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    one_hot = (np.arange(len(sizes))[:, None] == tile_ids) / sizes[:, None]
    mean_q, mean_k, mean_v = (np.einsum("jl,blnk->bjnk", one_hot, x) for x in (q, k, v))
    scores = np.einsum("bink,bjnk->bnij", mean_q, mean_k) * q.shape[-1] ** -0.5
    allowed = np.ones(scores.shape, bool)
    for b, n, i in np.ndindex(*scores.shape[:3]):
        if i >= P:
            low = P if policy == "exempt" else 0
            best = np.argsort(-scores[b, n, i, low:], kind="stable")[: kept + P - low] + low
            allowed[b, n, i, low:] = False
            allowed[b, n, i, best] = True
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    coarse = np.einsum("bnij,bjnk->bink", weights / weights.sum(-1, keepdims=True), mean_v)
    mask = allowed[:, :, tile_ids][..., tile_ids]
    zero = np.zeros(q.shape)
    out, _, _ = definition(q, k, v, mask, zero, zero[..., 0].swapaxes(1, 2))
    return out if gate is None else out + coarse[:, tile_ids] * np.asarray(gate, np.float64)


# (grid, tile, sparsity, prefix lengths, policy)
VIDEO = {
    "one token": ((1, 1, 1), (4, 4, 4), 0.5, (), "exempt"),
    "ragged": ((5, 6, 7), (4, 4, 4), 0.6, (), "exempt"),
    "dense": ((5, 6, 7), (4, 4, 4), 0.0, (), "exempt"),
    "long": ((5, 7, 13), (4, 4, 8), 0.8, (), "exempt"),
    "exempt": ((4, 5, 6), (2, 2, 4), 0.8, (5, 17), "exempt"),
    "compete": ((4, 5, 6), (2, 2, 4), 0.8, (5, 17), "compete"),
    "pairs": ((1, 1, 14), (1, 1, 2), 0.7, (), "exempt"),
}


@pytest.mark.parametrize(
    ("label", "gated", "name"),
    [
        # The coarse branch is the same for all implementations.
        *(pytest.param(label, True, "xla", marks=[slower] * (label in ("dense", "long", "exempt"))) for label in VIDEO),
        *((label, False, "reference") for label in VIDEO),
        *(pytest.param(label, False, "xla", marks=slower) for label in ("ragged", "compete")),
    ],
)
def test_video_sparse(label, gated, name):
    grid, tile, sparsity, prefix, policy = VIDEO[label]
    block, L = int(np.prod(tile)), sum(prefix) + int(np.prod(grid))
    chunks = [min(block, n - i) for n in prefix for i in range(0, n, block)]
    sizes = np.array([*chunks, *tiles.variable_block_sizes(grid, tile)])
    ids = np.concatenate([np.repeat(np.arange(len(chunks)), chunks).astype(int), len(chunks) + tile_of(grid, tile)])
    B = 2 if L < 300 else 1
    q, k, v, gate, dout = (normal(s, B, L, 2, 8) for s in range(5))
    gate = gate if gated else None
    kept = tiles.top_k_count(sparsity, len(sizes) - len(chunks))
    f = partial(kernels.video_sparse_attention, grid=grid, tile=tile, sparsity=sparsity, prefix_lengths=prefix)
    f = partial(f, prefix_policy=policy, implementation=name)
    f, f_tiled = jax.jit(f), jax.jit(partial(f, tiled=True))
    arguments = (ids, sizes, kept, len(chunks), policy)
    assert error(f(q, k, v, gate), video_sparse_definition(q, k, v, gate, *arguments)) < F32["out"]
    if name == "xla":
        video = np.arange(sum(prefix), L)[tiles.partition_indices(grid, tile)]
        order = np.concatenate([np.arange(sum(prefix)), video])
        moved = [None if x is None else x[:, order] for x in (q, k, v, gate)]
        np.testing.assert_allclose(f_tiled(*moved), np.asarray(f(q, k, v, gate))[:, order], atol=1e-6)
        # The gradient along a direction, against a central difference of the definition in float64.
        which = (0, 1, 2, 3) if gated else (0, 1, 2)
        grads = jax.jit(jax.grad(lambda *x: jnp.sum(f(*x) * dout), which))(q, k, v, gate)
        for i in which:
            direction, h = np.asarray(normal(50 + i, *q.shape), np.float64), 1e-5
            ends = []
            for sign in (h, -h):
                x = [None if y is None else np.asarray(y, np.float64) for y in (q, k, v, gate)]
                x[i] = x[i] + sign * direction
                ends.append(np.sum(video_sparse_definition(*x, *arguments) * np.asarray(dout)))
            slope, got = (ends[0] - ends[1]) / (2 * h), np.sum(np.asarray(grads[i], np.float64) * direction)
            bound = 3e-5 * np.linalg.norm(grads[i]) * np.linalg.norm(direction) ** 0.5
            # Of one token the gradients by q and k are nothing but the rounding of numbers near 1.
            assert abs(got - slope) <= (1e-6 if L == 1 and i < 2 else bound)


@pytest.mark.parametrize("which", ["sliding", "video"])
def test_a_scale_and_groups_of_heads(which):
    """Four heads of queries, two of keys; both are what scaled queries and repeated keys give, gradients too."""
    grid, tile, K = (3, 4, 5), (2, 2, 3), 8
    q, gate, dout = (normal(s, 1, 60, 4, K) for s in (0, 1, 2))
    k, v = (normal(s, 1, 60, 2, K) for s in (3, 4))
    f = {
        "sliding": partial(kernels.sliding_tile_attention, grid=grid, tile=tile, window=(1, 3, 1)),
        "video": partial(kernels.video_sparse_attention, gate=gate, grid=grid, tile=tile, sparsity=0.5),
    }[which]

    @jax.jit
    def run(q, k, v):
        short, pull = jax.vjp(partial(f, scale=0.3), q, k, v)
        every = lambda q, k, v: f(q * (0.3 * K**0.5), jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2))  # noqa: E731
        long, pull_long = jax.vjp(every, q, k, v)
        return (short, *pull(dout)), (long, *pull_long(dout))

    for one, other in zip(*run(q, k, v), strict=True):
        assert error(one, other) < 2e-6


def test_causal_tiles_see_their_window_of_the_past():
    grid, tile, window = (5, 4, 4), (2, 2, 3), (3, 1, 3)
    q, k, v, dout = (normal(s, 1, 80, 1, 8) for s in range(4))
    dlse = normal(4, 1, 1, 80)
    f = partial(kernels.sliding_tile_attention, grid=grid, tile=tile, window=window, causal=True, return_lse=True)
    frame = np.arange(80) // 16 // 2  # of tiles
    mask = sliding_mask(grid, tile, (window,), 0, 0) & (frame[:, None] >= frame)
    compare(results(f, (q, k, v), dout, dlse), definition(q, k, v, mask, dout, dlse), F32)


def test_causal_tiles_choose_as_if_nothing_followed():
    """The last tiles of a video that ends see what they see as tiles of a longer one."""
    tile, sparsity = (2, 2, 3), 0.6
    q, k, v, gate = (normal(s, 1, 96, 2, 8) for s in range(4))

    @partial(jax.jit, static_argnums=(0, 1))
    def attend(frames, causal):
        x = (x[:, : 16 * frames] for x in (q, k, v, gate))
        return kernels.video_sparse_attention(*x, grid=(frames, 4, 4), tile=tile, sparsity=sparsity, causal=causal)

    whole = attend(6, True)
    for frames in (4, 6):
        assert error(whole[:, 16 * (frames - 2) : 16 * frames], attend(frames, False)[:, -32:]) < 2e-6


def test_ties_take_the_lowest_tiles_and_exactly_as_many_as_asked():
    grid, tile = (1, 1, 16), (1, 1, 2)
    q, v = normal(0, 1, 16, 1, 8), normal(1, 1, 16, 1, 8)
    sign = np.where(np.arange(16) % 4 < 2, 1.0, -1.0)[None, :, None, None].astype(np.float32)
    f = jax.jit(partial(kernels.video_sparse_attention, gate=None, grid=grid, tile=tile, sparsity=0.6))
    got = f(q, np.zeros_like(q) * sign, v)
    want = np.broadcast_to(np.mean(v[:, :8], axis=1, keepdims=True), v.shape)  # ceil(0.4 * 8) = 4 tiles
    assert error(got, want) < 1e-6


@pytest.mark.parametrize("which", ["sliding", "video"])
@pytest.mark.parametrize("gradient", [False, True])
def test_long_videos_never_hold_all_logits(which, gradient):
    grid, tile, N, K = (8, 64, 64), (4, 8, 8), 2, 16  # 32,768 tokens: all logits would be 8.6 GB
    L = int(np.prod(grid))
    shape = jax.ShapeDtypeStruct((1, L, N, K), jnp.float32)

    def f(q, k, v):
        if which == "video":
            return jnp.sum(kernels.video_sparse_attention(q, k, v, q, grid=grid, tile=tile, sparsity=0.8))
        return jnp.sum(kernels.sliding_tile_attention(q, k, v, grid=grid, tile=tile, window=(1, 3, 3)))

    f = jax.grad(f, (0, 1, 2)) if gradient else f
    assert max(_sizes(jax.make_jaxpr(f)(shape, shape, shape).jaxpr)) <= 64 * L * N
    memory = jax.jit(f).lower(shape, shape, shape).compile().memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 2**27


def _sizes(jaxpr):
    """Elements of every value that a program makes, inner programs included."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars)
        for inner in jaxprs_in_params(eqn.params):
            yield from _sizes(inner)


def test_the_same_operands_give_the_same_bits():
    shape = (2, 6, 6, 2, 16, 16, 4, False)
    q, k, v, dout, dlse = block_operands(shape)
    f = lambda *x: kernels.block_sparse_attention(*x, *random_lists(shape), block=16, return_lse=True)  # noqa: E731
    first, second = (jax.tree.leaves(results(f, (q, k, v), dout, dlse)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def test_losses_of_windows():
    grid, tile = (4, 4, 6), (2, 2, 2)
    q, k, v = (normal(s, 1, 96 + 5, 2, 8) for s in range(3))
    candidates = ((1, 1, 1), (1, 3, 3), (2, 2, 3))
    how = dict(grid=grid, tile=tile, candidates=candidates, text_length=3)
    got = jax.jit(partial(mask_search.losses, **how))(q, k, v)
    assert got.shape == (3, 2) and (np.diff(got, axis=0) < 0).all() and np.abs(got[-1]).max() < 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": normal(0, 64, 2, 8)}, r"\[B,L,N,K\]"),
        ({"v": normal(0, 1, 64, 3, 8)}, r"v is float32\[1, 64, 3, 8\]"),
        ({"k": normal(0, 1, 64, 2, 8, dtype=jnp.bfloat16)}, "k is bfloat16"),
        ({"grid": (4, 4, 5)}, r"q has 64 tokens, but the grid \(4, 4, 5\) makes 80"),
        ({"grid": (4, 4, 3)}, "q has 64 tokens"),
        ({"grid": (4, 4, 0)}, "at least 1"),
        ({"tile": (4, 4)}, "tile must be three whole numbers"),
    ],
)
def test_operands_that_do_not_fit(change, message):
    x = normal(0, 1, 64, 2, 8)
    arguments = {"q": x, "k": x, "v": x, "grid": (4, 4, 4), "tile": (2, 2, 2)} | change
    with pytest.raises(ValueError, match=message):
        kernels.sliding_tile_attention(**arguments, window=(1, 1, 1))
    with pytest.raises(ValueError, match=message):
        kernels.video_sparse_attention(**arguments, gate=None, sparsity=0.5)


@pytest.mark.parametrize(
    ("function", "change", "message"),
    [
        ("sliding", {"window": (0, 1, 1)}, "window must be"),
        ("sliding", {"window": (1, 1)}, "window must be"),
        ("sliding", {"window": ((1, 1, 1),) * 3}, "each of the 2 heads"),
        ("sliding", {"window": (1.5, 1, 1)}, "window must be"),
        ("sliding", {"text_length": 1}, "grid"),
        ("sliding", {"grid": (4, 4, 3), "text_length": 17}, "text_length 17|text slots"),
        ("sliding", {"text_length": -1}, "text_length -1|text slots"),
        ("sliding", {"grid": (4, 4, 3), "text_length": 16, "causal": True}, "causal does not go with text"),
        ("video", {"grid": (4, 4, 3), "prefix_lengths": (16,), "causal": True}, "causal does not go with a prefix"),
        ("video", {"scale": 0.0}, "scale is 0.0"),
        ("video", {"k": normal(0, 1, 64, 4, 8)}, "k and v of N heads or of a divisor"),
        ("video", {"sparsity": float("nan")}, "sparsity must be a number in 0..1, not nan"),
        ("video", {"sparsity": 1.01}, "sparsity"),
        ("video", {"sparsity": -0.1}, "sparsity"),
        ("video", {"gate": normal(0, 1, 63, 2, 8)}, "gate is"),
        ("video", {"prefix_lengths": (3,)}, "prefixes"),
        ("video", {"prefix_lengths": (0,)}, "prefix_lengths"),
        ("video", {"prefix_policy": "join"}, "prefix_policy"),
        ("video", {"implementation": "flash"}, "no block-sparse attention implementation 'flash'"),
        ("blocks", {"block": 60}, r"\[B,blocks\*60,N,K\]"),
        ("blocks", {"q2k": np.zeros((1, 3, 4, 1), np.int32)}, "q2k is int32"),
        ("blocks", {"q2k": np.full((1, 1, 4, 1), 4, np.int32)}, "q2k holds 4..4"),
        ("blocks", {"q2k_count": np.zeros((1, 1, 4), np.float32)}, "q2k_count is float32"),
        ("blocks", {"q2k_count": np.full((1, 1, 4), 2, np.int32)}, "q2k_count holds 2..2"),
        ("blocks", {"kv_sizes": np.full(4, 17, np.int32)}, "kv_sizes holds 17..17"),
        ("blocks", {"kv_sizes": [16] * 4}, "kv_sizes is list"),
    ],
)
def test_mistakes_are_named(function, change, message):
    x = normal(0, 1, 64, 2, 8)
    lists = {"q2k": np.zeros((1, 1, 4, 1), np.int32), "q2k_count": np.ones((1, 1, 4), np.int32), "block": 16}
    call, arguments = {
        "sliding": (kernels.sliding_tile_attention, {"grid": (4, 4, 4), "tile": (2, 2, 2), "window": (1, 1, 1)}),
        "video": (kernels.video_sparse_attention, {"gate": x, "grid": (4, 4, 4), "sparsity": 0.5}),
        "blocks": (kernels.block_sparse_attention, lists | {"kv_sizes": np.full(4, 16, np.int32)}),
    }[function]
    with pytest.raises(ValueError, match=message):
        call(**{"q": x, "k": x, "v": x} | arguments | change)


def test_what_a_named_implementation_cannot_do(monkeypatch):
    x = normal(0, 1, 64, 1, 8)
    monkeypatch.setattr(xla, "unsupported", lambda q, k, v, block: f"takes no head dim {q.shape[-1]}")
    with pytest.raises(NotImplementedError, match="'xla': takes no head dim 8"):
        kernels.video_sparse_attention(x, x, x, None, grid=(4, 4, 4), sparsity=0.5, implementation="xla")
    assert sliding_tile.layout.choose(x, 1, 64, None) == ("reference", 64)
