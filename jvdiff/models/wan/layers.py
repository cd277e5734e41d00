"""What Wan's transformer has beside the shared layers: a norm with weights, and the rotation of queries and keys.

B batch · L video tokens · N heads · K head dim · D model width.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jvdiff.models.layers import layer_norm
from jvdiff.types import Array


class LayerNorm(nn.Module):
    """LayerNorm with weights: float32 [B,L,D] -> the same."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        return layer_norm(x, self.eps) * scale[None, None] + bias[None, None]


def rope_tables(grid: tuple[int, int, int], head_dim: int, frames: Any = None) -> tuple[Array, Array]:
    """Cosines and sines [L,K/2] float32 of the rotation of each channel pair at each token (t,h,w), w fastest.

    The channels are split over the axes as d-4*(d//6), 2*(d//6), 2*(d//6); theta is 10000 on each. Only short tables of
    each axis are constants of the compiled program. `frames`: int32 [T], traced or not, from 0 without a limit: the
    place in the video of each frame; None: 0, 1, ...
    """
    side = 2 * (head_dim // 6)
    whole: tuple[list[Array], list[Array]] = ([], [])
    for axis, (length, size) in enumerate(zip(grid, (head_dim - 2 * side, side, side), strict=True)):
        places = np.arange(length) if axis or frames is None else frames
        for table, short in zip(whole, _turns(places, size), strict=True):
            short = jnp.expand_dims(short, tuple({0, 1, 2} - {axis}))  # [n,size/2] -> [n,1,1,size/2], n on its axis
            table.append(jnp.broadcast_to(short, (*grid, size // 2)))
    cos, sin = (jnp.concatenate(t, axis=-1).reshape(-1, head_dim // 2) for t in whole)  # [T,H,W,K/2] -> [L,K/2]
    return cos, sin


def _turns(places: Any, size: int) -> tuple[Array, Array]:
    """Cosines and sines float32 [n,size/2] of places [n] times the rates of an axis of `size` channels.

    Angles are float64. Traced places are made of digits in base 256, whose turns are constants and follow one another:
    so the last frame of a day is as exact as the first.
    """
    rates = 10000.0 ** (-np.arange(0, size, 2) / size)
    if isinstance(places, np.ndarray):
        angles = places[:, None] * rates
        return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    cos, sin = _turns(np.arange(256), size)
    digits = cos[places & 255], sin[places & 255]  # rows of [256,size/2] -> [n,size/2]
    for shift in (8, 16, 24):
        c, s = (t[(places >> shift) & 255] for t in _turns(np.arange(256) << shift, size))  # [n,size/2]
        digits = digits[0] * c - digits[1] * s, digits[1] * c + digits[0] * s
    return digits


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates each adjacent channel pair of x float32 [B,L,N,K] by the angles of `rope_tables`."""
    even, odd = x[..., 0::2], x[..., 1::2]  # [B,L,N,K/2]
    c, s = cos[None, :, None], sin[None, :, None]  # [1,L,1,K/2]
    pairs = jnp.stack([even * c - odd * s, even * s + odd * c], axis=-1)  # [B,L,N,K/2,2]
    return pairs.reshape(x.shape)  # [B,L,N,K]
