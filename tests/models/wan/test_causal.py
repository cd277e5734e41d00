"""Chunk after chunk over a cache: against a plain program that keeps lists and shifts them, and against one forward
pass of the whole video under the block-causal mask.

B batch · T latent frames · H W latent grid · C latent channels · V tokens of a frame · S text tokens · N heads ·
K head dim.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff.errors import UsageError
from jvdiff.kernels import BlockCausal
from jvdiff.models import wan
from jvdiff.models.wan import places
from jvdiff.models.wan.layers import rope_tables
from jvdiff.sharding import Placement, collectives, make_mesh, param_shardings, read_mesh

CFG = wan.DiTConfig(
    num_attention_heads=4, attention_head_dim=12, num_layers=2, ffn_dim=40, in_channels=4, out_channels=4, text_dim=20
)
GRID = (4, 6)
ROWS = 7  # rows of text that are attended to; the last of five stands for three


@functools.cache
def params():
    random = np.random.default_rng(0)
    leaf = lambda x: np.float32(0.3) * random.standard_normal(x.shape, np.float32)  # noqa: E731
    return jax.tree.map(leaf, wan.abstract_params(CFG))


def inputs(frames, texts=1, batch=2):
    """Latents, timesteps of every frame, and texts [texts,B,S,D]."""
    random = np.random.default_rng(1)
    draw = lambda *shape: random.standard_normal(shape, np.float32)  # noqa: E731
    timestep = random.uniform(0, 1000, (batch, frames)).astype(np.float32)
    return draw(batch, frames, *GRID, CFG.in_channels), timestep, draw(texts, batch, 5, CFG.text_dim)


keys_of = jax.jit(wan.text_keys, static_argnums=1, static_argnames="placement")


@functools.cache
def step_of(span, placement):
    """The jitted (params, latents, timestep, text keys, cache) -> (velocity, cache); one of both compiles faster."""
    common = dict(text_length=ROWS, placement=placement)

    def step(weights, *given):
        return [f(weights, CFG, span, *given, **common) for f in (wan.chunk_velocity, wan.extend)]

    return jax.jit(step)


def rollout(span, latents, timestep, texts, *, cache=None, placement=None, weights=None):
    """Velocities [B,T,...] chunk by chunk, every chunk kept at its own timestep; and the cache. `texts`: [P,B,S,D] of P
    equal parts."""
    weights = params() if weights is None else weights
    step = step_of(span, placement)
    keys = [keys_of(weights, CFG, text, placement=placement) for text in texts]
    if cache is None:
        dtype = weights["blocks"]["self_attn"]["k"]["kernel"].dtype
        cache = wan.init_kv_cache(CFG, span, len(latents), GRID, dtype, placement=placement)
    frames, out = latents.shape[1], []
    for start in range(0, frames, span.chunk):
        part = slice(start, start + span.chunk)
        velocity, cache = step(weights, latents[:, part], timestep[:, part], keys[start * len(keys) // frames], cache)
        out.append(velocity)
    return np.concatenate(out, axis=1), cache


whole = jax.jit(
    lambda pattern, *a, cfg=CFG: wan.velocity(a[0], cfg, *a[1:], pattern=pattern, text_length=ROWS), static_argnums=0
)


def close(found, expected, limit=1e-5):
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=limit * np.abs(expected).max())


# ------------------------------------------------------------------------------------------------- the plain program


class Plain:
    """Wan chunk by chunk as FlashDreams does it, in float64 and in words of numpy: every layer has a list of frames; a
    new chunk is appended to it, after the oldest ones behind the sink were taken out so that it fits; attention is to
    all that is in the list."""

    def __init__(self, span):
        self.span, self.p = span, jax.tree.map(lambda x: np.asarray(x, np.float64), params())
        self.lists = [[] for _ in range(CFG.num_layers)]
        self.frames = 0

    def forward(self, latents, timestep, text):
        p, (B, T, H, W, C) = self.p, latents.shape
        D, N, K = CFG.width, CFG.num_attention_heads, CFG.attention_head_dim
        h, w = H // 2, W // 2
        x = latents.reshape(B, T, h, 2, w, 2, C).transpose(0, 1, 2, 4, 6, 3, 5).reshape(B, T, h * w, 4 * C)
        x = linear(p["patch_embed"], x)
        rates = 10000.0 ** (-np.arange(CFG.freq_dim // 2) / (CFG.freq_dim // 2))
        angles = timestep[..., None].astype(np.float64) * rates
        t = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
        t = linear(p["time_embed"]["linear_2"], silu(linear(p["time_embed"]["linear_1"], t)))
        modulation = linear(p["time_proj"], silu(t)).reshape(B, T, 6, D)
        text = np.concatenate([text, np.repeat(text[:, -1:], ROWS - text.shape[1], axis=1)], axis=1)
        text = linear(p["text_embed"]["linear_2"], gelu(linear(p["text_embed"]["linear_1"], text)))
        for layer, kept in enumerate(self.lists):
            q = jax.tree.map(lambda x, layer=layer: x[layer], p["blocks"])
            m = [m[:, :, None] for m in np.moveaxis(modulation + q["modulation"], 2, 0)]
            y = norm(x) * (1 + m[1]) + m[0]
            x = x + m[2] * self.self_attention(q["self_attn"], y, kept, (h, w))
            y = norm(x) * q["cross_norm"]["scale"] + q["cross_norm"]["bias"]
            a, b = q["cross_attn"], y.reshape(B, -1, D)
            heads = lambda x: x.reshape(*x.shape[:2], N, K)  # noqa: E731
            y = attention(
                heads(rms(a["q_norm"], linear(a["q"], b))), heads(rms(a["k_norm"], linear(a["k"], text))),
                heads(linear(a["v"], text)),
            )  # fmt: skip
            x = x + linear(a["out"], y.reshape(x.shape))
            y = norm(x) * (1 + m[4]) + m[3]
            x = x + m[5] * linear(q["ffn"]["down"], gelu(linear(q["ffn"]["up"], y)))
        shift, scale = np.moveaxis(t[:, :, None] + p["head"]["modulation"], 2, 0)
        x = linear(p["head"]["proj"], norm(x) * (1 + scale[:, :, None]) + shift[:, :, None])
        x = x.reshape(B, T, h, w, 2, 2, -1).transpose(0, 1, 2, 4, 3, 5, 6)
        return x.reshape(B, T, H, W, -1)

    def self_attention(self, p, x, kept, grid):
        B, T, V, _ = x.shape
        q, k, v = rms(p["q_norm"], linear(p["q"], x)), rms(p["k_norm"], linear(p["k"], x)), linear(p["v"], x)
        heads = lambda x: x.reshape(B, T, V, CFG.num_attention_heads, -1)  # noqa: E731
        q, k, v = heads(q), heads(k), heads(v)
        if not self.span.relative:
            at = [self.frames + i for i in range(T)]
            q, k = turned(q, at, grid), turned(k, at, grid)
        span, excess = self.span, len(kept) + T - self.span.sink - self.span.window
        if excess > 0:
            del kept[span.sink : span.sink + excess]
        kept += [(k[:, i : i + 1], v[:, i : i + 1]) for i in range(T)]
        k, v = (np.concatenate(x, axis=1) for x in zip(*kept, strict=True))
        if span.relative:
            at = range(len(kept))
            q, k = turned(q, at[-T:], grid), turned(k, at, grid)
        q, k, v = (x.reshape(B, -1, *x.shape[3:]) for x in (q, k, v))
        return linear(p["out"], attention(q, k, v).reshape(x.shape))


def linear(p, x):
    return x @ p["kernel"] + p["bias"]


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + CFG.eps)


def rms(p, x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + CFG.eps) * p["scale"]


def attention(q, k, v):
    scores = np.einsum("blnk,bmnk->bnlm", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnlm,bmnk->blnk", weights / weights.sum(-1, keepdims=True), v)


def turned(x, frames, grid):
    """x [B,T,V,N,K], whose channels turn with the frame, the row and the column."""
    side, places = 2 * (x.shape[-1] // 6), np.stack(np.meshgrid(frames, *map(range, grid), indexing="ij"), -1)
    sizes = (x.shape[-1] - 2 * side, side, side)
    angles = [places[..., i : i + 1] * 10000.0 ** (-np.arange(0, n, 2) / n) for i, n in enumerate(sizes)]
    turn = np.exp(1j * np.concatenate(angles, -1)).reshape(*x.shape[1:3], 1, -1)
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
    return np.stack([z.real, z.imag], -1).reshape(x.shape)


@functools.cache
def plain(span, frames, texts=1):
    """Velocities of the plain program for `inputs(frames, texts)`."""
    program, out = Plain(span), []
    latents, timestep, texts = inputs(frames, texts)
    for start in range(0, frames, span.chunk):
        part, text = slice(start, start + span.chunk), texts[start * len(texts) // frames]
        out.append(program.forward(latents[:, part], timestep[:, part], text))
        program.frames += span.chunk
    return np.concatenate(out, axis=1)


# ------------------------------------------------------------------------------------------------------ chunk by chunk


@pytest.mark.parametrize(
    "span",
    [
        wan.Span(1, 1, 0),  # nothing is kept
        wan.Span(3, 30, 0),  # the video ends before the window is full
        wan.Span(3, 6, 1),
        wan.Span(3, 4, 5),  # a part of a chunk is kept
        wan.Span(3, 30, 0, relative=True),
        wan.Span(3, 7, 5, relative=True),
    ],
    ids=str,
)
def test_a_ring_is_the_list_that_is_shifted_and_the_whole_video_under_the_mask(span):
    given = inputs(15)
    got, cache = rollout(span, *given)
    close(got, plain(span, 15))
    assert step_of(span, None)._cache_size() == 1  # one program for every chunk
    assert int(cache.frames) == 15 and cache.keys.shape[2] == span.slots
    if not span.relative:
        close(whole(span.pattern, params(), *given[:2], given[2][0]), got)


def test_a_text_for_each_part_and_a_timestep_for_each_clip():
    """A prompt that changes is the whole video with a text for each part."""
    span = wan.Span(1, 4, 1)
    latents, timestep, texts = inputs(6, texts=2)
    together = whole(span.pattern, params(), latents, timestep, texts.swapaxes(0, 1))
    close(together, plain(span, 6, 2))
    close(rollout(span, latents, timestep, texts)[0], plain(span, 6, 2))
    # One text twice, one timestep for all frames: as if neither were divided.
    once = whole(span.pattern, params(), latents, timestep[:, 0], texts[0])
    same = np.repeat(timestep[:, :1], 6, axis=1), np.repeat(texts[0][:, None], 2, axis=1)
    close(whole(span.pattern, params(), latents, *same), once)
    with pytest.raises(UsageError, match=r"there are 4 texts a clip of 6 frames; expected a number that divides"):
        whole(span.pattern, params(), latents, timestep, np.repeat(texts[0][:, None], 4, axis=1))
    with pytest.raises(UsageError, match=r"timestep is float32\[2, 5\]; expected float32\[2\], \[2,2\] .* or \[2,6\]"):
        whole(span.pattern, params(), latents, timestep[:, :5], texts[0])


def test_training_on_clean_and_noisy_copies_sees_what_a_rollout_sees():
    """The velocity at a noisy chunk over a clean past, all chunks in one pass; and a gradient reaches every weight."""
    span = wan.Span(1, 4, 1)
    clean, timestep, texts = inputs(6)
    noisy = clean[:, ::-1] + np.float32(0.5)
    kept_at, keys = np.zeros(2, np.float32), keys_of(params(), CFG, texts[0])
    step = step_of(span, None)
    past, expected = wan.init_kv_cache(CFG, span, 2, GRID), []
    for i in range(6):
        now = slice(i, i + 1)
        expected.append(step(params(), noisy[:, now], timestep[:, now], keys, past)[0])
        past = step(params(), clean[:, now], kept_at[:, None], keys, past)[1]
    expected = np.concatenate(expected, axis=1)

    pattern = BlockCausal(1, 4, 1, teacher_forcing=True)
    both = np.concatenate([clean, noisy], axis=1), np.concatenate([0 * timestep, timestep], axis=1)

    @jax.jit
    def run(weights, *given):
        def loss(weights):
            found = wan.velocity(weights, CFG, *given, pattern=pattern, text_length=ROWS)[:, 6:]
            return jnp.mean(found**2), found

        return jax.grad(loss, has_aux=True)(weights)

    gradient, found = run(params(), *both, texts[0])
    close(found, expected)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path
    with pytest.raises(UsageError, match="7 latent frames are not 2 copies of a video in chunks of 1; expected"):
        run(params(), both[0][:, :7], both[1][:, :7], texts[0])


# ------------------------------------------------------------------------------------------------- far on, and rounded


def test_frames_have_places_without_a_limit():
    frames = np.array([0, 1, 255, 256, 1023, 1024, 65_537, 9_999_999, 100_000_000, 2**31 - 1])
    found = jax.jit(lambda frames: rope_tables((len(frames), 1, 1), 128, frames))(frames.astype(np.int32))
    rates = 10000.0 ** (-np.arange(0, 44, 2) / 44)
    angles = frames[:, None].astype(np.float64) * rates[None]
    for table, expected in zip(found, (np.cos(angles), np.sin(angles)), strict=True):
        np.testing.assert_allclose(table[:, :22], expected, atol=5e-7)


@pytest.mark.parametrize("span", [wan.Span(3, 6, 1), wan.Span(3, 7, 5, relative=True)], ids=str)
def test_the_hundred_millionth_frame_is_as_good_as_the_thirteenth(span):
    """Attention depends on how far frames are apart, so that a video may begin anywhere: here after 12 frames of
    nothing, which fill the slots."""
    empty = wan.init_kv_cache(CFG, span, 2, GRID)
    at = lambda frame: wan.KVCache(empty.keys, empty.values, jnp.int32(frame))  # noqa: E731
    given = inputs(15)
    near, far = (rollout(span, *given, cache=at(frame))[0] for frame in (12, 100_000_002))
    assert int(rollout(span, *given, cache=at(100_000_002))[1].frames) == 100_000_017
    close(far, near, 1e-6 if span.relative else 1e-5)


def test_a_cache_in_bfloat16_costs_what_bfloat16_costs():
    span = wan.Span(3, 4, 5)
    given = inputs(15)
    exact = plain(span, 15)
    low = wan.abstract_params(CFG, jnp.bfloat16)
    weights = jax.tree.map(lambda x, like: np.asarray(x, like.dtype), params(), low)
    got, cache = rollout(span, *given, weights=weights)
    assert cache.keys.dtype == jnp.bfloat16 and got.dtype == np.float32
    error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
    together = whole(span.pattern, weights, *given[:2], given[2][0])
    assert error < 1.2 * np.linalg.norm(together - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.02


# ------------------------------------------------------------------------------------------------------- another text


@functools.cache
def reencoder(span, placement=None):
    run = functools.partial(wan.reencode, text_length=ROWS, placement=placement)
    return jax.jit(lambda weights, *a: run(weights, CFG, span, *a))


remembered = jax.jit(wan.remembered, static_argnums=0)


def history_of(span, latents):
    history = np.zeros((len(latents), span.slots, *GRID, CFG.in_channels), np.float32)
    for start in range(0, latents.shape[1], span.chunk):
        history = remembered(span, history, latents[:, start : start + span.chunk], np.int32(start))
    return history


@pytest.mark.parametrize("relative", [False, True])
def test_a_past_that_is_reencoded_is_the_one_under_that_text_from_the_start(relative):
    span = wan.Span(3, 30, 0, relative)  # 27 slots, six of which are filled
    latents, _, texts = inputs(6, texts=2)
    clean = np.zeros((2, 6), np.float32)
    history = history_of(span, latents)
    np.testing.assert_array_equal(history[:, :6], latents)
    _, past = rollout(span, latents, clean, texts[:1])
    for text in texts:
        _, expected = rollout(span, latents, clean, text[None])
        got = reencoder(span)(params(), history, clean[:, 0], keys_of(params(), CFG, text), past)
        assert int(got.frames) == 6
        for one, other in zip((got.keys, got.values), (expected.keys, expected.values), strict=True):
            close(one[:, :, :6], other[:, :, :6])
    assert np.abs(got.keys - past.keys).max() > 0.1


def test_what_is_remembered_is_what_the_slots_hold():
    span = wan.Span(3, 7, 5)
    latents, _, _ = inputs(30)
    held = span.held(jnp.int32(30))
    assert sorted(held.tolist()) == [0, 1, 2, 3, 4, 26, 27, 28, 29]
    np.testing.assert_array_equal(history_of(span, latents), latents[:, held])
    assert span.places(jnp.int32(30)).tolist() == [sorted(held.tolist()).index(frame) for frame in held.tolist()]


# ------------------------------------------------------------------------------------------------------- many devices


def placed(mesh):
    shape = read_mesh(mesh)
    placement = Placement(make_mesh(shape), shape.ring)
    return placement, jax.device_put(params(), param_shardings(placement.mesh, params(), places.DIT))


@pytest.mark.parametrize("mesh", ["sequence=8", "data=2,sequence=2,tensor=2"])
def test_a_mesh_gives_the_numbers_of_one_device(mesh):
    span = wan.Span(3, 6, 1)
    placement, weights = placed(mesh)
    close(rollout(span, *inputs(15), placement=placement, weights=weights)[0], plain(span, 15))
    assert step_of(span, placement)._cache_size() == 1


def test_a_past_is_reencoded_on_a_mesh_and_stays_where_it_is():
    span = wan.Span(3, 6, 1)
    latents, timestep, texts = inputs(6)
    placement, weights = placed("data=2,sequence=2,tensor=2")
    found = []
    for where, p in ((None, params()), (placement, weights)):
        past = rollout(span, latents, timestep, texts, placement=where, weights=p)[1]
        keys = keys_of(p, CFG, texts[0], placement=where)
        found.append(reencoder(span, where)(p, history_of(span, latents), timestep[:, 0], keys, past))
    close(found[1].keys, found[0].keys)  # 4 heads need no padding
    close(found[1].values, found[0].values)
    for one, other in zip(jax.tree.leaves(found[1]), jax.tree.leaves(past), strict=True):
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)


def test_divided_tokens_cost_four_all_to_alls_a_block_and_the_past_stays_where_it_is():
    span = wan.Span(3, 6, 1)
    placement, weights = placed("sequence=8")
    latents, timestep, texts = inputs(3)
    past = wan.init_kv_cache(CFG, span, 2, GRID, placement=placement)
    given = weights, latents, timestep, keys_of(weights, CFG, texts[0], placement=placement), past
    found = collectives.read(step_of(span, placement).lower(*given).compile().as_text())
    inside, outside = ([c for c in found if c.runs == runs] for runs in (CFG.num_layers, 1))
    assert len(found) == len(inside + outside)
    assert [c.kind for c in inside] == ["all-to-all"] * 4 * 2  # read, and written
    assert [c.kind for c in outside] == ["all-gather"]  # the velocity's patches, once


# ------------------------------------------------------------------------------------------------------------- errors


def test_what_does_not_fit_is_told():
    span = wan.Span(3, 6, 0)
    latents, timestep, texts = inputs(6)
    keys, past = keys_of(params(), CFG, texts[0]), wan.init_kv_cache(CFG, span, 2, GRID)
    for step in (wan.chunk_velocity, wan.extend):
        run = functools.partial(step, params(), CFG, span)
        with pytest.raises(UsageError, match=r"a chunk is \[2, 6, 4, 6, 4\]; expected \[B,3,H,W,4\]"):
            run(latents, timestep, keys, past)
        with pytest.raises(UsageError, match=r"a chunk is \[2, 3, 4, 6, 3\]"):
            run(latents[:, :3, ..., :3], timestep[:, :3], keys, past)
        with pytest.raises(
            UsageError, match=r"and the past \[2, 2, 3, 4, 4, 12\]; expected .* a past of \[2, 2, 3, 6\]"
        ):
            run(latents[:, :3], timestep[:, :3], keys, wan.init_kv_cache(CFG, span, 2, (4, 4)))
        with pytest.raises(
            UsageError, match=r"timestep of a chunk is float32\[2, 2\]; expected float32\[2\] or \[2,3\]"
        ):
            run(latents[:, :3], timestep[:, :2], keys, past)
    for bad in (dict(window=None), dict(chunk=0), dict(chunk=3, window=2), dict(sink=-1), dict(chunk=1.0)):
        with pytest.raises(UsageError, match="expected"):
            wan.Span(**bad)
