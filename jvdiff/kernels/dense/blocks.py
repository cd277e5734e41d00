"""Dense attention by the block-sparse GPU kernels, every block listed: fused, and with a float32 log-sum-exp.

B batch · L query tokens · S key tokens · N heads · K head dim.

cuDNN is faster, but its backward pass takes no cotangent of the log-sum-exp: this one takes its place there, and where
there is no cuDNN.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvdiff.kernels import layout
from jvdiff.kernels.block_sparse import block_sparse_attention, mosaic_gpu, triton
from jvdiff.runtime.target import Target

BLOCK = 128  # tokens: two warpgroups of Hopper's share the keys that they read


def unsupported(q: Any, k: Any, v: Any, return_lse: bool, target: Target) -> str | None:
    """Why neither kernel can do this on the target, or None."""
    if not return_lse:
        return "is there for the log-sum-exp, which is not asked for"
    kernels = (("mosaic_gpu", mosaic_gpu), ("triton", triton))
    reasons = {
        name: kernel.unsupported(q, k, v, BLOCK) or kernel.unavailable(target) or target.refusal(name)
        for name, kernel in kernels
    }
    return "; ".join(f"{name} {reason}" for name, reason in reasons.items()) if all(reasons.values()) else None


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, return_lse: bool, kv_length: jax.Array | None, target: Target
) -> tuple[jax.Array, jax.Array | None]:
    """The contract of `jvdiff.kernels.attention`, for the operands that `unsupported` lets through."""
    L, starts = q.shape[1], np.arange(0, k.shape[1], BLOCK, dtype=np.int32)
    sizes: Any = np.minimum(k.shape[1] - starts, BLOCK)
    q2k, count = layout.everything(-(-L // BLOCK), sizes)
    if kv_length is not None and kv_length.ndim:  # the lists of the kernels are of one length for all: one by one
        one = lambda x: attention(x[0][None], x[1][None], x[2][None], return_lse, x[3], target)  # noqa: E731
        out, lse = jax.lax.map(one, (q, k, v, kv_length))
        return out[:, 0], lse[:, 0]
    if kv_length is not None:
        sizes = jnp.clip(kv_length - starts, 0, BLOCK)
    q, k, v = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK), (0, 0), (0, 0))) for x in (q, k, v))  # whole blocks
    out, lse = block_sparse_attention(q, k, v, q2k, count, sizes, block=BLOCK, return_lse=True, target=target)
    return out[:, :L], lse[..., :L]
