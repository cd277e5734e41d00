"""Attention written as its definition, in float32: what every other implementation is compared with.

B batch · L query tokens · S key tokens · N heads · K head dim. It holds all logits [B,N,L,S].
"""

from typing import Any

import jax
import jax.numpy as jnp

from jvdiff.runtime.target import Target


def unsupported(q: Any, k: Any, v: Any, return_lse: bool, target: Target) -> str | None:
    """It can do everything that fits in memory."""
    return None


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, return_lse: bool, kv_length: jax.Array | None, target: Target
) -> tuple[jax.Array, jax.Array | None]:
    """The contract of `jvdiff.kernels.attention`."""
    qf, kf, vf = (x.astype(jnp.float32) for x in (q, k, v))
    logits = jnp.einsum("blnk,bsnk->bnls", qf, kf) * q.shape[-1] ** -0.5  # [B,N,L,S]
    if kv_length is not None:
        valid = jnp.arange(k.shape[1]).reshape(1, 1, 1, -1) < kv_length.reshape(-1, 1, 1, 1)  # [B or 1,1,1,S]
        logits = jnp.where(valid, logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    out = jnp.einsum("bnls,bsnk->blnk", jnp.exp(logits - lse[..., None]), vf)  # [B,L,N,K]
    return out.astype(q.dtype), lse if return_lse else None
