"""Folders of the user's cache whose files are run as code: nobody else may write into them, and none is damaged."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shlex
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jvdiff.config import expanded
from jvdiff.errors import SetupError, UsageError


def folder(name: str) -> Path:
    """~/.cache/jvdiff/NAME, or where XDG_CACHE_HOME says; not made. SetupError where no home folder is known."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    try:
        chosen = Path(expanded("XDG_CACHE_HOME", root or "~/.cache"))
    except UsageError:
        raise SetupError("no home folder is known. Let HOME or XDG_CACHE_HOME name a folder.") from None
    return (chosen if chosen.is_absolute() else Path(expanded("HOME", "~/.cache"))) / "jvdiff" / name


def check_private(path: Path, what: str, advice: str = "") -> None:
    """Checks that nobody but this user can write into a folder, or put another in its place.

    It is this user's, its group and others cannot write into it, and neither can they into a folder that it lies in,
    unless that has the sticky bit.

    Args:
        what: it holds, for the message: "the compilation cache".
        advice: what else may be done than chmod, the end of a sentence.

    Raises:
        SetupError: it is not, or they can.
        OSError: no such folder.
    """
    status = path.stat()
    if status.st_uid != os.getuid() or _open(status):
        raise SetupError(
            f"{what} {path} can be written by others, and what is in it is run as code.\n"
            f"Expected: yours, mode 0700. Found: owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o}.\n"
            f"Run chmod 700 {shlex.quote(str(path))}{advice}."
        )
    for parent in dict.fromkeys((*path.absolute().parents, *path.resolve().parents)):
        status = parent.stat()
        found = f"owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o}"
        if status.st_uid not in (0, os.getuid()) or (_open(status) and not status.st_mode & stat.S_ISVTX):
            raise SetupError(
                f"{what} {path} lies in {parent}, where others can put another folder in its place;\n"
                f"what is in it is run as code. Found: {found}.\n"
                f"Run chmod go-w {shlex.quote(str(parent))}{advice}."
            )


def _open(status: os.stat_result) -> bool:
    return bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


_SWITCH = "JAX_ENABLE_COMPILATION_CACHE"
_OFF = ("n", "no", "f", "false", "off", "0")
_ON = ("y", "yes", "t", "true", "on", "1")
_lock = threading.Lock()
_commands: list[_Before] = []  # one for each command that runs; there may be several, in threads of their own


class _Before(NamedTuple):
    """How JAX keeps programs where no command runs: its folder, whether it does, and what the environment says."""

    folder: str | None
    enabled: bool
    said: str | None


def named() -> str | None:
    """The folder of compiled programs that JAX's own settings name; "off" where they turn it off, None: neither."""
    import jax

    config: Any = jax.config
    return "off" if _commands and not _commands[0].enabled else config.jax_compilation_cache_dir


@contextlib.contextmanager
def no_programs() -> Iterator[None]:
    """Inside it JAX takes compiled programs from no folder until `compile_into` names one; afterwards as before.

    That holds for a JAX that is there, for one that is imported inside, and for those of child processes.
    """
    with _lock:
        _commands.append(_commands[0] if _commands else _turned_off())
    try:
        yield
    finally:
        with _lock:
            before = _commands.pop()
            if not _commands:
                _restore(before)


def _turned_off() -> _Before:
    jax, said = sys.modules.get("jax"), os.environ.get(_SWITCH)
    before = _Before(os.environ.get("JAX_COMPILATION_CACHE_DIR"), (said or "1").lower() not in _OFF, said)
    if jax:
        before = _Before(jax.config.jax_compilation_cache_dir, jax.config.jax_enable_compilation_cache, said)
        _set(before.folder, False)
    if said is None or said.lower() in (*_OFF, *_ON):  # others JAX refuses, with a sentence
        os.environ[_SWITCH] = "false"
    return before


def _restore(before: _Before) -> None:
    os.environ.pop(_SWITCH, None)
    if before.said is not None:
        os.environ[_SWITCH] = before.said
    if "jax" in sys.modules:
        _set(before.folder, before.enabled)


def compile_into(path: Path | None) -> None:
    """From now on JAX keeps compiled programs in a folder, and takes none from elsewhere; None: it keeps none."""
    from jax._src import compilation_cache  # nothing public lets an entry be compared before it is run

    _set(path and str(path), path is not None)
    real = compilation_cache.get_file_cache
    if not isinstance(real, functools.partial):
        compilation_cache.get_file_cache = functools.partial(_whole_entries, real)


def _set(folder: str | None, enabled: bool) -> None:
    import jax
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_enable_compilation_cache", enabled)
    reset_cache()


def _whole_entries(real: Callable[[str], tuple[Any, str] | None], path: str) -> tuple[Any, str] | None:
    """JAX's `get_file_cache`, whose entries are compared with their digests."""
    made = real(path)
    return made and (_WholeEntries(made[0], Path(path)), made[1])


class _WholeEntries:
    """JAX's cache of compiled programs, in which a damaged entry is as good as none, and is removed.

    JAX itself would warn at every start, compile, and keep the damaged entry. Beside NAME-cache is NAME-sha256; an
    entry that another program wrote has none, and must decompress.
    """

    def __init__(self, files: Any, path: Path):
        self.files, self._path = files, path

    def get(self, key: str) -> bytes | None:
        mark = self._path / f"{key}-sha256"
        try:
            value = self.files.get(key)
            written = mark.read_bytes() if mark.exists() else None
        except OSError:
            return None
        if value is None:
            return None
        if _decompresses(value) if written is None else written == _sha256(value):
            return value
        for path in (self._path / f"{key}-cache", mark):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        return None

    def put(self, key: str, value: bytes) -> None:
        with contextlib.suppress(OSError):  # a full disk: it is compiled again next time
            self.files.put(key, value)
            (self._path / f"{key}-sha256").write_bytes(_sha256(value))


def _sha256(value: bytes) -> bytes:
    return hashlib.sha256(value).hexdigest().encode()


def _decompresses(value: bytes) -> bool:
    from jax._src.compilation_cache import decompress_executable

    try:
        decompress_executable(value)
    except Exception:  # of zlib or of one of two packages for zstd, each with a type of its own
        return False
    return True
