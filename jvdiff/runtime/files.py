"""Files that appear complete or not at all, under names that no other process takes. Folders are in `staging`."""

import contextlib
import errno
import hashlib
import itertools
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from jvdiff.errors import InUse, ResourceError
from jvdiff.runtime import claims, peers
from jvdiff.runtime.verdict import unfinished

LONGEST = 255 - 40  # bytes of a hidden name, to which a few more letters are added


def hidden(path: Path, suffix: str) -> Path:
    """A hidden name beside `path`, made of its name, or of the name's digest where that is long."""
    name = path.name
    if len(os.fsencode(name)) + len(suffix) > LONGEST:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return path.with_name(f".{name}{suffix}")


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk; where a file system cannot tell, it is not
    asked."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary name beside `path`; what is written there becomes `path` when the block succeeds.

    When the block fails, the temporary file is removed and `path` is as it was. Folders are made as needed.

    Raises:
        ResourceError: the file system refuses (no space, no permission, not a folder).
    """
    path = Path(path)
    part = hidden(path, f".{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished(part):
            yield part
            sync(part)
            os.replace(part, path)
    except OSError as error:
        raise ResourceError(
            f"cannot write {path!s:.300}: {error.strerror or error}\n"
            "nothing was left there; free some space or choose another folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


@contextlib.contextmanager
def claim(folder: str | os.PathLike, stem: str, suffixes: Sequence[str] = (".json",)) -> Iterator[Path]:
    """Yields `folder/name`, where name is the first of `stem`, `stem-2`, `stem-3` .. that nobody has.

    A name is taken as long as another process holds its claim (see `claims`), and for good where there is a file of
    that name with one of `suffixes` that is not empty. So samplers that share a folder never overwrite each other, and
    what a killed process had half done is done again. Of several files write that with the suffix last: it marks the
    others as complete. Append suffixes with `Path(f"{base}.mp4")`: a stem may hold dots.

    Raises:
        ResourceError: the folder is a file, or the file system refuses.
    """
    with contextlib.ExitStack() as stack:
        yield _take(stack, Path(folder), stem, suffixes)


@contextlib.contextmanager
def alone(path: Path, what: object = None) -> Iterator[None]:
    """This process alone works on `path` inside the block: a saved state, or the files whose name this begins.

    Of several processes of one run the first holds that claim. Where nothing can be written, nothing is held.

    Raises:
        InUse: another process works on `what`, by default `path`.
        ResourceError: the file system refuses.
    """
    with contextlib.ExitStack() as stack:
        try:
            if peers.writes():
                stack.enter_context(claims.held(hidden(path, ".claim"), path if what is None else what))
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                reason = error.strerror or error
                raise ResourceError(f"cannot write beside {path!s:.300}: {reason}; free some space.") from error
        yield


def _take(stack: contextlib.ExitStack, folder: Path, stem: str, suffixes: Sequence[str]) -> Path:
    """The first free name, whose claim the stack gives back."""
    for number in itertools.count(1):
        base = folder / (stem if number == 1 else f"{stem}-{number}")
        files = [Path(f"{base}{suffix}") for suffix in suffixes]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if any(map(_is_there, files)):
                continue
            with contextlib.ExitStack() as held:
                held.enter_context(claims.held(hidden(base, ".claim"), base, watch=False))
                if not any(map(_is_there, files)):  # since
                    _tidy(base)
                    stack.push(held.pop_all())
                    return base
        except InUse:
            continue
        except FileExistsError:
            raise ResourceError(f"cannot write to {folder}: it is a file; choose another folder") from None
        except OSError as error:
            raise ResourceError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error
    raise AssertionError("unreachable")


def _tidy(base: Path) -> None:
    """Removes what a killed process had half written of the files named `base`, which are this one's now."""
    name = re.escape(base.name)
    part = re.compile(rf"\.{name}(\.preview|\.frames|\.failed)?\.\w+\.[0-9a-f]{{8}}\.part")
    staging = re.compile(rf"\.{name}\.state\.staging-\d+-[0-9a-f]{{8}}")
    for file in [file for file in base.parent.iterdir() if file.name.startswith(".")]:
        if part.fullmatch(file.name):
            file.unlink(missing_ok=True)
        elif staging.fullmatch(file.name):
            shutil.rmtree(file, ignore_errors=True)


def _is_there(file: Path) -> bool:
    """Whether a file has content; without, it is what a process of an earlier version left."""
    try:
        return file.stat().st_size > 0
    except FileNotFoundError:
        return False
