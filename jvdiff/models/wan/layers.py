"""The layers that Wan's transformer is made of: linear maps, norms, and the rotation of queries and keys.

B batch · L video tokens · N heads · K head dim · D model width.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jvdiff.types import Array


class MLP(nn.Module):
    hidden: int
    features: int
    activation: Callable[[Array], Array]
    names: tuple[str, str] = ("linear_1", "linear_2")
    exact: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = Linear(self.hidden, exact=self.exact, name=self.names[0])(x)
        return Linear(self.features, exact=self.exact, name=self.names[1])(self.activation(x))


class Linear(nn.Module):
    """x @ kernel + bias in the dtype of the kernel, whatever that of x. `exact`: a float32 product is never TF32."""

    features: int
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    exact: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        precision = jax.lax.Precision.HIGHEST if self.exact else None
        y = jnp.matmul(x.astype(kernel.dtype), kernel, precision=precision)
        return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


class LayerNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        return layer_norm(x, self.eps) * scale[None, None] + bias[None, None]


class RMSNorm(nn.Module):
    """[B,L,D] in any dtype -> float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps) * scale[None, None]


def layer_norm(x: Array, eps: float) -> Array:
    """LayerNorm without weights: float32 [B,L,D] -> the same."""
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def gelu(x: Array) -> Array:
    return nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


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
            short = jnp.expand_dims(short, tuple({0, 1, 2} - {axis}))
            table.append(jnp.broadcast_to(short, (*grid, size // 2)))
    cos, sin = (jnp.concatenate(t, axis=-1).reshape(-1, head_dim // 2) for t in whole)
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
    digits = cos[places & 255], sin[places & 255]
    for shift in (8, 16, 24):
        c, s = (t[(places >> shift) & 255] for t in _turns(np.arange(256) << shift, size))
        digits = digits[0] * c - digits[1] * s, digits[1] * c + digits[0] * s
    return digits


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates each adjacent channel pair of x float32 [B,L,N,K] by the angles of `rope_tables`."""
    even, odd = x[..., 0::2], x[..., 1::2]
    c, s = cos[None, :, None], sin[None, :, None]
    return jnp.stack([even * c - odd * s, even * s + odd * c], axis=-1).reshape(x.shape)
