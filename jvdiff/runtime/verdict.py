"""How a run of many processes ends: the failure of one is everyone's, and a sentence names the process.

JAX would abort the others without a sentence, and a collective whose partner is gone waits for ever. Hence every
process holds one TCP connection to a hub in process 0, with lines of JSON: it beats, it hands in values that all shall
know (`peers.gather`), and it says how it ended (`leave`). The first failure that the hub hears of is the verdict, by
word or by a connection that closes or falls silent. All end with its exit status. A main thread that does not come for
the verdict is stuck: its process ends without it, and what it had half written is removed.

In a program that never called `peers.join`, every function here does the obvious thing at once.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import shutil
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jvdiff.errors import JvdiffError, SetupError

GRACE = 3.0  # seconds between the news of a failure and the end of a process whose main thread does not react
member: Member | None = None  # this process as one of several; `peers.join` sets it
EVERY = "*"  # a mark, see `unfinished`
_unfinished: list[tuple[Path, str]] = []
_ending = threading.Lock()


class Failed(JvdiffError):
    """Another process failed; `exit_code` is that of its error."""


# --------------------------------------------------------------------------------------------- what the program calls


def explained(error: Exception) -> Exception:
    """The failure of another process, where JAX raised `error` because of it; else `error`, after `member.timeout`."""
    if member is None:
        return error
    import jax

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, jax.errors.JaxRuntimeError):
        cause = cause.__cause__ or cause.__context__
    if cause is None or "RESOURCE_EXHAUSTED" in str(cause):
        return error
    return member.failure(member.timeout) or error


def leave(code: int, message: str) -> int:
    """Ends this process's part with an exit status; returns everyone's, once all have ended or one has failed.

    Where that is not 0 this does not return but ends the process, because JAX's own end would wait for the others.
    """
    global member
    if member is None:
        return code
    member.leaving = True
    while True:
        try:
            member.tell({"end": [code, message]})
            failure = member.failure(None)
            break
        except KeyboardInterrupt:  # while waiting for the others
            code, message = 130, "stopped at once."
    if failure is None:
        import jax

        with contextlib.suppress(RuntimeError):
            jax.distributed.shutdown()
        member = None
        return 0
    if code == 0:
        print(f"error: {failure}", file=sys.stderr)
    if member.hub is not None:
        member.hub.wait_for_the_others(2 * GRACE)  # with process 0 goes JAX's coordinator
    end_now(failure.exit_code)
    return failure.exit_code


@contextlib.contextmanager
def unfinished(path: Path, mark: str = "") -> Iterator[None]:
    """Inside the block `path` is half written, and is removed if the process has to end at once.

    A folder, or a hidden file. Where process 0 dies outright and the others see its files, they remove it.
    `mark`: text in a file that is this process's own; one of this name without it is another's, and stays. `EVERY`: the
    last part of `path` is a pattern, and all that it fits is removed.
    """

    def tell() -> None:
        if member is not None:
            member.tell({"unfinished": [(str(path.absolute()), mark) for path, mark in _unfinished]})

    _unfinished.append((path, mark))
    tell()
    try:
        yield
    finally:
        _unfinished.remove((path, mark))
        tell()


def end_now(code: int, message: str = "") -> None:
    """Ends the process from any thread, whatever the others do; removes what is half written.

    Of several threads the first does that, and the others wait for the end here, so that they write nothing more.
    """
    try:
        if not _ending.acquire(timeout=GRACE / 2):  # the first is stuck: it waits for what this one holds
            return
        if member is not None:
            member.tell({"end": [code, message]})
            member.failure(0.5)  # until all know
        with contextlib.suppress(OSError):
            if message:
                os.write(2, f"error: {message}\n".encode(errors="backslashreplace"))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what threads of other packages say now comes of this
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # it was just being written to
            sys.stdout.flush()
        for path, mark in list(_unfinished):  # last, since other threads go on writing, and make the folder again
            _remove(path, mark)
    finally:
        os._exit(code)


def _remove(path: Path, mark: str) -> None:
    with contextlib.suppress(OSError):
        if mark == EVERY:
            for each in path.parent.glob(path.name):
                _remove(each, "")
        elif path.is_dir():
            for _ in range(20):  # another package's thread may still be writing there
                shutil.rmtree(path, ignore_errors=True)
                if not path.exists():
                    break
                time.sleep(0.01)
        elif path.name.startswith(".") and (not mark or mark.encode() in path.read_bytes()):
            path.unlink()


# ------------------------------------------------------------------------------------------- one end, and the other


class Member:
    """This process's end of the connection to the hub.

    rank, count: which process this is, of how many
    timeout: seconds of silence after which process 0 counts as dead
    hub: the hub itself, in process 0
    verdict: (exit status, sentence) for all; None as long as all work
    leaving: the main thread has come for the verdict
    hub_files: what process 0 has half written
    """

    def __init__(self, rank: int, count: int, timeout: float, host: str, place: str, hub: Hub | None):
        """Connects with the hub at `place`, its "port token"; OSError where it cannot be reached."""
        self.rank, self.count, self.timeout, self.host, self.hub = rank, count, timeout, host, hub
        port, token = place.split()
        self.connection = socket.create_connection((host, int(port)), timeout)
        self.sending, self.changed = threading.Lock(), threading.Condition()
        self.rounds, self.answers = 0, {}
        self.verdict, self.leaving, self.hub_files = None, False, []
        self.tell({"token": token, "rank": rank, "name": f"process {rank} ({socket.gethostname()}, pid {os.getpid()})"})
        for work in (self._listen, self._beat):
            threading.Thread(target=work, daemon=True).start()

    def tell(self, message: dict[str, Any]) -> None:
        with self.sending, contextlib.suppress(OSError):  # the listening thread will notice
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def gather(self, value: Any) -> list[Any]:
        self.rounds += 1
        self.tell({"round": self.rounds, "value": value})
        with self.changed:
            self.changed.wait_for(lambda: self.verdict or self.rounds in self.answers)
            if self.rounds in self.answers:
                return self.answers.pop(self.rounds)
        raise self.failure(0) or AssertionError("a process ended while others had more to do")

    def failure(self, timeout: float | None) -> Failed | None:
        """The failure that ends all, waited for; None where all ended well, or where `timeout` seconds went by."""
        with self.changed:
            self.changed.wait_for(lambda: self.verdict, timeout)
        code, text = self.verdict or (0, "")
        failed = Failed(text)
        failed.exit_code = code
        return failed if code else None

    def _beat(self) -> None:
        while self.verdict is None:
            self.tell({})
            time.sleep(min(1.0, self.timeout / 4))

    def _listen(self) -> None:
        reason = "ended without a word"
        try:
            for line in self.connection.makefile("rb"):
                self._hear(json.loads(line))
        except TimeoutError:
            reason = f"has been silent for {self.timeout:g} s"
        except OSError:
            pass
        if self.verdict is None:
            for path, mark in self.hub_files:
                _remove(Path(path), mark)
            self._hear({"verdict": [SetupError.exit_code, f"process 0 ({self.host}) {reason}."]})

    def _hear(self, message: dict[str, Any]) -> None:
        with self.changed:
            match message:
                case {"round": number, "values": values}:
                    self.answers[number] = values
                case {"unfinished": paths}:
                    self.hub_files = paths
                case {"verdict": verdict} if self.verdict is None:
                    self.verdict = verdict
                    threading.Thread(target=self._end_if_stuck, daemon=True).start()
            self.changed.notify_all()

    def _end_if_stuck(self) -> None:
        time.sleep(GRACE)
        if not self.leaving and (failure := self.failure(0)):
            end_now(failure.exit_code, str(failure))


class Hub(socketserver.ThreadingTCPServer):
    """In process 0: puts values together, and passes the verdict. One thread for each connection."""

    daemon_threads = True
    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET

    def __init__(self, count: int, timeout: float):
        super().__init__(("", 0), _Connection)
        self.count, self.timeout, self.token = count, timeout, secrets.token_hex(16)
        self.place = f"{self.server_address[1]} {self.token}"
        self.lock, self.rounds, self.ended, self.verdict = threading.RLock(), {}, {}, None
        self.connections: dict[int, _Connection] = {}
        threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True).start()

    def tell(self, message: dict[str, Any]) -> None:
        for connection in list(self.connections.values()):
            connection.tell(message)

    def hear(self, rank: int, name: str, message: dict[str, Any]) -> None:
        with self.lock:
            match message:
                case {"round": number, "value": value}:
                    values = self.rounds.setdefault(number, {})
                    values[rank] = value
                    if len(values) == self.count:
                        del self.rounds[number]
                        self.tell({"round": number, "values": [values[rank] for rank in range(self.count)]})
                case {"end": [code, text]}:
                    self.ended[rank] = code
                    if code:
                        self.judge(code, f"{name} failed: {text}")
                    elif len(self.ended) == self.count:
                        self.judge(0, "")
                case {"unfinished": _}:
                    if rank == 0:
                        self.tell(message)
                case _:
                    self.connections[rank].tell({})

    def judge(self, code: int, text: str) -> None:
        if self.verdict is None:
            self.verdict = code, text
            self.tell({"verdict": self.verdict})

    def wait_for_the_others(self, timeout: float) -> None:
        until = time.monotonic() + timeout
        while set(self.connections) - {0} and time.monotonic() < until:
            time.sleep(0.05)


class _Connection(socketserver.StreamRequestHandler):
    """The hub's end of a connection."""

    server: Hub

    def tell(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self.wfile.write(json.dumps(message).encode() + b"\n")

    def handle(self) -> None:
        hub, reason = self.server, "ended without a word"
        self.connection.settimeout(hub.timeout)
        try:
            hello = json.loads(self.rfile.readline(4096))
            if not hmac.compare_digest(hello["token"], hub.token):
                return
        except (OSError, ValueError, KeyError, TypeError):  # a stranger
            return
        rank, name = hello["rank"], hello["name"]
        with hub.lock:
            hub.connections[rank] = self
            if hub.verdict is not None:  # a process that comes late
                self.tell({"verdict": hub.verdict})
        try:
            for line in self.rfile:
                hub.hear(rank, name, json.loads(line))
        except TimeoutError:
            reason = f"has been silent for {hub.timeout:g} s"
        except OSError:
            pass
        with hub.lock:
            del hub.connections[rank]
            hub.judge(SetupError.exit_code, f"{name} {reason}.")
