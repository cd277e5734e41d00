"""The sampling loop, in two forms with the same numbers: step by step from Python, and one `lax.scan`.

A velocity is any callable `velocity(x, t)`, x float32 [B,...], t float32 [B] in 0..1000. What it needs besides is bound
with `jax.tree_util.Partial(function, params, ...)`, a callable that is also a pytree: the loops pass it to the compiled
step as an argument, so weights are never baked into the program, and the same object works in a notebook cell. A plain
function is fine too, but arrays it closes over become constants. The program is compiled once per *function object*, so
keep the function (a `functools.partial` of configuration, say) from call to call; weights, conditions, guidance scale,
schedule and the number of steps may change freely.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jvdiff.diffusion.solvers import Solver
from jvdiff.errors import UsageError
from jvdiff.runtime import profiling
from jvdiff.types import Array

Velocity = Callable[[Array, Array], Array]


def denoise(
    velocity: Velocity,
    solver: Solver,
    state: Any,
    *,
    start: int = 0,
    stop: int | None = None,
    callback: Callable[[int, Any], Any] | None = None,
) -> Any:
    """Run steps start..stop (default: to the end), one compiled call each, and return the state; its `x` are latents.

    state: `solver.init(noise)`, or one that an earlier call returned after `start` steps (also read back from a file as
    numpy arrays); resumed equals uninterrupted bit for bit. It is donated: do not use it afterwards.
    callback(done, state) is called when step number `done` (counted from 1) has been computed; `done` is the `start`
    that resumes from there. If it returns something true, the loop ends with that state; exceptions pass through.
    The state belongs to the loop: copy from it (`np.asarray(state.x)`) what must outlive the callback.
    On several devices, place the state and the velocity's arrays before the call; their sharding is kept.

    Raises UsageError unless 0 <= start <= stop <= len(solver).
    """
    one = functools.partial(step, solver.advance, _as_pytree(velocity))
    return loop(one, solver, state, start=start, stop=stop, callback=callback)


def loop(
    step: Callable[[Any, Any, Any], Any],
    solver: Solver,
    state: Any,
    *,
    start: int = 0,
    stop: int | None = None,
    callback: Callable[[int, Any], Any] | None = None,
) -> Any:
    """The loop of `denoise`, for any step(state, timestep, row of the solver's table) -> state."""
    for i in range(start, _check_range(solver, start, stop)):
        with profiling.step("denoise", i):
            state = step(state, solver.timesteps[i], solver.table[i])
            if callback is not None:
                jax.block_until_ready(state)
        if callback is not None and callback(i + 1, state):
            break
    return state


def denoise_scan(velocity: Velocity, solver: Solver, state: Any, *, start: int = 0, stop: int | None = None) -> Any:
    """As `denoise`, in one compiled program and without donation; gradients flow through it.

    Bind what you differentiate by with `Partial`, or close over it: both work under `jax.grad`. The backward pass keeps
    every step's activations unless the velocity is wrapped in `jax.checkpoint`.
    """
    stop = _check_range(solver, start, stop)
    rows = solver.timesteps[start:stop], solver.table[start:stop]
    return _scan(solver.advance, _as_pytree(velocity), state, *rows)


def advanced(advance, velocity, state, timestep, row):
    """The state one step later: velocity at (state.x, timestep), then the solver's `advance` with its row."""
    t = jnp.full(state.x.shape[:1], timestep)
    return advance(state, velocity(state.x, t).astype(jnp.float32), row)


# One compiled step: step(solver.advance, velocity, state, timestep, row) -> state. Public, so that it can be compiled
# ahead. Coefficients come as one row, not as table and index: the program is the same for any number of steps.
step = jax.jit(advanced, static_argnames="advance", donate_argnames="state")


@functools.partial(jax.jit, static_argnames="advance")
def _scan(advance, velocity, state, timesteps, table):
    def body(state, row):
        return advanced(advance, velocity, state, *row), None

    return jax.lax.scan(body, state, (timesteps, table))[0]


def _as_pytree(velocity: Velocity) -> Any:
    is_leaf = jax.tree_util.treedef_is_leaf(jax.tree.structure(velocity))
    return Partial(velocity) if is_leaf else velocity


def _check_range(solver: Solver, start: int, stop: int | None) -> int:
    stop = len(solver) if stop is None else stop
    if not 0 <= start <= stop <= len(solver):
        raise UsageError(f"start and stop must satisfy 0 <= start <= stop <= {len(solver)}; found {start}, {stop}")
    return stop
