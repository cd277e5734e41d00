"""What a user may set of a clip of this family, and which repositories are of it. Without JAX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jvdiff.config import option
from jvdiff.errors import CheckpointError
from jvdiff.models import options

PIPELINES = {"LatentVideoPipeline": ("CLASS_CONDITIONAL",)}  # _class_name: names in family.py
SOLVERS = ("ddim", "ddpm", "unipc", "euler")


@dataclass(frozen=True)
class Settings:
    """Everything besides label, seed and weights that decides what a clip looks like."""

    num_frames: int = option(16, "pixel frames")
    height: int = option(256, "pixels")
    width: int = option(256, "pixels")
    fps: int = options.fps(8)
    steps: int = options.steps(50)
    guidance: float = options.guidance(7.5)
    solver: str = option("ddim", "ddim, ddpm, unipc, or euler, which is ddim", choices=SOLVERS)


def select(index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The value in family.py that a repository is made for; None where it is of another family."""
    return PIPELINES.get(str(index.get("_class_name")), (None,))[0]


def defaults(index: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """The settings that a repository's own files ask for; raises as `trained`."""
    return trained(index)


def trained(index: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the clips that the weights were trained on; CheckpointError for what is not an object."""
    values = index.get("defaults", {})
    if not isinstance(values, Mapping):
        raise CheckpointError(f"model_index.json: defaults is {values!r:.60}; expected an object of settings.")
    return values
