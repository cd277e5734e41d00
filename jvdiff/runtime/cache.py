"""Folders of the user's cache whose files are run as code: nobody else may write into them."""

from __future__ import annotations

import os
import shlex
import stat
from pathlib import Path

from jvdiff.errors import SetupError


def folder(name: str) -> Path:
    """~/.cache/jvdiff/NAME, or where XDG_CACHE_HOME says; not made."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "jvdiff" / name


def check_private(path: Path, what: str, advice: str = "") -> None:
    """Checks that a folder is this user's, and that its group and others cannot write into it.

    Args:
        what: it holds, for the message: "the compilation cache".
        advice: what else may be done than chmod, the end of a sentence.

    Raises:
        SetupError: it is not, or they can.
        OSError: no such folder.
    """
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise SetupError(
            f"{what} {path} can be written by others, and what is in it is run as code.\n"
            f"Expected: yours, mode 0700. Found: owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o}.\n"
            f"Run chmod 700 {shlex.quote(str(path))}{advice}."
        )
