"""Block-sparse attention: the contract, the choice of an implementation, and the gradient.

B batch · L query tokens · S key tokens · N heads · K head dim · Nq, Nkv blocks of queries and keys · M places in a row.

Each implementation is a file of plain functions:

    unsupported(q, k, v, block) -> reason or None      by shapes and dtypes alone: what it cannot do anywhere
    unavailable(target) -> reason or None              why it cannot run on that kind of device
    parts(q, block, target) -> (queries, keys)         how many of a block are computed or left out together
    forward(q, k, v, lists, *, block, target, scale) -> (out, lse)
    backward(q, k, v, out, lse, dout, dlse, lists, *, block, target, scale) -> (dq, dk, dv)

Those of GPUs, `mosaic_gpu` and `triton`, also have `shapes`, how their kernels are cut (see `cuts`), and take `cuts=`.
They may rely on `lists` naming no key block without valid tokens. A row with no entries gives 0 and a log-sum-exp of
-inf. No backward pass uses atomics: the same operands give the same bits.
"""

import logging
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jvdiff.kernels.block_sparse import cuts, mosaic_gpu, reference, triton, xla
from jvdiff.kernels.block_sparse.lists import Lists, map_of, split, transpose
from jvdiff.kernels.linear import linear, say_left
from jvdiff.runtime.target import Target, here

__all__ = ["IMPLEMENTATIONS", "Lists", "block_sparse_attention", "choose", "cuts", "split", "transpose"]

ALIGNED = 8  # rows: blocks that are not padded begin at multiples of it, as a Hopper's copies must

SCALES = 1e-6, 1e6

_log = logging.getLogger("jvdiff.kernels")

# In order of preference: the first that supports the operands on the target is taken. `xla` supports all.
IMPLEMENTATIONS = {
    "mosaic_gpu": mosaic_gpu,
    "triton": triton,
    "xla": xla,
    "reference": reference,
}


def block_sparse_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q2k: Any,
    q2k_count: Any,
    kv_sizes: Any,
    *,
    q_sizes: Any = None,
    q_first: Any = None,
    kv_first: Any = None,
    block: int = 64,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    target: Target | None = None,
) -> Any:
    """Attention in which each block of queries sees a list of blocks of keys; differentiable in q, k and v.

    Args:
      q: [B,Nq*block,N,K], any float dtype; with `q_first` [B,L,N,K].
      k, v: [B,Nkv*block,N,K], the dtype of q; with `kv_first` [B,S,N,K].
      q2k: int32 [B,N,Nq,M]: the key blocks that each query block sees, each at most once, in any order. Numbers lie in
        0..Nkv-1 everywhere. B and N may be 1: the same for all.
      q2k_count: int32 [B,N,Nq]: how many entries of each row count. A row of 0 gives 0, and -inf as log-sum-exp.
      kv_sizes: int32 [Nkv]: how many tokens of each key block are valid; they come first.
      q_sizes: int32 [Nq]: how many queries of each block anybody asks for; they come first, and those after them give
        anything finite. None: all of them.
      q_first, kv_first: int32 [Nq] and [Nkv], both or none, with sizes, all of them numpy: the first row of each block,
        where blocks are not padded. They follow each other, those of q without gaps, and begin and end at multiples of
        `ALIGNED` rows.
      block: tokens in a block, or places for them.
      scale: of the logits; None: K^-1/2.
      return_lse: also return the log-sum-exp of each query's scaled logits.
      implementation: None takes the best that can do this on the target, and always works; a name takes exactly that
        one.
      target: what the program is made for; None: the devices at hand.

    Lists may be numpy (constants of the program, checked) or JAX arrays (computed inside it, not checked).

    Returns:
      out in the shape and dtype of q; with return_lse, (out, lse), lse natural float32 [B,N,rows of q].

    Raises:
      NotImplementedError: the named implementation cannot do this; the message says why.
      ValueError: the operands do not fit together, or there is no such name.
    """
    target, anywhere = target or here(), q_first is not None
    name = choose(q, k, v, block=block, implementation=implementation, target=target, anywhere=anywhere)
    lists = prepared(q, k, Lists(q2k, q2k_count, kv_sizes, q_sizes, q_first, kv_first), block)
    if not isinstance(q, Tracer) and (reason := IMPLEMENTATIONS[name].unavailable(target)):
        raise NotImplementedError(f"block-sparse attention implementation {name!r}: {reason}")
    scale = scale_of(q, scale)
    if not SCALES[0] <= scale <= SCALES[1]:  # padded keys are masked by what the products are
        raise ValueError(f"block_sparse_attention: scale is {scale!r}; it must lie in {SCALES[0]}..{SCALES[1]}")
    _log_once(name, q.shape, k.shape[1], str(q.dtype), block)
    with jax.named_scope(f"{name}_block_sparse"):
        out, lse = _attention(name, block, target, scale, q, k, v, lists)  # pyright: ignore[reportGeneralTypeIssues]
    return (out, lse) if return_lse else out


