"""Flow-matching noise levels: which sigmas a sampler visits, and which timesteps the network is told.

A latent at noise level sigma is (1 - sigma) * clean + sigma * noise. Everything here is float64 numpy, made once on
the host. The shift s bends a grid towards noise, sigma -> s * sigma / (1 + (s - 1) * sigma), and `make` is the only
place that applies it.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jvdiff.errors import CheckpointError, UsageError

GRIDS = ("diffusers", "wan")
SOLVERS = ("unipc", "euler")


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """N steps from noise to data.

    sigmas: float64 [N+1], strictly falling, the last one 0. timesteps: float64 [N], in 0..1000, what the network gets
    at each step (whole numbers where the reference program truncates them).
    """

    sigmas: np.ndarray
    timesteps: np.ndarray

    def __len__(self) -> int:
        return len(self.timesteps)


class Defaults(NamedTuple):
    """What a repository's scheduler_config.json asks for; the arguments of `make`, and a key of `solvers.SOLVERS`."""

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
    grid "wan", either solver: the official Wan programs (FlowUniPCMultistepScheduler, built with shift 1 and shifted
        in set_timesteps). linspace(1 - 1/train_steps, 0, steps + 1) without its end, shifted; timesteps truncated.

    Raises UsageError for steps < 1, a shift that is not a positive finite number, or an unknown name.
    """
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1:
        raise UsageError(f"steps must be a whole number of at least 1, found {steps!r}")
    if not _is_number(shift) or not shift > 0:
        raise UsageError(f"shift must be a positive finite number, found {shift!r}")
    if grid not in GRIDS:
        raise UsageError(f"grid must be one of {', '.join(GRIDS)}; found {grid!r}")
    if solver not in SOLVERS:
        raise UsageError(f"solver must be one of {', '.join(SOLVERS)}; found {solver!r}")

    def shifted(sigma):
        return shift * sigma / (1 + (shift - 1) * sigma)

    if grid == "wan":
        # The official program keeps this end in float32; a little more than 0.999, it decides some truncations below.
        top = float(np.float32(1 - 1 / train_steps))
        sigmas = shifted(np.linspace(top, 0, steps + 1)[:-1])
        timesteps = np.trunc(sigmas * train_steps)
    elif solver == "unipc":
        sigmas = shifted(np.linspace(1, 1 / train_steps, steps + 1)[:-1])
        sigmas[0] -= 1e-6
        timesteps = np.trunc(sigmas * train_steps)
    else:
        sigmas = shifted(np.linspace(1, shifted(1 / train_steps), steps))
        timesteps = sigmas * train_steps
    sigmas = np.append(sigmas, 0.0)
    sigmas.flags.writeable = timesteps.flags.writeable = False
    return Schedule(sigmas, timesteps)


# The keys of diffusers' classes: (the class's default, the values that we can reproduce). ANY: without effect on flow
# sigmas, whatever it says. NUMBER: the shift itself.
_ANY, _NUMBER = "any", "number"
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
_CLASSES = {  # _class_name: (solver, key of the shift, table)
    "UniPCMultistepScheduler": ("unipc", "flow_shift", _UNIPC),
    "FlowMatchEulerDiscreteScheduler": ("euler", "shift", _EULER),
}


def from_scheduler_config(config: Mapping[str, Any]) -> Defaults:
    """Solver, shift and grid of a scheduler_config.json, read as diffusers reads it (absent keys: class defaults).

    Raises CheckpointError naming the key and its value where diffusers would sample in a way that we do not
    reproduce, and for a key that neither class has, so that nothing is dropped silently.
    """
    where = "scheduler_config.json"
    name = config.get("_class_name")
    if name not in _CLASSES:
        raise CheckpointError(
            f"{where}: _class_name is {name!r}, a scheduler that jvdiff does not have.\n"
            f"Expected one of: {', '.join(_CLASSES)}.\n"
            "Use a repository with one of these, or give solver, shift and grid yourself."
        )
    solver, shift_key, table = _CLASSES[name]
    for key in config:
        if not key.startswith("_") and key not in table:
            near = difflib.get_close_matches(key, table, n=1)
            raise CheckpointError(
                f"{where}: unknown key {key!r} = {config[key]!r} for {name}."
                + (f" Did you mean {near[0]!r}?" if near else "")
                + "\nRemove it if it has no effect, or give solver, shift and grid yourself."
            )
    for key, (default, allowed) in table.items():
        value = config.get(key, default)
        if allowed is _ANY:
            continue
        if allowed is _NUMBER:
            good, expected = _is_number(value) and value > 0, "a positive finite number"
        else:
            good = any(type(value) is type(a) and value == a for a in allowed)
            expected = " or ".join(repr(a) for a in allowed)
        if not good:
            raise CheckpointError(
                f"{where}: {key} is {value!r}{'' if key in config else ' (absent, the default of ' + name + ')'}.\n"
                f"Expected {expected}; jvdiff samples flow-matching models only.\n"
                "Use a repository with a supported scheduler, or give solver, shift and grid yourself."
            )
    return Defaults(solver, float(config.get(shift_key, table[shift_key][0])), "diffusers")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and math.isfinite(value)
