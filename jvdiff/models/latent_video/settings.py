"""What a user may set of a clip of this family, and which repositories are of it. Without JAX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jvdiff.config import option

PIPELINES = {"LatentVideoPipeline": "CLASS_CONDITIONAL"}  # _class_name: name in family.py
SOLVERS = ("ddim", "ddpm", "unipc", "euler")


@dataclass(frozen=True)
class Settings:
    """Everything besides label, seed and weights that decides what a clip looks like."""

    num_frames: int = option(16, "pixel frames")
    height: int = option(256, "pixels")
    width: int = option(256, "pixels")
    fps: int = option(8, "frames a second; only written into the file", low=1, high=240)
    steps: int = option(50, "denoising steps", low=1, high=1000)
    guidance: float = option(
        7.5, "weight of classifier-free guidance; 1: none, and half the work", low=1.0, high=100.0,
        note="1 means without guidance",
    )  # fmt: skip
    solver: str = option("ddim", "ddim, ddpm, unipc, or euler, which is ddim", choices=SOLVERS)


def select(index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The value in family.py that a repository is made for; None where it is of another family."""
    return PIPELINES.get(str(index.get("_class_name")))
