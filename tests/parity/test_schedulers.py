"""Schedules and solvers against diffusers, live: in float64, and as its float32 pipeline runs them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jvdiff.diffusion import denoise, samplers, schedules, solvers, variance_preserving
from jvdiff.errors import CheckpointError

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


@pytest.mark.parametrize("kind,name", [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
@pytest.mark.parametrize("prediction", variance_preserving.PREDICTIONS)
@pytest.mark.parametrize("steps", (1, 2, 8, 50))  # divisors of 1000: diffusers' DDIM assumes it
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers, of a torch tensor
@pytest.mark.parametrize("solver", ("ddim", "unipc"))
def test_variance_preserving(kind, name, prediction, steps, solver):
    """DDIM is Euler's step in the coordinates of flow matching, and UniPC is the same in both."""
    if solver == "unipc" and (kind == "cosine" or prediction == "sample"):
        pytest.skip("diffusers' UniPC moves the last sigma of a cosine, and lowers its order where sigma is 0")
    common = dict(beta_schedule=name, prediction_type=prediction, timestep_spacing="trailing")
    if solver == "ddim":
        scheduler = diffusers.DDIMScheduler(**common, clip_sample=False)
    else:
        linear = dict(beta_start=1e-4, beta_end=0.02)
        scheduler = diffusers.UniPCMultistepScheduler(**common, **linear, solver_order=2, final_sigmas_type="zero")
    scheduler.set_timesteps(steps)
    abar = variance_preserving.alphas_cumprod(kind)
    np.testing.assert_allclose(scheduler.alphas_cumprod, abar, rtol=5e-4 if kind == "cosine" else 1e-5, atol=1e-9)
    schedule = variance_preserving.schedule(abar, steps)
    np.testing.assert_array_equal(scheduler.timesteps, schedule.timesteps)
    np_field, field = random_field(steps)
    x = np.random.default_rng(steps).normal(size=(2, 5, 6))
    reference = torch.tensor(x)
    scheduler.alphas_cumprod = torch.tensor(abar)
    for t in scheduler.timesteps:
        predicted = torch.tensor(np_field(reference.numpy(), int(t)))
        reference = scheduler.step(predicted, t, reference, return_dict=False)[0]
    run = solvers.euler(schedule) if solver == "ddim" else solvers.unipc(schedule)
    flow = variance_preserving.velocity(field, prediction, abar)
    start = variance_preserving.initial(jnp.asarray(x, jnp.float32), schedule)
    found, wanted = np.asarray(denoise(flow, run, run.init(start)).x), reference.numpy()
    # A noise predicted where nearly all is noise: what the network's float32 rounds off counts 1 / sqrt(abar) times.
    worst = 1 / np.sqrt(abar[-1]) if prediction == "epsilon" else 10
    assert np.linalg.norm(found - wanted) <= 1e-6 * worst * np.linalg.norm(wanted)


