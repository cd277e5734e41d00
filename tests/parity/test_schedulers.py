"""Schedules and solvers against diffusers, live: in float64, and as its float32 pipeline runs them."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jvdiff.diffusion import denoise, schedules, solvers

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.parity

STEPS = (1, 2, 3, 4, 8, 20, 50)
SHIFTS = (1.0, 3.0, 5.0, 8.0, 12.0)


def reference(solver, steps, shift):
    if solver == "unipc":
        scheduler = diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        )
    else:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    return scheduler


def random_field(seed, channels=6):
    """A smooth, non-linear velocity with weights of order one, in two languages."""
    rng = np.random.default_rng(seed)
    w1, w2 = rng.normal(size=(2, channels, channels)) / np.sqrt(channels)
    b = rng.normal(size=channels)

    def np_field(x, t):
        return np.tanh(x @ w1 + b * (t / 1000)) @ w2 - 0.5 * x

    f32 = [jnp.asarray(a, jnp.float32) for a in (w1, w2, b)]
    return np_field, Partial(_jax_field, *f32)


def _jax_field(w1, w2, b, x, t):
    time = (t / 1000)[:, None, None] * b[None, None]
    return jnp.tanh(x @ w1 + time) @ w2 - 0.5 * x


def run_reference(scheduler, field, x, timesteps, dtype):
    scheduler.set_begin_index(0)
    x = torch.tensor(x, dtype=dtype)
    for t_ref, t in zip(scheduler.timesteps, timesteps, strict=True):
        v = torch.tensor(field(x.numpy(), t), dtype=dtype)
        x = scheduler.step(v, t_ref, x, return_dict=False)[0]
    return x.numpy()


def run_ours(solver, schedule, field, x):
    s = solvers.SOLVERS[solver](schedule)
    return np.asarray(denoise(field, s, s.init(jnp.asarray(x, jnp.float32))).x)


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("solver", ("unipc", "euler"))
def test_schedule(solver, shift, steps):
    ours = schedules.make(steps, shift=shift, solver=solver)
    theirs = reference(solver, steps, shift)
    np.testing.assert_allclose(ours.sigmas, theirs.sigmas.numpy(), rtol=0, atol=6e-8)
    if solver == "unipc":
        np.testing.assert_array_equal(ours.timesteps, theirs.timesteps.numpy())
    else:
        np.testing.assert_allclose(ours.timesteps, theirs.timesteps.numpy(), rtol=4e-7)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("solver", ("unipc", "euler"))
def test_solver_float64(solver, shift, steps):
    """The reference's arithmetic in float64, on the exact sigmas; ours in float32."""
    schedule = schedules.make(steps, shift=shift, solver=solver)
    for seed in range(2):
        theirs = reference(solver, steps, shift)
        theirs.sigmas = torch.tensor(schedule.sigmas)
        field, jax_field = random_field(seed)
        x = np.random.default_rng(100 + seed).normal(size=(2, 5, 6)).astype(np.float32).astype(np.float64)
        if solver == "unipc":
            want = run_reference(theirs, field, x, schedule.timesteps, torch.float64)
        else:  # its step() computes in float32 whatever it is given; the formula is one line
            want = x
            for t, dt in zip(schedule.timesteps, np.diff(schedule.sigmas), strict=True):
                want = want + dt * field(want, t)
        assert relative(run_ours(solver, schedule, jax_field, x), want) <= 5e-6


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("solver", ("unipc", "euler"))
def test_solver_float32(solver, shift, steps):
    """The reference untouched, as its pipelines run it: float32 sigmas, coefficients and latents."""
    schedule = schedules.make(steps, shift=shift, solver=solver)
    theirs = reference(solver, steps, shift)
    field, jax_field = random_field(2)
    x = np.random.default_rng(102).normal(size=(2, 5, 6)).astype(np.float32)
    want = run_reference(theirs, field, x, theirs.timesteps.numpy(), torch.float32)
    assert relative(run_ours(solver, schedule, jax_field, x), want) <= 5e-6
