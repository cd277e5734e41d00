"""cuDNN's fused attention through JAX: the fastest dense attention on NVIDIA GPUs, bfloat16 and float16 only.

B batch · L query tokens · S key tokens · N heads · K head dim.
"""

from typing import Any

import jax
import jax.numpy as jnp


def unsupported(q: Any, k: Any, v: Any, return_lse: bool) -> str | None:
    """Why cuDNN cannot do this here, or None. Head dim: at most 256 on Hopper and later, 128 on Ampere."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16 operands, not {q.dtype}"
    if jax.default_backend() != "gpu":
        return f"needs an NVIDIA GPU, and the backend is {jax.default_backend()!r}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"takes head dims that are multiples of 8 up to 128, not {q.shape[-1]}"
    if return_lse:
        return "returns the log-sum-exp only in the operands' dtype, and float32 is asked for"
    return None


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, return_lse: bool, kv_length: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """The contract of `jvdiff.kernels.attention`, for the operands that `unsupported` lets through."""
    lengths = None if kv_length is None else jnp.broadcast_to(kv_length, q.shape[:1])
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="cudnn"), None
