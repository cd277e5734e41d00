"""Wan 2.1 and 2.2: the diffusion transformer and the causal VAE, as pure functions over nested dicts of arrays.

So are the encoders that it listens and looks through: `encode_text` (UMT5) and `encode_pictures` (CLIP).

Sources: the published repositories `Wan-AI/Wan2.*-Diffusers` and diffusers 0.42, whose numbers these match.
"""

from typing import TYPE_CHECKING

from jvdiff.lazy import attach

if TYPE_CHECKING:
    from jvdiff.kernels import Pattern
    from jvdiff.models.wan.attention import attention_choice
    from jvdiff.models.wan.causal import (
        KVCache,
        Span,
        TextKeys,
        chunk_velocity,
        extend,
        init_kv_cache,
        reencode,
        remembered,
        text_keys,
    )
    from jvdiff.models.wan.conditions import encode_pictures, encode_text, tokenize
    from jvdiff.models.wan.config import (
        WAN_2_1_FLF2V_14B,
        WAN_2_1_I2V_14B,
        WAN_2_1_T2V_1_3B,
        WAN_2_1_T2V_14B,
        WAN_2_1_VAE,
        WAN_2_2_I2V_A14B,
        WAN_2_2_TI2V_5B,
        WAN_2_2_VAE,
        DiTConfig,
        VAEConfig,
    )
    from jvdiff.models.wan.dit import velocity, window_losses
    from jvdiff.models.wan.params import abstract_params, init_params
    from jvdiff.models.wan.plan import mesh_sizes
    from jvdiff.models.wan.vae import (
        DECODER,
        cut_to_decode,
        decode,
        decode_chunk,
        decode_tile,
        denormalize_latents,
        encode,
        encode_chunk,
        encode_shown,
        init_cache,
        join_tiles,
        normalize_latents,
    )

__all__ = [
    "DECODER",
    "WAN_2_1_FLF2V_14B",
    "WAN_2_1_I2V_14B",
    "WAN_2_1_T2V_1_3B",
    "WAN_2_1_T2V_14B",
    "WAN_2_1_VAE",
    "WAN_2_2_I2V_A14B",
    "WAN_2_2_TI2V_5B",
    "WAN_2_2_VAE",
    "DiTConfig",
    "KVCache",
    "Pattern",
    "Span",
    "TextKeys",
    "VAEConfig",
    "abstract_params",
    "attention_choice",
    "chunk_velocity",
    "cut_to_decode",
    "decode",
    "decode_chunk",
    "decode_tile",
    "denormalize_latents",
    "encode",
    "encode_chunk",
    "encode_pictures",
    "encode_shown",
    "encode_text",
    "extend",
    "init_cache",
    "init_kv_cache",
    "init_params",
    "join_tiles",
    "mesh_sizes",
    "normalize_latents",
    "reencode",
    "remembered",
    "text_keys",
    "tokenize",
    "velocity",
    "window_losses",
]

__getattr__ = attach(__name__, __all__, ("config", "params", "plan", "attention", "dit", "causal", "vae", "conditions"))
