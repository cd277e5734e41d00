"""cuDNN's fused attention through JAX: the fastest dense attention on NVIDIA GPUs, bfloat16 and float16 only.

B batch · L query tokens · S key tokens · N heads · K head dim.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jvdiff.runtime.target import Target


def unsupported(q: Any, k: Any, v: Any, return_lse: bool, target: Target) -> str | None:
    """Why cuDNN cannot do this on the target, or None. Head dim: at most 256 on Hopper and later, 128 on Ampere."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16 operands, not {q.dtype}"
    if target.capability is None:
        return f"needs an NVIDIA GPU, and the backend is {target.platform!r}"
    if target.capability < (8, 0):
        return f"needs an NVIDIA GPU of compute capability 8.0 or later, and {target.kind} is not one"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"takes head dims that are multiples of 8 up to 128, not {q.shape[-1]}"
    if return_lse:
        return "returns the log-sum-exp only in the operands' dtype, and float32 is asked for"
    return None


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, return_lse: bool, kv_length: jax.Array | None, target: Target
) -> tuple[jax.Array, jax.Array | None]:
    """The contract of `jvdiff.kernels.attention`, for the operands that `unsupported` lets through."""
    lengths = None if kv_length is None else jnp.broadcast_to(kv_length, q.shape[:1])
    with version_of(target):
        return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="cudnn"), None


@contextlib.contextmanager
def version_of(target: Target) -> Iterator[None]:
    """Within it, JAX takes the target's version of cuDNN for found.

    JAX asks the library at hand as it traces, and has no other way to be told: for a GPU that is not there this is the
    answer. Where the target says nothing, the library is asked.
    """
    if target.cudnn is None:
        yield
        return
    from jax._src.cudnn import fused_attention_stablehlo as private

    asked = private.check_cudnn_version
    private.check_cudnn_version = lambda: target.cudnn
    try:
        yield
    finally:
        private.check_cudnn_version = asked
