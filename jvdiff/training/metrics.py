"""The numbers of a training: `metrics.jsonl`, a JSON object a line, and on request TensorBoard or Weights & Biases."""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from jvdiff.errors import SetupError, UsageError
from jvdiff.runtime import peers
from jvdiff.runtime.files import atomic
from jvdiff.runtime.progress import clock

METRICS = "metrics.jsonl"
_log = logging.getLogger("jvdiff.training")


class Metrics(ExitStack):
    """A context that writes, and logs how far the run is. Lines of steps that a resumed run does again are dropped.

    Raises:
      UsageError: an unknown name in `also`.
      SetupError: the package for it is not installed.
    """

    def __init__(self, folder: Path, done: int, steps: int, also: Sequence[str] = ()):
        super().__init__()
        if unknown := [name for name in also if name not in SINKS]:
            raise UsageError(f"log_to has {unknown[0]!r:.80}; expected some of {', '.join(SINKS)}.")
        self.path = folder / METRICS
        self.steps = steps
        self.refused: list[str] = []  # lines that the disk did not take
        self.clock = (time.perf_counter(), done)
        if self.path.exists() and peers.writes():
            with atomic(self.path) as part:
                lines = self.path.read_text().splitlines()
                part.write_text("".join(f"{line}\n" for line in lines if _step(line) <= done))
        try:
            self.sinks = [SINKS[name](self, folder, done) for name in also] if peers.writes() else []
        except BaseException:
            self.close()  # those that were opened before it
            raise

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """One line; a number that is not finite becomes null, as JSON wants it.

        Raises:
          OSError: the disk does not take it; it is in `refused`.
        """
        now = time.perf_counter()
        each = round((now - self.clock[0]) / max(step - self.clock[1], 1), 4)
        self.clock = (now, step)
        line = {"step": step, **numbers, "seconds_per_step": each}
        if peers.writes():
            self.refused.append(json.dumps({k: v if math.isfinite(v) else None for k, v in line.items()}) + "\n")
            with self.path.open("a") as file:
                file.write(self.refused[-1])
            self.refused.pop()
        for sink in self.sinks:
            sink(step, {name: value for name, value in line.items() if name != "step"})
        told = [f"step {step} of {self.steps}"]
        told += [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items() if k != "step"]
        told += [f"{clock(each * (self.steps - step))} left"] if step < self.steps else []
        _log.info("%s", " · ".join(told))

    def write_refused(self) -> None:
        """Writes the lines that the disk did not take; what it took of one is dropped when the run goes on."""
        if self.refused:
            with self.path.open("a") as file:
                file.write("\n" + "".join(self.refused))
            self.refused.clear()


def _tensorboard(stack: ExitStack, folder: Path, done: int) -> Callable[[int, Mapping[str, float]], None]:
    writer = _imported("tensorboardX").SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
    stack.callback(writer.close)

    def write(step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return write


def _wandb(stack: ExitStack, folder: Path, done: int) -> Callable[[int, Mapping[str, float]], None]:
    """A run of the name of the folder, in the project and mode that wandb's own variables say (WANDB_PROJECT, ...)."""
    run = _imported("wandb").init(id=folder.name, dir=str(folder), resume="allow")
    stack.callback(run.finish)
    return lambda step, numbers: run.log(dict(numbers), step=step)


SINKS = {"tensorboard": _tensorboard, "wandb": _wandb}


def _imported(package: str) -> Any:
    try:
        return __import__(package)
    except ImportError:
        raise SetupError(f"log_to needs the package {package}; install it with: pip install {package}") from None


def _step(line: str) -> float:
    """The step of a line of metrics; beyond every step where a killed run left half a line."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return math.inf
