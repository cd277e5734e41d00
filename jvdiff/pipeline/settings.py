"""What decides a clip besides its subject, seed and weights: complete and checked before anything is computed."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jvdiff import config
from jvdiff.errors import CheckpointError, UsageError
from jvdiff.kernels import Pattern
from jvdiff.models.family import Family, Models
from jvdiff.weights.safetensors import read_json

DEFAULTS_FILE = "jvdiff_defaults.json"
STREAM = "stream"  # the key in it under which a causal repository keeps what streaming needs (`stream_defaults`)


def resolve(family: Family, models: Models, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    """Complete settings, of the family's type: what is given and not None, else the repository's, else the family's.

    Args:
        defaults: the content of the repository's `jvdiff_defaults.json`.

    Raises:
        UsageError: an unknown setting, a value of another type, or out of range.
        CheckpointError: jvdiff has no equivalent of the scheduler.
    """
    config.check_names("setting", given, config.names(family.settings))
    chosen = {name: _plain(value) for name, value in given.items() if value is not None}
    return config.replace(family.settings(), family.complete(models, defaults, chosen))


def _plain(value: Any) -> Any:
    """A value as settings have it: a pattern by its text, of which `jvdiff.kernels.patterns.read` makes it again."""
    return str(value) if isinstance(value, Pattern) else value


def read_defaults(path: str | Path, family: Family) -> dict[str, Any]:
    """The repository's `jvdiff_defaults.json` without its object `stream`; {} without the file.

    Raises:
        CheckpointError: not an object of the family's settings: an unknown one, or a value that cannot be.
    """
    values = _defaults_file(path)
    values.pop(STREAM, None)
    values = config.known_fields(str(Path(path) / DEFAULTS_FILE), values, config.names(family.settings))
    try:
        config.replace(family.settings(), values)
    except UsageError as error:
        raise CheckpointError(f"{Path(path) / DEFAULTS_FILE}: {error}") from None
    return values


def stream_defaults(path: str | Path) -> dict[str, Any]:
    """The object `stream` of the repository's `jvdiff_defaults.json`, not checked; {} without one.

    Raises:
        CheckpointError: not an object.
    """
    values = _defaults_file(path).get(STREAM, {})
    if not isinstance(values, dict):
        raise CheckpointError(f"{Path(path) / DEFAULTS_FILE}: {STREAM} is {values!r:.60}, expected an object.")
    return values


def _defaults_file(path: str | Path) -> dict[str, Any]:
    file = Path(path) / DEFAULTS_FILE
    return read_json(file) if file.is_file() else {}


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
