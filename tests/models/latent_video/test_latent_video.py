"""The latent video models: shapes and counts, what attends to what, precision, meshes, and sizes that do not fit."""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jvdiff.errors import CheckpointError, UsageError
from jvdiff.models import latent_video
from jvdiff.models.latent_video import DiTConfig, VAEConfig, places
from jvdiff.models.latent_video.vae import _Activation, _Conv
from jvdiff.sharding import Placement, collectives, make_mesh, param_shardings, read_mesh

VAE = VAEConfig(width=4, multipliers=(1, 1, 2, 2), blocks=1, groups=2, latents_mean=(0.5, -1.0, 0.0, 2.0))
CFG = DiTConfig(hidden_size=96, depth=2, num_heads=4, num_classes=3, freq_dim=16)  # wide enough for fsdp to divide
ONE_BLOCK = dataclasses.replace(CFG, depth=1)
denoise = jax.jit(latent_video.denoise, static_argnames=("cfg", "remat", "implementation", "placement"))
encode = jax.jit(latent_video.encode, static_argnames=("cfg", "remat"))
decode = jax.jit(latent_video.decode, static_argnames=("cfg", "remat"))


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@functools.cache
def params_of(cfg):
    """Parameters that are all away from their trivial start."""
    random = np.random.default_rng(0)

    def leaf(path, x):
        scale = x.shape[-2] ** -0.5 if path[-1].key == "kernel" else 0.3
        return random.standard_normal(x.shape, np.float32) * np.float32(scale) + np.float32(path[-1].key == "scale")

    return jax.tree_util.tree_map_with_path(leaf, latent_video.abstract_params(cfg))


def inputs(batch=2):
    """Latents of 3 frames of 3 x 5 tokens, which no mesh of eight divides."""
    latents = np.random.default_rng(1).standard_normal((batch, 3, 6, 10, 4), np.float32)
    return latents, np.linspace(937.5, 20, batch, dtype=np.float32), np.arange(batch, dtype=np.int32) % 4


def cast(params, dtype):
    return jax.tree.map(lambda x: np.asarray(x, dtype), params)


def error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


# ------------------------------------------------------------------------------------------- shapes and counts


def test_a_clip_of_16_frames_has_192_times_fewer_latents():
    cfg, video, latents = VAEConfig(), struct(2, 16, 256, 256, 3), struct(2, 4, 32, 32, 4)
    params = latent_video.abstract_params(cfg)
    mean, logvar = jax.eval_shape(functools.partial(latent_video.encode, cfg=cfg), params, video=video)
    assert mean == logvar == latents
    assert video.size == 192 * mean.size
    assert jax.eval_shape(functools.partial(latent_video.decode, cfg=cfg), params, latents=latents) == video


