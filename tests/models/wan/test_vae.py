"""The Wan VAE by itself; the comparison with diffusers is in tests/parity/test_wan_vae.py.

B batch · T latent frames · H W latent grid · C channels · F pixel frames · Y X pixel height, width.
"""

import dataclasses
import json
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff.errors import CheckpointError, UsageError
from jvdiff.models import wan
from jvdiff.models.wan import vae, vae_layers
from jvdiff.models.wan.rollout import ROLLOUT
from jvdiff.precision import DECODING
from jvdiff.weights.naming import flatten

CFG = wan.VAEConfig(
    base_dim=6,
    dim_mult=(1, 2, 2),
    num_res_blocks=1,
    temperal_downsample=(True, True),
    z_dim=4,
    latents_mean=(0.5,) * 4,
    latents_std=(2.0,) * 4,
)
RESIDUAL = dataclasses.replace(
    CFG, dim_mult=(2, 2), temperal_downsample=(True,), is_residual=True, patch_size=2, decoder_base_dim=4
)
init_params = jax.jit(wan.init_params, static_argnums=1)
encode = jax.jit(wan.encode, static_argnums=1, static_argnames="chunk")
decode = jax.jit(wan.decode, static_argnums=1, static_argnames=("chunk", "clip"))
encode_chunk = jax.jit(wan.encode_chunk, static_argnums=1)
decode_chunk = jax.jit(wan.decode_chunk, static_argnums=1)


def every_leaf_away_from_its_start(cfg):
    random = np.random.default_rng(0)

    def fill(path, leaf):
        fan_in = max(math.prod(leaf.shape[:-1]), 4)
        values = random.standard_normal(leaf.shape, np.float32) * np.float32(fan_in**-0.5)
        return values + np.float32("scale" in jax.tree_util.keystr(path))

    return jax.tree_util.tree_map_with_path(fill, wan.abstract_params(cfg))


@pytest.fixture(scope="module")
def params():
    return every_leaf_away_from_its_start(CFG)


def video(F=17, Y=8, X=12, B=2, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (B, F, Y, X, 3)).astype(np.float32)


def latents(T=5, H=2, W=3, B=2, seed=0):
    return np.random.default_rng(seed).standard_normal((B, T, H, W, CFG.z_dim), np.float32)


def error(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def in_pieces(step, x, sizes):
    """The clip by explicit calls, `sizes` frames in each after the first."""
    piece, cache = step(x[:, :1], None)
    pieces, start = [piece], 1
    for size in sizes:
        piece, cache = step(x[:, start : start + size], cache)
        pieces.append(piece)
        start += size
    assert start == x.shape[1]
    return np.concatenate(pieces, axis=1)


def test_the_published_tree():
    """Names that saved checkpoints have; the full list of tensors is compared in tests/convert/test_tables.py."""
    tree = flatten(wan.abstract_params(wan.WAN_2_1_VAE, jnp.bfloat16))
    assert sum(leaf.size for leaf in tree.values()) == 126_892_531
    assert {leaf.dtype for leaf in tree.values()} == {jnp.dtype(jnp.bfloat16)}
    assert tree["encoder/down_0/res_0/conv_1/kernel"].shape == (3, 3, 3, 96, 96)
    assert tree["decoder/up_0/upsample/time_conv/kernel"].shape == (3, 384, 768)
    assert tree["decoder/up_1/res_0/shortcut/kernel"].shape == (192, 384)


def test_encoding_in_chunks_is_encoding_the_whole_clip(params):
    x = video()
    assert error(encode(params, CFG, x, chunk=2), encode(params, CFG, x, chunk=4)) <= 1e-5


def test_decoding_in_chunks_is_decoding_the_whole_clip(params):
    z = latents()
    whole = decode(params, CFG, z, chunk=4, clip=False)
    assert whole.shape == (2, 17, 8, 12, 3) and whole.dtype == jnp.float32
    assert error(decode(params, CFG, z, chunk=2, clip=False), whole) <= 1e-5
    clipped = decode(params, CFG, z, chunk=4)
    assert np.abs(clipped).max() <= 1.0
    np.testing.assert_allclose(clipped, np.clip(whole, -1, 1), atol=1e-4)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 1)])