@pytest.mark.parametrize("kind,name", [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_ancestral(kind, name):
    """One step from everywhere, with the noise taken out: diffusers draws its own."""
    scheduler = diffusers.DDPMScheduler(
        beta_schedule=name, prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False
    )
    scheduler.set_timesteps(20)
    abar = variance_preserving.alphas_cumprod(kind)
    scheduler.alphas_cumprod, scheduler.one = torch.tensor(abar), torch.tensor(1.0, dtype=torch.float64)
    schedule = variance_preserving.schedule(abar, 20)
    run, keys = solvers.ddpm(schedule), jax.random.split(jax.random.key(0), 2)
    np_field, field = random_field(3)
    flow = variance_preserving.velocity(field, "v_prediction", abar)
    x = np.random.default_rng(0).normal(size=(2, 5, 6))
    for i, t in enumerate(scheduler.timesteps):
        z = np.stack([jax.random.normal(jax.random.fold_in(key, i + 1), x.shape[1:]) for key in keys])
        scale, then = (1 / np.hypot(1 - s, s) for s in schedule.sigmas[i : i + 2])
        state = solvers.NoisyState(jnp.asarray(x / scale, jnp.float32), jnp.array(jax.random.key_data(keys)))
        found = np.asarray(denoise(flow, run, state, start=i, stop=i + 1).x) * then
        predicted = torch.tensor(np_field(x, int(t)))
        wanted = scheduler.step(predicted, t, torch.tensor(x), generator=torch.manual_seed(i), return_dict=False)[0]
        drawn = torch.randn(x.shape, generator=torch.manual_seed(i), dtype=torch.float64).numpy()
        noise = 0.0 if i == 19 else float(scheduler._get_variance(t) ** 0.5)
        np.testing.assert_allclose(found - noise * z, wanted.numpy() - noise * drawn, rtol=0, atol=5e-6)


WAN = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


UNIPC, EULER = diffusers.UniPCMultistepScheduler, diffusers.FlowMatchEulerDiscreteScheduler
# Files that diffusers takes, besides those of a plain solver.
FILES = [
    *((UNIPC, WAN | {"solver_order": order}) for order in (1, 2, 3)),
    (UNIPC, WAN | {"solver_order": 3, "flow_shift": 12.0, "shift_terminal": 0.1}),
    (UNIPC, WAN | {"shift_terminal": 0.02}),
    (UNIPC, WAN | {"shift_terminal": 0.0}),
    (UNIPC, WAN | {"use_karras_sigmas": True, "shift_terminal": 0.1}),
    (UNIPC, WAN | {"use_karras_sigmas": True, "solver_order": 3, "beta_schedule": "scaled_linear"}),
    (UNIPC, WAN | {"use_karras_sigmas": True, "sigma_max": 80.0, "solver_order": 1}),
    (UNIPC, WAN | {"use_karras_sigmas": True, "trained_betas": np.linspace(2e-4, 1e-2, 1000).tolist()}),
    *((EULER, {"shift": 5.0, f"use_{spacing}_sigmas": True}) for spacing in schedules.SPACINGS),
    *((EULER, {f"use_{spacing}_sigmas": True, "shift_terminal": 0.1}) for spacing in schedules.SPACINGS),
    (EULER, {"shift": 8.0, "shift_terminal": 0.1}),
    (EULER, {"shift": 3.0, "stochastic_sampling": True}),
    (EULER, {"shift": 3.0, "stochastic_sampling": True, "use_beta_sigmas": True, "shift_terminal": 0.05}),
]


def ours_of(scheduler, steps):
    found = schedules.from_scheduler_config(json.loads(scheduler.to_json_string()))
    return samplers.read(found.solver, steps, found.shift, found.grid, found.shift_terminal)


def stepped(scheduler, field, x, noises, monkeypatch):
    """What diffusers makes of x float32 with these noises, one a step."""
    module = diffusers.schedulers.scheduling_flow_match_euler_discrete
    drawn = iter([*noises, np.zeros_like(x)])
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.tensor(next(drawn)))
    return run_reference(scheduler, field, x, scheduler.timesteps.numpy(), torch.float32)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("steps", (2, 4, 15))
@pytest.mark.parametrize("kind,config", FILES)
def test_files_of_schedulers(kind, config, steps, monkeypatch):
    """Sigmas, timesteps and latents of what a scheduler_config.json asks for, as it is in diffusers."""
    theirs = kind(**config)
    theirs.set_timesteps(steps)
    sampler = ours_of(theirs, steps)
    np.testing.assert_allclose(sampler.schedule.sigmas, theirs.sigmas.numpy(), rtol=0, atol=1e-7)
    if kind is UNIPC:
        np.testing.assert_array_equal(sampler.schedule.timesteps, theirs.timesteps.numpy())
    else:
        np.testing.assert_allclose(sampler.schedule.timesteps, theirs.timesteps.numpy(), rtol=4e-7)
    field, jax_field = random_field(steps)
    x, *noises = np.random.default_rng(steps).normal(size=(steps, 2, 5, 6)).astype(np.float32)
    wanted = stepped(theirs, field, x, noises, monkeypatch)
    noise = jnp.asarray(noises) if config.get("stochastic_sampling") else None
    solver = sampler.make()
    found = denoise(jax_field, solver, solver.init(jnp.asarray(x), noise)).x
    # diffusers' coefficients are float32; those of order 3 are differences of nearly equal numbers
    assert relative(np.asarray(found), wanted) <= (1e-4 if solver.table.shape[1] == 11 else 1e-5)


@pytest.mark.parametrize("order", (1, 3))
@pytest.mark.parametrize("steps", (1, 2, 3, 5, 20))
def test_orders_float64(order, steps):
    schedule = schedules.make(steps, shift=5.0)
    theirs = UNIPC(**WAN | {"solver_order": order, "flow_shift": 5.0})
    theirs.set_timesteps(steps)
    theirs.sigmas = torch.tensor(schedule.sigmas)
    field, jax_field = random_field(order)
    x = np.random.default_rng(order).normal(size=(2, 5, 6)).astype(np.float32).astype(np.float64)
    wanted = run_reference(theirs, field, x, schedule.timesteps, torch.float64)
    solver = solvers.unipc(schedule, order)
    found = denoise(jax_field, solver, solver.init(jnp.asarray(x, jnp.float32))).x
    assert relative(np.asarray(found), wanted) <= 5e-6


LEVELS = (1.0, 0.9, 0.8, 0.55, 0.2)


@pytest.mark.parametrize("sigmas", (LEVELS, LEVELS[1:], (0.9999995, 0.5)))
@pytest.mark.parametrize("kind,config", [(UNIPC, WAN), (EULER, {"shift": 5.0}), FILES[4]])
def test_sigmas_that_are_given(kind, config, sigmas):
    """Both shift them; UniPC lowers the first if it is 1, and truncates what the network is told."""
    theirs = kind(**config)
    theirs.set_timesteps(sigmas=np.array(sigmas))
    found = schedules.from_scheduler_config(json.loads(theirs.to_json_string()))
    text = "sigmas:" + ",".join(map(str, sigmas))
    schedule = samplers.read(found.solver, len(sigmas), found.shift, text, found.shift_terminal).schedule
    np.testing.assert_allclose(schedule.sigmas, theirs.sigmas.numpy(), rtol=0, atol=1.2e-7)
    np.testing.assert_allclose(schedule.timesteps, theirs.timesteps.numpy(), rtol=4e-7)


@pytest.mark.parametrize("steps,shift", [(4, 7.0), (6, 17.0), (30, 5.0), (50, 7.0)])
def test_levels_that_a_pipeline_gives(steps, shift):
    """To the last bit of float32, with Euler; those of UniPC are float64 in both, and it truncates timesteps."""
    given = np.linspace(1.0, 0.0, steps + 1)[:-1]
    for kind, config, solver in ((EULER, {"shift": shift}, "euler"), (UNIPC, WAN | {"flow_shift": shift}, "unipc")):
        theirs = kind(**config)
        theirs.set_timesteps(sigmas=given)
        schedule = samplers.read(solver, steps, shift, "linear").schedule
        np.testing.assert_array_equal(schedule.sigmas.astype(np.float32), theirs.sigmas.numpy())
        np.testing.assert_array_equal(schedule.timesteps.astype(np.float32), theirs.timesteps.numpy())


def test_timesteps_that_are_given():
    """The sigmas are those of diffusers; it tells the network the numbers as given, and warns that they do not fit."""
    given = (1000, 750, 500, 250)
    theirs = EULER(shift=5.0)
    theirs.set_timesteps(timesteps=list(given))
    schedule = samplers.read("euler", 4, 5.0, "timesteps:1000,750,500,250").schedule
    np.testing.assert_allclose(schedule.sigmas, theirs.sigmas.numpy(), rtol=0, atol=1e-7)
    np.testing.assert_array_equal(theirs.timesteps.numpy(), given)
    np.testing.assert_allclose(schedule.timesteps, [1000, 937.5, 2500 / 3, 625], rtol=1e-12)


@pytest.mark.parametrize("stochastic", (False, True))
def test_a_timestep_for_each_token(stochastic, monkeypatch):
    theirs = EULER(shift=3.0, stochastic_sampling=stochastic)
    theirs.set_timesteps(5)
    schedule = schedules.make(5, shift=3.0, solver="euler")
    rng = np.random.default_rng(0)
    x, v, noise = rng.normal(size=(3, 2, 7, 6)).astype(np.float32)
    levels = theirs.timesteps.numpy()
    timestep = np.stack([[0, *levels, 333], rng.uniform(0, 1000, 7)]).astype(np.float32)  # [B,L]
    module = diffusers.schedulers.scheduling_flow_match_euler_discrete
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.tensor(noise))
    sign = 1 if stochastic else -1  # as its own pipelines give it
    told = theirs.timesteps[0], torch.tensor(x)
    kept = {"per_token_timesteps": torch.tensor(timestep), "return_dict": False}
    wanted = theirs.step(torch.tensor(sign * v), *told, **kept)[0].numpy()
    found = solvers.euler_tokens(
        schedule, *map(jnp.asarray, (x, v, timestep)), jnp.asarray(noise) if stochastic else None
    )
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)
    assert not stochastic or np.abs(wanted[:, 2] - x[:, 2]).max() > 0.1
    if not stochastic:
        np.testing.assert_array_equal(found[0, 0], x[0, 0])  # at 0 already


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "asked,reason",
    [({"solver_type": "bh1"}, "makes NaN of the last"), ({"lower_order_final": False}, "makes infinity of the last")],
)
def test_what_is_refused_for_nan_is_not_finite_in_diffusers(asked, reason):
    theirs = UNIPC(**WAN | asked)
    theirs.set_timesteps(4)
    field, _ = random_field(0)
    x = np.ones((1, 2, 6), np.float32)
    assert not np.isfinite(run_reference(theirs, field, x, theirs.timesteps.numpy(), torch.float32)).any()
    with pytest.raises(CheckpointError, match=reason):
        ours_of(theirs, 4)


