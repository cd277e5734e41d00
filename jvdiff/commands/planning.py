"""`jvdiff plan`: what the same words behind `jvdiff sample` or `jvdiff train` would take, without weights or data."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from jvdiff import config as configs
from jvdiff.commands import arguments, command_line, sample, train
from jvdiff.errors import JvdiffError, UsageError

COMMAND = dataclasses.replace(
    sample.COMMAND,
    name="plan",
    about="what a run of sample or train would take, without weights",
    examples=(
        "--config wan2_1_t2v_14b --plan_target=h200 --mesh=sequence=8",
        "--config latent_video_small --loop.mesh=fsdp=8",
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status; errors are sentences on stderr."""
    program, *words = sys.argv if argv is None else argv
    if _training(words):
        return command_line.main([program, *words, "--plan"], _parse_training, train.run, "folder")
    return command_line.main(
        [program, *words, "--plan"],
        lambda argv: sample.parse(argv, COMMAND),
        sample.run,
        "output",
    )


def _parse_training(argv: Sequence[str]) -> arguments.Request:
    """`train.parse`; UsageError for a task that has no plan."""
    line, tasks = arguments.split(argv[1:], ("plan",)), train.tasks()
    task = line.texts.get("task") or configs.load(line.config or "").get("task")
    planned = [name for name, kind in tasks.items() if kind.programs]
    if task in tasks and task not in planned and not line.asked & {"help", "version"}:
        raise UsageError(f"the task {task!r} of {line.config} has no plan; those that have one: {', '.join(planned)}.")
    return train.parse(argv)


def _training(words: Sequence[str]) -> bool:
    """Whether the configuration that the words name is one of a training; what is wrong with it is said later."""
    try:
        line = arguments.split(words)
        return line.config is not None and "task" in configs.load(line.config)
    except JvdiffError:
        return False
