"""Training a causal VAE to reconstruct clips.

B batch · T latent frames · H W latent grid · C latent channels · F pixel frames · Y X pixel height, width
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jvdiff.models import pixels, wan
from jvdiff.training.loop import Task, each
from jvdiff.types import Array, Params


def vae_task(
    cfg: wan.VAEConfig,
    clips: Callable[[int], np.ndarray],
    trained: Params | None = None,
    *,
    foreground_weight: float = 9.0,
    latent_noise: float = 0.05,
    l1: float = 1.0,
) -> Task:
    """Reconstruction with L2 and L1 error.

    Args:
      clips: step -> uint8 video [B,F,Y,X,3]; F = 1 trains on pictures.
      trained: the tree of a whole VAE of which only the decoder is trained on: what its encoder makes stays valid for
        a transformer that knows it. The task's parameters are then those of `wan.DECODER` alone.
      foreground_weight: of pixels that are not black, against 1; small bright things on black are else ignored.
      latent_noise: standard deviation of the noise that the decoder has to bear, in units of each latent channel's own,
        so that a diffusion model's small errors stay small on the screen. It takes the place of a KL term.
      l1: weight of the L1 error against 1 of L2. It makes early training fast; 0 at the end raises the PSNR.
    """

    def loss(params: Params, video: Array, key: Array) -> tuple[Array, Mapping[str, Array]]:
        params = {**(trained or {}), **params}
        target = video.astype(jnp.float32) / 127.5 - 1.0
        latents = wan.encode(params, cfg, target, chunk=max(1, (video.shape[1] - 1) // cfg.temporal_factor))
        spread = jax.lax.stop_gradient(jnp.std(latents, axis=(0, 1, 2, 3), keepdims=True))
        noisy = latents + latent_noise * spread * jax.random.normal(key, latents.shape)
        frames = wan.decode(params, cfg, noisy, chunk=max(1, latents.shape[1] - 1), clip=False)
        weight = jnp.where(jnp.max(video, axis=-1, keepdims=True) > 12, foreground_weight, 1.0)
        error = frames - target
        mean = jnp.sum(weight * (l1 * jnp.abs(error) + error**2)) / (3.0 * jnp.sum(weight))
        mse = jnp.mean((jnp.clip(frames, -1.0, 1.0) - target) ** 2) / 4.0
        return mean, {"psnr": -10.0 * jnp.log10(mse), "spread": jnp.mean(spread)}

    def init(key: Array) -> Params:
        return {name: trained[name] for name in wan.DECODER} if trained else wan.init_params(key, cfg)

    return Task(init=init, loss=loss, batches=each(clips))


def latent_statistics(cfg: wan.VAEConfig, params: Params, clips: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """(means, standard deviations) of the latent channels over uint8 clips [B,F,Y,X,3], for the VAE's configuration.

    Raises:
      NumericsError: see `pixels.latent_statistics`.
    """
    encode = jax.jit(lambda params, video: wan.encode(params, cfg, video.astype(jnp.float32) / 127.5 - 1.0))
    # [B,F,Y,X,3] -> [B,T,H,W,C]
    latents = np.concatenate([np.asarray(encode(params, clips[i : i + 8])) for i in range(0, len(clips), 8)])
    return pixels.latent_statistics(latents, "train longer, or with a smaller z_dim")
