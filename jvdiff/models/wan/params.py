"""The parameter trees of both networks: described, and made to start a training from."""

from typing import Any

import jax
import jax.numpy as jnp

from jvdiff.models.wan import dit, vae
from jvdiff.models.wan.config import DiTConfig, VAEConfig
from jvdiff.types import Params


def abstract_params(cfg: DiTConfig | VAEConfig, dtype: Any = jnp.float32) -> Params:
    """The parameter tree of a configuration as a nested dict of ShapeDtypeStruct; allocates nothing."""
    return vae.abstract_params(cfg, dtype) if isinstance(cfg, VAEConfig) else dit.abstract_params(cfg, dtype)


def init_params(key: jax.Array, cfg: DiTConfig | VAEConfig) -> Params:
    """Float32 parameters to start a training from."""
    return vae.init_params(key, cfg) if isinstance(cfg, VAEConfig) else dit.init_params(key, cfg)