def swapped():
    """(name, scheduler) as people make them from one another with `CLASS.from_config(other.config)`."""
    unipc, euler = diffusers.UniPCMultistepScheduler, diffusers.FlowMatchEulerDiscreteScheduler
    u, e = unipc(**WAN), euler(shift=3.0)
    yield "UniPC with another shift", unipc.from_config(u.config, flow_shift=5.0)
    yield "Euler, whose own shift is 1", euler.from_config(u.config)
    yield "Euler with the shift", euler.from_config(u.config, shift=3.0)
    yield "UniPC from Euler", unipc.from_config(e.config, **WAN)
    yield "there and back", unipc.from_config(euler.from_config(u.config, shift=8.0).config)
    for name in (n for n in dir(diffusers) if n.endswith("Scheduler") and not n.startswith("Flax")):
        try:
            config = getattr(diffusers, name)().config
        except (TypeError, ValueError, ImportError):  # abstract, or with a package of its own
            continue
        if "num_train_timesteps" in config and config["num_train_timesteps"] == 1000:
            yield f"UniPC from {name}", unipc.from_config(config, **WAN)
            yield f"Euler from {name}", euler.from_config(config, shift=3.0)


@pytest.mark.filterwarnings("ignore")  # of schedulers whose numbers nobody uses here
def test_swapped_schedulers_have_the_sigmas_that_diffusers_gives_them(tmp_path):
    """What `save_pretrained` writes after a swap has keys that the class does not read; neither do we."""
    taken, refused = 0, {}
    for name, scheduler in swapped():
        scheduler.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "scheduler_config.json").read_text())
        again = type(scheduler).from_pretrained(tmp_path)
        try:
            found = schedules.from_scheduler_config(config)
        except CheckpointError as error:
            refused[name] = str(error)
            continue
        again.set_timesteps(20)
        ours = samplers.read(found.solver, 20, found.shift, found.grid, found.shift_terminal).schedule
        np.testing.assert_allclose(ours.sigmas, again.sigmas.numpy(), atol=1e-6, err_msg=name)
        taken += 1
    assert taken > 30 and not any("unknown field" in text for text in refused.values()), refused
