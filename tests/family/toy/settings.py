"""What a user may set of a clip of this family, and which repositories are of it. Without JAX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jvdiff.config import option
from jvdiff.errors import CheckpointError

PIPELINES = {"ToyPipeline": ("TOY",)}  # _class_name: names in family.py


@dataclass(frozen=True)
class Settings:
    """Everything besides prompt, picture, seed and weights that decides what a clip looks like."""

    num_frames: int = option(3, "pixel frames", low=1, high=64)
    height: int = option(16, "pixels, a multiple of 2")
    width: int = option(16, "pixels, a multiple of 2")
    fps: int = option(8, "frames a second; only written into the file", low=1, high=240)
    steps: int = option(4, "denoising steps", low=1, high=1000)
    guidance: float = option(3.0, "weight of classifier-free guidance; 1: none", low=1.0, high=100.0)
    guidance_2: float | None = option(None, "the second expert's; none: as guidance", low=1.0, high=100.0)
    boundary: float | None = option(
        None, "share of the noise below which the second expert works; none: the repository's", low=0.0, high=1.0
    )
    embedded_guidance: float = option(4.0, "guidance that the transformer is told", low=0.0, high=100.0)
    shift: float = option(5.0, "how much the noise levels lean towards noise", low=0.01, high=100.0)
    solver: str = option("renoise:1000,750,500,250", "unipc, euler, or renoise: and timesteps")


def select(index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The value in family.py that a repository is made for; None where it is of another family."""
    return PIPELINES.get(str(index.get("_class_name")), (None,))[0]


def defaults(index: Mapping[str, Any], folder: Path | None = None) -> Mapping[str, Any]:
    """The settings that a repository's own files ask for; CheckpointError for a boundary that is none."""
    value = index.get("boundary_ratio")
    if not isinstance(value, float) or not 0 <= value <= 1:
        raise CheckpointError(f"model_index.json: boundary_ratio is {value!r:.40}; expected a number from 0 to 1.")
    return {"boundary": value}
