import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jvdiff.diffusion import add_noise, denoise, denoise_scan, schedules, solvers
from jvdiff.errors import UsageError

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
        grid = schedules.make(steps, shift=1.0, grid="training")
        schedule = schedules.Schedule(grid.sigmas, grid.sigmas[:-1] * 1000)  # not truncated: the exact field
        solver = solvers.SOLVERS[name](schedule)
        x = np.linspace(-2, 2, 9)[None].astype(np.float32)
        state = denoise(gaussian_velocity, solver, solver.init(jnp.asarray(x)))
        errors.append(np.abs(np.asarray(state.x) - gaussian_solution(x, schedule.sigmas[0])).max())
    orders = -np.diff(np.log2(errors))
    assert np.all((low < orders) & (orders < high)), (errors, orders)


def test_a_higher_order_converges_faster():
    errors, grid = {}, schedules.make(40, shift=1.0, grid="training")
    schedule = schedules.Schedule(grid.sigmas, grid.sigmas[:-1] * 1000)
    x = np.linspace(-2, 2, 9)[None].astype(np.float32)
    for order in (1, 2, 3):
        solver = solvers.unipc(schedule, order)
        state = denoise(gaussian_velocity, solver, solver.init(jnp.asarray(x)))
        errors[order] = np.abs(np.asarray(state.x) - gaussian_solution(x, schedule.sigmas[0])).max()
    assert errors[1] > 3 * errors[2] > 9 * errors[3], errors


def test_order_3_is_resumed_bit_for_bit():
    solver = solvers.unipc(schedules.make(5, shift=3.0), 3)
    whole = denoise_scan(stub, solver, solver.init(X))
    saved = jax.tree.map(np.array, denoise(stub, solver, solver.init(X), stop=3))
    np.testing.assert_array_equal(denoise(stub, solver, saved, start=3).x, whole.x)


def test_unipc_beats_euler_at_equal_cost():
    error = {}
    for name in ("euler", "unipc"):
        solver = solvers.SOLVERS[name](schedules.make(20, shift=1.0, grid="training"))
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


X, KEY = jax.random.normal(jax.random.key(3), (2, 3, 4)), jax.random.key(4)
KEYS = jax.random.split(KEY, 8)  # one for each clip


def stub(x, t):
    """A flow that knows its timestep; x float32 [B,L,C]."""
    return 0.7 * x + 0.1 + t[:, None, None] / 1000


def float64_stub(x, t):
    return 0.7 * x + 0.1 + t / 1000


def assert_near(got, want, bound):
    error = np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)
    assert error <= bound, error


def float64_renoise(x, steps, noises):
    """Self-forcing written out: steps are (sigma, timestep); noises those of the steps after the first."""
    clean = None
    for i, (sigma, t) in enumerate(steps):
        if i > 0:
            x = (1 - sigma) * clean + sigma * noises[i - 1]
        clean = x - sigma * float64_stub(x, t)
    return clean


def noises(count, shape=X.shape):
    def draw(key, i):
        return jax.random.normal(jax.random.fold_in(key, i + 1), shape[1:], jnp.float32)

    return np.array([[draw(key, i) for key in KEYS[: shape[0]]] for i in range(count)], np.float64)


@pytest.mark.parametrize("loop", (denoise, denoise_scan))
@pytest.mark.parametrize(
    "steps,kwargs",
    [
        ([(1, 1000), (0.9375, 937.5), (5 / 6, 2500 / 3), (0.625, 625)], {"shift": 5.0}),
        ([(1, 1000), (0.96, 960), (8 / 9, 8000 / 9), (8 / 11, 8000 / 11)], {}),
        ([(1, 1000), (0.96, 960), (8 / 9, 888), (8 / 11, 727)], {"integer": True}),
        ([(1, 1000), (28 / 37, 757), (12 / 23, 522)], {"denoising_timesteps": (1000, 757, 522), "warp": False}),
        ([(1, 1000)], {"denoising_timesteps": (1000,)}),
    ],
    ids=("shift-5", "shift-8", "integer", "not-warped", "one-step"),
)
def test_renoise_against_float64(steps, kwargs, loop):
    solver = solvers.renoise(schedules.self_forcing(**kwargs))
    state = loop(stub, solver, solver.init(X, KEYS[:2]))
    assert_near(state.x, float64_renoise(np.asarray(X, np.float64), steps, noises(len(steps) - 1)), 2e-6)