def test_streaming_by_hand(params, sizes):
    x, z = video(), latents()
    mean = in_pieces(lambda x, cache: encode_chunk(params, CFG, x, cache), x, [4 * size for size in sizes])
    assert error(mean, encode(params, CFG, x, chunk=4)) <= 1e-5
    frames = in_pieces(lambda z, cache: decode_chunk(params, CFG, z, cache), z, sizes)
    assert error(frames, decode(params, CFG, z, chunk=4)) <= 1e-5


def test_the_past_decides_the_future_and_never_the_other_way(params):
    x, z = video(), latents()
    for run, whole, unit, at in ((encode, x, 4, 3), (decode, z, 1, 3)):
        changed = whole.copy()
        changed[:, 1 + unit * (at - 1) :] += 0.5
        before, after = (np.asarray(run(params, CFG, x, chunk=4)) for x in (whole, changed))
        kept = at if run is encode else 1 + 4 * (at - 1)
        np.testing.assert_array_equal(before[:, :kept], after[:, :kept])
        assert np.all(np.any(before[:, kept:] != after[:, kept:], axis=(0, 2, 3, 4)))


def test_a_clip_of_one_frame_is_a_picture(params):
    x, z = video(F=1), latents(T=1)
    mean, frame = encode(params, CFG, x), decode(params, CFG, z)
    assert mean.shape == (2, 1, 2, 3, 4) and frame.shape == (2, 1, 8, 12, 3)
    longer = np.concatenate([x, video(F=16, seed=3)], axis=1)
    assert error(mean, encode(params, CFG, longer, chunk=4)[:, :1]) <= 1e-6
    longer = np.concatenate([z, latents(T=4, seed=3)], axis=1)
    assert error(frame, decode(params, CFG, longer, chunk=4)[:, :1]) <= 1e-6


def test_the_cache_has_the_described_shapes(params):
    for which, step, first in (("encode", encode_chunk, video(F=1)), ("decode", decode_chunk, latents(T=1))):
        cache = step(params, CFG, first, None)[1]
        described = wan.init_cache(CFG, which, 2, 2, 3)
        assert jax.tree.structure(cache) == jax.tree.structure(described)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), cache) == jax.tree.map(
            lambda x: (x.shape, x.dtype), described
        )


def test_the_residual_vae_in_chunks_is_the_whole_clip():
    """Its shortcut pads a clip once in front when it encodes, and drops a frame once when it decodes."""
    params, x, z = every_leaf_away_from_its_start(RESIDUAL), video(F=5), latents(T=3)
    mean = in_pieces(lambda x, cache: encode_chunk(params, RESIDUAL, x, cache), x, [2, 2])
    assert mean.shape == (2, 3, 2, 3, 4)
    assert error(mean, encode(params, RESIDUAL, x, chunk=2)) <= 1e-5
    frames = in_pieces(lambda z, cache: decode_chunk(params, RESIDUAL, z, cache), z, [1, 1])
    assert frames.shape == (2, 5, 8, 12, 3)
    assert error(frames, decode(params, RESIDUAL, z, chunk=2)) <= 1e-5


def test_a_stream_knows_the_size_of_its_pictures():
    """Also where the network sees patches of them."""
    for cfg in (CFG, RESIDUAL):
        assert ROLLOUT.picture_shape(wan.init_cache(cfg, "encode", 2, 2, 3)) == (2, 2, 8, 12, 3)


