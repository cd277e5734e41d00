"""HunyuanVideo: the diffusion transformer and the causal VAE, as pure functions over nested dicts of arrays.

Sources: the published repository `hunyuanvideo-community/HunyuanVideo` and diffusers 0.42, whose numbers these match.
The text encoders are `jvdiff.models.text.llama` and `clip_text`.
"""

from typing import TYPE_CHECKING

from jvdiff.lazy import attach

if TYPE_CHECKING:
    from jvdiff.models.hunyuan_video.config import HUNYUAN_VIDEO, DiTConfig
    from jvdiff.models.hunyuan_video.dit import abstract_params, init_params, velocity
    from jvdiff.models.hunyuan_video.plan import mesh_sizes
    from jvdiff.models.hunyuan_video.prompts import crop, tokenize
    from jvdiff.models.hunyuan_video.vae import decode, denormalize_latents, encode, normalize_latents
    from jvdiff.models.hunyuan_video.vae_config import HUNYUAN_VIDEO_VAE, VAEConfig

__all__ = [
    "HUNYUAN_VIDEO",
    "HUNYUAN_VIDEO_VAE",
    "DiTConfig",
    "VAEConfig",
    "abstract_params",
    "crop",
    "decode",
    "denormalize_latents",
    "encode",
    "init_params",
    "mesh_sizes",
    "normalize_latents",
    "tokenize",
    "velocity",
]

__getattr__ = attach(__name__, __all__, ("config", "vae_config", "plan", "dit", "vae", "prompts"))
