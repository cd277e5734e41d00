"""What can be trained of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jvdiff.config import option
from jvdiff.training.options import Kind


@dataclass(frozen=True)
class Loss:
    """`loss`: none."""


@dataclass(frozen=True)
class Fields:
    """Task own."""

    width: int = option(3, "of a model that is not made")
    loss: Loss = option(None, "none")


def run(config: Any, folder: Path) -> Path:
    """Writes what it was given."""
    (folder / "width").write_text(str(config.width))
    return folder / "width"


TASKS = {"own": Kind("nothing", Fields, "causal.trainings:run")}
