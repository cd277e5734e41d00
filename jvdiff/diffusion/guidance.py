"""Classifier-free guidance (arXiv:2207.12598): steer towards a condition by extrapolating from its absence."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jvdiff.errors import UsageError
from jvdiff.types import Array

MODES = ("batched", "sequential")


def classifier_free(
    velocity_fn: Callable[[Array, Array, Any], Array],
    cond: Any,
    uncond: Any,
    scale: float,
    mode: str = "batched",
) -> Partial:
    """A velocity(x, t) = uncond + scale * (cond - uncond), in the dtype of the network's output.

    velocity_fn(x [B,...], t [B], condition) -> v [B,...]; bind parameters with `Partial(network, params)`, so that
    they stay arguments of the compiled step. cond and uncond are pytrees of arrays with leading axis B.
    mode "batched": one call on a batch of 2B; needs equal shapes. "sequential": two calls of B, one after the other,
    half the activations. scale 1 needs no uncond and calls the network once. Changing scale does not recompile.

    Raises UsageError for an unknown mode, or conditions that cannot be put into one batch.
    """
    if mode not in MODES:
        raise UsageError(f"guidance mode must be one of {', '.join(MODES)}; found {mode!r}")
    if isinstance(scale, (int, float)) and scale == 1:
        return Partial(_conditional, velocity_fn, cond)
    if mode == "sequential":
        return Partial(_sequential, velocity_fn, cond, uncond, scale)
    shapes = [jax.tree.map(lambda a: (a.shape, a.dtype), c) for c in (cond, uncond)]
    if shapes[0] != shapes[1]:
        raise UsageError(
            "batched guidance needs cond and uncond of equal shapes and dtypes.\n"
            f"cond {shapes[0]}, uncond {shapes[1]}.\nPad them alike, or use mode='sequential'."
        )
    both = jax.tree.map(lambda c, u: jnp.concatenate([c, u]), cond, uncond)  # [B,...] each -> [2B,...]
    return Partial(_batched, velocity_fn, both, scale)


def _conditional(velocity_fn, cond, x, t):
    return velocity_fn(x, t, cond)


def _batched(velocity_fn, both, scale, x, t):
    v = velocity_fn(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both)
    cond, uncond = jnp.split(v, 2)  # [2B,...] -> [B,...] each
    return uncond + scale * (cond - uncond)


def _sequential(velocity_fn, cond, uncond, scale, x, t):
    v_cond = velocity_fn(x, t, cond)
    # Without the barrier the compiler may merge or interleave the two calls, and hold both calls' activations.
    v_cond, x = jax.lax.optimization_barrier((v_cond, x))
    v_uncond = velocity_fn(x, t, uncond)
    return v_uncond + scale * (v_cond - v_uncond)
