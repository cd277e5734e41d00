"""A claim: a small file that says which process alone writes something, on one machine or on many that share a folder.

    with claims.held(folder / ".clip.claim", "clip") as claim:
        ...
        claim.check()  # before what cannot be taken back

It needs no locks of the file system, which many clusters' lack. The file holds host, boot, process, the process's start
time, a nonce and a count, and its holder counts on every 10 s. Who finds it takes it over

* at once, where its process was one of this machine, since its last start, and is gone;
* after 60 s without change by the reader's own clock otherwise: the clocks of two machines are never compared.

Of several that would take over claim X, one creates X's successor, a file named after X's nonce, and only who has that
may replace X by it. A successor is a claim itself, so that a taker that is killed half way is taken over too.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jvdiff.errors import InUse
from jvdiff.runtime.verdict import unfinished

RENEWED, SILENT = 10.0, 60.0  # seconds: between two renewals; without one, until a claim counts as left behind
_first_seen: dict[Path, tuple[bytes, float]] = {}  # claims of other machines: content, and since when it is that


class Holder(NamedTuple):
    """Who has a claim.

    boot: the machine's start and the process's name space, within which `pid` means one process; "" where unknown
    started: when the process began, in ticks since the machine's start
    count: of renewals
    """

    host: str
    boot: str
    pid: int
    started: str
    nonce: str
    count: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def encode(self) -> bytes:
        return json.dumps(self._asdict() | {"count": f"{self.count:09}"}).encode()


class Claim(NamedTuple):
    """A claim that this process has.

    path: the file
    what: what it is about, as messages name it
    """

    path: Path
    what: str
    nonce: str

    def check(self) -> None:
        """Raises InUse if another process has taken the claim, as one may that cannot see that this one lives."""
        now = _decode(_read(self.path) or b"")
        if now is None or now.nonce != self.nonce:
            raise InUse(
                f"{self.what}: {now or 'another process'} took it over, since this one was silent for {SILENT:g} s.\n"
                "Nothing more is written there."
            )


@contextlib.contextmanager
def held(path: str | os.PathLike, what: object = None, *, watch: bool = True) -> Iterator[Claim]:
    """Holds the claim `path`, a hidden file, inside the block. `what` (default: `path`) is what messages name.

    watch: a claim of another machine is watched, for a minute at most, until it is known whether its holder lives.
        Otherwise it counts as held, until this process has asked for it again and again for a minute.

    Raises:
        InUse: another process has it; or this one, in another thread.
        OSError: the file system refuses.
    """
    path, what = Path(os.path.abspath(path)), str(path if what is None else what)
    own = Holder(socket.gethostname(), _boot(), os.getpid(), _started(os.getpid()), secrets.token_hex(8))
    released = threading.Event()
    try:
        with unfinished(path, own.nonce):
            _take(path, own, what, watch)
            threading.Thread(target=_renew, args=(path, own, released), daemon=True).start()
            yield Claim(path, what, own.nonce)
    finally:
        released.set()
        with contextlib.suppress(OSError):
            if (now := _decode(_read(path) or b"")) is not None and now.nonce == own.nonce:
                path.unlink()


def holder(path: str | os.PathLike) -> Holder | None:
    """Who has the claim; None where nobody has, or who had it is known to be gone."""
    path = Path(os.path.abspath(path))
    found = _read(path)
    return None if found is None or _left_behind(path, found) else _decode(found) or Holder("?", "", 0, "", "")


def _take(path: Path, own: Holder, what: str, watch: bool) -> None:
    """Makes the claim this process's own; raises as `held`."""
    watched: list[bytes] = []
    while True:
        with contextlib.suppress(FileExistsError):
            _create(path, own)
            return
        if (found := _read(path)) is None:
            continue  # released since
        by = _decode(found)
        if _left_behind(path, found):
            successor = path.with_name(f"{path.name}.{by.nonce[:8] if by else 'unfinished'}")
            with unfinished(successor, own.nonce):
                _take(successor, own, what, watch)
                if _read(path) == found:
                    os.replace(successor, path)
                    return
                successor.unlink()
            continue
        who = by or "another process"
        if not watch or (by and _is_here(by)) or (watched and watched[0] != found):
            raise InUse(f"{what}: is being written by {who}.\nWait for it, or choose another name.")
        watched.append(found)
        if len(watched) == 2:  # and not one that is being created
            notice = f"notice: {what} is claimed by {who}; watching for {SILENT:g} s at most whether it lives"
            print(notice, file=sys.stderr, flush=True)
        time.sleep(0.1)


def _create(path: Path, own: Holder) -> None:
    """Makes the file; FileExistsError where there is one."""
    try:
        _appear(path, own.encode())
        return
    except FileExistsError:
        raise
    except (OSError, AttributeError):  # an empty one then stays where the process is killed before it writes
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.write(handle, own.encode())
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(handle)


def _appear(path: Path, content: bytes) -> None:
    """Makes a file that appears with its content; OSError or AttributeError where the system cannot."""
    handle = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o644)
    try:
        os.write(handle, content)
        os.link(f"/proc/self/fd/{handle}", path, src_dir_fd=handle, follow_symlinks=True)
    finally:
        os.close(handle)


def _renew(path: Path, own: Holder, released: threading.Event) -> None:
    """Counts on, until the claim is released or another's; a file system that refuses now may not do so later."""
    while not released.wait(RENEWED):
        own = own._replace(count=own.count + 1)
        with contextlib.suppress(OSError), open(path, "r+b", buffering=0) as file:
            found = _decode(file.read())
            if found is None or found.nonce != own.nonce:
                return
            file.seek(0)
            file.write(own.encode())  # as long as before


def _left_behind(path: Path, found: bytes) -> bool:
    """Whether nobody holds a claim of this content any more."""
    by = _decode(found)
    if by is not None and _is_here(by):
        return not _lives(by)
    now = time.monotonic()
    content, since = _first_seen.get(path, (None, now))
    if content != found:
        since = now
        _first_seen[path] = found, now
    return now - since >= SILENT


def _is_here(by: Holder) -> bool:
    """Whether a number of a process of the holder's machine means the same here."""
    return by.boot != "" and (by.host, by.boot) == (socket.gethostname(), _boot())


def _lives(by: Holder) -> bool:
    try:
        os.kill(by.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return _started(by.pid) in ("", by.started)


def _started(pid: int) -> str:
    """When a process began; "ended" where its parent has not heard of its end yet, "" where that cannot be known."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "ended" if state in "ZX" else fields[18]


def _boot() -> str:
    """The machine's start, and the process's name space: in a container numbers mean other processes."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _read(path: Path) -> bytes | None:
    """A claim's content, of which there may be a part so far; None where there is no claim."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        return os.read(handle, 4096)
    finally:
        os.close(handle)


def _decode(content: bytes) -> Holder | None:
    try:
        values = json.loads(content)
        kinds = {"host": str, "boot": str, "pid": int, "started": str, "nonce": str, "count": int}
        return Holder(**{name: kind(values[name]) for name, kind in kinds.items()})
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