def float64_unipc(x, n, shift):
    """UniPC of order 2 as written in float64 step by step, without a table; its grid is the official Wan program's."""
    grid = np.linspace(float(np.float32(0.999)), 0, n + 1)[:-1]
    sigma = np.append(shift * grid / (1 + (shift - 1) * grid), 0)
    alpha, t = 1 - sigma, np.trunc(1000 * sigma)
    lam = np.log(alpha[:-1] / sigma[:-1])
    clean, base, order = [], None, 0  # estimates so far; the corrected sample one step earlier; the predictor's order
    for i in range(n):
        clean.append(x - sigma[i] * float64_stub(x, t[i]))
        if i > 0:
            h = lam[i] - lam[i - 1]
            growth = np.expm1(-h)
            phi = growth / -h - 1
            rest, rho = 0, 0.5
            if order == 2:
                r = (lam[i - 2] - lam[i - 1]) / h
                rho_0, rho = np.linalg.solve([[1, 1], [r, 1]], [phi / growth, 2 * (phi / -h - 0.5) / growth])
                rest = rho_0 * (clean[-3] - clean[-2]) / r
            inner = clean[-2] + rest + rho * (clean[-1] - clean[-2])
            x = sigma[i] / sigma[i - 1] * base - alpha[i] * growth * inner
        order, base = (1 if i in (0, n - 1) else 2), x
        if i == n - 1:
            return clean[-1]
        h = lam[i + 1] - lam[i]
        slope = 0.5 * h / (lam[i - 1] - lam[i]) * (clean[-2] - clean[-1]) if order == 2 else 0
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * np.expm1(-h) * (clean[-1] + slope)


@pytest.mark.parametrize("shift", (5.0, 8.0))
@pytest.mark.parametrize("steps", (1, 2, 3, 4, 50))
def test_unipc_against_float64(steps, shift):
    solver = solvers.unipc(schedules.make(steps, shift=shift, grid="training"))
    state = denoise(stub, solver, solver.init(X))
    assert_near(state.x, float64_unipc(np.asarray(X, np.float64), steps, shift), 5e-6)


@pytest.mark.parametrize("loop", (denoise, denoise_scan))
@pytest.mark.parametrize("steps", (1, 4))
def test_renoise_counts(monkeypatch, steps, loop):
    """N calls of the network and N - 1 draws of noise, counted while the compiled program runs."""
    x = jnp.ones((1, steps, 97 if loop is denoise else 89))  # a shape of its own: what was traced before counts nothing
    counts = {"calls": 0, "draws": 0}

    def count(what):
        counts[what] += 1

    def normal(*args, draw=jax.random.normal):
        jax.debug.callback(lambda: count("draws"))
        return draw(*args)

    def network(x, t):
        jax.debug.callback(lambda: count("calls"))
        return stub(x, t)

    solver = solvers.renoise(schedules.self_forcing((1000, 750, 500, 250)[:steps]))
    state = solver.init(x, KEYS[:1])
    monkeypatch.setattr(jax.random, "normal", normal)
    jax.block_until_ready(loop(network, solver, state))
    jax.effects_barrier()
    assert counts == {"calls": steps, "draws": steps - 1}


def test_renoise_loop_scan_and_resumed_are_bit_equal():
    solver = solvers.renoise(schedules.self_forcing())
    whole = denoise_scan(stub, solver, solver.init(X, KEYS[:2]))
    for at in range(5):
        state = denoise(stub, solver, solver.init(X, KEYS[:2]), stop=at)
        saved = jax.tree.map(np.array, state)  # plain numpy, as from a file
        np.testing.assert_array_equal(denoise(stub, solver, saved, start=at).x, whole.x)


def test_renoise_noise_is_of_key_and_step_only():
    solver = solvers.renoise(schedules.self_forcing())
    one, other = (denoise(stub, solver, solver.init(x, KEYS[:2]), stop=2) for x in (X, X + 1))
    # Step 1 again, from another state with the same keys: the same noise.
    replayed = solver.advance(solver.init(X, KEYS[:2]), jnp.zeros_like(X), solver.table[1])
    want = (1 - solver.table[1, 1]) * X + solver.table[1, 1] * noises(2)[1].astype(np.float32)
    np.testing.assert_allclose(replayed.x, want, rtol=0, atol=1e-6)
    assert np.std(other.x - one.x) < 1e-5  # the states differ by what is left of X: a constant
    different = denoise(stub, solver, solver.init(X, jax.random.split(jax.random.key(5), 2)))
    assert np.abs(different.x - denoise(stub, solver, solver.init(X, KEYS[:2])).x).max() > 0.1


