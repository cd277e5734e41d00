"""Frames as pixels."""

import jax.numpy as jnp

from jvdiff.types import Array


def to_pixels(frames: Array) -> Array:
    """Frames in -1..1 -> uint8, rounded as diffusers does it: to [0,1], clamped, times 255, halves to even."""
    return jnp.round(jnp.clip(frames / 2 + 0.5, 0.0, 1.0) * 255).astype(jnp.uint8)
