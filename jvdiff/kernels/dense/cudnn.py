"""cuDNN's fused attention through JAX: the fastest dense attention on NVIDIA GPUs, bfloat16 and float16 only.

B batch · L query tokens · S key tokens · N heads · K head dim.
"""

import contextlib
import inspect
from collections.abc import Iterator
from functools import cache, partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import zero_from_primal

from jvdiff.kernels.dense import blocks, xla
from jvdiff.kernels.linear import linear, say_left
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
    if return_lse and _private() is None:
        return f"gives no float32 log-sum-exp through JAX {jax.__version__}"
    return None


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, return_lse: bool, kv_length: jax.Array | None, target: Target
) -> tuple[jax.Array, jax.Array | None]:
    """The contract of `jvdiff.kernels.attention`, for the operands that `unsupported` lets through."""
    if return_lse:
        return _with_lse(target, q, k, v, kv_length)  # pyright: ignore[reportGeneralTypeIssues]
    return _attention(target, q, k, v, kv_length), None  # pyright: ignore[reportGeneralTypeIssues]


@cache
def _private() -> ModuleType | None:
    """JAX's module of cuDNN's attention, if it gives the log-sum-exp, which `jax.nn` rounds to the operands' dtype."""
    try:
        from jax._src.cudnn import fused_attention_stablehlo as private
    except ImportError:
        return None
    wanted = {"q_seqlen", "kv_seqlen", "scale", "mask_type", "return_residual"}
    asked = inspect.signature(getattr(private, "dot_product_attention", lambda: None)).parameters
    return private if wanted <= set(asked) and hasattr(private, "MaskType") else None


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _with_lse(target: Target, q: jax.Array, k: jax.Array, v: jax.Array, kv_length: Any) -> tuple[jax.Array, jax.Array]:
    """out [B,L,N,K] and the log-sum-exp [B,N,L]."""
    private: Any = _private()
    count: dict[str, Any] = {}
    if kv_length is not None:
        lengths = (jnp.broadcast_to(jnp.int32(n), q.shape[:1]) for n in (q.shape[1], kv_length))
        count = dict(zip(("q_seqlen", "kv_seqlen"), lengths, strict=True), mask_type=private.MaskType.PADDING)
    with version_of(target):
        return private.dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, return_residual=True, **count)


@_with_lse.defjvp
def _with_lse_derivative(target: Target, primals: Any, tangents: Any) -> Any:
    """Another kernel's: JAX's backward pass forgets that the log-sum-exp has a cotangent."""
    q, k, v, kv_length = primals
    other = xla if blocks.unsupported(q, k, v, True, target) else blocks
    return jax.jvp(lambda q, k, v: other.attention(q, k, v, True, kv_length, target), (q, k, v), tangents[:3])


def _cudnn(target: Target, q: jax.Array, k: jax.Array, v: jax.Array, kv_length: jax.Array | None) -> jax.Array:
    lengths = None if kv_length is None else jnp.broadcast_to(kv_length, q.shape[:1])
    with version_of(target):
        return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="cudnn")


def _pair(target: Target, q: jax.Array, k: jax.Array, v: jax.Array, kv_length: Any) -> tuple[jax.Array, Any]:
    """The result, and JAX's function from its cotangent to those of q, k and v."""
    return jax.vjp(lambda q, k, v: _cudnn(target, q, k, v, kv_length), q, k, v)


# JAX gives cuDNN a backward pass and no jvp: `linear` joins the one with XLA's tangents.
_attention = jax.custom_jvp(_cudnn, nondiff_argnums=(0,))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _kept(target: Target, *operands: Any) -> tuple[jax.Array, list[jax.Array]]:
    """The result, and what the backward pass needs beside it, which is not to be stored where there is none."""
    out, pull = _pair(target, *operands)
    return out, jax.tree.leaves(pull)


def _tangents(target: Target, residuals: Any, *dots: jax.Array) -> list[jax.Array]:
    (*operands, kv_length), _ = residuals
    say_left("cuDNN")
    return [jax.jvp(lambda q, k, v: xla.attention(q, k, v, False, kv_length, target)[0], operands, list(dots))[1]]


def _cotangents(target: Target, residuals: Any, dout: jax.Array) -> Any:
    operands, kept = residuals
    pull = jax.tree.structure(jax.eval_shape(lambda *x: _pair(target, *x)[1], *operands))
    return jax.tree.unflatten(pull, kept)(dout)


def _derivative(target: Target, primals: Any, tangents: Any) -> Any:
    out, kept = _kept(target, *primals)  # pyright: ignore[reportGeneralTypeIssues]
    forward, backward = partial(_tangents, target), partial(_cotangents, target)
    (dot,) = linear(forward, backward, (primals, kept), tangents[:3], [out])
    return out, kept, dot


@_attention.defjvp
def _attention_derivative(target: Target, primals: Any, tangents: Any) -> Any:
    out, _, dot = _derivative(target, primals, tangents)
    return out, dot


@_kept.defjvp
def _kept_derivative(target: Target, primals: Any, tangents: Any) -> Any:
    out, kept, dot = _derivative(target, primals, tangents)
    return (out, kept), (dot, [zero_from_primal(x) for x in kept])  # which only `_cotangents` reads


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
