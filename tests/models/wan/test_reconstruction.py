"""The VAE's task on a tiny VAE: its error, that all of it learns, and the statistics of its latents.

B batch · T latent frames · H W latent grid · C latent channels · F pixel frames · Y X pixel height, width
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff.errors import NumericsError
from jvdiff.models import wan
from jvdiff.models.wan import reconstruction
from jvdiff.training import loop

CFG = wan.VAEConfig(
    base_dim=4,
    z_dim=4,
    dim_mult=(1, 2),
    num_res_blocks=1,
    temperal_downsample=(True,),
    latents_mean=(0.0,) * 4,
    latents_std=(1.0,) * 4,
)


def clips(step, frames=7):
    """uint8 [2,F,16,16,3]: a bright square that moves over black."""
    video = np.zeros((2, frames, 16, 16, 3), np.uint8)
    for frame in range(frames):
        video[0, frame, 4:9, frame % 8 : frame % 8 + 5] = (255, 128, 0)
        video[1, frame, frame % 8 : frame % 8 + 5, 6:11] = (0, 90, 255)
    return video


@pytest.fixture(scope="module")
def params(random_params):
    return random_params(wan.abstract_params(CFG))


@pytest.fixture(scope="module")
def run(params):
    """The state after the first step, and the loss of 60 steps on the same clips of four latent frames.

    Four, because of the first, which stands alone, the decoder's temporal convolutions remember nothing.
    """
    task = reconstruction.vae_task(CFG, clips, latent_noise=0.01)
    schedule = loop.Schedule(steps=60, learning_rate=1e-2, warmup=5)
    state, step = (
        loop.start(task, schedule, jax.random.key(0), params),
        loop.make_step(task, schedule, jax.random.key(1)),
    )
    values = []
    for number in range(schedule.steps):
        state, metrics = step(state, next(task.batches(number)))
        values.append(float(metrics["loss"]))
        if number == 0:
            first = jax.tree.map(np.array, state)
    return first, values


def test_the_error_is_weighted_l1_plus_l2_and_psnr_is_of_pixels(monkeypatch):
    """Frames that are off by 0.5 on the foreground and by 0.25 on black, against the sum by hand."""
    video = clips(0)
    bright = video.max(axis=-1, keepdims=True) > 12
    target = video.astype(np.float32) / 127.5 - 1.0
    off = np.where(bright, -0.5, 0.25).astype(np.float32)
    monkeypatch.setattr(reconstruction.wan, "encode", lambda *args, **options: jnp.ones((2, 4, 4, 4, 4)))
    monkeypatch.setattr(reconstruction.wan, "decode", lambda *args, **options: jnp.asarray(target + off))
    task = reconstruction.vae_task(CFG, clips, foreground_weight=9.0)
    value, metrics = jax.jit(task.loss)({}, video, jax.random.key(0))
    share = bright.mean()
    expected = (9 * share * (0.5 + 0.25) + (1 - share) * (0.25 + 0.0625)) / (9 * share + 1 - share)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    shown = np.clip(target + off, -1, 1) - target
    np.testing.assert_allclose(metrics["psnr"], -10 * np.log10((shown**2).mean() / 4), rtol=1e-5)


def test_noise_on_the_latents_is_in_units_of_each_channels_own_spread(monkeypatch):
    spread = np.array([0.1, 1.0, 5.0, 20.0], np.float32)
    latents = jnp.asarray(np.random.default_rng(0).standard_normal((4, 5, 16, 16, 4), np.float32) * spread[None])
    seen = {}

    def decode(params, cfg, z, **options):
        seen.update(noise=z - latents, **options)
        return jnp.zeros((2, 7, 16, 16, 3))

    monkeypatch.setattr(reconstruction.wan, "encode", lambda *args, **options: latents)
    monkeypatch.setattr(reconstruction.wan, "decode", decode)
    _, metrics = reconstruction.vae_task(CFG, clips, latent_noise=0.5).loss({}, clips(0), jax.random.key(0))
    np.testing.assert_allclose(np.std(seen["noise"], axis=(0, 1, 2, 3)), 0.5 * spread, rtol=0.05)
    np.testing.assert_allclose(metrics["spread"], spread.mean(), rtol=0.05)
    assert seen["clip"] is False  # values beyond the screen's have a gradient too


def test_every_parameter_gets_a_gradient(run):
    """Adam's first moment after one step is a tenth of the (clipped) gradient."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(run[0].optimizer[1][0].mu):
        name = jax.tree_util.keystr(path)
        assert 0 < np.linalg.norm(leaf) < np.inf, name
        if "time_conv" in name and "kernel" in name:
            assert all(np.linalg.norm(leaf[tap]) > 0 for tap in range(3)), name  # every tap of it


def test_it_learns_the_clips_it_is_shown(run):
    values = run[1]
    assert np.mean(values[-5:]) < 0.5 * values[0], values


def test_statistics_are_those_of_the_encoder_over_all_clips(params):
    video = np.concatenate([np.roll(clips(0, 3), shift, axis=2) for shift in range(5)])  # 10: a batch, and a rest
    mean, std = reconstruction.latent_statistics(CFG, params, video)
    latents = np.asarray(jax.jit(lambda x: wan.encode(params, CFG, x))(video.astype(np.float32) / 127.5 - 1.0))
    np.testing.assert_allclose(mean, latents.mean(axis=(0, 1, 2, 3), dtype=np.float64), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(std, latents.std(axis=(0, 1, 2, 3), dtype=np.float64), rtol=1e-4)
    assert all(type(v) is float for v in (*mean, *std))


def test_a_channel_that_nothing_uses_is_told(monkeypatch):
    latents = jnp.array([[0.0, 1.0, 7.0, 2.0], [0.0, 2.0, 7.0, 5.0]]).reshape(1, 2, 1, 1, 4)
    monkeypatch.setattr(reconstruction.wan, "encode", lambda *args: latents)
    with pytest.raises(NumericsError, match=r"(?s)channels \[0, 2\].*smaller z_dim"):
        reconstruction.latent_statistics(CFG, {}, clips(0))


def test_a_trained_vae_goes_on_with_its_decoder_alone(params):
    """Only the decoder's parameters are trained, from where they were, on what the unchanged encoder makes."""
    task = reconstruction.vae_task(CFG, clips, params, latent_noise=0.0)
    begin = task.init(jax.random.key(0))
    assert set(begin) == {"post_quant_conv", "decoder"}
    jax.tree.map(np.testing.assert_array_equal, begin, {name: params[name] for name in begin})
    whole = reconstruction.vae_task(CFG, clips, latent_noise=0.0)
    video, key = clips(0), jax.random.key(1)
    (alone, _), gradients = jax.jit(jax.value_and_grad(task.loss, has_aux=True))(begin, video, key)
    np.testing.assert_allclose(alone, jax.jit(whole.loss)(params, video, key)[0], rtol=1e-6)
    assert all(np.abs(np.asarray(leaf)).max() > 0 for leaf in jax.tree.leaves(gradients))