def test_renoise_takes_key_data_too():
    solver = solvers.renoise(schedules.self_forcing())
    data = jax.random.key_data(KEYS[:2])
    typed, raw = (denoise(stub, solver, solver.init(X, keys)) for keys in (KEYS[:2], data))
    np.testing.assert_array_equal(typed.x, raw.x)
    assert data.shape and typed.x.dtype == jnp.float32 and X.sum() != 0  # neither was donated with the state


def test_renoise_takes_the_noise_itself():
    """In place of keys: what the keys would have drawn gives the same latents."""
    solver = solvers.renoise(schedules.self_forcing())
    given = solver.init(X, jnp.asarray(noises(3), jnp.float32))
    np.testing.assert_allclose(
        denoise(stub, solver, given).x, denoise(stub, solver, solver.init(X, KEYS[:2])).x, rtol=0, atol=1e-6
    )


def test_a_clip_is_renoised_by_its_own_key():
    solver = solvers.renoise(schedules.self_forcing())
    together, alone = (denoise(stub, solver, solver.init(X[rows], KEYS[rows])).x for rows in (slice(2), slice(1, 2)))
    np.testing.assert_allclose(together[1], alone[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("noise", "told"),
    [(KEYS[:3], r"uint32\[3, 2\]"), (jax.random.key_data(KEY), r"uint32\[2\]"), (X, r"float32\[2, 3, 4\]")],
)
def test_noise_of_another_shape_is_a_sentence(noise, told):
    with pytest.raises(UsageError, match=rf"noise is {told}; expected a random key for each of 2 clips, or float32"):
        solvers.renoise(schedules.self_forcing()).init(X, noise)


def test_renoise_is_traced_once_for_any_steps():
    shapes = []

    def network(x, t):
        shapes.append(x.shape)
        return stub(x, t)

    for given, shift in [((1000, 750, 500, 250), 8.0), ((1000, 500), 5.0), ((1000,), 5.0)]:
        solver = solvers.renoise(schedules.self_forcing(given, shift=shift))
        denoise(network, solver, solver.init(X, KEYS[:2]))
    assert shapes == [X.shape]


def test_renoise_is_the_same_on_eight_devices():
    solver = solvers.renoise(schedules.self_forcing())
    noise = jax.random.normal(jax.random.key(6), (8, 3, 4))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    x, keys = solver.init(noise, KEYS)
    state = solvers.NoisyState(jax.device_put(x, rows), jax.device_put(keys, everywhere))
    got = denoise(stub, solver, state)
    assert got.x.sharding.is_equivalent_to(rows, 3)
    np.testing.assert_allclose(got.x, denoise(stub, solver, solver.init(noise, KEYS)).x, rtol=0, atol=1e-6)


def test_each_token_goes_to_the_level_below_its_own():
    schedule = schedules.make(4, shift=3.0, solver="euler")
    whole = np.asarray(solvers.euler(schedule).step(solvers.EulerState(X), 1, X).x)  # all at the second level
    timestep = jnp.full(X.shape[:2], schedule.timesteps[1], jnp.float32).at[0, 0].set(0)
    found = np.asarray(solvers.euler_tokens(schedule, X, X, timestep))
    np.testing.assert_array_equal(found[0, 0], X[0, 0])
    np.testing.assert_allclose(found[1], whole[1], rtol=1e-6)
    noised = solvers.euler_tokens(schedule, X, X, timestep, jnp.ones_like(X))
    sigma, below = schedule.sigmas[1:3]
    np.testing.assert_allclose(noised[1], (1 - below) * (1 - sigma) * X[1] + below, atol=1e-6)


def test_add_noise():
    clean = jax.random.normal(jax.random.key(7), (2, 3, 4)).astype(jnp.bfloat16)
    noise = np.asarray(jax.random.normal(KEY, clean.shape, jnp.float32))
    got = add_noise(clean, 0.129928, KEY)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, (1 - 0.129928) * np.asarray(clean, np.float32) + 0.129928 * noise, atol=1e-6)
    sigma = jnp.array([0.25, 0.5])[:, None, None]  # a level for each row
    got = add_noise(clean, sigma, KEY)
    np.testing.assert_allclose(got[1], 0.5 * np.asarray(clean, np.float32)[1] + 0.5 * noise[1], atol=1e-6)
