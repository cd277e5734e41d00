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

GRIDS = ("diffusers", "training")
SOLVERS = ("unipc", "euler")


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
    """What a repository's scheduler_config.json asks for, as arguments of `make`.

    solver: one of SOLVERS
    shift: how much the noise levels lean towards noise
    grid: one of GRIDS
    """

    solver: str
    shift: float
    grid: str


def make(
    steps: int, *, shift: float, grid: str = "diffusers", solver: str = "unipc", train_steps: int = 1000
) -> Schedule:
    """The sigmas and timesteps of `steps` steps.

    grid "diffusers", solver "unipc": diffusers' UniPCMultistepScheduler with flow sigmas, as WanPipeline runs it.
        linspace(1, 1/train_steps, steps + 1) without its end, shifted; the first sigma is lowered by 1e-6 because
        log(1 - sigma) is needed there; timesteps are truncated to whole numbers.
    grid "diffusers", solver "euler": diffusers' FlowMatchEulerDiscreteScheduler with its own grid. linspace from 1 to
        the *shifted* 1/train_steps, both ends kept, then shifted; timesteps are not truncated. (That the low end goes
        through the shift twice is diffusers' behaviour, reproduced on purpose; every other point does so once.)
    grid "training", either solver: the authors' programs of video models (FlowUniPCMultistepScheduler, built with
        shift 1 and shifted in set_timesteps), which begin at the highest level of training.
        linspace(1 - 1/train_steps, 0, steps + 1) without its end, shifted; timesteps truncated.

    Raises UsageError for steps < 1, a shift that is not a positive finite number, or an unknown name.
    """
    _check_count("steps", steps)
    _check_count("train_steps", train_steps)
    _check_shift(shift)
    if grid not in GRIDS:
        raise UsageError(f"grid must be one of {', '.join(GRIDS)}; found {grid!r}")
    if solver not in SOLVERS:
        raise UsageError(f"solver must be one of {', '.join(SOLVERS)}; found {solver!r}")

    if grid == "training":
        # The official program keeps this end in float32; a little more than 0.999, it decides some truncations below.
        top = float(np.float32(1 - 1 / train_steps))
        sigmas = _shifted(np.linspace(top, 0, steps + 1)[:-1], shift)
        timesteps = np.trunc(sigmas * train_steps)
    elif solver == "unipc":
        sigmas = _shifted(np.linspace(1, 1 / train_steps, steps + 1)[:-1], shift)
        sigmas[0] -= 1e-6
        timesteps = np.trunc(sigmas * train_steps)
    else:
        sigmas = _shifted(np.linspace(1, _shifted(1 / train_steps, shift), steps), shift)
        timesteps = sigmas * train_steps
    return _schedule(sigmas, timesteps)


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
    levels = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps) ** rho
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
_ANY, _NUMBER, _LEVEL = "any", "number", "level"
_WHERE = "scheduler_config.json"
_UNIPC = {
    "num_train_timesteps": (1000, (1000,)),
    "beta_start": (0.0001, _ANY),
    "beta_end": (0.02, _ANY),
    "beta_schedule": ("linear", _ANY),
    "trained_betas": (None, _ANY),
    "solver_order": (2, (2,)),
    "prediction_type": ("epsilon", ("flow_prediction",)),
    "thresholding": (False, (False,)),
    "dynamic_thresholding_ratio": (0.995, _ANY),
    "sample_max_value": (1.0, _ANY),
    "predict_x0": (True, (True,)),
    "solver_type": ("bh2", ("bh2", "midpoint", "heun", "logrho")),  # diffusers runs bh2 for the last three
    "lower_order_final": (True, (True,)),
    "disable_corrector": ([], ([],)),
    "solver_p": (None, (None,)),
    "use_karras_sigmas": (False, (False,)),
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
    "shift_terminal": (None, (None,)),
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
    "shift_terminal": (None, (None,)),
    "use_karras_sigmas": (False, (False,)),
    "use_exponential_sigmas": (False, (False,)),
    "use_beta_sigmas": (False, (False,)),
    "time_shift_type": ("exponential", ("exponential", "linear")),
    "stochastic_sampling": (False, (False,)),
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
    """Solver, shift and grid of a scheduler_config.json, read as diffusers reads it (absent keys: class defaults).

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
    shift = config.get(shift_key, table[shift_key][0])
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
    return Defaults(solver, float(shift), "diffusers")


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
        if allowed is _ANY:
            continue
        if allowed is _NUMBER:
            good, expected = _is_number(value) and value > 0, "a positive finite number"
        elif allowed is _LEVEL:
            good, expected = _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"
        else:
            good = any(type(value) is type(a) and value == a for a in allowed)
            expected = " or ".join(repr(a) for a in allowed)
        if not good:
            raise CheckpointError(
                f"{_WHERE}: {key} is {value!r}{'' if key in config else ' (absent, the default of ' + name + ')'}.\n"
                f"Expected {expected}; jvdiff samples flow-matching models only.\n"
                "Use a repository with a supported scheduler, or give solver, shift and grid yourself."
            )
    return others


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and math.isfinite(value)
