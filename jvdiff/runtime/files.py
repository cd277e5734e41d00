"""Files that appear complete or not at all, under names that no other process takes. Folders are in `staging`."""

import contextlib
import itertools
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from jvdiff.errors import ResourceError
from jvdiff.runtime.verdict import unfinished


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary name beside `path`; what is written there becomes `path` when the block succeeds.

    When the block fails, the temporary file is removed and `path` is as it was. Folders are made as needed.

    Raises:
        ResourceError: the file system refuses (no space, no permission, not a folder).
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished(part):
            yield part
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
    except OSError as error:
        raise ResourceError(
            f"cannot write {path}: {error.strerror or error}\n"
            "nothing was left there; free some space or choose another folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


@contextlib.contextmanager
def claim(folder: str | os.PathLike, stem: str, suffix: str = ".json") -> Iterator[Path]:
    """Yields `folder/name`, where name is the first of `stem`, `stem-2`, `stem-3` .. that no other process has.

    `name + suffix` is created empty and thereby taken, so that samplers that share a folder never overwrite each
    other. Write that file last: it marks the others beside it as complete. If it is still empty when the block ends,
    it is removed. Append suffixes with `Path(f"{base}.mp4")`: a stem may hold dots.

    Raises:
        ResourceError: the folder is a file, or the file system refuses.
    """
    base, mark = _take(Path(folder), stem, suffix)
    try:
        with unfinished(mark):
            yield base
    finally:
        with contextlib.suppress(OSError):
            if mark.stat().st_size == 0:
                mark.unlink()


def _take(folder: Path, stem: str, suffix: str) -> tuple[Path, Path]:
    """Creates the first free name's mark with O_EXCL; the name without `suffix`, and the mark."""
    for number in itertools.count(1):
        base = folder / (stem if number == 1 else f"{stem}-{number}")
        mark = Path(f"{base}{suffix}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mark.open("xb").close()
            return base, mark
        except FileExistsError:
            if not folder.is_dir():
                raise ResourceError(f"cannot write to {folder}: it is a file; choose another folder") from None
        except OSError as error:
            raise ResourceError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error
    raise AssertionError("unreachable")