@pytest.mark.parametrize("name", latent_video.SIZES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_size_predicts_what_it_is_given(name, dtype):
    cfg, latents = latent_video.SIZES[name], struct(2, 4, 32, 32, 4)
    run = functools.partial(latent_video.denoise, cfg=cfg)
    rest = {"latents": latents, "timestep": struct(2), "labels": struct(2, dtype=jnp.int32)}
    assert jax.eval_shape(run, latent_video.abstract_params(cfg, dtype), **rest) == latents


@pytest.mark.parametrize(
    ("cfg", "count"),
    [
        (latent_video.SMALL, 62_374_928),
        (latent_video.MEDIUM, 208_264_720),
        (latent_video.LARGE, 734_924_816),
        (latent_video.XL, 1_925_939_216),
        (VAEConfig(), 154_168_587),
    ],
)
def test_parameter_counts(cfg, count):
    """The figures of docs/latent_video.md."""
    assert sum(x.size for x in jax.tree.leaves(latent_video.abstract_params(cfg))) == count


@pytest.mark.parametrize("cfg", [CFG, VAE])
def test_init_fits_the_abstract_tree(cfg):
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    start = latent_video.init_params(jax.random.key(0), cfg)
    assert shapes(start) == shapes(latent_video.abstract_params(cfg))


# ------------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize("cfg", [*latent_video.SIZES.values(), CFG, VAEConfig(), VAE])
def test_a_configuration_survives_its_file(cfg):
    assert type(cfg).from_json(json.loads(json.dumps(cfg.to_json()))) == cfg


@pytest.mark.parametrize(
    ("cls", "fields", "words"),
    [
        (DiTConfig, {"_class_name": "WanTransformer3DModel"}, "_class_name.*LatentVideoTransformer"),
        (DiTConfig, {"hidden": 8}, "unknown field 'hidden' = 8.*hidden_size"),
        (DiTConfig, {"depth": 0}, "depth is 0.*1 to 1024"),
        (DiTConfig, {"depth": True}, "depth is True"),
        (DiTConfig, {"hidden_size": 100}, "num_heads is 12.*divisor of hidden_size 100"),
        (DiTConfig, {"hidden_size": 30, "num_heads": 3}, "multiple of 4"),
        (DiTConfig, {"freq_dim": 7}, "freq_dim is 7"),
        (DiTConfig, {"prediction": "velocity"}, "v_prediction, epsilon, sample"),
        (VAEConfig, {"_class_name": "AutoencoderKLWan"}, "_class_name.*LatentVideoVAE"),
        (VAEConfig, {"multipliers": [1, 2, 4]}, r"multipliers is \(1, 2, 4\).*four"),
        (VAEConfig, {"width": 48}, "groups is 32.*widths.*48"),
        (VAEConfig, {"latents_mean": [0.0, 1.0]}, "latents_mean.*1 or 4 numbers"),
        (VAEConfig, {"latents_std": [0.0]}, "latents_std.*above 0"),
        (VAEConfig, {"latents_std": [float("nan")]}, "latents_std"),
    ],
)
def test_a_value_that_cannot_be_is_named(cls, fields, words):
    with pytest.raises(CheckpointError, match=words):
        cls.from_json(fields)


# ------------------------------------------------------------------------------------------- the transformer


def test_a_new_model_predicts_zero_and_its_blocks_do_nothing():
    start, (latents, timestep, labels) = latent_video.init_params(jax.random.key(0), CFG), inputs()
    assert not np.any(denoise(start, CFG, latents, timestep, labels))
    seeing = {**start, "head": params_of(CFG)["head"]}
    expected = denoise(seeing, CFG, latents, timestep, labels)
    other = {**params_of(CFG)["blocks"], "modulation": start["blocks"]["modulation"]}
    assert np.any(expected)
    np.testing.assert_array_equal(denoise({**seeing, "blocks": other}, CFG, latents, timestep, labels), expected)


def without(*layers):
    """A block whose spatial attention (0), temporal attention (1) or feed-forward (2) has its gate shut."""
    params = jax.tree.map(np.copy, params_of(ONE_BLOCK))
    for layer in layers:
        for leaf in params["blocks"]["modulation"].values():
            leaf.reshape(*leaf.shape[:-1], 9, -1)[..., 3 * layer + 2, :] = 0
    return params


@pytest.mark.parametrize(
    ("shut", "frames", "places"), [((1,), False, True), ((0,), True, False), ((0, 1), False, False), ((), True, True)]
)
def test_spatial_attention_never_mixes_frames_nor_temporal_attention_patches(shut, frames, places):
    """One patch of one frame is perturbed, and the others are looked at."""
    params, (latents, timestep, labels) = without(*shut), inputs(1)
    perturbed = latents.copy()
    perturbed[0, 1, 2:4, 6:8] += 1
    moved = np.not_equal(*(denoise(params, ONE_BLOCK, x, timestep, labels) for x in (latents, perturbed)))
    moved = moved[0].reshape(3, 3, 2, 5, 2, 4).any((2, 4, 5))  # [T, rows, columns] of patches
    assert moved[1, 1, 3]
    own = np.zeros_like(moved[1])
    own[1, 3] = True
    assert np.all(moved[:, 1, 3]) == frames and np.any(moved[[0, 2], 1, 3]) == frames
    assert np.all(moved[1][~own]) == places and np.any(moved[1][~own]) == places
    if not (frames and places):
        assert not np.any(moved[[0, 2]][:, ~own])


def test_every_token_knows_its_place():
    """Of a uniform clip every frame and every patch is predicted differently."""
    _, timestep, labels = inputs(1)
    found = np.asarray(denoise(params_of(CFG), CFG, np.ones((1, 3, 6, 10, 4), np.float32), timestep, labels))
    tokens = found.reshape(3, 3, 2, 5, 2, 4).transpose(0, 1, 3, 2, 4, 5).reshape(45, -1)
    apart = np.abs(tokens[:, None] - tokens[None]).max(-1)
    assert np.all(apart[~np.eye(45, dtype=bool)] > 1e-3)


def test_labels_and_timesteps_count_and_the_null_class_is_one_more():
    latents, _, _ = inputs(1)
    latents, labels = np.repeat(latents, 5, axis=0), np.arange(5, dtype=np.int32)
    found = denoise(params_of(CFG), CFG, latents, np.full(5, 500, np.float32), labels)
    assert labels[3] == CFG.null_class
    assert all(error(found[i], found[j]) > 1e-3 for i in range(4) for j in range(i))
    assert np.all(np.isnan(found[4]))
    times = np.array([0, 936, 937.5, 938, 1000], np.float32)  # bfloat16 has no 937.5
    found = denoise(cast(params_of(CFG), jnp.bfloat16), CFG, latents, times, np.zeros(5, np.int32))
    assert all(np.any(found[i] != found[j]) for i in range(5) for j in range(i))


def test_bfloat16_is_near_float32():
    expected = denoise(params_of(CFG), CFG, *inputs())
    found = denoise(cast(params_of(CFG), jnp.bfloat16), CFG, *inputs())
    assert found.dtype == jnp.float32
    assert 1e-5 < error(found, expected) < 0.02


@functools.cache
def gradient(mesh=None, remat=None):
    """Of a mean square, over two clips; with the parameters' places on a mesh."""
    latents, timestep, labels = inputs()
    placement, params, places = None, params_of(CFG), None
    if mesh:
        placement, params = placed(mesh)
        places = jax.tree.map(lambda x: x.sharding, params)

    def loss(params):
        out = latent_video.denoise(params, CFG, latents, timestep, labels, remat=remat, placement=placement)
        return jnp.mean((out - latents) ** 2)

    return jax.jit(jax.grad(loss), out_shardings=places)(params)


def placed(mesh):
    shape = read_mesh(mesh)
    placement = Placement(make_mesh(shape), shape.ring)
    params = params_of(CFG)
    return placement, jax.device_put(params, param_shardings(placement.mesh, params, places.DIT))


@pytest.mark.parametrize(("mesh", "remat"), [(None, "dots"), ("sequence=2,fsdp=4", "full")])
def test_gradients_are_the_same_however_they_are_made(mesh, remat):
    for one, other in zip(jax.tree.leaves(gradient()), jax.tree.leaves(gradient(mesh, remat)), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5 * max(np.abs(one).max(), 1e-3))


@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,tensor=2", "data=2,sequence=2,tensor=2"])
def test_a_mesh_gives_the_numbers_of_one_device(mesh):
    expected = np.asarray(denoise(params_of(CFG), CFG, *inputs()))
    placement, params = placed(mesh)
    found = denoise(params, CFG, *inputs(), placement=placement)
    assert found.sharding.is_fully_replicated
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_a_layer_gathers_its_weights_once_and_adds_up_three_times():
    placement, params = placed("data=2,fsdp=2,tensor=2")
    program = denoise.lower(params, CFG, *inputs(4), placement=placement).compile()
    layer = [c for c in collectives.read(program.as_text()) if c.runs == CFG.depth]
    assert sorted(c.kind for c in layer) == ["all-gather"] * 2 + ["all-reduce"] * 3
    weights, modulation = (c for c in layer if c.kind == "all-gather")
    assert "modulation" in modulation.source and "modulation" not in weights.source


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latents": struct(2, 3, 6, 10, 3)}, r"float32\[B,T,H,W,4\]"),
        ({"latents": struct(2, 3, 6, 10, 4, dtype=jnp.bfloat16)}, "bfloat16"),
        ({"latents": struct(2, 3, 6, 11, 4)}, "latent W is 11.*such as 1[02]"),
        ({"timestep": struct(2, dtype=jnp.bfloat16)}, r"timestep is bfloat16\[2\]; expected float32\[2\]"),
        ({"labels": struct(3, dtype=jnp.int32)}, r"labels is int32\[3\]; expected int32\[2\]"),
        ({"remat": "some"}, "'full' or 'dots'"),
        ({"placement": "tensor=8"}, "tensor=8 does not divide the 4 attention heads"),
        ({"placement": "data=8"}, "data=8 does not divide the batch of 2"),
    ],
)
def test_what_the_transformer_cannot_take(change, words):
    sizes = dict(latents=struct(2, 3, 6, 10, 4), timestep=struct(2), labels=struct(2, dtype=jnp.int32)) | change
    static = {name: sizes.pop(name) for name in ("remat", "placement") if name in sizes}
    if mesh := static.get("placement"):
        static["placement"] = Placement(make_mesh(read_mesh(mesh)))
    with pytest.raises(UsageError, match=words):
        jax.eval_shape(functools.partial(latent_video.denoise, cfg=CFG, **static), params_of(CFG), **sizes)


