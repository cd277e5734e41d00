import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from jvdiff.diffusion import classifier_free, denoise, denoise_scan, sampling, schedules, solvers
from jvdiff.errors import UsageError

B, T, H, W, C, D = 2, 3, 5, 4, 4, 32
KEYS = jax.random.split(jax.random.key(0), 8)
NOISE = jax.random.normal(KEYS[0], (B, T, H, W, C))
COND, UNCOND = jax.random.normal(KEYS[1], (2, B, C))
SHAPES = {"time": (1, 1, C), "qkv": (C, 3 * D), "out": (D, C), "up": (C, 2 * D), "down": (2 * D, C)}
PARAMS = {
    name: jax.random.normal(key, shape) / shape[-2] ** 0.5
    for key, (name, shape) in zip(KEYS[2:], SHAPES.items(), strict=False)
}
BOTH = pytest.mark.parametrize("name", sorted(solvers.SOLVERS))


def network(params, x, t, condition):
    """A transformer block with one head: attention, MLP, normalisation, time and condition added."""
    h = x.reshape(x.shape[0], -1, C) + jnp.sin(t / 100)[:, None, None] * params["time"] + condition[:, None]
    q, k, v = jnp.split(h @ params["qkv"], 3, axis=-1)
    weights = jax.nn.softmax(jnp.einsum("bld,bsd->bls", q, k) * D**-0.5)
    h = h + jnp.einsum("bls,bsd->bld", weights, v) @ params["out"]
    h = h * jax.lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6)
    h = h + jax.nn.gelu(h @ params["up"]) @ params["down"]
    return h.reshape(x.shape)


def guided(params=PARAMS, scale=4.0, mode="batched"):
    return classifier_free(Partial(network, params), COND, UNCOND, scale, mode)


def make(name, steps, shift=5.0):
    return solvers.SOLVERS[name](schedules.make(steps, shift=shift, solver=name))


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def copy(state):
    return jax.tree.map(np.array, state)


@BOTH
@pytest.mark.parametrize(("mode", "steps"), [("batched", 1), ("batched", 6), ("sequential", 3)])
def test_loop_and_scan_are_bit_equal(name, mode, steps):
    solver, velocity = make(name, steps), guided(mode=mode)
    loop = denoise(velocity, solver, solver.init(NOISE))
    scan = denoise_scan(velocity, solver, solver.init(NOISE))
    assert np.isfinite(loop.x).all() and np.std(loop.x - NOISE) > 0.1
    assert_equal(loop, scan)


@BOTH
def test_loop_and_scan_are_bit_equal_on_analytic_flows(name):
    solver = make(name, 7)
    for velocity in (lambda x, t: x, lambda x, t: jnp.cos(x) * (t / 1000)[:, None, None, None, None]):
        state = denoise(velocity, solver, solver.init(NOISE))
        assert_equal(state, denoise_scan(velocity, solver, solver.init(NOISE)))


@BOTH
@pytest.mark.parametrize("at", (1, 5, 6))
def test_resumed_equals_uninterrupted(name, at):
    solver, velocity = make(name, 6), guided()
    whole = denoise(velocity, solver, solver.init(NOISE))
    saved = copy(denoise(velocity, solver, solver.init(NOISE), stop=at))  # plain numpy arrays, as from a file
    assert_equal(whole, denoise_scan(velocity, solver, saved, start=at))
    assert_equal(whole, denoise(velocity, solver, saved, start=at))


@pytest.fixture
def compiled():
    """The durations of the compilations that happen while a test runs."""
    durations = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            durations.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield durations
    jax.monitoring.unregister_event_duration_listener(listen)


def test_compiles_once(compiled):
    """Over steps, numbers of steps, shifts, weights, prompts and guidance scales; also resumed from numpy arrays."""
    traces = []

    def traced(params, x, t, condition):
        traces.append(x.shape)
        return network(params, x, t, condition)

    def run(steps, shift, params, scale):
        solver = make("unipc", steps, shift)
        state, velocity = solver.init(NOISE), classifier_free(Partial(traced, params), COND, UNCOND, scale)
        compiled.clear()
        state = denoise(velocity, solver, state, stop=steps - 1)
        denoise(velocity, solver, copy(state), start=steps - 1)
        return len(compiled)

    assert run(5, 3.0, PARAMS, 4.0) == 1
    assert run(3, 8.0, jax.tree.map(lambda p: 2 * p, PARAMS), 2.5) == 0
    assert traces == [(2 * B, T, H, W, C)]


def test_parameters_are_not_constants_of_the_program():
    solver, velocity = make("unipc", 2), guided()
    args = velocity, solver.init(NOISE), solver.timesteps[0], solver.table[0]
    assert not jax.make_jaxpr(lambda *a: sampling.step(solver.advance, *a))(*args).consts
    text = sampling.step.lower(solver.advance, *args).as_text()
    constants = [line for line in text.splitlines() if "stablehlo.constant" in line]
    assert not [line for line in constants if f"x{2 * D}x" in line or f"x{3 * D}x" in line]
    assert text.count("tf.aliasing_output") == 4  # every buffer of the state is donated, and used


