"""Linear maps that have a transpose of their own, and derivatives in every direction and of every order.

JAX has halves of this: `jax.custom_vjp` refuses `jax.jvp`, and `jax.custom_derivatives.linear_call` refuses `jax.vmap`
and residuals that are differentiated. A function with one kernel forwards and another backwards is a `jax.custom_jvp`
here, whose tangents are such a map of the operands' tangents: `jax.jvp` runs the map, `jax.grad` its transpose, and
what differentiates either of them goes through the map, which is plain JAX.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_log = logging.getLogger("jvdiff.kernels")


def linear(
    forward: Callable[..., Sequence[Any]],
    transpose: Callable[..., Sequence[Any]],
    residuals: Any,
    x: Sequence[Any],
    like: Sequence[Any],
) -> tuple[Any, ...]:
    """forward(residuals, *x), whose transpose is transpose(residuals, *cotangents).

    Args:
      forward: linear in x, and plain JAX. A gradient does not even trace it.
      transpose: anything; a kernel, for instance, that has no derivatives.
      residuals: a tree of arrays.
      x: float arrays.
      like: arrays, or ShapeDtypeStructs, of the shapes and dtypes of the result.
    """
    leaves, tree = jax.tree.flatten(residuals)
    how = _Map(forward, transpose, tree, len(leaves), _types(x), _types(like))
    return tuple(_linear.bind(*leaves, *x, how=how))


@cache
def say_left(kernel: str) -> None:
    """Says once that XLA takes a kernel's place under `jax.jvp`; for a `forward` to call."""
    _log.warning("attention: jax.jvp cannot go through %s. XLA computes the tangents, block by block.", kernel)


Types = tuple[jax.ShapeDtypeStruct, ...]


def _types(arrays: Sequence[Any], *more: int) -> Types:
    return tuple(jax.ShapeDtypeStruct((*more, *x.shape), x.dtype) for x in arrays)


@dataclass(frozen=True, eq=False)
class _Map:
    """A call of `linear`.

    tree, count: of the residuals, and how many leaves it has.
    sources, results: what x and the result are.
    """

    forward: Callable[..., Sequence[Any]]
    transpose: Callable[..., Sequence[Any]]
    tree: Any
    count: int
    sources: Types
    results: Types

    def run(self, *leaves: Any) -> tuple[Any, ...]:
        residuals = jax.tree.unflatten(self.tree, leaves[: self.count])
        return tuple(self.forward(residuals, *leaves[self.count :]))


_linear = Primitive("linear")
_linear.multiple_results = True
_linear.def_impl(lambda *leaves, how: how.run(*leaves))
_linear.def_abstract_eval(lambda *_, how: [ShapedArray(x.shape, x.dtype) for x in how.results])
mlir.register_lowering(_linear, mlir.lower_fun(lambda *leaves, how: how.run(*leaves), multiple_results=True))


def _derivative(primals: Sequence[Any], tangents: Sequence[Any], *, how: _Map) -> tuple[Any, Any]:
    out, n = _linear.bind(*primals, how=how), how.count
    moving = [type(dot) is not ad.Zero for dot in tangents]
    if not any(moving[:n]):
        return out, _linear.bind(*primals[:n], *map(ad.instantiate_zeros, tangents[n:]), how=how)
    pick = lambda values: tuple(x for x, moves in zip(values, moving, strict=True) if moves)  # noqa: E731

    def run(*moved: Any) -> tuple[Any, ...]:
        values = iter(moved)
        return how.run(*(next(values) if moves else x for x, moves in zip(primals, moving, strict=True)))

    return out, jax.jvp(run, pick(primals), pick(tangents))[1]


def _transposed(cotangents: Sequence[Any], *leaves: Any, how: _Map) -> list[Any]:
    residuals = jax.tree.unflatten(how.tree, leaves[: how.count])
    grads = _pull(how, residuals, tuple(map(ad.instantiate_zeros, cotangents)))
    # What is known of x are the tangents of constants: zeros, which need no gradient.
    wanted = map(ad.is_undefined_primal, leaves[how.count :])
    return [None] * how.count + [grad if asked else None for grad, asked in zip(grads, wanted, strict=True)]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _pull(how: _Map, residuals: Any, cotangents: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(how.transpose(residuals, *cotangents))


@_pull.defjvp
def _pull_derivative(how: _Map, primals: Any, tangents: Any) -> tuple[Any, Any]:
    def plain(residuals: Any, cotangents: tuple[Any, ...]) -> tuple[Any, ...]:
        forward = lambda *x: tuple(how.forward(residuals, *x))  # noqa: E731
        return jax.linear_transpose(forward, *how.sources)(cotangents)

    return _pull(how, *primals), jax.jvp(plain, primals, tangents)[1]


def _batched(leaves: Sequence[Any], axes: Sequence[Any], *, how: _Map) -> tuple[Any, list[int]]:
    n = how.count
    size = next(x.shape[axis] for x, axis in zip(leaves, axes, strict=True) if axis is not None)

    def in_front(x: Any, axis: int | None) -> jax.Array:
        return jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)

    x = list(map(in_front, leaves[n:], axes[n:]))
    of_residuals = jax.tree.unflatten(how.tree, axes[:n])
    forward = jax.vmap(how.forward, (of_residuals, *(0 for _ in x)))
    transpose = jax.vmap(how.transpose, (of_residuals, *(0 for _ in how.results)))
    many = _Map(forward, transpose, how.tree, n, _types(x), _types(how.results, size))
    return _linear.bind(*leaves[:n], *x, how=many), [0] * len(how.results)


ad.primitive_jvps[_linear] = _derivative
ad.primitive_transposes[_linear] = _transposed
batching.primitive_batchers[_linear] = _batched
