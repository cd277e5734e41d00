"""Kernels of eight bits: whole numbers and a scale for each output channel, half or a quarter of the bytes.

    small = quantise(kernel)            # float [..,in,out] -> Quantised, in place of the kernel in a parameter tree
    network(params, ..., dtype=...)     # multiplies in `dtype` as before; see `layers.product`

Symmetric and rounded to the nearest: each weight is off by at most half a scale, which is the largest magnitude of its
column over 127. Activations stay floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvdiff.types import Array

LARGEST = 127  # -128 stays unused, so that a kernel and its negative have the same numbers


@partial(jax.tree_util.register_dataclass, data_fields=("values", "scale"), meta_fields=())
@dataclass(frozen=True)
class Quantised:
    """A kernel for `layers.product`: values times scale.

    values: int8 [..,in,out], the shape of the kernel.
    scale: float32 [..,1,out], one for each output channel (and layer, where layers are stacked).
    """

    values: Any
    scale: Any

    @property
    def dtype(self) -> Any:
        """The dtype of products where no other is named: the scale's."""
        return self.scale.dtype

    def product(self, x: Array, dtype: Any, precision: Any = None) -> Array:
        """x [..,in] -> float32 [..,out]: integers, exact in bfloat16, are summed in float32, and sums are scaled."""
        values = self.values.astype(dtype)
        sums = jnp.matmul(x.astype(dtype), values, precision=precision, preferred_element_type=jnp.float32)
        return sums * self.scale.reshape((1,) * (sums.ndim - 1) + (-1,))  # scale [1,out] -> [..,out]

    def array(self, dtype: Any) -> Array:
        """The kernel [..,in,out] itself, rounded to `dtype` once."""
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


def quantise(kernel: Any) -> Quantised:
    """A float kernel [..,in,out] of numpy or JAX, or a ShapeDtypeStruct, in eight bits; the same kind comes back.

    A column of zeros stays one.
    """
    if isinstance(kernel, jax.ShapeDtypeStruct):
        return jax.eval_shape(quantise, kernel)
    xp: Any = np if isinstance(kernel, np.ndarray) else jnp
    kernel = kernel.astype(np.float32)
    scale = xp.max(xp.abs(kernel), axis=-2, keepdims=True) / xp.float32(LARGEST)
    values = kernel / xp.where(scale > 0, scale, xp.ones_like(scale))
    return Quantised(xp.round(values).astype(np.int8), scale)
