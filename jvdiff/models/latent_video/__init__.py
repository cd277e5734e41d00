"""The latent video model: a video VAE and a transformer with factorised attention, to be trained from nothing.

Pure functions over nested dicts of arrays. Clips have class labels; `DiTConfig.null_class` stands for none.
"""

from typing import TYPE_CHECKING

from jvdiff.lazy import attach

if TYPE_CHECKING:
    from jvdiff.models.latent_video.config import LARGE, MEDIUM, PREDICTIONS, SIZES, SMALL, XL, DiTConfig, VAEConfig
    from jvdiff.models.latent_video.dit import denoise, mesh_sizes
    from jvdiff.models.latent_video.params import abstract_params, init_params
    from jvdiff.models.latent_video.vae import decode, denormalize_latents, encode, normalize_latents

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

__getattr__ = attach(__name__, __all__, ("params", "config", "dit", "vae"))
