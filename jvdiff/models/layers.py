"""The layers that networks share: the product with a kernel, linear maps, norms, and the embedding of timesteps.

B batch · L video tokens · N heads · K head dim · D model width.

A kernel is a float array [..,in,out], or a registered pytree that stands for one: `quantised.Quantised`, and whatever
else has these members:

    dtype                               of its products where none is named
    product(x, dtype, precision)        x [..,in] in any dtype -> float32 [..,out], the operands in `dtype`
    array(dtype)                        the kernel as one array [..,in,out], for convolutions

The first leaf of such a pytree has the shape of the kernel, which is what Linen checks; all leaves have the same
number of axes, the layers of a stack in axis 0. The dtype that a kernel is stored in never decides the one that it is
multiplied in, unless no other is named.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jvdiff.errors import UsageError
from jvdiff.precision import DECODING
from jvdiff.runtime.target import Target
from jvdiff.types import Array


def product(
    x: Array, kernel: Any, dtype: Any = None, *, out: Any = None, precision: Any = None, tf32: bool = False
) -> Array:
    """x [..,in] times a kernel [in,out], see above: every product of the networks with a parameter.

    Args:
      x: any float dtype.
      dtype: of the operands. None: the kernel's.
      out: the dtype of the result [..,out], which float32 accumulators are rounded to once. None: that of the operands.
      tf32: of float32 operands as `as_tf32` gives them.

    Raises:
      UsageError: an array of integers, or a compute dtype that is not a float.
    """
    dtype = compute_dtype(kernel, dtype)
    if tf32:
        x, kernel = as_tf32(x), as_tf32(as_array(kernel, dtype))
    if _is_array(kernel):
        return jnp.matmul(x.astype(dtype), kernel.astype(dtype), precision=precision, preferred_element_type=out)
    return kernel.product(x, dtype, precision).astype(dtype if out is None else out)


def as_array(kernel: Any, dtype: Any = None) -> Array:
    """A kernel, see above, as one array [..,in,out] in `dtype` (None: its own): for convolutions.

    Raises:
      UsageError: as `product` does.
    """
    dtype = compute_dtype(kernel, dtype)
    return kernel.astype(dtype) if _is_array(kernel) else kernel.array(dtype)


def as_tf32(x: Array) -> Array:
    """float32 as it goes into a product of TF32: a GPU rounds it; elsewhere rounding to 10 bits is emulated."""
    return jax.lax.platform_dependent(x, cuda=lambda x: x, default=lambda x: jax.lax.reduce_precision(x, 8, 10))


def compute_dtype(kernel: Any, dtype: Any = None) -> jnp.dtype:
    """`dtype`, or where it is None the one that products with this kernel have.

    Raises:
      UsageError: an array of integers, or a dtype that is not a float.
    """
    if _is_array(kernel) and not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise UsageError(
            f"A kernel is {kernel.dtype}{list(kernel.shape)}; expected floats: integers alone do not say what they "
            "stand for.\nGive them with their scale, as jvdiff.models.quantised.Quantised(values, scale)."
        )
    dtype = jnp.dtype(kernel.dtype if dtype is None else dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise UsageError(f"The compute dtype is {dtype}; expected a float, for instance bfloat16 or float32.")
    return dtype


def computing(arithmetic: str | None) -> tuple[str | None, bool, AbstractContextManager[None]]:
    """(dtype, whether products are of TF32, what to multiply in) of a name of `jvdiff.precision.DECODING`.

    None: (None, no, as JAX multiplies).

    Raises:
      UsageError: there is no such name.
    """
    if arithmetic is None:
        return None, False, nullcontext()
    if arithmetic not in DECODING:
        raise UsageError(f"the arithmetic of a decoder is {arithmetic!r:.40}; expected one of {', '.join(DECODING)}.")
    dtype, products = DECODING[arithmetic]
    return dtype, arithmetic == "tf32", jax.default_matmul_precision(products)


def _is_array(kernel: Any) -> bool:
    return not hasattr(kernel, "product")


class MLP(nn.Module):
    """Two linear maps around an activation: [..,in] -> [..,features].

    hidden: columns of the first.
    names: of the two submodules.
    exact, dtype: of `Linear`.
    """

    hidden: int
    features: int
    activation: Callable[[Array], Array]
    names: tuple[str, str] = ("linear_1", "linear_2")
    exact: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        first, second = (
            Linear(n, exact=self.exact, dtype=self.dtype, name=name)
            for n, name in zip((self.hidden, self.features), self.names, strict=True)
        )
        return second(self.activation(first(x)))


class Linear(nn.Module):
    """x @ kernel + bias: any float dtype [..,in] -> [..,features].

    dtype: of operands and result. None: that of the kernel.
    exact: in float32, never TF32, always.
    bias: whether there is one.
    tf32: as in `product`.
    """

    features: int
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    exact: bool = False
    dtype: Any = None
    bias: bool = True
    tf32: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        if self.exact:
            y = product(x, kernel, jnp.float32, precision=jax.lax.Precision.HIGHEST)
        else:
            y = product(x, kernel, self.dtype, tf32=self.tf32)
        if not self.bias:
            return y
        return y + row(self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32), y)


class RMSNorm(nn.Module):
    """Over the last axis: [...,D] in any dtype -> float32.

    rotated: a rotation follows, before which XLA for GPUs would else write the result in float32, to read it again.
    """

    eps: float
    rotated: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        inverse = jax.lax.optimization_barrier(inverse) if self.rotated else inverse
        return x * inverse * row(scale, x)


def row(vector: Array, x: Array) -> Array:
    """vector [D] in the shape and the dtype that meet x [...,D]."""
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))  # [D] -> [1,..,1,D]


def layer_norm(x: Array, eps: float) -> Array:
    """LayerNorm without weights: float32 [...,D] -> the same."""
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def gelu(x: Array, target: Target | None = None) -> Array:
    """GELU by tanh, computed in float32.

    target: what the program is made for; where its products take GELU too (`Target.epilogues`) it is written in the
        dtype of x, which is how XLA knows it, and computed from the product's float32 sums.
    """
    if target is not None and target.epilogues:
        return nn.gelu(x, approximate=True)
    return nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def sinusoid(timestep: Array, size: int) -> Array:
    """float32 [...] -> [...,size]: the cosines, then the sines, of t * 10000^(-i/(size/2))."""
    rates = np.exp(-math.log(10000.0) * np.arange(size // 2) / (size // 2)).astype(np.float32)
    angles = timestep[..., None] * row(jnp.asarray(rates), timestep[..., None])
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)  # [...,size/2] twice -> [...,size]


class LayerNorm(nn.Module):
    """LayerNorm with weights: float32 [B,L,D] -> the same."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        return layer_norm(x, self.eps) * scale[None, None] + bias[None, None]


