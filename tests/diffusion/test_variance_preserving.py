"""The DDPM process against closed forms: its levels, the predictions, and where samplers take a known distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff.diffusion import denoise, schedules, solvers
from jvdiff.diffusion import variance_preserving as vp
from jvdiff.errors import UsageError

WEIGHTS, MEANS, SPREADS = np.array([0.3, 0.7]), np.array([-2.0, 1.0]), np.array([0.4, 0.25])  # a Gaussian mixture


def expectations(x, signal, spread):
    """E[clean | x] and E[noise | x] of the mixture, in float64 numpy or float32 jnp."""
    xp = jnp if isinstance(x, jax.Array) else np
    dtype = x.dtype
    weights, means, variances = (xp.asarray(v, dtype) for v in (WEIGHTS, MEANS, SPREADS**2))
    x, signal, spread = x[..., None], xp.asarray(signal)[..., None], xp.asarray(spread)[..., None]
    weights, means, variances = (v.reshape((1,) * (x.ndim - 1) + (-1,)) for v in (weights, means, variances))
    total = signal**2 * variances + spread**2
    logits = xp.log(weights) - 0.5 * xp.log(total) - 0.5 * (x - signal * means) ** 2 / total
    share = xp.exp(logits - logits.max(-1, keepdims=True))
    share = share / share.sum(-1, keepdims=True)
    clean = (share * (means + signal * variances / total * (x - signal * means))).sum(-1)
    noise = (share * (spread / total * (x - signal * means))).sum(-1)
    return clean, noise


def perfect(abar, prediction):
    """The network that knows the mixture."""

    def network(x, t):
        now = vp.level(abar, t, x.ndim)
        return vp.target(prediction, *expectations(x, *now), now)

    return network


def cdf(x):
    """Of the clean mixture."""
    erf = np.vectorize(__import__("math").erf)
    return (WEIGHTS * 0.5 * (1 + erf((x[..., None] - MEANS) / SPREADS / np.sqrt(2)))).sum(-1)


@pytest.mark.parametrize("kind", vp.NOISE_SCHEDULES)
def test_levels_fall_from_data_to_noise(kind):
    abar = vp.alphas_cumprod(kind)
    assert abar.dtype == np.float64 and abar.shape == (1000,) and np.all(np.diff(abar) < 0)
    assert abar[0] > 0.9998 and 0 < abar[-1] < 5e-5


def test_levels_against_the_papers_formulas():
    linear = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    np.testing.assert_allclose(vp.alphas_cumprod("linear"), linear, rtol=1e-12)

    def f(t):
        return np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2

    t = np.arange(990)  # the last betas are clipped
    np.testing.assert_allclose(vp.alphas_cumprod("cosine")[:990], f(t + 1) / f(0), rtol=1e-9)


@pytest.mark.parametrize("prediction", vp.PREDICTIONS)
@pytest.mark.parametrize("timestep", [0, 37, 500, 998])
def test_predictions_round_trip(prediction, timestep):
    clean, noise = jax.random.normal(jax.random.key(timestep), (2, 3, 4, 5))
    now = vp.level(vp.alphas_cumprod("linear"), jnp.full(3, timestep), 3)
    x = vp.diffuse(clean, noise, now)
    found = vp.clean_and_noise(prediction, vp.target(prediction, clean, noise, now), x, now)
    worst = {"epsilon": 1 / now.signal, "sample": 1 / now.spread, "v_prediction": jnp.ones(1)}[prediction]
    for part, wanted in zip(found, (clean, noise), strict=True):
        np.testing.assert_allclose(part, wanted, rtol=0, atol=2e-6 * float(worst.max()))


def test_v_is_the_rotation_of_its_parts():
    clean, noise = jax.random.normal(jax.random.key(0), (2, 2, 6))
    now = vp.level(vp.alphas_cumprod(), jnp.array([10, 700]), 2)
    x, v = vp.diffuse(clean, noise, now), vp.v_prediction(clean, noise, now)
    np.testing.assert_allclose(x**2 + v**2, clean**2 + noise**2, rtol=1e-5)
    np.testing.assert_allclose(now.signal * x - now.spread * v, clean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("solver", [solvers.euler, solvers.unipc])
@pytest.mark.parametrize("prediction", vp.PREDICTIONS)
def test_the_exact_score_of_a_mixture_lands_on_it(prediction, solver):
    """The flow in one dimension keeps the order of points: quantiles of the noise become those of the data."""
    abar = vp.alphas_cumprod("linear" if prediction == "epsilon" else "cosine")
    schedule = vp.schedule(abar, 500)
    share = (np.arange(400) + 0.5) / 400
    noise = jnp.asarray(jax.scipy.stats.norm.ppf(share)[None], jnp.float32)
    run = solver(schedule)
    x = denoise(vp.velocity(perfect(abar, prediction), prediction, abar), run, run.init(vp.initial(noise, schedule))).x
    np.testing.assert_allclose(cdf(np.asarray(x, np.float64)[0]), share, rtol=0, atol=6e-3)


def test_ancestral_sampling_has_the_moments_of_the_data():
    abar = vp.alphas_cumprod()
    schedule = vp.schedule(abar, 250)
    noise = jax.random.normal(jax.random.key(1), (4, 5000))
    run = solvers.ddpm(schedule)
    state = run.init(vp.initial(noise, schedule), jax.random.split(jax.random.key(2), len(noise)))
    x = np.asarray(denoise(vp.velocity(perfect(abar, "v_prediction"), "v_prediction", abar), run, state).x, np.float64)
    mean = (WEIGHTS * MEANS).sum()
    variance = (WEIGHTS * (SPREADS**2 + MEANS**2)).sum() - mean**2
    assert abs(x.mean() - mean) < 0.03 and abs(x.var() / variance - 1) < 0.03
    grid = np.linspace(-3, 2, 41)
    empirical = (x.reshape(-1, 1) < grid).mean(0)
    np.testing.assert_allclose(empirical, cdf(grid), rtol=0, atol=0.015)


@pytest.mark.parametrize("kind", vp.NOISE_SCHEDULES)
@pytest.mark.parametrize("steps", [1, 3, 30])
def test_euler_is_ddim_and_ddpm_its_ancestral_form(kind, steps):
    """Against the textbook's formulas in the textbook's coordinates, float64, on a network without meaning."""
    abar = vp.alphas_cumprod(kind)
    schedule = vp.schedule(abar, steps)

    def network(x, t):
        return jnp.sin(2 * x) + t[:, None] / 1000

    standard = jax.random.normal(jax.random.key(3), (2, 7))
    flow = vp.velocity(network, "v_prediction", abar)
    ddim, ddpm = solvers.euler(schedule), solvers.ddpm(schedule)
    keys = jax.random.split(jax.random.key(4), 2)
    found = denoise(flow, ddim, ddim.init(vp.initial(standard, schedule))).x
    noisy = denoise(flow, ddpm, ddpm.init(vp.initial(standard, schedule), keys)).x

    wanted, ancestral = np.asarray(standard, np.float64), np.asarray(standard, np.float64)
    times = schedule.timesteps.astype(int)
    for i, t in enumerate(times):
        now, then = abar[t], abar[times[i + 1]] if i + 1 < steps else 1.0
        v = np.sin(2 * wanted) + t / 1000
        clean, noise = np.sqrt(now) * wanted - np.sqrt(1 - now) * v, np.sqrt(1 - now) * wanted + np.sqrt(now) * v
        wanted = np.sqrt(then) * clean + np.sqrt(1 - then) * noise

        v = np.sin(2 * ancestral) + t / 1000
        clean = np.sqrt(now) * ancestral - np.sqrt(1 - now) * v
        alpha = now / then
        mean = np.sqrt(then) * (1 - alpha) / (1 - now) * clean
        mean = mean + np.sqrt(alpha) * (1 - then) / (1 - now) * ancestral
        z = np.array([jax.random.normal(jax.random.fold_in(key, i + 1), (7,)) for key in keys], np.float64)
        ancestral = mean + np.sqrt((1 - then) / (1 - now) * (1 - alpha)) * z * (i + 1 < steps)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-5)
    np.testing.assert_allclose(noisy, ancestral, rtol=0, atol=3e-5)


@pytest.mark.parametrize("steps", [1, 7, 50, 1000])
def test_schedules_begin_at_the_last_timestep(steps):
    schedule = vp.schedule(vp.alphas_cumprod(), steps)
    assert len(schedule) == steps and schedule.timesteps[0] == 999 and schedule.timesteps[-1] >= 0
    assert np.all(np.diff(schedule.timesteps) < 0) and np.all(np.diff(schedule.sigmas) < 0) and schedule.sigmas[-1] == 0
    assert isinstance(schedule, schedules.Schedule)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vp.alphas_cumprod("square"), "noise schedule is 'square'; expected one of cosine, linear"),
        (lambda: vp.alphas_cumprod(train_steps=1), "train_steps is 1; expected a whole number from 2"),
        (lambda: vp.schedule(vp.alphas_cumprod(), 0), "steps is 0; expected a whole number from 1 to 1000"),
        (lambda: vp.schedule(vp.alphas_cumprod(), 1001), "steps is 1001"),
        (lambda: vp.velocity(None, "x0", vp.alphas_cumprod()), "prediction is 'x0'; expected one of v_prediction"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(UsageError, match=message):
        call()