def test_the_shortcuts_of_the_residual_vae():
    """Of the first frame every even channel is 0 and every odd one the frame's mean; when decoding it comes once."""
    x = np.random.default_rng(0).standard_normal((1, 2, 4, 6, 8), np.float32)
    squares = x.reshape(1, 2, 2, 2, 3, 2, 8).mean((3, 5))  # [B,T,H/2,W/2,C]
    first = vae_layers._means(x[:, :1], 16, True)
    np.testing.assert_allclose(first[..., 0::2], 0)
    np.testing.assert_allclose(first[..., 1::2], squares[:, :1], atol=1e-6)
    both = vae_layers._means(x, 16, True)
    np.testing.assert_allclose(both[..., 0::2], squares[:, :1], atol=1e-6)
    np.testing.assert_allclose(both[..., 1::2], squares[:, 1:], atol=1e-6)
    np.testing.assert_array_equal(vae_layers._means(x, 8, None), x)

    doubled = x.repeat(2, axis=2).repeat(2, axis=3)
    np.testing.assert_array_equal(vae_layers._copies(x, 8, True, False), doubled.repeat(2, axis=1))
    np.testing.assert_array_equal(vae_layers._copies(x[:, :1], 8, True, True), doubled[:, :1])
    rows = vae_layers._copies(x, 4, False, False)  # two channels a row of the square
    np.testing.assert_array_equal(rows[:, :, 0::2], doubled[:, :, 0::2, :, 0::2])
    np.testing.assert_array_equal(rows[:, :, 1::2], doubled[:, :, 1::2, :, 1::2])


def test_patches_put_the_column_before_the_row():
    frames = np.arange(2 * 2 * 3, dtype=np.float32).reshape(1, 1, 2, 2, 3)
    patches = vae._patches(frames, 2)
    assert patches.shape == (1, 1, 1, 1, 12)
    assert patches[0, 0, 0, 0, 1] == frames[0, 0, 1, 0, 0]  # c 0, column 0, row 1
    np.testing.assert_array_equal(vae._pixels(patches, 2), frames)


@pytest.mark.parametrize("run", ["encode", "decode"])
def test_memory_does_not_grow_with_the_clip(run, params):
    """Working memory for 81 frames is that for 21: beyond them the compiled program only holds the clip itself."""

    def compiled_bytes(frames):
        pixels = jax.ShapeDtypeStruct((1, frames, 64, 96, 3), jnp.float32)
        z = jax.ShapeDtypeStruct((1, 1 + frames // 4, 16, 24, CFG.z_dim), jnp.float32)
        program = encode.lower(params, CFG, pixels) if run == "encode" else decode.lower(params, CFG, z)
        return program.compile().memory_analysis().temp_size_in_bytes, 4 * pixels.size

    (short, short_clip), (long, long_clip) = compiled_bytes(21), compiled_bytes(81)
    assert long - short <= long_clip - short_clip + 0.03 * short


def test_folded_upsampling_is_nearest_upsampling_and_a_convolution():
    random = np.random.default_rng(0)
    x, kernel = (random.standard_normal(shape, np.float32) for shape in ((2, 3, 5, 7, 6), (3, 3, 6, 4)))
    doubled = x.repeat(2, axis=2).repeat(2, axis=3)
    assert error(jax.jit(vae_layers._upsampled_conv)(x, kernel), jax.jit(vae_layers._conv2d)(doubled, kernel)) <= 1e-6


def test_normalisation_of_latents_is_undone():
    z = latents()
    np.testing.assert_allclose(wan.normalize_latents(CFG, z), (z - 0.5) / 2.0, rtol=1e-6)
    np.testing.assert_allclose(wan.denormalize_latents(CFG, wan.normalize_latents(CFG, z)), z, atol=1e-6)


def test_training_starts_from_a_network_that_sees_one_frame_at_a_time():
    """Every temporal kernel starts in its newest tap, and no layer starts at zero or blows up."""
    params = jax.tree.map(np.asarray, init_params(jax.random.key(0), CFG))
    for path, kernel in flatten(params).items():
        if path.endswith("kernel") and (kernel.ndim == 5 or "time_conv" in path):
            assert not np.any(kernel[:2]) and np.all(np.any(kernel[2] != 0, axis=tuple(range(kernel.ndim - 2))))
    x = video()
    mean = encode(params, CFG, x, chunk=4)
    # frames that come before the newest of their latent frame are not seen
    changed = np.where((np.arange(17) % 4 == 0)[None, :, None, None, None], x, np.float32(0))
    np.testing.assert_allclose(encode(params, CFG, changed, chunk=4), mean, atol=1e-6)
    frames = decode(params, CFG, mean, chunk=4, clip=False)
    assert 0.2 < np.std(mean) < 5 and 0.2 < np.std(frames) < 5


def test_gradients_of_a_video_of_one_colour_are_finite_and_reach_every_layer():
    """Black above all: most of a moving digit's picture, and where a badly scaled network stays for ever."""
    cfg = dataclasses.replace(CFG, dim_mult=(1, 2), temperal_downsample=(True,))
    params = init_params(jax.random.key(0), cfg)

    @jax.jit
    @jax.grad
    def gradients(params, level):
        x = jnp.full((1, 3, 8, 8, 3), level)
        back = wan.decode(params, cfg, wan.encode(params, cfg, x), clip=False)
        return jnp.mean(jnp.square(back - x - 0.1))

    for level in (-1.0, 1.0):
        found = {path: np.abs(g).max() for path, g in flatten(gradients(params, level)).items()}
        assert all(np.isfinite(size) for size in found.values())
        idle = [path for path, size in found.items() if size == 0]
        assert idle == []


def test_bfloat16_runs_in_bfloat16_and_answers_in_float32(params):
    half = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), params)
    mean, cache = encode_chunk(half, CFG, video(F=1), None)
    frames = decode_chunk(half, CFG, latents(T=1), None)[0]
    assert mean.dtype == frames.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(cache)} == {jnp.dtype(jnp.bfloat16)}
    assert error(mean, encode_chunk(params, CFG, video(F=1), None)[0]) < 0.05
    assert error(frames, decode_chunk(params, CFG, latents(T=1), None)[0]) < 0.05
    program = str(jax.make_jaxpr(partial(wan.decode_chunk, cfg=CFG, cache=None))(half, latents=latents(T=1)))
    assert all("bf16" in line for line in program.splitlines() if "conv_general_dilated[" in line)


