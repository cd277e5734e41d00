"""The latent video model: a video VAE and a transformer with factorised attention, to be trained from nothing.

Pure functions over nested dicts of arrays. Clips have class labels; `DiTConfig.null_class` stands for none.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jvdiff.models.latent_video import dit, vae
from jvdiff.models.latent_video.config import LARGE, MEDIUM, PREDICTIONS, SIZES, SMALL, XL, DiTConfig, VAEConfig
from jvdiff.models.latent_video.dit import denoise, mesh_sizes
from jvdiff.models.latent_video.vae import decode, denormalize_latents, encode, normalize_latents
from jvdiff.types import Params

__all__ = [
    "LARGE",
    "MEDIUM",
    "PREDICTIONS",
    "SIZES",
    "SMALL",
    "XL",
    "DiTConfig",
    "VAEConfig",
    "abstract_params",
    "decode",
    "denoise",
    "denormalize_latents",
    "encode",
    "init_params",
    "mesh_sizes",
    "normalize_latents",
]


def abstract_params(cfg: DiTConfig | VAEConfig, dtype: Any = jnp.float32) -> Params:
    """The parameter tree of a configuration as a nested dict of ShapeDtypeStruct; allocates nothing."""
    return vae.abstract_params(cfg, dtype) if isinstance(cfg, VAEConfig) else dit.abstract_params(cfg, dtype)


def init_params(key: jax.Array, cfg: DiTConfig | VAEConfig) -> Params:
    """Float32 parameters to start a training from."""
    return vae.init_params(key, cfg) if isinstance(cfg, VAEConfig) else dit.init_params(key, cfg)
