import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff.diffusion import denoise, schedules, solvers

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "goldens" / "schedules.json").read_text())
MEAN, SPREAD = 0.7, 1.0  # of the Gaussian data below


def golden_field(x, t):
    return jnp.sin(2 * x) + x * (t / 1000)[:, None] - 0.3


def gaussian_velocity(x, t):
    """The exact velocity for data N(MEAN, SPREAD^2): E[noise - clean | x at sigma]."""
    sigma = (t / 1000)[:, None]
    variance = (1 - sigma) ** 2 * SPREAD**2 + sigma**2
    return -MEAN + (sigma - (1 - sigma) * SPREAD**2) / variance * (x - (1 - sigma) * MEAN)


def gaussian_solution(x, sigma):
    """Where the flow takes x from `sigma` to 0: its z-score does not change."""
    return MEAN + SPREAD * (x - (1 - sigma) * MEAN) / np.sqrt((1 - sigma) ** 2 * SPREAD**2 + sigma**2)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: "{grid}-{solver}-{steps}-{shift}".format(**c))
def test_golden(case):
    schedule = schedules.make(case["steps"], shift=case["shift"], grid=case["grid"], solver=case["solver"])
    solver = solvers.SOLVERS[case["solver"]](schedule)
    state = denoise(golden_field, solver, solver.init(jnp.asarray(GOLDEN["noise"], jnp.float32)))
    want = np.asarray(case["latents"])
    assert np.linalg.norm(np.asarray(state.x) - want) <= 5e-6 * np.linalg.norm(want)


@pytest.mark.parametrize("steps", (1, 2, 3, 9))
@pytest.mark.parametrize("name", sorted(solvers.SOLVERS))
def test_constant_velocity_is_exact(name, steps):
    noise, clean = jax.random.normal(jax.random.key(0), (2, 2, 5))
    schedule = schedules.make(steps, shift=5.0, solver=name)
    sigma = schedule.sigmas[0]
    solver = solvers.SOLVERS[name](schedule)
    start = (1 - sigma) * np.asarray(clean) + sigma * np.asarray(noise)
    state = denoise(lambda x, t: noise - clean, solver, solver.init(jnp.asarray(start, jnp.float32)))
    np.testing.assert_allclose(state.x, clean, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name,low,high", [("euler", 0.9, 1.1), ("unipc", 1.9, 2.6)])
def test_order_of_convergence(name, low, high):
    errors = []
    for steps in (20, 40, 80, 160):
        grid = schedules.make(steps, shift=1.0, grid="wan")
        schedule = schedules.Schedule(grid.sigmas, grid.sigmas[:-1] * 1000)  # not truncated: the exact field
        solver = solvers.SOLVERS[name](schedule)
        x = np.linspace(-2, 2, 9)[None].astype(np.float32)
        state = denoise(gaussian_velocity, solver, solver.init(jnp.asarray(x)))
        errors.append(np.abs(np.asarray(state.x) - gaussian_solution(x, schedule.sigmas[0])).max())
    orders = -np.diff(np.log2(errors))
    assert np.all((low < orders) & (orders < high)), (errors, orders)


def test_unipc_beats_euler_at_equal_cost():
    error = {}
    for name in ("euler", "unipc"):
        solver = solvers.SOLVERS[name](schedules.make(20, shift=1.0, grid="wan"))
        x = np.linspace(-2, 2, 9)[None].astype(np.float32)
        state = denoise(gaussian_velocity, solver, solver.init(jnp.asarray(x)))
        error[name] = np.abs(np.asarray(state.x) - gaussian_solution(x, 0.999)).max()
    assert error["unipc"] < error["euler"] / 10


@pytest.mark.parametrize("steps", (1, 2, 3, 50))
@pytest.mark.parametrize("name", sorted(solvers.SOLVERS))
def test_tables_are_finite(name, steps):
    solver = solvers.SOLVERS[name](schedules.make(steps, shift=3.0, solver=name))
    assert np.isfinite(solver.table).all() and solver.table.dtype == np.float32
    assert len(solver) == steps == len(solver.table)


def test_last_unipc_step_is_the_clean_estimate():
    solver = solvers.unipc(schedules.make(4, shift=3.0))
    assert solver.table[-1, -3:].tolist() == [0, 1, 0]


@pytest.mark.parametrize("name", sorted(solvers.SOLVERS))
def test_step_index_may_be_traced(name):
    solver = solvers.SOLVERS[name](schedules.make(3, shift=3.0, solver=name))
    state = other = solver.init(jnp.ones((1, 4)))
    traced = jax.jit(lambda state, i: solver.step(state, i, jnp.sin(state.x)))
    for i in range(3):
        state = solver.step(state, i, jnp.sin(state.x))
        other = traced(other, i)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state, other)


@pytest.mark.parametrize("name", sorted(solvers.SOLVERS))
def test_state_is_float32_and_a_copy(name):
    solver = solvers.SOLVERS[name](schedules.make(2, shift=3.0, solver=name))
    noise = jnp.ones((1, 2), jnp.bfloat16)
    state = denoise(lambda x, t: x.astype(jnp.bfloat16), solver, solver.init(noise))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state))
    noise = jnp.ones((1, 2))
    denoise(lambda x, t: x, solver, solver.init(noise))
    assert noise.sum() == 2  # not donated with the state