def test_a_decoder_computes_as_it_is_told(params):
    """TF32 is emulated, and lies between exact and bfloat16; frames are float32 in each."""
    z, run = latents(T=2), jax.jit(wan.decode, static_argnums=1, static_argnames=("arithmetic", "clip"))
    found = {name: np.asarray(run(params, CFG, z, arithmetic=name, clip=False)) for name in DECODING}
    tf32, bf16 = (error(found[name], found["exact"]) for name in ("tf32", "bf16"))
    assert 1e-6 < tf32 < bf16 / 3 < 0.05
    assert all(frames.dtype == np.float32 for frames in found.values())


def test_products_are_told_to_a_gpu(params):
    """Traced only. On a GPU exact means highest, and nothing is rounded there for TF32, which rounds by itself."""

    def text(name, platform="cuda"):
        run = jax.jit(partial(wan.decode, cfg=CFG, arithmetic=name))
        return run.trace(params, latents=latents(T=2)).lower(lowering_platforms=(platform,)).as_text()

    products = [line for line in text("exact").splitlines() if re.search("stablehlo.(convolution|dot_general)", line)]
    assert len(products) > 20 and all("HIGHEST" in line for line in products)
    assert "HIGHEST" not in text("tf32") and "reduce_precision" not in text("tf32")
    assert text("tf32", "cpu").count("stablehlo.reduce_precision") > len(products)


def test_an_arithmetic_that_is_none(params):
    with pytest.raises(UsageError, match="the arithmetic of a decoder is 'half'; expected one of exact, tf32, bf16"):
        wan.decode(params, CFG, latents(T=1), arithmetic="half")


