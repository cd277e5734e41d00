"""Work that is done is kept: where it belongs, else on another disk, else in memory until there is room."""

import contextlib
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from jvdiff.config import expanded
from jvdiff.errors import JvdiffError, ResourceError, UsageError
from jvdiff.runtime import progress
from jvdiff.runtime.interrupts import shielded

T = TypeVar("T")
MORE = ("/var/tmp", "/dev/shm")  # often another disk than the temporary folder; memory, until the machine restarts


def kept(save: Callable[[Path], T], bases: Sequence[Path], *, wait: bool = True) -> T:
    """What `save(base)` returns for the first base that takes it; base: path of the files, without suffix.

    Tried are `bases`, then a new folder in the temporary one and in `MORE`, there also under a short name. Where all
    refuse and somebody sits at a terminal, who may free some space or name another folder, that is waited for, until a
    signal comes. Signals end nothing else here.

    Raises:
        ResourceError: nobody took it; all reasons.
    """
    reasons: list[str] = []
    with shielded(), contextlib.ExitStack() as stack:
        for base in dict.fromkeys(bases):
            if (found := _tried(save, base, reasons)) is not None:
                return found[0]
            stack.enter_context(_files_of_any_size())
        for base in _temporary(bases[0].name, reasons):
            if (found := _tried(save, base, reasons)) is not None:
                return found[0]
        while wait and (folder := _another_folder(reasons)) is not None:
            reasons.clear()
            if (found := _tried(save, Path(folder or bases[0].parent) / bases[0].name, reasons)) is not None:
                return found[0]
    raise ResourceError("nothing could be saved anywhere:\n" + "\n".join(reasons[:4]))


def attempt(keep: Callable[[], T], what: str) -> T | None:
    """What `keep()` returns, while an error is on its way that must not be hidden; None where it fails, with a notice.

    what: is to be kept, for that notice; it may be on a device that is lost.
    """
    try:
        return keep()
    except (JvdiffError, OSError, MemoryError) as error:
        notice = f"notice: {what} is lost: {error}"
    except RuntimeError as error:  # of JAX
        notice = f"notice: {what} cannot be read back from the device: {' '.join(str(error).split()):.200}"
    progress.tell(f"{notice}\n", sys.stderr)
    return None


def _tried(save: Callable[[Path], T], base: Path, reasons: list[str]) -> tuple[T] | None:
    try:
        return (save(base),)
    except (JvdiffError, OSError, MemoryError) as error:
        line = str(error).partition("\n")[0] or type(error).__name__
        reasons.append(line if str(base) in line else f"{base}: {line}")
        progress.tell(f"notice: {reasons[-1]}\n", sys.stderr)
        return None


@contextlib.contextmanager
def _files_of_any_size() -> Iterator[None]:
    """Inside, `ulimit -S -f` does not hold, which would refuse everywhere."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (before[1], before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _temporary(name: str, reasons: list[str]) -> Iterator[Path]:
    for place in (None, *MORE):
        try:
            folder = Path(tempfile.mkdtemp(prefix="jvdiff-", dir=place))
        except OSError as error:
            reasons.append(f"{place or 'the temporary folder'}: {error.strerror or error}")
            continue
        yield folder / name
        yield folder / "clip"
        with contextlib.suppress(OSError):
            folder.rmdir()  # nothing was written there


def _another_folder(reasons: Sequence[str]) -> str | None:
    """What somebody at the terminal answers: a folder, "" for the same as before; None without somebody."""
    try:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            return None
        told = "\n".join(reasons[:4])
        progress.tell(
            f"{told}\nThe work that is done is kept in memory. Free some space and press Enter, or type another\n"
            "folder and press Enter; Ctrl-C gives it up: ",
            sys.stderr,
        )
        with shielded(False):
            line = sys.stdin.readline()
        answer = line.strip()
        return (expanded("the folder", answer) if answer else "") if line else None
    except UsageError as error:  # and is asked again
        progress.tell(f"{error}\n", sys.stderr)
        return ""
    except (KeyboardInterrupt, OSError, ValueError, AttributeError):
        return None