# ------------------------------------------------------------------------------------------- the VAE


def clip():
    return np.random.default_rng(0).uniform(-1, 1, (2, 8, 16, 24, 3)).astype(np.float32)


def test_the_vae_goes_there_and_back():
    video = clip()
    mean, logvar = encode(params_of(VAE), VAE, video)
    assert mean.shape == logvar.shape == (2, 2, 2, 3, 4) and mean.dtype == logvar.dtype == jnp.float32
    found = decode(params_of(VAE), VAE, mean)
    assert found.shape == video.shape and found.dtype == jnp.float32
    assert 0 < np.abs(found).max() <= 1
    loud = jax.tree.map(lambda x: 100 * x, params_of(VAE))
    assert -30 <= encode(loud, VAE, video)[1].min() < encode(loud, VAE, video)[1].max() <= 20


def test_the_vae_in_bfloat16_is_near_float32():
    video = clip()
    expected = encode(params_of(VAE), VAE, video)[0]
    found = encode(cast(params_of(VAE), jnp.bfloat16), VAE, video)[0]
    assert found.dtype == jnp.float32
    assert 1e-5 < error(found, expected) < 0.05
    latents = np.random.default_rng(1).standard_normal((2, 2, 2, 3, 4), np.float32)
    decoded = [decode(cast(params_of(VAE), dtype), VAE, latents) for dtype in (jnp.float32, jnp.bfloat16)]
    assert decoded[1].dtype == jnp.float32
    assert 1e-5 < error(decoded[1], decoded[0]) < 0.05