def rope_tables(
    grid: tuple[int, int, int], sizes: tuple[int, int, int], theta: float, frames: Any = None
) -> tuple[Array, Array]:
    """Cosines and sines [L,K/2] float32 of the rotation of each channel pair at each token (t,h,w), w fastest.

    sizes: how many of a head's K channels turn with each axis. Only short tables of each axis are constants of the
    compiled program. `frames`: int32 [T], traced or not, from 0 without a limit: the place in the video of each frame;
    None: 0, 1, ...
    """
    whole: tuple[list[Array], list[Array]] = ([], [])
    for axis, (length, size) in enumerate(zip(grid, sizes, strict=True)):
        places = np.arange(length) if axis or frames is None else frames
        for table, short in zip(whole, _turns(places, size, theta), strict=True):
            short = jnp.expand_dims(short, tuple({0, 1, 2} - {axis}))  # [n,size/2] -> [n,1,1,size/2], n on its axis
            table.append(jnp.broadcast_to(short, (*grid, size // 2)))
    cos, sin = (jnp.concatenate(t, axis=-1).reshape(-1, sum(sizes) // 2) for t in whole)  # [T,H,W,K/2] -> [L,K/2]
    return cos, sin


def _turns(places: Any, size: int, theta: float) -> tuple[Array, Array]:
    """Cosines and sines float32 [n,size/2] of places [n] times the rates of an axis of `size` channels.

    Angles are float64. Traced places are made of digits in base 256, whose turns are constants and follow one another:
    so the last frame of a day is as exact as the first.
    """
    rates = theta ** (-np.arange(0, size, 2) / size)
    if isinstance(places, np.ndarray):
        angles = places[:, None] * rates
        return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    cos, sin = _turns(np.arange(256), size, theta)
    digits = cos[places & 255], sin[places & 255]  # rows of [256,size/2] -> [n,size/2]
    for shift in (8, 16, 24):
        c, s = (t[(places >> shift) & 255] for t in _turns(np.arange(256) << shift, size, theta))  # [n,size/2]
        digits = digits[0] * c - digits[1] * s, digits[1] * c + digits[0] * s
    return digits


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates each adjacent channel pair of x float32 [B,L,N,K] by the angles of `rope_tables`."""
    even, odd = x[..., 0::2], x[..., 1::2]  # [B,L,N,K/2]
    c, s = cos[None, :, None], sin[None, :, None]  # [1,L,1,K/2]
    pairs = jnp.stack([even * c - odd * s, even * s + odd * c], axis=-1)  # [B,L,N,K/2,2]
    return pairs.reshape(x.shape)  # [B,L,N,K]
