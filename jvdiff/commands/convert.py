"""The command lines of the converters; the converters themselves are `jvdiff.convert`.

jvdiff convert --source=FOLDER or OWNER/NAME --target=FOLDER
jvdiff to_hf --source=FOLDER --target=FOLDER

Exit status: 0 done · 2 usage · 3 checkpoint · 4 disk or memory · 5 interrupted; see jvdiff/errors.py.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jvdiff import config as configs
from jvdiff.commands import arguments, command_line, options
from jvdiff.commands.arguments import Command, Section
from jvdiff.errors import Interrupted, UsageError
from jvdiff.runtime import environment, interrupts


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
    return _run(CONVERT, _convert, argv)


def to_hf(argv: Sequence[str] | None = None) -> int:
    """`jvdiff to_hf`; returns the exit status."""
    return _run(TO_HF, _to_hf, argv)


def _convert(values: Mapping[str, Any]) -> None:
    if not values["source"] and not values["verify"]:
        raise UsageError("give --source to convert, or --verify to read the target again. --help lists all flags.")
    _leave_the_gpu()
    from jvdiff import models
    from jvdiff.convert.from_diffusers import convert, find, verify  # pyright: ignore[reportMissingImports]

    start, target, family = time.monotonic(), values["target"], models.named(values["family"])
    if values["source"]:
        source, origin = find(values["source"], values["revision"], _tell)
        options = {name: values[name] for name in ("dtype", "overwrite", "allow_nonfinite", "follow_symlinks")}
        with command_line.plain_logs("jvdiff.weights"):  # tensors that nobody uses are counted in one
            convert(source, target, origin=origin, family=family, tell=_tell, **options)
    if values["verify"]:
        verify(target, family, values["follow_symlinks"])
    done = "verified" if values["verify"] else "written"
    print(f"{target}: complete and {done} in {time.monotonic() - start:.1f} s")


def _to_hf(values: Mapping[str, Any]) -> None:
    _leave_the_gpu()
    from jvdiff import models
    from jvdiff.convert import to_diffusers  # pyright: ignore[reportMissingImports]

    family = models.named(values["family"])
    how: dict[str, Any] = {"family": family, "follow_symlinks": values["follow_symlinks"]}
    to_diffusers.to_hf(values["source"], values["target"], values["dtype"], values["vae"], **how)
    print(f"{values['target']}: complete")


def _leave_the_gpu() -> None:
    """Files only: the GPU and its memory are left to others."""
    import jax

    jax.config.update("jax_platforms", "cpu")


_STOPPED = "interrupted: the target is as it was before; run the same command to start again."


def _tell(line: str) -> None:
    """Shows the progress; and stops, if Orbax's event loop has swallowed what a signal raised."""
    if interrupts.asked():
        raise KeyboardInterrupt
    print(line, flush=True)


def _stoppable(work: Callable[[Mapping[str, Any]], None], values: Mapping[str, Any]) -> None:
    try:
        work(values)
    except Exception:
        if interrupts.asked():  # Orbax has made another error of KeyboardInterrupt
            raise KeyboardInterrupt from None
        raise


def _run(command: Command, work: Callable[[Mapping[str, Any]], None], argv: Sequence[str] | None) -> int:
    """Reads a command line and does what it says; errors become one message and an exit status."""

    def told() -> None:
        values = arguments.values(command, words)
        environment.check_flags()
        _stoppable(work, values)

    words = [f"jvdiff {command.name}", *(sys.argv if argv is None else argv)[1:]]
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax's threads log what is raised here anyway
    return command_line.ended(told, words, stopped=(Interrupted.exit_code, _STOPPED))
