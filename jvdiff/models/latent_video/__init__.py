"""The latent video model: a video VAE and a transformer with factorised attention, to be trained from nothing.

Pure functions over nested dicts of arrays. Clips have class labels; `DiTConfig.null_class` stands for none.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jvdiff.models.latent_video.config import LARGE, MEDIUM, PREDICTIONS, SIZES, SMALL, XL, DiTConfig, VAEConfig
    from jvdiff.models.latent_video.dit import denoise, mesh_sizes
    from jvdiff.models.latent_video.params import abstract_params, init_params
    from jvdiff.models.latent_video.vae import decode, denormalize_latents, encode, normalize_latents

# Imported when a name of theirs is first used, the first file that has it: settings.py is read without the networks.
_FILES = ("params", "config", "dit", "vae")

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


def __getattr__(name: str) -> Any:
    if name in __all__:
        for file in _FILES:
            module = importlib.import_module(f"{__name__}.{file}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
