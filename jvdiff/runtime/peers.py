"""Many processes, one run: they find each other, one leads, and all agree.

JAX finds the processes (Slurm, Kubernetes, Open MPI, or explicit addresses) and computes on all their devices. What
they have to know of each other they `gather`. How they end is in `verdict`.

A program that never called `join` is alone, and every function here does the obvious thing at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jvdiff import config as configs
from jvdiff.config import option
from jvdiff.errors import SetupError, UsageError
from jvdiff.runtime import verdict

_SAME_COMMAND = "Start every process with the same command, and look at the messages of the others."


@dataclass(frozen=True)
class Processes:
    """many processes (docs/clusters.md)"""

    distributed: bool = option(False, "this process is one of several that make one run")
    coordinator_address: str | None = option(None, "HOST:PORT of process 0; none: the cluster says")
    num_processes: int | None = option(None, "none: the cluster says")
    process_id: int | None = option(None, "0 to num_processes - 1; none: the cluster says")
    distributed_timeout: float = option(
        120.0, "seconds to wait for all to come, and for a silent one before it counts as dead"
    )


def fields() -> dict[str, Any]:
    """The config fields of a run with many processes."""
    return configs.fields(Processes)


def join(config: Any) -> None:
    """Makes this process one of several, if config.distributed says so; before any other use of JAX.

    Raises:
        UsageError: fields that do not go together, or no cluster to read them from.
        SetupError: process 0 cannot be reached. Where processes do not come in time, JAX gives no chance to raise:
            the sentence is printed and the process ends with that error's status.
    """
    _check(config)
    if not config.get("distributed"):
        return
    timeout = float(config.distributed_timeout)
    with _deadline(timeout):
        _start_jax(config, timeout)
        _meet(timeout)
        gather("here")
    if not writes():
        _quieten()


def several() -> bool:
    """Whether this process is one of several."""
    return verdict.member is not None


def writes() -> bool:
    """Whether this process writes files and talks: it is process 0, or alone."""
    return verdict.member is None or verdict.member.rank == 0


def gather(value: Any) -> list[Any]:
    """The values (as JSON knows them) of all processes, by rank; each must call this equally often.

    Raises:
        Failed: a process failed.
    """
    return [value] if verdict.member is None else verdict.member.gather(value)


def agree(what: str, value: Any) -> None:
    """Raises UsageError on every process unless `value` is the same on all."""
    values = gather(value)
    if others := [rank for rank, other in enumerate(values) if other != values[0]]:
        rank = others[0]
        raise UsageError(
            f"{what}: process {rank} has {values[rank]!r:.200}, process 0 {values[0]!r:.200}.\n{_SAME_COMMAND}"
        )


# ----------------------------------------------------------------------------------------------------- how they meet


def _check(config: Any) -> None:
    """Raises UsageError where the fields of `fields` do not go together."""
    addresses = [
        name for name in ("coordinator_address", "num_processes", "process_id") if config.get(name) is not None
    ]
    if not config.get("distributed"):
        if addresses:
            raise UsageError(f"{', '.join(addresses)}: only with --distributed=true.")
    elif not 1 <= config.distributed_timeout <= 86400:
        raise UsageError(f"distributed_timeout is {config.distributed_timeout:g}; expected 1 to 86400 seconds.")


def _state() -> Any:
    """What JAX knows of the processes: process_id, num_processes, coordinator_address, client."""
    from jax._src.distributed import global_state  # nothing public tells the address, or lets a port be published

    return global_state


@contextlib.contextmanager
def _deadline(timeout: float) -> Iterator[None]:
    """Ends the process with a sentence if the block takes longer."""

    def late() -> None:
        state = _state()
        verdict.end_now(
            SetupError.exit_code,
            f"process {state.process_id} waited {timeout:g} s, but not all of {state.num_processes} processes came "
            f"to process 0 at {state.coordinator_address}.\n{_SAME_COMMAND}",
        )

    timer = threading.Timer(timeout, late)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _start_jax(config: Any, timeout: float) -> None:
    """JAX's own meeting. Its time-outs end in an abort; they are so long that ours come first."""
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from us
    try:
        jax.distributed.initialize(
            config.coordinator_address,
            config.num_processes,
            config.process_id,
            initialization_timeout=int(10 * timeout),
            heartbeat_timeout_seconds=int(10 * timeout),
            shutdown_timeout_seconds=int(timeout) + 1,
        )
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"distributed: {' '.join(str(error).split())}\nNo Slurm, Kubernetes or Open MPI says more; give "
            "--coordinator_address=HOST:PORT, --num_processes=N and --process_id=0 to N - 1.\n"
            "(On Kubernetes JAX needs the package kubernetes, with Open MPI 5 mpi4py.)"
        ) from error
    except RuntimeError as error:
        raise SetupError(f"distributed: JAX cannot start: {' '.join(str(error).split())[:500]}") from error


def _meet(timeout: float) -> None:
    """Process 0 opens the hub and publishes its place in JAX's store; every process connects with it."""
    state, hub = _state(), None
    rank, count = state.process_id, state.num_processes
    host = str(state.coordinator_address).rsplit(":", 1)[0].strip("[]")
    try:
        if rank == 0:
            hub = verdict.Hub(count, timeout)
            state.client.key_value_set("jvdiff/hub", hub.place)
        place = state.client.blocking_key_value_get("jvdiff/hub", int(10 * timeout * 1000))
        verdict.member = verdict.Member(rank, count, timeout, host, place, hub)
    except OSError as error:
        raise SetupError(f"distributed: process {rank} cannot reach process 0 at {host}: {error}.") from error


def _quieten() -> None:
    """Lets this process, which is not the first, print errors only, and our sentence before JAX's abort."""
    logging.getLogger("jvdiff").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    # A JAX client whose coordinator is gone aborts; sleep(6), as SIGABRT is number 6, gives way to our sentence.
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
