"""The command lines of the converters; the converters themselves are `jvdiff.convert`.

jvdiff convert --source=FOLDER or OWNER/NAME --target=FOLDER
jvdiff to_hf --source=FOLDER --target=FOLDER
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jvdiff import config as configs
from jvdiff.commands import arguments, options
from jvdiff.commands.arguments import Command, Section
from jvdiff.errors import UsageError


def _sections(group: type) -> Any:
    return lambda config, flags: [Section(str(group.__doc__), configs.options(group))]


CONVERT = Command(
    name="convert",
    about="a Hugging Face repository becomes an Orbax directory, whole or not at all",
    examples=(
        "--source=OWNER/NAME-Diffusers --target=checkpoints/NAME --dtype=bfloat16 --verify",
        "--target=checkpoints/NAME --verify",
    ),
    sections=_sections(options.Convert),
)
TO_HF = Command(
    name="to_hf",
    about="a converted or trained repository becomes a Diffusers folder",
    examples=("--source=runs/digits_dit/repository --target=checkpoints/mine --dtype=float16",),
    sections=_sections(options.ToHf),
)


def main(argv: Sequence[str] | None = None) -> int:
    """`jvdiff convert`; returns the exit status."""
    return _run("__main__", list(sys.argv if argv is None else argv))


def to_hf(argv: Sequence[str] | None = None) -> int:
    """`jvdiff to_hf`; returns the exit status."""
    return _run("to_hf", list(sys.argv if argv is None else argv))


def _run(module: str, argv: Sequence[str]) -> int:
    def work() -> None:
        (to_hf_values if module == "to_hf" else convert_values)(argv[1:])  # what is wrong is said before JAX is there
        program = importlib.import_module(f"jvdiff.convert.{module}")
        status.append(importlib.import_module("jvdiff.convert.__main__").run(lambda: program.main(argv[1:])))

    status: list[int] = []
    return arguments.told(work) or (status[0] if status else 0)


def convert_values(words: Sequence[str]) -> Mapping[str, Any]:
    """What the words of `jvdiff convert` say, by name.

    Raises:
        Told: --help or --version.
        UsageError: an unknown flag or value, or nothing to do.
    """
    values = arguments.values(CONVERT, ["jvdiff convert", *words])
    if not values["source"] and not values["verify"]:
        raise UsageError("give --source to convert, or --verify to read the target again. --help lists all flags.")
    return values


def to_hf_values(words: Sequence[str]) -> Mapping[str, Any]:
    """What the words of `jvdiff to_hf` say, by name. Raises: as `convert_values`."""
    return arguments.values(TO_HF, ["jvdiff to_hf", *words])