@pytest.mark.parametrize(
    "run, shape, message",
    [
        (wan.encode, (1, 2, 8, 12, 3), "use 1 or 5"),
        (wan.encode, (1, 4, 8, 12, 3), "use 1 or 5"),
        (wan.encode, (1, 16, 8, 12, 3), "use 13 or 17"),
        (wan.encode, (1, 5, 6, 12, 3), "height divisible by 4, found 6"),
        (wan.encode, (1, 5, 8, 13, 3), "width divisible by 4, found 13"),
        (partial(wan.encode, chunk=3), (1, 9, 8, 12, 3), "do not divide"),
        (partial(wan.decode, chunk=2), (1, 4, 2, 3, 4), "do not divide"),
        (partial(wan.encode_chunk, cache=None), (1, 5, 8, 12, 3), "exactly 1"),
        (partial(wan.decode_chunk, cache=None), (1, 2, 2, 3, 4), "exactly 1"),
        (partial(wan.encode_chunk, cache={}), (1, 3, 8, 12, 3), "multiple of 4"),
        (partial(wan.decode_chunk, cache={}), (1, 0, 2, 3, 4), "found 0"),
    ],
)
def test_clips_that_cannot_be(params, run, shape, message):
    with pytest.raises(UsageError, match=message):
        jax.eval_shape(lambda params, x: run(params, CFG, x), params, jax.ShapeDtypeStruct(shape, jnp.float32))


PUBLISHED = {
    "_class_name": "AutoencoderKLWan",
    "_diffusers_version": "0.33.0.dev0",
    "attn_scales": [],
    "base_dim": 96,
    "dim_mult": [1, 2, 4, 4],
    "dropout": 0.0,
    "latents_mean": list(wan.WAN_2_1_VAE.latents_mean),
    "latents_std": list(wan.WAN_2_1_VAE.latents_std),
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "z_dim": 16,
}


def test_the_published_config():
    assert wan.VAEConfig.from_json(PUBLISHED) == wan.VAEConfig.from_json({}) == wan.WAN_2_1_VAE
    assert (wan.WAN_2_1_VAE.spatial_factor, wan.WAN_2_1_VAE.temporal_factor) == (8, 4)
    assert hash(wan.WAN_2_1_VAE) == hash(wan.VAEConfig())


@pytest.mark.parametrize("other, field", [({"patch_size": 2}, "in_channels"), ({"is_residual": True}, "dim_mult")])
def test_fields_that_do_not_go_together(other, field):
    """diffusers takes three channels where a file does not say; a shortcut makes 12 widths of 8, and never 5."""
    with pytest.raises(CheckpointError, match=field):
        wan.VAEConfig.from_json(PUBLISHED | {"dim_mult": [1, 2, 5, 5]} | other)


@pytest.mark.parametrize(
    "cfg", [CFG, wan.WAN_2_1_VAE, wan.WAN_2_2_VAE, RESIDUAL, dataclasses.replace(CFG, dim_mult=(1, 8, 4))]
)
def test_configs_survive_json(cfg):
    assert wan.VAEConfig.from_json(json.loads(json.dumps(cfg.to_json()))) == cfg


@pytest.mark.parametrize(
    "field, value",
    [
        ("base_dim", 0),
        ("base_dim", 96.0),
        ("base_dim", True),
        ("base_dim", 10**9),
        ("z_dim", -16),
        ("z_dim", 17),
        ("num_res_blocks", "2"),
        ("dim_mult", [1]),
        ("dim_mult", [1, 2, 4, 0]),
        ("dim_mult", 4),
        ("temperal_downsample", [False, True]),
        ("temperal_downsample", [0, 1, 1]),
        ("temperal_downsample", None),
        ("latents_mean", [0.0] * 15),
        ("latents_mean", ["0"] * 16),
        ("latents_mean", None),
        ("latents_std", [0.0] + [1.0] * 15),
        ("latents_std", [float("nan")] * 16),
        ("attn_scales", [1.0]),
        ("is_residual", 1),
        ("decoder_base_dim", 0),
        ("in_channels", 12),
        ("patch_size", "2"),
    ],
)
def test_configs_that_cannot_be(field, value):
    with pytest.raises(CheckpointError, match=field) as caught:
        wan.VAEConfig.from_json(PUBLISHED | {field: value})
    assert len(str(caught.value).splitlines()) <= 6
