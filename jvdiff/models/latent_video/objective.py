"""Training the latent video models: the VAE on clips, the transformer on the VAE's latents of labelled clips.

B batch · T latent frames · H W latent grid · C latent channels · F pixel frames · Y X pixel height, width
"""

from collections.abc import Callable, Generator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri

from jvdiff.diffusion import variance_preserving as vp
from jvdiff.errors import UsageError
from jvdiff.models import latent_video
from jvdiff.models.latent_video import places
from jvdiff.sharding import Placement
from jvdiff.training.loop import Task
from jvdiff.types import Array, Params


class LabelledLatents(NamedTuple):
    """What the transformer is trained on.

    latents: [B,T,H,W,C] of any float dtype, normalised
    labels: int32 [B]
    """

    latents: np.ndarray
    labels: np.ndarray


def video_vae_task(
    cfg: latent_video.VAEConfig,
    batches: Callable[[int], Generator[np.ndarray, None, None]],
    *,
    kl: float = 1e-4,
    l1: float = 1.0,
    foreground_weight: float = 1.0,
    compute_dtype: str = "float32",
    remat: bool = False,
) -> Task:
    """Reconstruction (L2 and L1) of uint8 video [B,F,Y,X,3] from a sample of the latents, and their KL divergence.

    Args:
      kl: weight of the divergence from a standard normal, averaged over the latents' values, against 1 of L2.
      l1: weight of the L1 error. It makes early training fast; 0 at the end raises the PSNR.
      foreground_weight: of pixels that are not black, against 1; small bright things on black are else ignored.
      compute_dtype: of convolutions and activations; the parameters that are trained stay float32.
    """

    def loss(params: Params, video: Array, key: Array) -> tuple[Array, Mapping[str, Array]]:
        params = _in(compute_dtype, params)
        target = video.astype(jnp.float32) / 127.5 - 1.0
        mean, logvar = latent_video.encode(params, cfg, target, remat=remat)
        latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        error = latent_video.decode(params, cfg, latents, remat=remat) - target
        weight = jnp.where(jnp.max(video, axis=-1, keepdims=True) > 12, foreground_weight, 1.0)
        reconstruction = jnp.sum(weight * (l1 * jnp.abs(error) + error**2)) / (3.0 * jnp.sum(weight))
        divergence = 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1.0 - logvar)
        psnr = -10.0 * jnp.log10(jnp.mean(error**2) / 4.0)
        return reconstruction + kl * divergence, {"psnr": psnr, "kl": divergence, "spread": jnp.std(mean)}

    return Task(init=lambda key: latent_video.init_params(key, cfg), loss=loss, batches=batches)


def latent_video_task(
    cfg: latent_video.DiTConfig,
    batches: Callable[[int], Generator[LabelledLatents, None, None]],
    show: Callable[[Params, int], None] | None = None,
    *,
    noise_schedule: str = "cosine",
    drop_label: float = 0.1,
    timesteps: str = "uniform",
    compute_dtype: str = "float32",
    remat: str | None = None,
    placement: Placement | None = None,
) -> Task:
    """Diffusion as DDPM defines it (`diffusion.variance_preserving`): the mean squared error of what the network
    predicts (`cfg.prediction`) at random timesteps, which are spread evenly over the batch (arXiv:2107.00630).

    Args:
      drop_label: the share of clips whose label is replaced by that of no class, for guidance (arXiv:2207.12598).
      timesteps: "uniform", or "logit_normal" (arXiv:2403.03206): more of those in the middle, where a clip takes shape.
      compute_dtype: of the matrices of attention and feed-forward; the parameters that are trained stay float32.
      remat: see `latent_video.denoise`.
      placement: the mesh that `fit` is given.

    Raises:
      UsageError: `timesteps` is neither.
    """
    abar = vp.alphas_cumprod(noise_schedule)
    if timesteps not in ("uniform", "logit_normal"):
        raise UsageError(f"loss.timesteps is {timesteps!r:.40}; expected 'uniform' or 'logit_normal'.")

    def loss(params: Params, batch: LabelledLatents, key: Array) -> tuple[Array, Mapping[str, Array]]:
        keys = jax.random.split(key, 3)
        clean = jnp.asarray(batch.latents, jnp.float32)
        timestep = _spread(keys[0], len(clean), timesteps, len(abar))
        noise = jax.random.normal(keys[1], clean.shape)
        dropped = jax.random.uniform(keys[2], clean.shape[:1]) < drop_label
        labels = jnp.where(dropped, cfg.null_class, batch.labels)
        level = vp.level(abar, timestep, clean.ndim)
        predicted = latent_video.denoise(
            _in(compute_dtype, params),
            cfg,
            vp.diffuse(clean, noise, level),
            timestep.astype(jnp.float32),
            labels,
            remat=remat,
            placement=placement,
        )
        error = jnp.mean((predicted - vp.target(cfg.prediction, clean, noise, level)) ** 2, axis=(1, 2, 3, 4))
        noisy = (timestep >= len(abar) // 2).astype(jnp.float32)
        return jnp.mean(error), {"loss_noisy": jnp.sum(error * noisy) / jnp.maximum(jnp.sum(noisy), 1.0)}

    def init(key: Array) -> Params:
        return latent_video.init_params(key, cfg)

    return Task(init=init, loss=loss, batches=batches, rules=places.DIT, show=show)


def _spread(key: Array, count: int, distribution: str, steps: int) -> Array:
    """int32 [count] in 0..steps-1, one in each of `count` equally probable parts: the loss differs more with the
    timestep than with the clip."""
    quantile = (jax.random.uniform(key) + jnp.arange(count) / count) % 1.0
    if distribution == "logit_normal":
        quantile = jax.nn.sigmoid(ndtri(quantile))
    return jnp.minimum((quantile * steps).astype(jnp.int32), steps - 1)


def _in(dtype: str, params: Params) -> Params:
    return jax.tree.map(lambda x: x.astype(dtype), params)
