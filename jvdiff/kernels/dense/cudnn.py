"""cuDNN's fused attention through JAX: the fastest dense attention on NVIDIA GPUs, bfloat16 and float16 only.

B batch · L query tokens · S key tokens · N heads · K head dim.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import zero_from_primal

from jvdiff.kernels.dense import xla
from jvdiff.kernels.linear import linear, say_left


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
    return _attention(q, k, v, kv_length), None


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, kv_length: jax.Array | None) -> jax.Array:
    lengths = None if kv_length is None else jnp.broadcast_to(kv_length, q.shape[:1])
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="cudnn")


def _pair(q: jax.Array, k: jax.Array, v: jax.Array, kv_length: jax.Array | None) -> tuple[jax.Array, Any]:
    """The result, and JAX's function from its cotangent to those of q, k and v."""
    return jax.vjp(lambda q, k, v: _cudnn(q, k, v, kv_length), q, k, v)


# cuDNN has a backward pass and no jvp; `linear` joins the one with XLA's tangents.
_attention = jax.custom_jvp(_cudnn)


@jax.custom_jvp
def _kept(*operands: Any) -> tuple[jax.Array, list[jax.Array]]:
    """The result, and what the backward pass needs: apart from `_attention`, since it costs memory."""
    out, pull = _pair(*operands)
    return out, jax.tree.leaves(pull)


def _tangent(residuals: Any, *dots: jax.Array) -> list[jax.Array]:
    (*operands, kv_length), _ = residuals
    say_left("cuDNN")
    return [jax.jvp(lambda q, k, v: xla.attention(q, k, v, False, kv_length)[0], operands, list(dots))[1]]


def _cotangents(residuals: Any, dout: jax.Array) -> Any:
    operands, kept = residuals
    pull = jax.tree.structure(jax.eval_shape(lambda *x: _pair(*x)[1], *operands))
    return jax.tree.unflatten(pull, kept)(dout)


def _derivative(primals: Any, tangents: Any) -> Any:
    out, kept = _kept(*primals)
    (dot,) = linear(_tangent, _cotangents, (primals, kept), tangents[:3], [out])
    return out, kept, dot


@_attention.defjvp
def _attention_derivative(primals: Any, tangents: Any) -> Any:
    out, _, dot = _derivative(primals, tangents)
    return out, dot


@_kept.defjvp
def _kept_derivative(primals: Any, tangents: Any) -> Any:
    out, kept, dot = _derivative(primals, tangents)
    return (out, kept), (dot, [zero_from_primal(x) for x in kept])  # which only `_cotangents` reads
