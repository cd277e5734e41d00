"""`jvdiff plan`: what the same words behind `jvdiff sample` or `jvdiff train` would take, without weights or data."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from jvdiff import config as configs
from jvdiff.commands import arguments, command_line, sample, train
from jvdiff.errors import JvdiffError

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
        return train.main([program, *words, "--plan"])
    return command_line.main(
        [program, *words, "--plan"],
        lambda argv: sample.parse(argv, COMMAND),
        sample.run,
        "output",
    )


def _training(words: Sequence[str]) -> bool:
    """Whether the configuration that the words name is one of a training; what is wrong with it is said later."""
    try:
        line = arguments.split(words)
        return line.config is not None and "task" in configs.load(line.config)
    except JvdiffError:
        return False
