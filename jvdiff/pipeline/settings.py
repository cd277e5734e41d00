"""What decides a clip besides prompt, seed and weights: its settings, complete and checked before anything is computed.

T latent frames · H W latent grid · C latent channels
"""

from __future__ import annotations

import dataclasses
import json
import math
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jvdiff.diffusion import schedules
from jvdiff.errors import CheckpointError, UsageError
from jvdiff.kernels.patterns import read as read_pattern
from jvdiff.models import wan
from jvdiff.models.text import tokenizer as tokenizers
from jvdiff.models.text import umt5

PROMPT_CHARACTERS = 100_000
DEFAULTS_FILE = "jvdiff_defaults.json"
STREAM = "stream"  # the key in it under which a causal repository keeps what streaming needs (`stream_defaults`)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything besides prompt, seed and weights that decides what a clip looks like. Defaults: the Wan 2.1 family's.

    num_frames, height, width count pixels frames and pixels; fps is only written into the file. pattern says which
    tokens see each other (`read_pattern`), attention which implementation computes it. A repository may hold
    its own defaults in `jvdiff_defaults.json` (any of these fields), beside the files that diffusers reads.
    """

    num_frames: int = 81
    height: int = 480
    width: int = 832
    fps: int = 16
    steps: int = 50
    guidance: float = 5.0
    negative_prompt: str = ""
    shift: float = 3.0
    solver: str = "unipc"
    grid: str = "diffusers"
    pattern: str = "dense"
    attention: str | None = None


FIELDS = tuple(field.name for field in dataclasses.fields(Settings))


class Configs(NamedTuple):
    """The three configurations that decide shapes."""

    transformer: wan.DiTConfig
    vae: wan.VAEConfig
    text_encoder: umt5.Config


def resolve(
    configs: Configs, scheduler: Mapping[str, Any], defaults: Mapping[str, Any] | None = None, **given: Any
) -> Settings:
    """Complete, checked settings: what is `given` and not None, else the repository's, else the family's.

    Args:
        scheduler: the content of scheduler_config.json; not read where solver, shift and grid are all known without it.
        defaults: the content of the repository's `jvdiff_defaults.json`.

    Raises:
        UsageError: a value that cannot be; sizes name the nearest ones that can.
        CheckpointError: a scheduler that cannot be reproduced.
    """
    chosen = dict(defaults or {}) | {name: value for name, value in given.items() if value is not None}
    if unknown := sorted(chosen.keys() - set(FIELDS)):
        raise UsageError(f"unknown setting {', '.join(unknown)}; expected some of {', '.join(FIELDS)}.")
    if not {"solver", "shift", "grid"} <= chosen.keys():
        chosen = schedules.from_scheduler_config(scheduler)._asdict() | chosen
    settings = dataclasses.replace(Settings(), **{name: _typed(name, value) for name, value in chosen.items()})
    _check(settings, configs)
    return settings


def read_defaults(path: str | Path) -> dict[str, Any]:
    """The repository's `jvdiff_defaults.json` without its object `stream`; {} if there is none.

    Raises:
        CheckpointError: it is not an object of known settings.
    """
    own = _defaults_file(path)
    own.pop(STREAM, None)
    try:
        if unknown := sorted(own.keys() - set(FIELDS)):
            raise ValueError(f"unknown {', '.join(unknown)}; expected some of {', '.join(FIELDS)}")
        return {name: _typed(name, value) for name, value in own.items()}
    except ValueError as error:  # UsageError is one
        raise CheckpointError(f"{Path(path) / DEFAULTS_FILE}: {error}.") from None


def stream_defaults(path: str | Path) -> dict[str, Any]:
    """The object `stream` of the repository's `jvdiff_defaults.json`, not checked; {} if there is none.

    Raises:
        CheckpointError: it is not an object.
    """
    found = _defaults_file(path).get(STREAM, {})
    if not isinstance(found, dict):
        raise CheckpointError(f"{Path(path) / DEFAULTS_FILE}: {STREAM} is {found!r:.60}, expected an object.")
    return found


def _defaults_file(path: str | Path) -> dict[str, Any]:
    file = Path(path) / DEFAULTS_FILE
    if not file.is_file():
        return {}
    try:
        own = json.loads(file.read_bytes()[: 2**20])
        if not isinstance(own, dict):
            raise ValueError("not a JSON object")
        return own
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}.") from None


def _typed(name: str, value: Any) -> Any:
    """`value` as the type of field `name`; a whole float is a fine int, but nothing is guessed from strings."""
    kind = type(getattr(Settings(), name)) if name != "attention" else str
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if kind is str and isinstance(value, str):
        return value
    if kind is float and number:
        return float(value)
    if kind is int and number and value == value and abs(value) < 2**31 and int(value) == value:
        return int(value)
    what = {int: "a whole number", float: "a number", str: "text"}[kind]
    raise UsageError(f"{name} is {value!r:.80}; expected {what}.")


def _check(settings: Settings, configs: Configs) -> None:
    dit, vae = configs.transformer, configs.vae
    units = (vae.temporal_factor, vae.spatial_factor * dit.patch_size[1], vae.spatial_factor * dit.patch_size[2])
    most = dit.rope_max_seq_len
    for name, unit, extra in zip(("num_frames", "height", "width"), units, (1, 0, 0), strict=True):
        value, low = getattr(settings, name), max(extra, unit * (1 - extra))
        high = (most - 1) * unit + extra if extra else most * unit
        nearest = min(max(round((value - extra) / unit) * unit + extra, low), high)
        if value != nearest:
            rule = f"a multiple of {unit}" + (" plus 1" if extra else "")
            raise UsageError(
                f"{name} is {value}; this model needs {rule} from {low} to {high}. The nearest is {nearest}."
            )
    _within("fps", settings.fps, 1, 240)
    _within("steps", settings.steps, 1, 1000)
    _within("guidance", settings.guidance, 1.0, 100.0, "1 means without guidance")
    _within("shift", settings.shift, 0.01, 100.0)
    _one_of("solver", settings.solver, schedules.SOLVERS)
    _one_of("grid", settings.grid, schedules.GRIDS)
    pattern = read_pattern(settings.pattern, dit.num_attention_heads)
    if settings.attention is not None:
        _one_of("attention", settings.attention, pattern.implementations)
    if settings.negative_prompt:
        check_prompt(settings.negative_prompt, "negative_prompt")


def _within(name: str, value: float, low: float, high: float, note: str = "") -> None:
    if not (math.isfinite(value) and low <= value <= high):
        nearest = low if math.isnan(value) else min(max(value, low), high)
        raise UsageError(
            f"{name} is {value}; expected {low} to {high}{note and f' ({note})'}. The nearest is {nearest}."
        )


def _one_of(name: str, value: str, names: Sequence[str]) -> None:
    if value not in names:
        raise UsageError(f"{name} is {value!r}; expected one of {', '.join(names)}.")


def check_prompt(prompt: Any, name: str = "prompt") -> str:
    """`prompt` itself, if it is text that can be tokenised.

    Raises:
        UsageError: not text, blank, half a surrogate pair, or longer than any prompt.
    """
    if not isinstance(prompt, str):
        raise UsageError(f"{name} is {prompt!r:.80}; expected text.")
    if len(prompt) > PROMPT_CHARACTERS:
        raise UsageError(f"{name} has {len(prompt)} characters; the most is {PROMPT_CHARACTERS}.")
    if not tokenizers.clean(prompt):
        raise UsageError(f"{name} is empty; say what the video shows.")
    return prompt


def check_seed(seed: Any) -> int:
    """`seed` as an int; None draws one, which the caller shows, so that the clip can be made again.

    Raises:
        UsageError: not a whole number from 0 to 2**32 - 1 (more bits would be dropped without a word).
    """
    if seed is None:
        return secrets.randbelow(2**32)
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise UsageError(f"seed is {seed!r:.80}; expected a whole number from 0 to {2**32 - 1}, or none to draw one.")
    return int(seed)


def latent_shape(configs: Configs, settings: Settings) -> tuple[int, int, int, int]:
    """[T,H,W,C] of one clip."""
    vae = configs.vae
    frames = 1 + (settings.num_frames - 1) // vae.temporal_factor
    return frames, settings.height // vae.spatial_factor, settings.width // vae.spatial_factor, vae.z_dim
