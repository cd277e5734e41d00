"""The layers that the diffusion transformers share: linear maps, norms, and the embedding of timesteps.

B batch · L video tokens · N heads · K head dim · D model width.
"""

import math
from collections.abc import Callable

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
    """x @ kernel + bias in the dtype of the kernel, whatever that of x. `exact`: in float32, never TF32, always."""

    features: int
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    exact: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        if self.exact:
            kernel, bias = kernel.astype(jnp.float32), bias.astype(jnp.float32)
        precision = jax.lax.Precision.HIGHEST if self.exact else None
        y = jnp.matmul(x.astype(kernel.dtype), kernel, precision=precision)
        return y + row(bias, y)


class RMSNorm(nn.Module):
    """Over the last axis: [...,D] in any dtype -> float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps) * row(scale, x)


def row(vector: Array, x: Array) -> Array:
    """vector [D] in the shape and the dtype that meet x [...,D]."""
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def layer_norm(x: Array, eps: float) -> Array:
    """LayerNorm without weights: float32 [...,D] -> the same."""
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def gelu(x: Array) -> Array:
    return nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def sinusoid(timestep: Array, size: int) -> Array:
    """float32 [...] -> [...,size]: the cosines, then the sines, of t * 10000^(-i/(size/2))."""
    rates = np.exp(-math.log(10000.0) * np.arange(size // 2) / (size // 2)).astype(np.float32)
    angles = timestep[..., None] * row(jnp.asarray(rates), timestep[..., None])
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