@BOTH
def test_callback_sees_each_step_and_can_stop(name):
    solver, velocity = make(name, 5), guided()
    seen = {}
    last = denoise(velocity, solver, solver.init(NOISE), callback=lambda done, s: seen.update({done: np.array(s.x)}))
    assert list(seen) == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(seen[5], last.x)
    state = denoise(velocity, solver, solver.init(NOISE), callback=lambda done, s: done == 3)
    np.testing.assert_array_equal(state.x, seen[3])
    assert_equal(denoise(velocity, solver, state, start=3), last)


def test_callback_exceptions_pass_through():
    def callback(done, state):
        raise KeyboardInterrupt

    solver = make("euler", 2)
    with pytest.raises(KeyboardInterrupt):
        denoise(lambda x, t: x, solver, solver.init(NOISE), callback=callback)


@pytest.mark.parametrize("start,stop", [(-1, None), (0, 4), (3, 2), (4, None)])
def test_bad_range(start, stop):
    solver = make("euler", 3)
    for run in (denoise, denoise_scan):
        with pytest.raises(UsageError, match="0 <= start <= stop <= 3"):
            run(lambda x, t: x, solver, solver.init(NOISE), start=start, stop=stop)


def test_velocity_gets_one_timestep_per_row_in_float32():
    solver = make("euler", 3)

    def velocity(x, t):
        assert t.shape == (B,) and t.dtype == x.dtype == jnp.float32
        return jnp.broadcast_to(t[:, None, None, None, None], x.shape)

    state = denoise(velocity, solver, solver.init(jnp.zeros_like(NOISE)))
    want = (solver.table[:, 0].astype(np.float64) * solver.timesteps).sum()
    np.testing.assert_allclose(state.x, np.full(NOISE.shape, want), rtol=1e-6)


@BOTH
def test_two_velocities_in_turn(name):
    """A high-noise and a low-noise expert are two calls."""
    solver, high, low = make(name, 4), guided(scale=3.0), guided(scale=1)
    state = denoise(high, solver, solver.init(NOISE), stop=2)
    state = denoise(low, solver, state, start=2)
    want = denoise_scan(low, solver, denoise_scan(high, solver, solver.init(NOISE), stop=2), start=2)
    assert_equal(state, want)


@BOTH
def test_gradients_against_finite_differences(name):
    solver = make(name, 4, shift=3.0)
    target = jax.random.normal(KEYS[7], NOISE.shape)

    def loss(noise, params, scale):
        x = denoise_scan(guided(params, scale), solver, solver.init(noise)).x
        return jnp.mean((x - target) ** 2)

    args = (NOISE, PARAMS, 2.0)
    grads = jax.grad(loss, argnums=(0, 1, 2))(*args)
    assert all(np.isfinite(g).all() and np.any(g != 0) for g in jax.tree.leaves(grads))
    for argnum, eps in ((0, 1e-2), (1, 3e-3), (2, 1e-2)):
        direction = jax.tree.map(jnp.sign, grads[argnum])  # a large slope, well above float32 rounding

        def at(size, argnum=argnum, direction=direction):
            moved = jax.tree.map(lambda p, d: p + size * d, args[argnum], direction)
            return loss(*args[:argnum], moved, *args[argnum + 1 :])

        slope = sum(jnp.abs(g).sum() for g in jax.tree.leaves(grads[argnum]))
        central = (8 * (at(eps) - at(-eps)) - (at(2 * eps) - at(-2 * eps))) / (12 * eps)
        np.testing.assert_allclose(slope, central, rtol=1e-2)


def test_gradient_by_a_closed_over_value():
    solver = make("euler", 3)

    def final(a):
        return denoise_scan(lambda x, t: a * x, solver, solver.init(jnp.ones((1, 1)))).x.sum()

    factors = 1 + 0.5 * solver.table[:, 0].astype(np.float64)
    want = sum(solver.table[i, 0] * np.prod(factors) / factors[i] for i in range(3))
    np.testing.assert_allclose(jax.grad(final)(0.5), want, rtol=1e-5)


def test_sharded_batch_keeps_its_sharding_and_compiles_once(compiled):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    noise = jax.random.normal(KEYS[7], (8, T, H, W, C))
    cond = jax.random.normal(KEYS[6], (8, C))
    solver = make("unipc", 4)
    want = denoise(Partial(plain, PARAMS, cond), solver, solver.init(noise))
    velocity = Partial(plain, jax.device_put(PARAMS, everywhere), jax.device_put(cond, rows))
    state = jax.device_put(solver.init(noise), rows)
    compiled.clear()
    got = denoise(velocity, solver, state)
    assert len(compiled) == 1
    assert all(leaf.sharding.is_equivalent_to(rows, 5) for leaf in got)
    np.testing.assert_allclose(got.x, want.x, rtol=1e-4, atol=1e-5)


def plain(params, condition, x, t):
    return network(params, x, t, condition)
