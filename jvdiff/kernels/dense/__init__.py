"""The contract of dense attention, and the choice of the implementation that fulfils it.

B batch · L query tokens · S key tokens · N heads · K head dim.

Every implementation is a plain function `(q, k, v, return_lse, kv_length, target) -> (out, lse or None)` in a file of
its own, with an `unsupported(q, k, v, return_lse, target) -> reason or None` beside it that looks at shapes, dtypes and
the target only. It may rely on kv_length, int32 [] or [B], lying in 1..S.
"""

import logging
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jvdiff.kernels.dense import blocks, cudnn, reference, xla
from jvdiff.runtime.target import Target, here

_log = logging.getLogger("jvdiff.kernels")

# In order of preference: the first that supports the operands on the target is taken. `xla` supports all.
IMPLEMENTATIONS = {"cudnn": cudnn, "blocks": blocks, "xla": xla, "reference": reference}


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    kv_length: Any = None,
    return_lse: bool = False,
    implementation: str | None = None,
    target: Target | None = None,
) -> Any:
    """softmax(q k^T / sqrt(K)) v for each head; differentiable.

    Args:
      q: [B,L,N,K], any float dtype.
      k, v: [B,S,N,K], the dtype of q.
      kv_length: int32 [], or [B] with one for each entry, may be traced: only the first kv_length keys count; None
        counts all. With 0 keys out is 0 and the log-sum-exp -inf. Keys and values that do not count must be finite all
        the same.
      return_lse: also return the log-sum-exp of each query's scaled logits.
      implementation: None takes the best that can do this shape and dtype on the target, and always works; a name
        takes exactly that one.
      target: what the program is made for; None: the devices at hand.

    Returns:
      out [B,L,N,K] in the dtype of q; with return_lse, (out, lse), lse natural float32 [B,N,L].

    Raises:
      NotImplementedError: the named implementation cannot do this; the message says why.
      ValueError: the operands do not fit together, or there is no such name.
    """
    target = target or here()
    how: Any = dict(return_lse=return_lse, implementation=implementation, target=target)
    name = choose(q, k, v, kv_length=kv_length, **how)
    _log_once(name, q.shape, k.shape[1], str(q.dtype))
    attend = jax.named_scope(f"{name}_attention")(IMPLEMENTATIONS[name].attention)
    if kv_length is None:
        out, lse = attend(q, k, v, return_lse, None, target)
        return (out, lse) if return_lse else out
    # Without keys one is attended to and the result thrown away, so that nothing is infinite on the way, nor backwards.
    kv_length = jnp.asarray(kv_length, jnp.int32)
    length = jnp.clip(kv_length, 1, k.shape[1])
    out, lse = attend(q, k, v, return_lse, length, target)
    some = (kv_length > 0).reshape(-1, 1, 1)  # [B or 1,1,1]
    out = jnp.where(some[..., None], out, 0)
    return (out, jnp.where(some, lse, -jnp.inf)) if return_lse else out


def choose(
    q: Any,
    k: Any,
    v: Any,
    *,
    kv_length: Any = None,
    return_lse: bool = False,
    implementation: str | None = None,
    target: Target | None = None,
) -> str:
    """The name of the implementation that `attention` runs for these operands (arrays or ShapeDtypeStructs).

    Raises as `attention` does. Runs nothing, so that a record of a run can be written before it.
    """
    for name, x in (("k", k), ("v", v)):
        expected = (q.shape[0], k.shape[1], *q.shape[2:]) if q.ndim == 4 else None
        if x.shape != expected or x.dtype != q.dtype:
            raise ValueError(
                f"attention: {name} is {x.dtype}{list(x.shape)}; with q {q.dtype}{list(q.shape)} it must be "
                f"[B,S,N,K] with the same B, N, K and dtype, and the same S for k and v"
            )
    if kv_length is not None:
        shape, dtype = jnp.shape(kv_length), jnp.result_type(kv_length)
        if shape not in ((), q.shape[:1]) or not jnp.issubdtype(dtype, jnp.integer):
            raise ValueError(
                f"attention: kv_length is {dtype}{list(shape)}; it must be one whole number, int32[], or one for each "
                f"entry of the batch, int32[{q.shape[0]}]"
            )
    target = target or here()
    if implementation is None:
        return next(n for n, i in IMPLEMENTATIONS.items() if i.unsupported(q, k, v, return_lse, target) is None)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"no attention implementation {implementation!r}; there are {', '.join(IMPLEMENTATIONS)}")
    if reason := IMPLEMENTATIONS[implementation].unsupported(q, k, v, return_lse, target):
        raise NotImplementedError(f"attention implementation {implementation!r}: {reason}")
    return implementation


def merge(out_1: jax.Array, lse_1: jax.Array, out_2: jax.Array, lse_2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Attention over the union of two disjoint sets of keys, from the results over each.

    out [B,L,N,K] any float dtype, lse natural float32 [B,N,L], -inf where there were no keys; returns the same, out in
    the dtype of out_1. Where neither set has keys out is 0.
    """
    top = lax.stop_gradient(jnp.maximum(lse_1, lse_2))
    top = jnp.where(jnp.isneginf(top), 0, top)
    w_1, w_2 = jnp.exp(lse_1 - top), jnp.exp(lse_2 - top)
    seen = w_1 + w_2 > 0
    total = jnp.where(seen, w_1 + w_2, 1)
    lse = jnp.where(seen, top + jnp.log(total), -jnp.inf)
    w_1, w_2 = (jnp.swapaxes(w / total, 1, 2)[..., None] for w in (w_1, w_2))  # [B,N,L] -> [B,L,N,1]
    out = out_1.astype(jnp.float32) * w_1 + out_2.astype(jnp.float32) * w_2
    return out.astype(out_1.dtype), lse


@cache
def _log_once(name: str, q_shape: tuple[int, ...], keys: int, dtype: str) -> None:
    _log.info("attention q=%s keys=%d %s: %s", list(q_shape), keys, dtype, name)
