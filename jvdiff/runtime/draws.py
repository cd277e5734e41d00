"""Random numbers that no setting of JAX changes: keys are threefry's, and what is drawn does not depend on a mesh.

JAX_DEFAULT_PRNG_IMPL and JAX_THREEFRY_PARTITIONABLE would give other numbers for the same seed without a word.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp
import numpy as np

from jvdiff.types import Array

KIND = "threefry2x32"


def key(seed: int) -> Array:
    """The key of a seed from 0 to 2**32 - 1: that of `jax.random.key`, without JAX_RANDOM_SEED_OFFSET."""
    return key_of(jnp.array([0, np.uint32(seed)], jnp.uint32))


def key_of(data: Array) -> Array:
    """The keys whose data uint32 [...,2] are: the inverse of `jax.random.key_data`."""
    return jax.random.wrap_key_data(data, impl=KIND)


def normal(key: Array, shape: tuple[int, ...]) -> Array:
    """Standard normal float32 of this shape."""
    with pinned():
        return jax.random.normal(key, shape, jnp.float32)


def pinned() -> AbstractContextManager[None]:
    """Inside it JAX draws the same numbers whatever the environment says; what is traced there keeps to it."""
    return jax.threefry_partitionable(True)
