"""Flow-matching noise levels: which sigmas a sampler visits, and which timesteps the network is told.

A latent at noise level sigma is (1 - sigma) * clean + sigma * noise. Everything here is float64 numpy, made once on
the host. The shift s bends a grid towards noise, sigma -> s * sigma / (1 + (s - 1) * sigma); `make` and `training` are
the only places that apply it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jvdiff.config import known_fields, tell_once
from jvdiff.errors import CheckpointError, UsageError

SPACINGS = ("karras", "exponential", "beta")  # grids between two ends
LISTS = ("sigmas", "timesteps")  # grids that are given
GRIDS = ("diffusers", "linear", "training", *SPACINGS, *LISTS)
SOLVERS = ("unipc", "euler")
_EPS = 1e-6  # how far below 1 the first sigma of UniPC is


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """N steps from noise to data.

    sigmas: float64 [N+1], strictly falling, the last one 0
    timesteps: float64 [N], in 0..1000, what the network gets at each step (whole numbers where the reference program
        truncates them)
    """

    sigmas: np.ndarray
    timesteps: np.ndarray

    def __len__(self) -> int:
        return len(self.timesteps)


class Defaults(NamedTuple):
    """What a repository's scheduler_config.json asks for, as `diffusion.samplers.read` takes it.

    solver: "unipc" with its order ("unipc:3") where that is not 2, "euler", or "renoise"
    shift: how much the noise levels lean towards noise
    grid: one of GRIDS, with numbers behind it where it has any ("karras:157.4,0.01")
    shift_terminal: the last noise level above 0; None leaves it where it is
    """

    solver: str
    shift: float
    grid: str
    shift_terminal: float | None = None


def make(
    steps: int,
    *,
    shift: float,
    grid: str = "diffusers",
    solver: str = "unipc",
    values: Sequence[float] = (),
    terminal: float | None = None,
    train_steps: int = 1000,
) -> Schedule:
    """The sigmas and timesteps of `steps` steps.

    grid "diffusers", solver "unipc": diffusers' UniPCMultistepScheduler with flow sigmas, as WanPipeline runs it.
        linspace(1, 1/train_steps, steps + 1) without its end, shifted; the first sigma is lowered by 1e-6 because
        log(1 - sigma) is needed there; timesteps are truncated to whole numbers.
    grid "diffusers", solver "euler": diffusers' FlowMatchEulerDiscreteScheduler with its own grid. linspace from 1 to
        the *shifted* 1/train_steps, both ends kept, then shifted; timesteps are not truncated. (That the low end goes
        through the shift twice is diffusers' behaviour, reproduced on purpose; every other point does so once.)
    grid "linear", either solver: linspace(1, 0, steps + 1) without its end, shifted. A pipeline of diffusers that has
        levels of its own gives these to the scheduler. With Euler all of it is float32 arithmetic, as there, because
        networks that tell timesteps apart finely notice; timesteps are truncated for UniPC alone.
    grid "training", either solver: the authors' programs of video models (FlowUniPCMultistepScheduler, built with
        shift 1 and shifted in set_timesteps), which begin at the highest level of training.
        linspace(1 - 1/train_steps, 0, steps + 1) without its end, shifted; timesteps truncated.
    grid "karras", "exponential", "beta", solver "euler": diffusers' spacings between the ends of its own grid, or
        between `values` (highest, lowest). Timesteps are not truncated.
    grid "karras", solver "unipc": `karras` between `values`, by default those of 1000 linear betas; no shift.
    grid "sigmas": `values`, shifted; as diffusers takes `sigmas=`, so that UniPC's timesteps are truncated.
    grid "timesteps": sigma is the shifted value / train_steps, and the network gets train_steps * sigma, not truncated.
        UniPC lowers the first sigma of a list by 1e-6 where it is 1.

    terminal: the sigmas are stretched so that this is the last one above 0 (diffusers' shift_terminal).

    Raises UsageError for steps < 1, a shift that is not a positive finite number, an unknown name, values that are not
    those of the grid, or noise levels that do not fall.
    """
    _check_count("steps", steps)
    _check_count("train_steps", train_steps)
    _check_shift(shift)
    if grid not in GRIDS:
        raise UsageError(f"grid must be one of {', '.join(GRIDS)}; found {grid!r}")
    if solver not in SOLVERS:
        raise UsageError(f"solver must be one of {', '.join(SOLVERS)}; found {solver!r}")
    _check_values(steps, grid, solver, values, train_steps)
    unipc = solver == "unipc"
    if unipc and grid == "karras":
        if terminal is not None:
            raise UsageError("shift_terminal does nothing to unipc on the grid karras; leave it out.")
        highest, lowest = values or edges(np.linspace(1e-4, 0.02, 1000, dtype=np.float32))
        return karras(steps, sigma_max=highest, sigma_min=lowest, train_steps=train_steps)
    sigmas = _shifted(_unshifted(steps, shift, grid, solver, values, train_steps), shift)
    if terminal is not None:
        sigmas = _stretched(sigmas, terminal)
    if grid in SPACINGS:
        sigmas = _spaced(grid, steps, *(values or sigmas[[0, -1]]))
    if unipc and grid != "training" and abs(sigmas[0] - 1) < _EPS:
        sigmas[0] -= _EPS
    if not np.all(np.diff(sigmas, append=0.0) < 0):
        raise UsageError(
            f"noise levels cannot be told apart at shift {shift}: of {steps} steps the first are "
            f"{np.round(sigmas[:3], 6).tolist()}; take fewer steps or a shift near 5."
        )
    truncated = grid == "training" or (unipc and grid != "timesteps")
    timesteps = (sigmas * train_steps).astype(np.float64)
    return _schedule(sigmas, np.trunc(timesteps) if truncated else timesteps)


def _unshifted(steps: int, shift: float, grid: str, solver: str, values: Sequence[float], train_steps: int) -> Any:
    if grid in LISTS:
        return np.asarray(values, np.float64) / (train_steps if grid == "timesteps" else 1)
    if grid == "training":
        # The official program keeps this end in float32; a little more than 0.999, it decides some truncations.
        return np.linspace(float(np.float32(1 - 1 / train_steps)), 0, steps + 1)[:-1]
    if grid == "linear":
        return np.linspace(1, 0, steps + 1)[:-1].astype(np.float64 if solver == "unipc" else np.float32)
    if solver == "unipc":
        return np.linspace(1, 1 / train_steps, steps + 1)[:-1]
    return np.linspace(1, _shifted(1 / train_steps, shift), steps)


def _check_values(steps: int, grid: str, solver: str, values: Sequence[float], train_steps: int) -> None:
    """Raises UsageError unless the numbers are those that a grid takes."""
    if solver == "unipc" and grid in ("exponential", "beta"):
        raise UsageError(f"grid is {grid!r}; unipc has no such levels of a flow. Expected another grid, or euler.")
    if not (values or grid in LISTS):
        return
    most = train_steps if grid == "timesteps" else math.inf if solver == "unipc" and grid == "karras" else 1
    falling = all(map(_is_number, values)) and np.all(np.diff([*values, 0.0]) < 0) and max(values, default=1) <= most
    if grid not in (*SPACINGS, *LISTS) or not falling:
        what = "no numbers" if grid not in (*SPACINGS, *LISTS) else f"falling numbers above 0, at most {most}"
        raise UsageError(f"grid {grid!r} has the numbers {list(values)!r:.120}; expected {what}.")
    count = steps if grid in LISTS else 2
    if len(values) != count:
        whose = f"one for each of {steps} steps" if grid in LISTS else "the highest level and the lowest"
        raise UsageError(f"grid {grid!r} has {len(values)} numbers; expected {whose}.")


def _stretched(sigmas: np.ndarray, terminal: float) -> np.ndarray:
    """1 - (1 - sigma) / c, with c such that the last is `terminal`."""
    if not (_is_number(terminal) and 0 < terminal < 1):
        raise UsageError(f"shift_terminal is {terminal!r}; expected a number between 0 and 1, both excluded.")
    clean = 1 - sigmas
    if not clean[-1] > 0:
        raise UsageError(f"shift_terminal is {terminal}, and there is no noise level below 1 to move; take more steps.")
    return 1 - clean / (clean[-1] / (1 - terminal))  # in this order, which decides truncations


def _spaced(spacing: str, steps: int, highest: float, lowest: float) -> np.ndarray:
    if spacing == "karras":
        return _karras(steps, highest, lowest, 7.0)
    if spacing == "exponential":
        return np.exp(np.linspace(math.log(highest), math.log(lowest), steps))
    from scipy.special import betaincinv  # takes a while to import

    return lowest + (highest - lowest) * betaincinv(0.6, 0.6, 1 - np.linspace(0, 1, steps))


def _karras(steps: int, highest: float, lowest: float, rho: float) -> np.ndarray:
    return np.linspace(highest ** (1 / rho), lowest ** (1 / rho), steps) ** rho


def edges(betas: np.ndarray) -> tuple[float, float]:
    """The highest and the lowest noise-to-signal ratio of betas float32 [N], in the arithmetic of torch."""
    clean = np.cumprod((1 - betas).astype(np.float64)).astype(np.float32)  # torch multiplies in float64
    levels = np.sqrt((1 - clean) / clean)
    return float(levels[-1]), float(levels[0])


def karras(
    steps: int, *, sigma_max: float = 200.0, sigma_min: float = 0.01, rho: float = 7.0, train_steps: int = 1000
) -> Schedule:
    """The noise levels of Karras et al. (arXiv:2206.00364) as flow-matching sigmas s / (1 + s), from sigma_max to
    sigma_min, both ends kept; timesteps truncated. With the authors' programs' `use_karras_sigmas` (Cosmos) n steps
    are n + 1 of these.

    Raises UsageError for steps < 1 or train_steps < 1.
    """
    _check_count("steps", steps)
    _check_count("train_steps", train_steps)
    levels = _karras(steps, sigma_max, sigma_min, rho)
    sigmas = levels / (1 + levels)
    return _schedule(sigmas, np.trunc(sigmas * train_steps))


def training(
    *,
    shift: float,
    sigma_max: float = 1.0,
    sigma_min: float = 0.0,
    extra_one_step: bool = True,
    train_steps: int = 1000,
) -> Schedule:
    """All noise levels that a flow-matching network of the Self-Forcing family was trained at, the highest first.

    linspace(sigma_max, sigma_min, train_steps + 1) without its end (`extra_one_step`), or train_steps points with both
    ends; shifted. Timesteps are train_steps * sigma, not truncated. LingBot-World has sigma_max 0.999.
    (The 0 that ends every Schedule comes besides: `Schedule.sigmas` has one number more than the table.)

    Raises UsageError for a shift that is not a positive finite number, train_steps < 1, or ends that are not
    1 >= sigma_max > sigma_min >= 0.
    """
    _check_shift(shift)
    _check_count("train_steps", train_steps)
    if not (_is_number(sigma_max) and _is_number(sigma_min) and 1 >= sigma_max > sigma_min >= 0):
        raise UsageError(f"expected 1 >= sigma_max > sigma_min >= 0, found {sigma_max!r} and {sigma_min!r}")
    grid = np.linspace(sigma_max, sigma_min, train_steps + bool(extra_one_step))[:train_steps]
    sigmas = _shifted(grid, shift)
    return _schedule(sigmas, sigmas * train_steps)


def self_forcing(
    denoising_timesteps: Sequence[int] = (1000, 750, 500, 250),
    *,
    shift: float = 8.0,
    warp: bool = True,
    integer: bool = False,
    sigma_max: float = 1.0,
    sigma_min: float = 0.0,
    extra_one_step: bool = True,
    train_steps: int = 1000,
) -> Schedule:
    """The few steps of a distilled network (Self-Forcing, arXiv:2506.08009; FlashDreams' FlowMatchScheduler).

    denoising_timesteps count down the entries of the `training` table, so that d means entry train_steps - d; 0 means
    its last entry, told to the network as timestep 0.
    warp: the network gets the entry's timestep (shift 5: 1000, 937.5, 833.33, 625). Without: it gets d itself, and
        sigma is that of the entry whose timestep is nearest.
    integer: what the network gets is truncated to a whole number, as LingBot-World's int64 timesteps are.
    The default shift is FlashDreams'; the published Self-Forcing checkpoints were trained with 5.

    Raises UsageError as `training`, and for denoising_timesteps that are not whole numbers from train_steps to 0 which
    fall, or of which two share a noise level.
    """
    table = training(
        shift=shift, sigma_max=sigma_max, sigma_min=sigma_min, extra_one_step=extra_one_step, train_steps=train_steps
    )
    given = tuple(denoising_timesteps)
    whole = all(isinstance(d, int | np.integer) and not isinstance(d, bool) for d in given)
    if not given or not whole or not train_steps >= given[0] or not given[-1] >= 0 or np.any(np.diff(given) >= 0):
        raise UsageError(
            f"denoising_timesteps must be falling whole numbers from {train_steps} to 0, found {denoising_timesteps!r}"
        )
    if warp:
        entries = np.array([min(train_steps - d, train_steps - 1) for d in given])
        sigmas, timesteps = table.sigmas[entries], np.where(np.array(given) > 0, table.timesteps[entries], 0.0)
    else:
        sigmas = np.array([nearest_sigma(d, table.timesteps, table.sigmas) for d in given])
        timesteps = np.array(given, np.float64)
    if integer:
        timesteps = np.trunc(timesteps + 1e-6)  # 0.58 * 1000 is 579.9999999999999
    if np.any(np.diff(sigmas, append=0.0) >= 0):
        raise UsageError(
            f"denoising_timesteps {given} at shift {shift} have the noise levels {np.round(sigmas, 6).tolist()}; "
            "expected falling ones above 0. Leave out one of those that are equal"
        )
    return _schedule(sigmas, timesteps)


def nearest_sigma(t: float, timesteps: np.ndarray, sigmas: np.ndarray) -> float:
    """The sigma of the entry whose timestep is nearest to t, the first of two that are equally near. timesteps [N],
    sigmas [N] or longer.

    For a step that has to be an entry of a table. To noise to the level that a network is told, take t / 1000 instead:
    the nearest entry of few steps may be far away.

    Raises UsageError for a t that is not a finite number.
    """
    if not _is_number(t):
        raise UsageError(f"a timestep must be a finite number, found {t!r}")
    return float(sigmas[np.argmin(np.abs(np.asarray(timesteps) - t))])


def _schedule(sigmas: np.ndarray, timesteps: np.ndarray) -> Schedule:
    sigmas = np.append(sigmas, 0.0)
    sigmas.flags.writeable = timesteps.flags.writeable = False
    return Schedule(sigmas, timesteps)


def _shifted(sigma: Any, shift: float) -> Any:
    return shift * sigma / (1 + (shift - 1) * sigma)


def _check_shift(shift: Any) -> None:
    if not _is_number(shift) or not shift > 0:
        raise UsageError(f"shift must be a positive finite number, found {shift!r}")


def _check_count(name: str, count: Any) -> None:
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1:
        raise UsageError(f"{name} must be a whole number of at least 1, found {count!r}")


# The keys of diffusers' classes: (the class's default, the values that we can reproduce). ANY: without effect on flow
# sigmas, whatever it says. NUMBER: the shift itself. LEVEL: a sigma.
# TERMINAL: a level below 1, or nothing.
_ANY, _NUMBER, _LEVEL, _TERMINAL = "any", "number", "level", "terminal"
_WHERE = "scheduler_config.json"
_UNIPC = {
    "num_train_timesteps": (1000, (1000,)),
    "beta_start": (0.0001, _ANY),
    "beta_end": (0.02, _ANY),
    "beta_schedule": ("linear", _ANY),
    "trained_betas": (None, _ANY),
    "solver_order": (2, (1, 2, 3)),
    "prediction_type": ("epsilon", ("flow_prediction",)),
    "thresholding": (False, (False,)),
    "dynamic_thresholding_ratio": (0.995, _ANY),
    "sample_max_value": (1.0, _ANY),
    "predict_x0": (True, (True,)),
    "solver_type": ("bh2", ("bh2", "midpoint", "heun", "logrho")),  # diffusers runs bh2 for the last three
    "lower_order_final": (True, (True,)),
    "disable_corrector": ([], ([],)),
    "solver_p": (None, (None,)),
    "use_karras_sigmas": (False, (False, True)),
    "use_exponential_sigmas": (False, (False,)),
    "use_beta_sigmas": (False, (False,)),
    "use_flow_sigmas": (False, (True,)),
    "flow_shift": (1.0, _NUMBER),
    "timestep_spacing": ("linspace", ("linspace", "leading", "trailing")),  # flow sigmas replace it
    "steps_offset": (0, _ANY),
    "final_sigmas_type": ("zero", ("zero",)),
    "rescale_betas_zero_snr": (False, _ANY),
    "use_dynamic_shifting": (False, (False,)),
    "time_shift_type": ("exponential", _ANY),
    "sigma_min": (None, _ANY),
    "sigma_max": (None, _ANY),
    "shift_terminal": (None, _TERMINAL),
}
_EULER = {
    "num_train_timesteps": (1000, (1000,)),
    "shift": (1.0, _NUMBER),
    "use_dynamic_shifting": (False, (False,)),
    "base_shift": (0.5, _ANY),
    "max_shift": (1.15, _ANY),
    "base_image_seq_len": (256, _ANY),
    "max_image_seq_len": (4096, _ANY),
    "invert_sigmas": (False, (False,)),
    "shift_terminal": (None, _TERMINAL),
    "use_karras_sigmas": (False, (False, True)),
    "use_exponential_sigmas": (False, (False, True)),
    "use_beta_sigmas": (False, (False, True)),
    "time_shift_type": ("exponential", ("exponential", "linear")),
    "stochastic_sampling": (False, (False, True)),
    "sigma_min": (None, _ANY),  # no argument of the class, which reads what another scheduler left there
    "sigma_max": (None, _ANY),
}
_REASONS = {  # why a value is refused that diffusers takes, or seems to
    "use_dynamic_shifting": "a dynamic shift follows a number mu, which no pipeline gives that jvdiff runs",
    "solver_type": "bh1 makes NaN of the last step, to noise level 0",
    "lower_order_final": "an order above 1 makes infinity of the last step, to noise level 0",
    "final_sigmas_type": "it leaves noise in the clip",
    "use_exponential_sigmas": "their levels are noise-to-signal ratios, not those of a flow",
    "use_beta_sigmas": "their levels are noise-to-signal ratios, not those of a flow",
    "invert_sigmas": "it turns noise and data around, for models of another kind",
}
# Arguments of diffusers' other schedulers. `CLASS.from_config(other.config)`, the documented way to change a scheduler,
# leaves them in the file that it writes, and the class, which has no such argument, does not see them.
_OTHERS = frozenset({
    *_UNIPC, *_EULER,
    *("algorithm_type", "block_length", "clip_sample", "clip_sample_range", "eta", "euler_at_final", "gamma"),
    *("interpolation_type", "lambda_min_clipped", "num_inference_steps", "original_inference_steps", "rho"),
    *("s_churn", "s_max", "s_min", "s_noise", "scale_factors", "scaler", "set_alpha_to_one", "sigma_data"),
    *("sigma_schedule", "skip_prk_steps", "snr_shift_scale", "stage_range", "stages", "timestep_scaling"),
    *("timestep_type", "tau_func", "upscale_mode", "use_lu_lambdas", "variance_type"),
})  # fmt: skip
_SELF_FORCING_NAME = "SelfForcingFlowMatchScheduler"
_SELF_FORCING = {
    "num_inference_steps": (100, (1000,)),  # the length of its table, not of a run
    "num_train_timesteps": (1000, (1000,)),
    "shift": (3.0, _NUMBER),
    "sigma_max": (1.0, _LEVEL),
    "sigma_min": (0.003 / 1.002, _LEVEL),
    "inverse_timesteps": (False, (False,)),
    "extra_one_step": (False, (False, True)),
    "reverse_sigmas": (False, (False,)),
    "training": (False, _ANY),  # weights of a loss
}
_CLASSES = {  # _class_name: (solver, key of the shift, table)
    "UniPCMultistepScheduler": ("unipc", "flow_shift", _UNIPC),
    "FlowMatchEulerDiscreteScheduler": ("euler", "shift", _EULER),
}


def from_scheduler_config(config: Mapping[str, Any]) -> Defaults:
    """The sampler of a scheduler_config.json, read as diffusers reads it (absent keys: class defaults).

    Keys that diffusers leaves there of the scheduler before (`from_config`) do nothing, as in diffusers, and are told.

    Raises CheckpointError naming the key and its value where diffusers would sample in a way that we do not
    reproduce, and for a key that no scheduler has, so that nothing is dropped silently.
    """
    name = config.get("_class_name")
    if name not in [*_CLASSES]:  # a list: what a damaged file has may be a dict
        raise CheckpointError(
            f"{_WHERE}: _class_name is {name!r}, a scheduler that jvdiff does not have.\n"
            f"Expected one of: {', '.join(_CLASSES)}.\n"
            "Use a repository with one of these, or give solver, shift and grid yourself."
        )
    solver, shift_key, table = _CLASSES[name]
    others = _check_config(config, table)
    values = {key: config.get(key, default) for key, (default, _) in table.items()}
    shift = values[shift_key]
    elsewhere = {key: config[key] for _, key, _ in _CLASSES.values() if key in others and config[key] != shift}
    if elsewhere and shift_key not in config:
        (key, value), *_ = elsewhere.items()
        raise CheckpointError(
            f"{_WHERE}: {key} is {value!r:.80}, and a {name} reads {shift_key} alone, which is not there (1.0).\n"
            f"Which of the two is meant cannot be told. Write {shift_key} into the file, or give shift yourself."
        )
    if others:
        tell_once(
            f"{_WHERE}: a {name} does not read {', '.join(others)}, of the scheduler before, and neither does jvdiff; "
            f"its shift is {shift}"
        )
    if solver == "unipc" and values["solver_order"] != 2:
        solver = f"unipc:{values['solver_order']}"
    if values.get("stochastic_sampling"):
        solver = "renoise"
    return Defaults(solver, float(shift), *_grid_of(values, solver))


def _grid_of(values: Mapping[str, Any], solver: str) -> tuple[str, float | None]:
    """The grid with its numbers, and shift_terminal, that a scheduler's complete values ask for."""
    spacings = [spacing for spacing in SPACINGS if values[f"use_{spacing}_sigmas"]]
    terminal = float(values["shift_terminal"]) if values["shift_terminal"] else None
    if len(spacings) > 1:
        raise CheckpointError(
            f"{_WHERE}: use_{spacings[0]}_sigmas and use_{spacings[1]}_sigmas are both true; diffusers refuses that "
            "too.\nSet one of them to false, or give solver, shift and grid yourself."
        )
    if not spacings:
        return "diffusers", terminal
    ends = [values["sigma_max"], values["sigma_min"]]
    if not all(end is None or (_is_number(end) and end > 0) for end in ends):
        raise CheckpointError(f"{_WHERE}: sigma_max and sigma_min are {ends}; expected positive numbers, or null.")
    if solver.startswith("unipc"):
        terminal = None  # which diffusers applies to its own grid alone
        own = edges(_betas(values)) if None in ends else ends
    elif ends == [None, None]:
        return spacings[0], terminal  # between the ends of Euler's own grid, which steps and shift decide
    elif None in ends:
        raise CheckpointError(f"{_WHERE}: sigma_max and sigma_min are {ends}; expected both, or neither of them.")
    else:
        own = ends
    numbers = [float(a if b is None else b) for a, b in zip(own, ends, strict=True)]
    return f"{spacings[0]}:{','.join(map(repr, numbers))}", terminal


def _betas(values: Mapping[str, Any]) -> np.ndarray:
    """float32 [1000]: what UniPC's levels of Karras et al. lie between, even with flow sigmas."""
    if values["trained_betas"] is not None:
        return np.asarray(values["trained_betas"], np.float32)
    kind, first, last = (values[f"beta_{key}"] for key in ("schedule", "start", "end"))
    if kind not in ("linear", "scaled_linear") or values["rescale_betas_zero_snr"]:
        raise CheckpointError(
            f"{_WHERE}: use_karras_sigmas is true, beta_schedule {kind!r:.80} and rescale_betas_zero_snr "
            f"{values['rescale_betas_zero_snr']!r:.80}.\nExpected linear or scaled_linear, and false: the levels lie "
            "between those of the betas.\nGive sigma_max and sigma_min in the file, or grid yourself."
        )
    power = 1 if kind == "linear" else 0.5
    return np.linspace(first**power, last**power, 1000, dtype=np.float32) ** np.float32(1 / power)


def from_self_forcing_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments shift, sigma_max, sigma_min and extra_one_step of `training` and `self_forcing`, from the
    scheduler_config.json of a causal repository, read as FastVideo's SelfForcingFlowMatchScheduler reads it (absent
    keys: its defaults). Which steps are taken, the file does not say.

    Raises CheckpointError as `from_scheduler_config`.
    """
    if (name := config.get("_class_name")) != _SELF_FORCING_NAME:
        raise CheckpointError(f"{_WHERE}: _class_name is {name!r}; expected {_SELF_FORCING_NAME!r}.")
    _check_config(config, _SELF_FORCING)
    given = {key: config.get(key, default) for key, (default, _) in _SELF_FORCING.items()}
    numbers = {key: float(given[key]) for key in ("shift", "sigma_max", "sigma_min")}
    return numbers | {"extra_one_step": given["extra_one_step"]}


def _check_config(config: Mapping[str, Any], table: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """The keys that other schedulers have; CheckpointError for one that none has, or a value that is not allowed."""
    name = config["_class_name"]
    others = [key for key in config if key in _OTHERS and key not in table]
    known_fields(f"{_WHERE} of a {name}", config, (*table, *others))
    for key, (default, allowed) in table.items():
        value = config.get(key, default)
        good, expected = _allowed(value, allowed)
        if not good:
            raise CheckpointError(
                f"{_WHERE}: {key} is {value!r}{'' if key in config else ' (absent, the default of ' + name + ')'}.\n"
                f"Expected {expected}; {_REASONS.get(key, 'jvdiff samples flow-matching models only')}.\n"
                "Use a repository with a supported scheduler, or give solver, shift and grid yourself."
            )
    return others


def _allowed(value: Any, allowed: Any) -> tuple[bool, str]:
    """Whether a value of a scheduler's table is one that we can reproduce, and which are."""
    if allowed is _ANY:
        return True, ""
    if allowed is _NUMBER:
        return _is_number(value) and value > 0, "a positive finite number"
    if allowed is _LEVEL:
        return _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"
    if allowed is _TERMINAL:  # 0 is none to diffusers
        return value is None or (_is_number(value) and 0 <= value < 1), "a number from 0, below 1, or null"
    good = any(type(value) is type(a) and value == a for a in allowed)
    return good, " or ".join(repr(a) for a in allowed)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and math.isfinite(value)