@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 2, 2)])
def test_taps_make_a_convolution_in_three_dimensions(stride):
    x = np.random.default_rng(0).standard_normal((2, 8, 6, 4, 5), np.float32)
    params = _Conv(7, stride).init(jax.random.key(0), x)
    expected = lax.conv_general_dilated(
        x, params["params"]["kernel"], stride, ((1, 1),) * 3, dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )
    np.testing.assert_allclose(_Conv(7, stride).apply(params, x), expected, atol=1e-5)


def test_norms_are_over_a_group_of_channels_in_all_frames():
    x = 3 + np.random.default_rng(0).standard_normal((2, 4, 3, 5, 6), np.float32)
    params = {"scale": np.linspace(1, 2, 6, dtype=np.float32), "bias": np.linspace(-1, 1, 6, dtype=np.float32)}
    expected = nn.silu(nn.GroupNorm(3, use_fast_variance=False).apply({"params": params}, x))
    np.testing.assert_allclose(_Activation(3).apply({"params": params}, x), expected, atol=1e-4)


def test_rematerialisation_leaves_the_vaes_gradient():
    video = np.random.default_rng(0).uniform(-1, 1, (1, 4, 8, 8, 3)).astype(np.float32)

    def loss(params, remat):
        mean, logvar = latent_video.encode(params, VAE, video, remat=remat)
        return jnp.mean((latent_video.decode(params, VAE, mean, remat=remat) - video) ** 2) + jnp.mean(logvar)

    one, other = (jax.jit(jax.grad(loss), static_argnums=1)(params_of(VAE), remat) for remat in (False, True))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5 * max(np.abs(a).max(), 1e-3))


def test_latents_are_normalised_by_channel_and_back():
    cfg = dataclasses.replace(VAE, latents_std=(2.0,))
    latents = np.random.default_rng(0).standard_normal((2, 2, 3, 3, 4), np.float32)
    found = latent_video.normalize_latents(cfg, latents)
    np.testing.assert_allclose(found, (latents - np.float32(cfg.latents_mean)) / 2, rtol=1e-6)
    np.testing.assert_allclose(latent_video.denormalize_latents(cfg, found), latents, atol=1e-6)


@pytest.mark.parametrize(
    ("run", "x", "words"),
    [
        (encode, struct(1, 17, 250, 256, 3), "17 frames of 250x256.*\n.*nearest.*16 frames of 248x256"),
        (encode, struct(1, 1, 4, 3, 3), "nearest size that fits is 4 frames of 8x8"),
        (encode, struct(1, 16, 64, 64, 4), r"\[B,F,Y,X,3\]"),
        (encode, struct(1, 16, 64, 64, 3, dtype=jnp.uint8), "uint8.*float32.* in -1..1"),
        (decode, struct(1, 4, 8, 8, 16), r"\[B,T,H,W,4\]"),
    ],
)
def test_what_the_vae_cannot_take(run, x, words):
    with pytest.raises(UsageError, match=words):
        run(params_of(VAE), VAE, x)
