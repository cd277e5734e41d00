"""What a user may set of a training, whatever is trained; tasks add fields of their own. Without JAX."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, NamedTuple

from jvdiff.config import option
from jvdiff.errors import UsageError
from jvdiff.models.options import family, follow_symlinks, profile


@dataclass(frozen=True)
class Schedule:
    """Optimisation: AdamW with linear warm-up and cosine decay to `final_rate` times the peak."""

    steps: int = option(MISSING, "steps in all")
    learning_rate: float = option(1e-3, "at its peak")
    warmup: int = option(100, "steps in which the rate rises from 0")
    final_rate: float = option(0.01, "of the cosine's end, times learning_rate")
    weight_decay: float = option(0.01, "of matrices, a step, times the rate")
    clip: float = option(1.0, "of the global gradient norm")
    average_decay: float = option(
        0.999, "of the moving average that is kept; reached gradually: at most (1 + n) / (10 + n) at step n"
    )

    def __post_init__(self):
        for field, fits, expected in (
            ("steps", self.steps >= 1, "1 or more"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "a number above 0"),
            ("warmup", 0 <= self.warmup < self.steps, f"0 or more, and fewer than the {self.steps} steps"),
            ("final_rate", 0 <= self.final_rate <= 1, "0 to 1 (times learning_rate)"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more"),
            ("clip", 0 < self.clip <= math.inf, "a number above 0"),
            ("average_decay", 0 <= self.average_decay < 1, "0 or more, and below 1"),
        ):
            if not fits:
                raise UsageError(f"{field} is {getattr(self, field)}; expected {expected}.")


@dataclass(frozen=True)
class Loop:
    """The loop: mesh, saving, logging."""

    save_every: int = option(500, "steps between two checkpoints")
    log_every: int = option(20, "steps between two lines of metrics")
    show_every: int | None = option(None, "steps between two samples; none: no samples")
    keep: int = option(2, "how many checkpoints are kept")
    accumulate: int = option(1, "into how many parts a batch is cut, whose gradients are averaged")
    most_skipped: int = option(10, "how many steps in a row, skipped because their numbers are not finite, end the run")
    log_to: tuple[str, ...] = option((), "tensorboard, wandb or both, besides metrics.jsonl")
    mesh: str | dict[str, int] | None = option(None, "devices: data=2,fsdp=4; none: one device")


@dataclass(frozen=True)
class Training:
    """Fields of every training."""

    task: str = option(None, "what is trained; each task has fields of its own")
    folder: str = option(None, "where the run lives: config.json, state/, metrics.jsonl, and the result", path=True)
    seed: int = option(None, "of weights, data and noise")
    schedule: Schedule = option(None, "optimisation")
    loop: Loop = option(None, "mesh, saving, logging")


@dataclass(frozen=True)
class Going:
    """Fields that a command sets, and no configuration has to have."""

    family: str | None = family()
    resume: str | None = option(
        None, "the folder that a message named, with a state that the disk of `folder` had refused", path=True
    )
    allow_changes: bool = option(False, "go on in `folder` though fields that decide numbers are other ones now")
    compile_cache: str | None = option(
        None, 'a folder of your own, or "off"; none: the user\'s cache folder', path=True
    )
    follow_symlinks: bool = follow_symlinks()
    profile: str | None = profile()  # of the first steps


# Whatever these are, the numbers are the same: a run may go on with others.
FREE = frozenset({
    *("folder", "family", "compile_cache", "allow_changes", "resume", "plan", "plan_target", "follow_symlinks"),
    *("loop.mesh", "loop.save_every", "loop.log_every", "loop.show_every", "loop.keep", "loop.log_to"),
    *("loop.most_skipped", "profile"),
})  # fmt: skip


class Kind(NamedTuple):
    """A task, as the command line knows it.

    about: what it trains, in one line.
    fields: the group of its options beside `Training`'s.
    run: MODULE:FUNCTION of (config, folder) -> the result's path.
    programs: MODULE:FUNCTION of (config, mesh_of) -> (name, task, schedule, abstract batch, into how many parts a batch
        is cut) of each part of a run; None: no plan
    free: paths of options that decide no number of the training.
    """

    about: str
    fields: type
    run: str
    programs: str | None = None
    free: tuple[str, ...] = ()


def function(name: str) -> Callable[..., Any]:
    """The function that MODULE:FUNCTION names."""
    module, attribute = name.split(":")
    return getattr(importlib.import_module(module), attribute)


def flat(values: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested dicts by path."""
    if not isinstance(values, Mapping):
        return {path: values}
    return {p: leaf for name, inner in values.items() for p, leaf in flat(inner, f"{path}.{name}".strip(".")).items()}