def scale_of(q: Any, scale: float | None) -> float:
    """The scale of the logits of q [...,K] where it may be left out."""
    return float(q.shape[-1] ** -0.5 if scale is None else scale)


def choose(
    q: Any,
    k: Any,
    v: Any,
    *,
    block: int = 64,
    implementation: str | None = None,
    target: Target | None = None,
    anywhere: bool = False,
) -> str:
    """The name of the implementation that `block_sparse_attention` runs for these operands (or ShapeDtypeStructs).

    anywhere: their blocks are not padded. Raises as `block_sparse_attention` does. Runs nothing, so that a record of a
    run can be written before it.
    """
    if block < 1:
        raise ValueError(f"block_sparse_attention: block must be at least 1 token, not {block}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        expected = (q.shape[0], k.shape[1], *q.shape[2:]) if q.ndim == k.ndim == 4 and name != "q" else x.shape
        if x.ndim != 4 or x.shape != expected or x.dtype != q.dtype or (x.shape[1] % block and not anywhere):
            raise ValueError(
                f"block_sparse_attention: {name} is {x.dtype}{list(x.shape)} beside q {q.dtype}{list(q.shape)} and "
                f"k {k.dtype}{list(k.shape)}; all must be [B,blocks*{block},N,K] with the same B, N, K and dtype"
            )
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"block_sparse_attention: q, k and v must be of a float dtype, not {q.dtype}")
    on = target or here()
    if implementation is None:
        every = IMPLEMENTATIONS.items()
        able = (n for n, i in every if not (i.unsupported(q, k, v, block) or i.unavailable(on) or on.refusal(n)))
        if (name := next(able)) != "mosaic_gpu" and mosaic_gpu.too_old(on):
            _say_once(mosaic_gpu.too_old(on))
        return name
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"no block-sparse attention implementation {implementation!r}; there are {', '.join(IMPLEMENTATIONS)}"
        )
    if reason := IMPLEMENTATIONS[implementation].unsupported(q, k, v, block) or on.refusal(implementation):
        raise NotImplementedError(f"block-sparse attention implementation {implementation!r}: {reason}")
    return implementation


def prepared(q: Any, k: Any, lists: Lists, block: int) -> Lists:
    """The lists as implementations take them: checked, int32, without key blocks that have no valid tokens."""
    _check_lists(q, k, lists, block)
    sizes = lists.kv_sizes
    lists = jax.tree.map(lambda x: x.astype(np.int32), lists)
    if lists.q_first is not None:
        maps = {"q_map": map_of(lists.q_first, lists.q_sizes, block, q.shape[1])}
        lists = lists._replace(**maps, kv_map=map_of(lists.kv_first, lists.kv_sizes, block, k.shape[1]))
    return lists if isinstance(sizes, np.ndarray) and sizes.all() else split(lists, block, block, block)


