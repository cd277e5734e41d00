import json
import pathlib

import numpy as np
import pytest

from jvdiff.diffusion import schedules
from jvdiff.errors import CheckpointError, UsageError

TESTS = pathlib.Path(__file__).parents[1]
GOLDEN = json.loads((TESTS / "goldens" / "schedules.json").read_text())
CONFIGS = TESTS / "data" / "scheduler_configs"


def read(name):
    return json.loads((CONFIGS / f"{name}.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: "{grid}-{solver}-{steps}-{shift}".format(**c))
def test_golden(case):
    schedule = schedules.make(case["steps"], shift=case["shift"], grid=case["grid"], solver=case["solver"])
    np.testing.assert_allclose(schedule.sigmas, case["sigmas"], rtol=0, atol=6e-8)  # float32 in the reference
    if case["solver"] == "unipc":
        np.testing.assert_array_equal(schedule.timesteps, case["timesteps"])
    else:
        np.testing.assert_allclose(schedule.timesteps, case["timesteps"], rtol=4e-7)


def test_shift_is_applied_once():
    """Shift 12, 40 steps: applied twice, the official grid would start at 0.9999930 (vllm-project/vllm-omni#7576)."""
    wan = schedules.make(40, shift=12.0, grid="training")
    np.testing.assert_allclose(wan.sigmas[:3], [0.9999166, 0.9977826, 0.9955462], rtol=0, atol=5e-8)
    diffusers = schedules.make(40, shift=12.0)
    np.testing.assert_allclose(diffusers.sigmas[:3], [0.999999, 0.9978700, 0.9956378], rtol=0, atol=5e-8)
    np.testing.assert_array_equal(diffusers.timesteps[:3], [999, 997, 995])


def test_timesteps_are_truncated_for_unipc_only():
    assert schedules.make(4, shift=3.0).timesteps.tolist() == [999, 900, 750, 500]
    assert schedules.make(4, shift=3.0, grid="training").timesteps.tolist() == [999, 899, 749, 499]
    assert schedules.make(3, shift=1.0, grid="training").timesteps.tolist() == [999, 666, 333]
    euler = schedules.make(4, shift=3.0, solver="euler").timesteps
    assert euler[0] == 1000 and np.any(euler != np.trunc(euler))


def test_the_linear_grid_is_float32_for_euler():
    """Not the grid of Euler's own scheduler (1000, 934, 781, 47), and to the last bit what float32 makes of it."""
    schedule = schedules.make(4, shift=7.0, grid="linear", solver="euler")
    np.testing.assert_array_equal(schedule.timesteps, np.float32([1000, 954.5454, 875, 700]))
    fifty = schedules.make(50, shift=7.0, grid="linear", solver="euler")
    np.testing.assert_array_equal(fifty.timesteps[:3], np.float32([1000, 997.0930, 994.0829]))
    np.testing.assert_array_equal(fifty.sigmas, np.float32(fifty.sigmas))
    assert schedules.make(4, shift=7.0, grid="linear").timesteps.tolist() == [999, 954, 875, 700]


@pytest.mark.parametrize("steps", (1, 2, 5, 50, 1000))
@pytest.mark.parametrize("shift", (0.5, 1, 3.0, 17.0))
@pytest.mark.parametrize(
    "grid,solver", [(grid, solver) for grid in ("diffusers", "linear", "training") for solver in ("unipc", "euler")]
)
def test_every_schedule_falls_to_zero(grid, solver, shift, steps):
    schedule = schedules.make(steps, shift=shift, grid=grid, solver=solver)
    assert len(schedule) == steps and schedule.sigmas.shape == (steps + 1,)
    assert schedule.sigmas.dtype == schedule.timesteps.dtype == np.float64
    assert np.all(np.diff(schedule.sigmas) < 0) and schedule.sigmas[-1] == 0 and schedule.sigmas[0] <= 1
    assert np.all(np.diff(schedule.timesteps) <= 0)
    assert np.all((schedule.timesteps >= 0) & (schedule.timesteps <= 1000))
    with pytest.raises(ValueError):
        schedule.sigmas[0] = 2


@pytest.mark.parametrize(
    "steps,kwargs,name",
    [
        (0, {"shift": 3.0}, "steps"),
        (-1, {"shift": 3.0}, "steps"),
        (2.0, {"shift": 3.0}, "steps"),
        (True, {"shift": 3.0}, "steps"),
        (4, {"shift": 0.0}, "shift"),
        (4, {"shift": float("nan")}, "shift"),
        (4, {"shift": float("inf")}, "shift"),
        (4, {"shift": "3"}, "shift"),
        (4, {"shift": 3.0, "grid": "wan"}, "grid must be one of"),
        (4, {"shift": 3.0, "grid": "beta"}, "unipc has no such levels"),
        (4, {"shift": 3.0, "grid": "karras", "terminal": 0.1}, "shift_terminal does nothing"),
        (4, {"shift": 3.0, "grid": "karras", "values": (0.1, 0.9)}, "falling numbers"),
        (4, {"shift": 3.0, "grid": "karras", "values": (0.9, 0.5, 0.1)}, "the highest level and the lowest"),
        (4, {"shift": 3.0, "grid": "karras", "solver": "euler", "values": (80.0, 0.1)}, "at most 1"),
        (2, {"shift": 3.0, "grid": "diffusers", "values": (0.9, 0.1)}, "expected no numbers"),
        (2, {"shift": 3.0, "grid": "sigmas", "values": (0.9, 0.0)}, "falling numbers above 0, at most 1"),
        (2, {"shift": 3.0, "grid": "sigmas", "values": (0.9, 0.9)}, "falling numbers"),
        (2, {"shift": 3.0, "grid": "sigmas", "values": (1.1, 0.9)}, "at most 1"),
        (2, {"shift": 3.0, "grid": "sigmas", "values": (float("nan"), 0.9)}, "falling numbers"),
        (2, {"shift": 3.0, "grid": "sigmas"}, "0 numbers; expected one for each of 2 steps"),
        (2, {"shift": 3.0, "grid": "timesteps", "values": (1001, 900)}, "at most 1000"),
        (2, {"shift": 1e9, "grid": "sigmas", "values": (1.0, 0.9999)}, "cannot be told apart at shift"),
        (2, {"shift": 3.0, "terminal": 1.0}, "between 0 and 1"),
        (1, {"shift": 3.0, "terminal": 0.1}, "no noise level below 1"),
        (4, {"shift": 3.0, "solver": "dpm++"}, "solver"),
    ],
)
def test_bad_arguments(steps, kwargs, name):
    with pytest.raises(UsageError, match=name):
        schedules.make(steps, **kwargs)


def float64_table(shift, sigma_max=1.0):
    """The training table, written out: entry j of 1000."""
    grid = [sigma_max * (1000 - j) / 1000 for j in range(1000)]
    return np.array([shift * g / (1 + (shift - 1) * g) for g in grid])


@pytest.mark.parametrize("shift,sigma_max", [(5.0, 1.0), (8.0, 1.0), (10.0, 0.999)])
def test_training_table(shift, sigma_max):
    table = schedules.training(shift=shift, sigma_max=sigma_max)
    assert len(table) == 1000 and table.sigmas[-1] == 0
    np.testing.assert_allclose(table.sigmas[:-1], float64_table(shift, sigma_max), rtol=1e-12)
    np.testing.assert_allclose(table.timesteps, 1000 * table.sigmas[:-1], rtol=1e-12)


def test_training_table_with_both_ends():
    table = schedules.training(shift=1.0, sigma_max=1.0, sigma_min=0.5, extra_one_step=False, train_steps=3)
    assert table.sigmas.tolist() == [1, 0.75, 0.5, 0] and table.timesteps.tolist() == [3, 2.25, 1.5]


@pytest.mark.parametrize(
    "given,kwargs,sigmas,timesteps",
    [
        ((1000, 750, 500, 250), {"shift": 5.0}, [1, 0.9375, 0.8333333, 0.625], [1000, 937.5, 833.33333, 625]),
        ((1000, 750, 500, 250), {}, [1, 0.96, 0.8888889, 0.7272727], [1000, 960, 888.88889, 727.27273]),
        ((1000, 757, 522), {"warp": False}, [1, 28 / 37, 12 / 23], [1000, 757, 522]),  # CausVid; 280/1000, 120/1000
        ((1000, 750, 500, 250), {"integer": True}, [1, 0.96, 0.8888889, 0.7272727], [1000, 960, 888, 727]),
        (
            (1000, 821, 642, 321),  # LingBot-World
            {"shift": 10.0, "sigma_max": 0.999, "integer": True},
            [0.9998999, 0.9785458, 0.9470422, 0.8251926],
            [999, 978, 947, 825],
        ),
        ((1000, 0), {"shift": 5.0}, [1, 5 / 1004], [1000, 0]),  # 0: the last entry, and still told as 0
        ((1000, 580, 29), {"shift": 1.0, "integer": True}, [1, 0.58, 0.029], [1000, 580, 29]),  # rounding decides not
    ],
    ids=("shift-5", "default", "not-warped", "integer", "sigma-max", "zero", "no-shift"),
)
def test_self_forcing(given, kwargs, sigmas, timesteps):
    schedule = schedules.self_forcing(given, **kwargs)
    assert schedule.sigmas.dtype == schedule.timesteps.dtype == np.float64
    np.testing.assert_allclose(schedule.sigmas, [*sigmas, 0], rtol=0, atol=5e-8)
    np.testing.assert_allclose(schedule.timesteps, timesteps, rtol=0, atol=5e-6)
    if kwargs.get("integer"):
        assert np.all(schedule.timesteps == np.trunc(schedule.timesteps))


def test_nearest_sigma():
    table, unipc = schedules.training(shift=5.0), schedules.make(50, shift=5.0, grid="training")
    assert schedules.nearest_sigma(128, table.timesteps, table.sigmas) == pytest.approx(0.129928, abs=5e-7)
    assert schedules.nearest_sigma(128, unipc.timesteps, unipc.sigmas) == pytest.approx(0.0925, abs=5e-5)
    assert schedules.nearest_sigma(0, table.timesteps, table.sigmas) == table.sigmas[999]  # never the closing 0
    first = schedules.nearest_sigma(2.0, np.array([3.0, 1.0]), np.array([0.3, 0.1, 0.0]))
    assert first == 0.3  # of two that are equally near
    with pytest.raises(UsageError, match="finite"):
        schedules.nearest_sigma(float("nan"), table.timesteps, table.sigmas)


def test_steps_of_unipc_on_the_official_grid():
    schedule = schedules.make(50, shift=5.0, grid="training")
    assert schedule.timesteps[[0, 1, 2, -2, -1]].tolist() == [999, 995, 991, 172, 92]
    np.testing.assert_allclose(schedule.sigmas[[0, -2]], [0.9997998, 0.092507], rtol=0, atol=5e-7)


@pytest.mark.parametrize(
    "kwargs,message",
    [
        ({"denoising_timesteps": ()}, "falling whole numbers from 1000 to 0"),
        ({"denoising_timesteps": (500, 750)}, r"falling.*\(500, 750\)"),
        ({"denoising_timesteps": (500, 500)}, "falling"),
        ({"denoising_timesteps": (1001,)}, "from 1000 to 0"),
        ({"denoising_timesteps": (500, -1)}, "from 1000 to 0"),
        ({"denoising_timesteps": (999.5,)}, "whole numbers"),
        ({"denoising_timesteps": (True,)}, "whole numbers"),
        ({"denoising_timesteps": (1000, 1, 0)}, "noise levels .*equal"),
        ({"warp": False, "denoising_timesteps": (4, 3)}, "noise levels .*equal"),  # entries are 8 apart there
        ({"shift": 0}, "shift"),
        ({"shift": None}, "shift"),
        ({"sigma_max": 1.5}, "sigma_max"),
        ({"sigma_min": 1.0}, "sigma_min"),
        ({"train_steps": 0}, "train_steps"),
    ],
)
def test_bad_self_forcing(kwargs, message):
    with pytest.raises(UsageError, match=message):
        schedules.self_forcing(**kwargs)


@pytest.mark.parametrize(
    "name,expected",
    [
        ("wan_2_1", ("unipc", 3.0, "diffusers", None)),
        ("wan_2_2_a14b", ("unipc", 3.0, "diffusers", None)),
        ("wan_2_2_ti2v_5b", ("unipc", 5.0, "diffusers", None)),
        ("hunyuan_video", ("euler", 7.0, "diffusers", None)),
    ],
)
def test_published_configs(name, expected):
    assert schedules.from_scheduler_config(read(name)) == expected


def test_every_published_config_is_tested():
    assert len(list(CONFIGS.glob("*.json"))) == 5


def test_few_step_scheduler_is_refused_by_name():
    with pytest.raises(CheckpointError, match="SelfForcingFlowMatchScheduler"):
        schedules.from_scheduler_config(read("self_forcing_wan_2_1"))


def test_published_self_forcing_config():
    found = schedules.from_self_forcing_config(read("self_forcing_wan_2_1"))
    assert found == {"shift": 5.0, "sigma_max": 1.0, "sigma_min": 0.0, "extra_one_step": True}
    assert schedules.self_forcing(**found).timesteps[1] == 937.5
    minimal = {"_class_name": "SelfForcingFlowMatchScheduler", "num_inference_steps": 1000}
    found = schedules.from_self_forcing_config(minimal)  # FastVideo's defaults
    assert found == {"shift": 3.0, "sigma_max": 1.0, "sigma_min": 0.003 / 1.002, "extra_one_step": False}


@pytest.mark.parametrize(
    "key,value",
    [
        ("shift", 0),
        ("shift", "5"),
        ("sigma_min", -0.1),
        ("sigma_max", float("nan")),
        ("extra_one_step", 1),
        ("num_inference_steps", 4),
        ("num_train_timesteps", 500),
        ("inverse_timesteps", True),
        ("reverse_sigmas", True),
        ("sihft", 5.0),
        ("_class_name", "UniPCMultistepScheduler"),
    ],
)
def test_self_forcing_configs_that_are_refused(key, value):
    with pytest.raises(CheckpointError) as error:
        schedules.from_self_forcing_config(read("self_forcing_wan_2_1") | {key: value})
    message = str(error.value)
    assert key in message and repr(value) in message and len(message.splitlines()) <= 6


def test_absent_keys_take_the_class_defaults():
    minimal = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    assert schedules.from_scheduler_config(minimal) == ("euler", 1.0, "diffusers", None)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    minimal = {"_class_name": "UniPCMultistepScheduler"} | flow
    assert schedules.from_scheduler_config(minimal) == ("unipc", 1.0, "diffusers", None)
    with pytest.raises(CheckpointError, match=r"prediction_type is 'epsilon' \(absent"):
        schedules.from_scheduler_config({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True})


@pytest.mark.parametrize(
    "base,key,value",
    [
        ("wan_2_1", "solver_order", 4),
        ("wan_2_1", "solver_order", True),
        ("wan_2_1", "solver_type", "bh1"),
        ("wan_2_1", "final_sigmas_type", "sigma_min"),
        ("wan_2_1", "lower_order_final", False),
        ("wan_2_1", "disable_corrector", [0]),
        ("wan_2_1", "use_flow_sigmas", False),
        ("wan_2_1", "use_exponential_sigmas", True),
        ("wan_2_1", "use_beta_sigmas", True),
        ("wan_2_1", "shift_terminal", 1.0),
        ("wan_2_1", "prediction_type", "v_prediction"),
        ("wan_2_1", "predict_x0", False),
        ("wan_2_1", "thresholding", True),
        ("wan_2_1", "flow_shift", "3.0"),
        ("wan_2_1", "flow_shift", float("nan")),
        ("wan_2_1", "flow_shift", 0),
        ("wan_2_1", "flow_shift", None),
        ("wan_2_1", "num_train_timesteps", 10**9),
        ("wan_2_2_a14b", "use_dynamic_shifting", True),
        ("hunyuan_video", "use_dynamic_shifting", True),
        ("hunyuan_video", "stochastic_sampling", 1),
        ("hunyuan_video", "invert_sigmas", True),
        ("hunyuan_video", "shift_terminal", -0.1),
        ("hunyuan_video", "shift", True),
        ("hunyuan_video", "sihft", 3.0),
        ("hunyuan_video", "_class_name", "DDIMScheduler"),
        ("hunyuan_video", "_class_name", {}),
    ],
)
def test_what_we_cannot_reproduce_is_refused(base, key, value):
    with pytest.raises(CheckpointError) as error:
        schedules.from_scheduler_config(read(base) | {key: value})
    message = str(error.value)
    assert key in message and repr(value) in message and len(message.splitlines()) <= 6


@pytest.mark.parametrize(
    "base,asked,message",
    [
        ("wan_2_1", {"solver_type": "bh1"}, "bh1 makes NaN of the last step"),
        ("wan_2_2_a14b", {"use_dynamic_shifting": True}, "follows a number mu"),
        ("wan_2_1", {"use_beta_sigmas": True}, "noise-to-signal ratios, not those of a flow"),
        (
            "hunyuan_video",
            {"use_beta_sigmas": True, "use_karras_sigmas": True},
            "both true; diffusers refuses",
        ),
        ("wan_2_1", {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"}, "linear or scaled_linear"),
        ("wan_2_1", {"use_karras_sigmas": True, "sigma_min": -1}, "positive numbers, or null"),
        ("hunyuan_video", {"use_karras_sigmas": True, "sigma_min": 0.1}, "both, or neither"),
    ],
)
def test_why_a_config_is_refused(base, asked, message):
    with pytest.raises(CheckpointError, match=message):
        schedules.from_scheduler_config(read(base) | asked)


@pytest.mark.parametrize(
    "base,asked,expected",
    [
        ("wan_2_1", {"solver_order": 3, "shift_terminal": 0.1}, ("unipc:3", 3.0, "diffusers", 0.1)),
        ("wan_2_1", {"shift_terminal": 0}, ("unipc", 3.0, "diffusers", None)),
        (
            "wan_2_1",
            {"use_karras_sigmas": True, "sigma_max": 80, "sigma_min": 0.002, "shift_terminal": 0.1},
            ("unipc", 3.0, "karras:80.0,0.002", None),
        ),
        ("hunyuan_video", {"use_beta_sigmas": True, "shift_terminal": 0.1}, ("euler", 7.0, "beta", 0.1)),
        ("hunyuan_video", {"stochastic_sampling": True}, ("renoise", 7.0, "diffusers", None)),
        (
            "hunyuan_video",
            {"use_karras_sigmas": True, "sigma_max": 0.9, "sigma_min": 0.1},  # left by another scheduler
            ("euler", 7.0, "karras:0.9,0.1", None),
        ),
    ],
)
def test_what_a_config_asks_for(base, asked, expected):
    assert schedules.from_scheduler_config(read(base) | asked) == expected


def test_a_list_of_sigmas_is_shifted_and_unipc_truncates():
    euler = schedules.make(4, shift=5.0, grid="sigmas", solver="euler", values=(1, 0.75, 0.5, 0.25))
    np.testing.assert_allclose(euler.sigmas, [1, 0.9375, 5 / 6, 0.625, 0], rtol=1e-15)
    np.testing.assert_allclose(euler.timesteps, [1000, 937.5, 2500 / 3, 625], rtol=1e-15)
    unipc = schedules.make(4, shift=5.0, grid="sigmas", values=(1, 0.75, 0.5, 0.25))
    np.testing.assert_allclose(unipc.sigmas, [1 - 1e-6, 0.9375, 5 / 6, 0.625, 0], rtol=1e-15)
    assert unipc.timesteps.tolist() == [999, 937, 833, 625]
    assert schedules.make(2, shift=1.0, grid="sigmas", values=(0.9, 0.4)).sigmas.tolist() == [0.9, 0.4, 0]  # no 1


def test_a_list_of_timesteps_is_shifted_and_never_truncated():
    for solver in schedules.SOLVERS:
        schedule = schedules.make(3, shift=5.0, grid="timesteps", solver=solver, values=(1000, 750, 500))
        np.testing.assert_allclose(schedule.sigmas, [1, 0.9375, 5 / 6, 0], rtol=1.01e-6)
        assert (schedule.sigmas[0] == 1) == (solver == "euler")
        np.testing.assert_array_equal(schedule.timesteps, 1000 * schedule.sigmas[:-1])


@pytest.mark.parametrize("grid", schedules.SPACINGS)
def test_spacings_go_from_end_to_end(grid):
    own, spaced = (schedules.make(6, shift=3.0, solver="euler", grid=each).sigmas for each in ("diffusers", grid))
    np.testing.assert_allclose(spaced[[0, -2]], own[[0, -2]], rtol=1e-12)
    assert np.abs(spaced - own).max() > 0.05
    named = schedules.make(6, shift=3.0, solver="euler", grid=grid, values=(0.9, 0.1)).sigmas
    np.testing.assert_allclose(named[[0, -2]], [0.9, 0.1], rtol=1e-12)
