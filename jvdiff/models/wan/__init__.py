"""Wan 2.1: the diffusion transformer and the causal VAE, as pure functions over nested dicts of arrays.

Sources: the published repositories `Wan-AI/Wan2.1-T2V-*-Diffusers` and diffusers 0.42, whose numbers these match.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jvdiff.models.wan import dit
from jvdiff.models.wan.config import WAN_2_1_T2V_1_3B, WAN_2_1_T2V_14B, DiTConfig
from jvdiff.models.wan.dit import attention_choice, velocity

__all__ = [
    "WAN_2_1_T2V_1_3B",
    "WAN_2_1_T2V_14B",
    "DiTConfig",
    "abstract_params",
    "attention_choice",
    "init_params",
    "velocity",
]


def abstract_params(cfg: DiTConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The parameter tree of a configuration as a nested dict of ShapeDtypeStruct; allocates nothing."""
    return dit.abstract_params(cfg, dtype)


def init_params(key: jax.Array, cfg: DiTConfig) -> dict[str, Any]:
    """Float32 parameters to start a training from."""
    return dit.init_params(key, cfg)
