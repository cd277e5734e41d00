"""The VAE's task on a tiny VAE: its error, that all of it learns, and the statistics of its latents.

B batch · T latent frames · H W latent grid · C latent channels · F pixel frames · Y X pixel height, width
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff.errors import NumericsError
from jvdiff.models import wan
from jvdiff.training import loop, reconstruction

CFG = wan.VAEConfig(
    base_dim=4, z_dim=4, dim_mult=(1, 1, 2, 2), num_res_blocks=1, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4
)


def clips(step, frames=9):
    """uint8 [2,F,16,16,3]: a bright square that moves over black."""
    video = np.zeros((2, frames, 16, 16, 3), np.uint8)
    for frame in range(frames):
        video[0, frame, 4:9, frame % 8 : frame % 8 + 5] = (255, 128, 0)
        video[1, frame, frame % 8 : frame % 8 + 5, 6:11] = (0, 90, 255)
    return video


@pytest.fixture(scope="module")
def params():
    return jax.jit(wan.init_params, static_argnums=1)(jax.random.key(0), CFG)


def test_the_error_is_weighted_l1_plus_l2_and_psnr_is_of_pixels(params, monkeypatch):
    """Frames that are off by 0.5 on the foreground and by 0.25 on black, against the sum by hand."""
    video = clips(0)
    bright = video.max(axis=-1, keepdims=True) > 12
    target = video.astype(np.float32) / 127.5 - 1.0
    off = np.where(bright, -0.5, 0.25).astype(np.float32)
    monkeypatch.setattr(reconstruction.wan, "decode", lambda *args, **options: jnp.asarray(target + off))
    task = reconstruction.vae_task(CFG, clips, foreground_weight=9.0)
    value, metrics = jax.jit(task.loss)(params, video, jax.random.key(0))
    share = bright.mean()
    expected = (9 * share * (0.5 + 0.25) + (1 - share) * (0.25 + 0.0625)) / (9 * share + 1 - share)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    shown = np.clip(target + off, -1, 1) - target
    np.testing.assert_allclose(metrics["psnr"], -10 * np.log10((shown**2).mean() / 4), rtol=1e-5)
    assert metrics["spread"] > 0


def test_noise_on_the_latents_is_in_units_of_their_own_spread(params, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        reconstruction.wan,
        "decode",
        lambda p, c, z, **options: seen.update(z=z, **options) or jnp.zeros((2, 9, 16, 16, 3)),
    )
    video = clips(0)
    reconstruction.vae_task(CFG, clips, latent_noise=0.0).loss(params, video, jax.random.key(0))
    clean = seen["z"]
    reconstruction.vae_task(CFG, clips, latent_noise=0.5).loss(params, video, jax.random.key(0))
    ratio = (seen["z"] - clean).std(axis=(0, 1, 2, 3)) / clean.std(axis=(0, 1, 2, 3))
    assert clean.shape == (2, 3, 2, 2, 4) and seen["clip"] is False
    np.testing.assert_allclose(ratio, 0.5, rtol=0.5)


def test_every_parameter_gets_a_gradient(params):
    """Four latent frames: of the first, which stands alone, the decoder's temporal convolutions remember nothing."""
    task = reconstruction.vae_task(CFG, clips)
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), params)
    gradient = jax.jit(jax.grad(lambda p: task.loss(p, clips(0, 13), jax.random.key(0))[0]))(noisy)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all() and float(jnp.linalg.norm(leaf)) > 0, name
        if "time_conv" in name and "kernel" in name:
            assert all(float(jnp.linalg.norm(leaf[tap])) > 0 for tap in range(3)), name  # every tap of it


@pytest.mark.parametrize("frames", [1, 9])
def test_it_learns_pictures_and_clips(params, frames):
    task = reconstruction.vae_task(CFG, lambda step: clips(step, frames), latent_noise=0.01)
    schedule = loop.Schedule(steps=50, learning_rate=3e-3, warmup=5)
    state, step = (
        loop.start(task, schedule, jax.random.key(0), params),
        loop.make_step(task, schedule, jax.random.key(1)),
    )
    values = []
    for number in range(schedule.steps):
        state, metrics = step(state, task.batch(number))
        values.append(float(metrics["loss"]))
    assert np.mean(values[-5:]) < 0.6 * values[0], values


def test_statistics_are_those_of_the_encoder_over_all_clips(params):
    video = np.concatenate([np.roll(clips(0), shift, axis=2) for shift in range(5)])  # 10 clips: a batch, and a rest
    mean, std = reconstruction.latent_statistics(CFG, params, video)
    latents = np.asarray(jax.jit(lambda x: wan.encode(params, CFG, x))(video.astype(np.float32) / 127.5 - 1.0))
    np.testing.assert_allclose(mean, latents.mean(axis=(0, 1, 2, 3), dtype=np.float64), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(std, latents.std(axis=(0, 1, 2, 3), dtype=np.float64), rtol=1e-4)
    assert all(type(v) is float for v in (*mean, *std))


def test_a_channel_that_nothing_uses_is_told(params):
    dead = {**params, "quant_conv": jax.tree.map(jnp.zeros_like, params["quant_conv"])}
    with pytest.raises(NumericsError, match=r"(?s)channels \[0, 1, 2, 3\].*smaller z_dim"):
        reconstruction.latent_statistics(CFG, dead, clips(0))
