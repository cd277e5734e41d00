"""Folders that appear whole or not at all.

Each is written into a hidden folder beside its target, under a claim, and then renamed. Files are in `files`.
"""

import ctypes
import errno
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from jvdiff.errors import JvdiffError, ResourceError, UsageError
from jvdiff.runtime import claims
from jvdiff.runtime.files import hidden, sync
from jvdiff.runtime.verdict import unfinished

MANIFEST = "jvdiff.json"  # its presence says that a folder is a complete one of ours, which may be overwritten


def resource_error(error: BaseException, path: Path) -> ResourceError | None:
    """The error of a full disk or memory, where `error` is one: of the system, TensorStore or numpy; else None."""
    if isinstance(error, MemoryError):
        return ResourceError(f"{path}: not enough memory ({error}).\nFree memory, or use a machine with more.")
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    words = ("RESOURCE_EXHAUSTED", "OUT_OF_RANGE", "No space left", "File too large", "quota exceeded")
    if not full and not any(word in str(error) for word in words):
        return None
    free = shutil.disk_usage(path if path.exists() else path.parent).free
    return ResourceError(
        f"{path}: the disk (or a limit on file size) is full; {free:,} bytes are free.\n"
        "Nothing was left behind. Free some space, or choose another target."
    )


@contextmanager
def staged(
    path: str | Path, *, needed: int = 0, overwrite: bool | None = None, manifest: str = MANIFEST
) -> Iterator[Path]:
    """A new hidden folder that becomes `path` by one rename when the block ends well, and is removed otherwise.

    A claim keeps a second writer out. `needed` bytes must be free on the disk.
    `overwrite` swaps a complete folder of the same kind for the new one, and replaces nothing else; `manifest` is a
    file that such a folder has, and that the block writes too. None: whoever asks has no such option.

    Raises:
        UsageError: `path` exists already, or its folder cannot be written.
        InUse: another process is writing it.
        ResourceError: disk or memory are full.
    """
    target = Path(os.path.abspath(path))
    check_target(target, overwrite, manifest)
    _check_space(target, needed)
    with lock(target) as claim:
        check_target(target, overwrite, manifest)  # the claim's holder before us may have written it
        prefix = hidden(target, ".staging-")
        for stale in target.parent.glob(f"{glob.escape(prefix.name)}*"):  # of a process that was killed
            shutil.rmtree(stale, ignore_errors=True)
        staging = prefix.with_name(f"{prefix.name}{os.getpid()}-{secrets.token_hex(4)}")
        try:
            with unfinished(staging):
                staging.mkdir()
                yield staging
                for path in (staging, *staging.rglob("*")):
                    sync(path)
                claim.check()
                if target.exists():
                    _exchange(staging, target)
                else:
                    staging.rename(target)
                sync(target.parent)
        except JvdiffError:
            raise
        except Exception as error:
            if resource := resource_error(error, target):
                raise resource from error
            raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)  # after an exchange: the old content


def check_target(target: Path, overwrite: bool | None, manifest: str = MANIFEST) -> None:
    """Raises UsageError if `staged` could not put a folder there."""
    try:
        exists = os.path.lexists(target)
        replaceable = (target / manifest).is_file() and not target.is_symlink()
        if overwrite and replaceable:
            return
        if exists:
            kind = "an Orbax directory" if manifest == MANIFEST else "a saved state"
            state = f"is not {kind} of jvdiff" if overwrite else "exists already"
            advice = "Replace it with overwrite, remove" if overwrite is False and replaceable else "Remove"
            raise UsageError(
                f"{target}: {state}, and is left as it is.\n{advice} it yourself, or choose another target."
            )
        if not target.parent.is_dir():
            raise UsageError(f"{target.parent}: no such folder.\nMake it first, or choose another target.")
    except OSError as error:
        raise UsageError(f"{target!s:.200}: cannot be written ({error.strerror}).\nChoose another target.") from error


def _check_space(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise ResourceError(
            f"{target}: needs about {needed:,} bytes, {free:,} are free.\nFree some space, or choose another target."
        )


@contextmanager
def lock(target: Path) -> Iterator[claims.Claim]:
    """Holds `.NAME.lock` beside the target, a claim.

    Raises:
        InUse: another process holds it.
        ResourceError: the disk is full.
        UsageError: the folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            claim = stack.enter_context(claims.held(target.with_name(f".{target.name}.lock"), target))
        except OSError as error:
            if resource := resource_error(error, target):
                raise resource from error
            reason = error.strerror
            raise UsageError(f"{target!s:.200}: cannot be written ({reason}).\nChoose another target.") from error
        yield claim


def _exchange(new: Path, old: Path) -> None:
    """Swaps two folders in one step, so that there is a complete one at every moment (Linux only)."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    folder, exchange = -100, 2  # AT_FDCWD (the paths are absolute), RENAME_EXCHANGE
    if rename is None or rename(folder, os.fsencode(new), folder, os.fsencode(old), exchange) != 0:
        raise UsageError(f"{old}: this system cannot swap folders in one step.\nRemove it yourself, then start again.")
