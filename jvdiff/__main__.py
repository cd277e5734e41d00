"""The door of `jvdiff` and `python -m jvdiff`: which command, and what there is.

jvdiff sample --prompt="a red seven moving left"
jvdiff COMMAND --help
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jvdiff
from jvdiff.commands import help as pages
from jvdiff.config import nearest
from jvdiff.errors import UsageError
from jvdiff.training.options import function

COMMANDS = {
    "sample": ("jvdiff.commands.sample:main", "prompts become video files"),
    "stream": ("jvdiff.commands.stream:main", "a video without end, made chunk by chunk"),
    "train": ("jvdiff.commands.train:main", "trains a model, or goes on training it"),
    "plan": ("jvdiff.commands.planning:main", "what a run of sample or train would take, without weights"),
    "convert": ("jvdiff.commands.convert:main", "a Hugging Face repository becomes an Orbax directory"),
    "to_hf": ("jvdiff.commands.convert:to_hf", "a converted or trained repository becomes a Diffusers folder"),
    "verify": ("jvdiff.commands.verify:main", "whether checkpoints, runs, states and clips are what was written"),
    "windows": ("jvdiff.commands.windows:main", "records which windows of sparse attention a model's heads need"),
    "doctor": ("jvdiff.commands.doctor:main", "what this machine has for jvdiff, and what to do about what is wrong"),
    "tune": ("jvdiff.commands.tune:main", "the fastest cut of the kernels of sparse attention on this GPU"),
    "sharding": ("jvdiff.commands.sharding:main", "where weights would live on a mesh"),
    "digits": ("jvdiff.digits.__main__:main", "moving digits as MP4 files"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `jvdiff COMMAND ...` and returns its exit status; argv[0] is the program."""
    program, *words = sys.argv if argv is None else argv
    if not words or words[0] in ("-h", "--help", "help"):
        print(pages.overview({name: about for name, (_, about) in COMMANDS.items()}))
        return 0 if words else UsageError.exit_code
    if words[0] == "--version":
        print(f"jvdiff {jvdiff.__version__}")
        return 0
    if words[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"error: unknown command {words[0]!r:.80}{nearest(words[0], COMMANDS)}; one of {known}.", file=sys.stderr)
        return UsageError.exit_code
    started = "python -m jvdiff" if Path(program).name == "__main__.py" else "jvdiff"
    command: Callable[[Sequence[str]], int] = function(COMMANDS[words[0]][0])
    return command([f"{started} {words[0]}", *words[1:]])


if __name__ == "__main__":
    sys.exit(main())
