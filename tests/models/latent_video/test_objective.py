"""What the loss of the class-conditional transformer means, seen through the network that it calls.

B batch · T latent frames · H W latent grid · C latent channels
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import logit, ndtr

from jvdiff.diffusion import variance_preserving as vp
from jvdiff.errors import UsageError
from jvdiff.models.latent_video import DiTConfig
from jvdiff.models.latent_video import objective as latent_video
from jvdiff.models.latent_video.objective import LabelledLatents

CLIPS = 16


def task(prediction="v_prediction", **options):
    cfg = DiTConfig(hidden_size=8, depth=1, num_heads=1, in_channels=3, num_classes=5, prediction=prediction)
    return latent_video.latent_video_task(cfg, lambda start: iter(()), noise_schedule="linear", **options)


def batch(clips=CLIPS):
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((clips, 2, 4, 2, 3)).astype(np.float16)
    return LabelledLatents(latents, rng.integers(0, 5, clips).astype(np.int32))


@pytest.fixture
def seen(monkeypatch):
    """What the network is given, timesteps and labels; it answers with zeros."""
    given = {"timestep": [], "labels": []}

    def network(params, cfg, latents, timestep, labels, **options):
        given["timestep"].append(np.asarray(timestep))
        given["labels"].append(np.asarray(labels))
        return jnp.zeros_like(latents)

    monkeypatch.setattr(latent_video.latent_video, "denoise", network)
    return given


@pytest.mark.parametrize("timesteps", ["uniform", "logit_normal"])
@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon", "sample"])
def test_the_exact_prediction_has_no_loss_and_an_offset_has_its_square(monkeypatch, prediction, timesteps):
    """Worked out of the network's own input, whatever the timestep is: noising and target belong together."""
    clean = batch().latents.astype(np.float32)
    abar = vp.alphas_cumprod("linear")

    def exact(params, cfg, latents, timestep, labels, **options):
        kept = jnp.asarray(abar, jnp.float32)[timestep.astype(jnp.int32)][:, None, None, None, None]
        noise = (latents - jnp.sqrt(kept) * clean) / jnp.sqrt(1 - kept)
        v = jnp.sqrt(kept) * noise - jnp.sqrt(1 - kept) * clean
        return {"v_prediction": v, "epsilon": noise, "sample": clean}[prediction] + params["offset"]

    monkeypatch.setattr(latent_video.latent_video, "denoise", exact)
    loss = task(prediction, timesteps=timesteps).loss
    for offset in (0.0, 0.5):
        value, metrics = loss({"offset": jnp.float32(offset)}, batch(), jax.random.key(3))
        np.testing.assert_allclose(value, offset**2, atol=1e-4)
        np.testing.assert_allclose(metrics["loss_noisy"], offset**2, atol=1e-4)


@pytest.mark.parametrize("timesteps", ["uniform", "logit_normal"])
def test_a_batch_has_a_timestep_of_each_equally_probable_part(seen, timesteps):
    for seed in range(20):
        task(timesteps=timesteps).loss({}, batch(), jax.random.key(seed))
    each = np.stack(seen["timestep"])
    assert each.min() >= 0 and each.max() <= 999 and (each == each.round()).all()
    quantile = (each + 0.5) / 1000
    if timesteps == "logit_normal":
        quantile = np.asarray(ndtr(logit(jnp.asarray(quantile, jnp.float32))))
    np.testing.assert_allclose(np.sort(quantile), np.sort(quantile)[:, :1] + np.arange(CLIPS) / CLIPS, atol=2e-3)
    assert np.ptp(np.sort(quantile)[:, 0]) > 0.7 / CLIPS  # not the same ones in every step


def test_the_middle_is_where_the_logit_normal_looks(seen):
    for timesteps in ("uniform", "logit_normal"):
        task(timesteps=timesteps).loss({}, batch(4000), jax.random.key(0))
    uniform, normal = (np.mean((t >= 400) & (t < 835)) for t in seen["timestep"])
    np.testing.assert_allclose([uniform, normal], [0.435, 0.605], atol=0.003)  # the normal's: of -0.41 to 1.62


def test_a_tenth_of_the_labels_is_dropped(seen):
    many = batch(4000)
    task().loss({}, many, jax.random.key(1))
    task(drop_label=0.0).loss({}, many, jax.random.key(1))
    some, none = (labels != many.labels for labels in seen["labels"])
    assert not none.any() and (seen["labels"][0][some] == 5).all() and 0.08 < some.mean() < 0.12


def test_a_distribution_that_is_not_there():
    with pytest.raises(UsageError, match=r"loss\.timesteps is 'cosine'; expected 'uniform' or 'logit_normal'"):
        task(timesteps="cosine")
