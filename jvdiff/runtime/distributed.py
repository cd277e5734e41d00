"""Many processes, one run: they find each other, decide together, and end together.

JAX finds the processes (Slurm, Kubernetes, Open MPI, or explicit addresses) and computes on all their devices. How they
end is here, because JAX would abort the others without a sentence, and a collective whose partner is gone waits for
ever. Every process holds one TCP connection to a hub in process 0, lines of JSON: it beats, it puts values together
with the others (`gather`), and it says how it ended (`leave`). The first failure that the hub hears of, by word or by a
connection that closes or falls silent, is everyone's: the same exit status, and a sentence that names the process. A
main thread that does not come for it is stuck, and its process ends without it, what it had half written removed.

A program that never called `join` is alone, and every function here does the obvious thing at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import hmac
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import socketserver
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import config_dict

from jvdiff.errors import JvdiffError, SetupError, UsageError

GRACE = 3.0  # seconds between the news of a failure and the end of a process whose main thread does not react
_member: _Member | None = None
_unfinished: list[Path] = []


def fields() -> dict[str, Any]:
    """The config fields of a run with many processes; see docs/clusters.md."""
    return {
        "distributed": False,
        "coordinator_address": config_dict.placeholder(str),  # HOST:PORT of process 0; None: the cluster says
        "num_processes": config_dict.placeholder(int),  # None: the cluster says
        "process_id": config_dict.placeholder(int),  # 0 to num_processes - 1; None: the cluster says
        "distributed_timeout": 120.0,  # seconds to wait for all to come, and for a silent one before it counts as dead
    }


class Failed(JvdiffError):
    """Another process failed; `exit_code` is that of its error."""


# --------------------------------------------------------------------------------------------- what the program calls


def join(config: Any) -> None:
    """Makes this process one of several, if config.distributed says so; before any other use of JAX.

    Raises:
        UsageError: fields that do not go together, or no cluster to read them from.
        SetupError: process 0 cannot be reached. Where processes do not come in time, JAX gives no chance to raise:
            the sentence is printed and the process ends with that error's status.
    """
    global _member
    given = [name for name in list(fields())[1:4] if config.get(name) is not None]
    if not config.get("distributed"):
        if given:
            raise UsageError(f"{', '.join(given)}: only with --config.distributed=true.")
        return
    timeout = float(config.distributed_timeout)
    if not 1 <= timeout <= 86400:
        raise UsageError(f"distributed_timeout is {timeout:g}; expected 1 to 86400 seconds.")
    import jax
    from jax._src.distributed import global_state  # nothing public tells the address, or lets a port be published

    def late() -> None:
        rank, count, address = global_state.process_id, global_state.num_processes, global_state.coordinator_address
        _exit_now(SetupError.exit_code, f"{_late(rank, count, timeout)} at {address}.\n{_SAME_COMMAND}")

    deadline = threading.Timer(timeout, late)
    deadline.daemon = True
    deadline.start()
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from us
    try:
        # The time-outs of JAX end in an abort; they are so long that ours come first.
        jax.distributed.initialize(
            config.coordinator_address,
            config.num_processes,
            config.process_id,
            initialization_timeout=int(10 * timeout),
            heartbeat_timeout_seconds=int(10 * timeout),
            shutdown_timeout_seconds=int(timeout) + 1,
        )
    except (ValueError, TypeError) as error:
        deadline.cancel()
        raise UsageError(
            f"distributed: {' '.join(str(error).split())}\nNo Slurm, Kubernetes or Open MPI says more; give "
            "--config.coordinator_address=HOST:PORT, --config.num_processes=N and --config.process_id=0 to N - 1.\n"
            "(On Kubernetes JAX needs the package kubernetes, with Open MPI 5 mpi4py.)"
        ) from error
    except RuntimeError as error:
        deadline.cancel()
        raise SetupError(f"distributed: JAX cannot start: {' '.join(str(error).split())[:500]}") from error
    rank, count, client = global_state.process_id, global_state.num_processes, global_state.client
    host = str(global_state.coordinator_address).rsplit(":", 1)[0].strip("[]")
    hub = None
    try:
        if rank == 0:
            hub = _Hub(count, timeout)
            client.key_value_set("jvdiff/hub", f"{hub.server_address[1]} {hub.token}")  # type: ignore[union-attr]
        port, token = client.blocking_key_value_get("jvdiff/hub", int(10 * timeout * 1000)).split()  # type: ignore[union-attr]
        connection = socket.create_connection((host, int(port)), timeout)
    except OSError as error:
        deadline.cancel()
        raise SetupError(f"distributed: process {rank} cannot reach process 0 at {host}: {error}.") from error
    _member = _Member(rank, count, connection, timeout, host, hub)
    _member.tell({"token": token, "rank": rank, "name": f"process {rank} ({socket.gethostname()}, pid {os.getpid()})"})
    _member.start()
    gather("here")
    deadline.cancel()
    if rank:
        logging.getLogger("jvdiff").setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
        # A JAX client whose coordinator is gone aborts; sleep(6), as SIGABRT is number 6, gives way to our sentence.
        libc = ctypes.CDLL(None)
        libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def several() -> bool:
    """Whether this process is one of several."""
    return _member is not None


def writes() -> bool:
    """Whether this process writes files and talks: it is process 0, or alone."""
    return _member is None or _member.rank == 0


def gather(value: Any) -> list[Any]:
    """The values (as JSON knows them) of all processes, by rank; each must call this equally often.

    Raises:
        Failed: a process failed.
    """
    return [value] if _member is None else _member.gather(value)


def agree(what: str, value: Any) -> None:
    """Raises UsageError on every process unless `value` is the same on all."""
    values = gather(value)
    if other := [rank for rank, found in enumerate(values) if found != values[0]]:
        raise UsageError(
            f"{what}: process {other[0]} has {values[other[0]]!r:.200}, process 0 {values[0]!r:.200}.\n{_SAME_COMMAND}"
        )


def explained(error: Exception) -> Exception:
    """The failure of another process, where that is why JAX raised `error`; else `error` itself, after a while."""
    if _member is None:
        return error
    import jax

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, jax.errors.JaxRuntimeError):
        cause = cause.__cause__ or cause.__context__
    if cause is None or "RESOURCE_EXHAUSTED" in str(cause):
        return error
    return _member.failure(_member.timeout) or error


def leave(code: int, message: str) -> int:
    """Ends this process's part with an exit status; returns everyone's, once all have ended or one has failed.

    Where that is not 0 this does not return but ends the process, because JAX's own end would wait for the others.
    """
    global _member
    if (member := _member) is None:
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
        _member = None
        return 0
    if code == 0 and failure is not None:
        print(f"error: {failure}", file=sys.stderr)
    if member.hub is not None:
        member.hub.wait_for_the_others(2 * GRACE)  # with process 0 goes JAX's coordinator
    _exit_now(failure.exit_code)
    return failure.exit_code


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[None]:
    """Inside the block `path` is half written, and is removed if the process has to end at once.

    A folder, a hidden file, or a file that is a mark as long as it is empty. Where process 0 dies outright and the
    others see its files, they remove it.
    """

    def tell() -> None:
        if _member is not None:
            _member.tell({"unfinished": [str(path.absolute()) for path in _unfinished]})

    _unfinished.append(path)
    tell()
    try:
        yield
    finally:
        _unfinished.remove(path)
        tell()


# ----------------------------------------------------------------------------------------------------- how it is done

_SAME_COMMAND = "Start every process with the same command, and look at the messages of the others."


def _late(rank: int, count: int, timeout: float) -> str:
    return f"process {rank} waited {timeout:g} s, but not all of {count} processes came to process 0"


def _exit_now(code: int, message: str = "") -> None:
    """Ends the process from any thread, whatever the others do; removes what is half written."""
    for path in list(_unfinished):
        _remove(path)
    if message:
        print(f"error: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(".") or path.stat().st_size == 0:
            path.unlink()


class _Member:
    """This process's end of the connection to the hub."""

    def __init__(self, rank: int, count: int, connection: socket.socket, timeout: float, host: str, hub: Any):
        self.rank, self.count, self.timeout, self.host, self.hub = rank, count, timeout, host, hub
        self.connection, self.sending, self.changed = connection, threading.Lock(), threading.Condition()
        self.rounds, self.answer, self.verdict = 0, {}, None
        self.leaving, self.of_hub = False, []

    def start(self) -> None:
        for work in (self._listen, self._beat):
            threading.Thread(target=work, daemon=True).start()

    def tell(self, message: dict[str, Any]) -> None:
        with self.sending, contextlib.suppress(OSError):  # who listens will notice
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def gather(self, value: Any) -> list[Any]:
        self.rounds += 1
        self.tell({"round": self.rounds, "value": value})
        with self.changed:
            self.changed.wait_for(lambda: self.verdict or self.rounds in self.answer)
            if self.rounds in self.answer:
                return self.answer.pop(self.rounds)
        raise self.failure(0) or AssertionError("a process ended while others had more to do")

    def failure(self, timeout: float | None) -> Failed | None:
        """What all have to end with, waited for; None where all ended well, or nothing was heard in time."""
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
        how = "ended without a word"
        try:
            for line in self.connection.makefile("rb"):
                self._hear(json.loads(line))
        except TimeoutError:
            how = f"has been silent for {self.timeout:g} s"
        except OSError:
            pass
        if self.verdict is None:
            for path in self.of_hub:
                _remove(Path(path))
            self._hear({"verdict": [SetupError.exit_code, f"process 0 ({self.host}) {how}."]})

    def _hear(self, message: dict[str, Any]) -> None:
        with self.changed:
            match message:
                case {"round": number, "values": values}:
                    self.answer[number] = values
                case {"unfinished": paths}:
                    self.of_hub = paths
                case {"verdict": verdict} if self.verdict is None:
                    self.verdict = verdict
                    threading.Thread(target=self._end_if_stuck, daemon=True).start()
            self.changed.notify_all()

    def _end_if_stuck(self) -> None:
        time.sleep(GRACE)
        if not self.leaving and (failure := self.failure(0)):
            _exit_now(failure.exit_code, str(failure))


class _Hub(socketserver.ThreadingTCPServer):
    """In process 0: puts values together, and passes the verdict. One thread for each connection."""

    daemon_threads = True
    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET

    def __init__(self, count: int, timeout: float):
        super().__init__(("", 0), _Connection)
        self.count, self.silence, self.token = count, timeout, secrets.token_hex(16)
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

    server: _Hub

    def tell(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self.wfile.write(json.dumps(message).encode() + b"\n")

    def handle(self) -> None:
        hub, how = self.server, "ended without a word"
        self.connection.settimeout(hub.silence)
        try:
            hello = json.loads(self.rfile.readline(4096))
            if not hmac.compare_digest(hello["token"], hub.token):
                return
        except (OSError, ValueError, KeyError, TypeError):  # a stranger
            return
        rank, name = hello["rank"], hello["name"]
        with hub.lock:
            hub.connections[rank] = self
        try:
            for line in self.rfile:
                hub.hear(rank, name, json.loads(line))
        except TimeoutError:
            how = f"has been silent for {hub.silence:g} s"
        except OSError:
            pass
        with hub.lock:
            del hub.connections[rank]
            hub.judge(SetupError.exit_code, f"{name} {how}.")