def _check_lists(q: Any, k: Any, lists: Lists, block: int) -> None:
    """ValueError for lists that do not fit the operands, or with values out of range where these are known."""
    (B, _, N, _), Nq, Nkv = q.shape, q.shape[1] // block, k.shape[1] // block
    if lists.q_first is not None or lists.kv_first is not None:
        Nq, Nkv = _check_rows(q, k, lists)
    if lists.q_sizes is not None and np.shape(lists.q_sizes) != (Nq,):
        raise ValueError(f"block_sparse_attention: q_sizes must be int32 [{Nq}], not {list(np.shape(lists.q_sizes))}")
    for name, x, ranks in (("q2k", lists.q2k, 4), ("q2k_count", lists.q2k_count, 3), ("kv_sizes", lists.kv_sizes, 1)):
        ok = hasattr(x, "dtype") and x.ndim == ranks and jnp.issubdtype(x.dtype, jnp.integer)
        if ok and name == "kv_sizes":
            ok = x.shape == (Nkv,)
        elif ok:
            ok = x.shape[0] in (1, B) and x.shape[1] in (1, N) and x.shape[2] == Nq
        if not ok:
            axes = {"q2k": f"[{B} or 1,{N} or 1,{Nq},M]", "q2k_count": f"[{B} or 1,{N} or 1,{Nq}]"}
            kind = f"{getattr(x, 'dtype', type(x).__name__)}{list(np.shape(x))}"
            expected = f"int32 {axes.get(name, f'[{Nkv}]')}"
            raise ValueError(f"block_sparse_attention: {name} is {kind}; with these q and k it must be {expected}")
    for name, x, low, high in (
        ("q2k", lists.q2k, 0, Nkv - 1),
        ("q2k_count", lists.q2k_count, 0, lists.q2k.shape[-1]),
        ("kv_sizes", lists.kv_sizes, 0, block),
    ):
        if isinstance(x, np.ndarray) and x.size and not (low <= x.min() and x.max() <= high):
            raise ValueError(
                f"block_sparse_attention: {name} holds {x.min()}..{x.max()}; it must stay within {low}..{high}"
            )
    if lists.q2k.shape[:2] != lists.q2k_count.shape[:2]:
        raise ValueError(
            f"block_sparse_attention: q2k {list(lists.q2k.shape)} and q2k_count {list(lists.q2k_count.shape)} must "
            f"agree on batch and heads"
        )


def _check_rows(q: Any, k: Any, lists: Lists) -> tuple[int, int]:
    """How many blocks there are; ValueError unless they lie in their operands, one behind the other."""
    for name, x, first, sizes in (("q", q, lists.q_first, lists.q_sizes), ("kv", k, lists.kv_first, lists.kv_sizes)):
        if not (isinstance(first, np.ndarray) and isinstance(sizes, np.ndarray) and first.shape == sizes.shape):
            raise ValueError(f"block_sparse_attention: {name}_first and {name}_sizes must be numpy arrays of one shape")
        begin, end = np.append(first, x.shape[1]), np.append(0, first + sizes)
        numbers = np.concatenate([begin, end]) if name == "q" else begin
        if (begin < end).any() or (numbers % ALIGNED).any() or (name == "q" and (begin != end).any()):
            raise ValueError(
                f"block_sparse_attention: {name}_first and {name}_sizes must be blocks behind each other in "
                f"{x.shape[1]} rows, those of q without gaps, that begin and end at multiples of {ALIGNED} rows"
            )
    return lists.q_sizes.size, lists.kv_sizes.size


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def _attention(
    name: str, block: int, target: Target, scale: float, q: jax.Array, k: jax.Array, v: jax.Array, lists: Lists
) -> tuple[jax.Array, jax.Array]:
    return IMPLEMENTATIONS[name].forward(q, k, v, lists, block=block, target=target, scale=scale)


@_attention.defjvp
def _derivative(name: str, block: int, target: Target, scale: float, primals: Any, tangents: Any) -> tuple[Any, Any]:
    results = _attention(name, block, target, scale, *primals)  # pyright: ignore[reportGeneralTypeIssues]
    how = dict(block=block, target=target, scale=scale)
    forward, backward = partial(_tangents, name, how), partial(_cotangents, name, how)
    return results, linear(forward, backward, (primals, results), tangents[:3], results)


def _tangents(name: str, how: Any, residuals: Any, *dots: jax.Array) -> tuple[jax.Array, jax.Array]:
    (q, k, v, lists), _ = residuals
    if name in ("mosaic_gpu", "triton"):
        say_left(name)
    return jax.jvp(lambda q, k, v: xla.forward(q, k, v, lists, **how), (q, k, v), dots)[1]


def _cotangents(name: str, how: Any, residuals: Any, dout: jax.Array, dlse: jax.Array) -> Any:
    (q, k, v, lists), (out, lse) = residuals
    dlse = jnp.where(jnp.isfinite(lse), dlse, 0)  # the log-sum-exp of no keys is a constant
    return IMPLEMENTATIONS[name].backward(q, k, v, out, lse, dout, dlse, lists, **how)


@cache
def _say_once(line: str | None) -> None:
    _log.warning("%s", line)


@cache
def _log_once(name: str, q_shape: tuple[int, ...], keys: int, dtype: str, block: int) -> None:
    _log.info("block-sparse attention q=%s keys=%d block=%d %s: %s", list(q_shape), keys, block, dtype, name)
