"""What the command lines share: errors as sentences with an exit status, what is said, the compilation cache.

Exit status: 0 done · 2 usage · 3 checkpoint or data · 4 memory or disk · 5 interrupted, resumable · 6 NaN or infinity ·
7 set-up · 130 stopped at once · 1 anything else, with the traceback in a file.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jvdiff.commands.arguments import Request, Told, traced
from jvdiff.errors import JvdiffError, ResourceError, UsageError
from jvdiff.runtime import cache, peers, progress, verdict
from jvdiff.runtime.interrupts import STOPPED, command

SHARED = (
    "Another process on it leaves none: JAX takes most of a GPU's memory when it starts. Give each process a GPU of\n"
    "its own, with CUDA_VISIBLE_DEVICES=0, 1 and so on (docs/clusters.md)."
)
_CONTROL = {i: f"\\x{i:02x}" for i in (*range(9), *range(11, 32), *range(127, 160))}  # all but tab and line feed
FILES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif", ".png", ".apng", ".jpg", ".npz", ".json", ".jsonl")
LARGE = 500_000_000  # parameters; on a CPU such models take hours


@command(*STOPPED)
def main(
    argv: Sequence[str] | None,
    parse: Callable[[Sequence[str]], Request],
    work: Callable[[Request], Iterable[Path]],
    folder: str,
) -> int:
    """Runs a command line, prints the paths of what it made, and returns its exit status.

    `folder` names the field of the config with the folder that gets the traceback of a bug. Of several processes all
    return the same status, and process 0 prints the paths.
    """
    argv = list(sys.argv if argv is None else argv)
    place, shown, code, message = None, None, 0, ""
    try:
        try:
            request = parse(argv)
        except Told as told:  # --help, --version
            print(told, flush=True)
            return 0
        place = request.config.get(folder)
        if (status := _plan_elsewhere(request, argv)) is not None:
            return status
        peers.join(request.config)
        for path in work(request):
            if peers.writes():
                print(os.fsencode(path).decode(sys.stdout.encoding or "utf-8", "backslashreplace"))
        sys.stdout.flush()
    except KeyboardInterrupt:
        code, message = STOPPED
    except BrokenPipeError:  # who reads our output, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as raised:
        shown = verdict.explained(raised)
        code, message = _sentence(shown, place)
    if code:
        if shown is not None and traced(argv):
            traceback.print_exception(shown)
        progress.tell(f"error: {message}\n", sys.stderr)
    return verdict.leave(code, message)


def _plan_elsewhere(request: Request, argv: Sequence[str]) -> int | None:
    """The exit status of a plan for a GPU that is not there, made by a process that has the compiler for it.

    None: no such plan is asked for, or this process can make it.
    """
    if not request.config.get("plan") or request.config.get("plan_target") is None:
        return None
    from jvdiff.plan.targets import run_with_compiler

    first, *rest = request.program
    program = rest if first == "python" else ["-m", *request.program]
    return run_with_compiler(request.config.plan_target, [*program, *argv[1:]])


def writable(folder: str, field: str) -> Path:
    """The folder that a field of the config names, made if need be; asked before minutes of work.

    Raises:
        ResourceError: nothing can be written there.
        UsageError: it looks like the name of a file.
    """
    if Path(folder).suffix.lower() in FILES and not Path(folder).is_dir():
        raise UsageError(
            f"{field} is {folder}, which looks like a file; expected a folder, in which files get their names\n"
            f"from what they show: for instance --{field}={Path(folder).with_suffix('')}."
        )
    if not peers.writes():
        return Path(folder)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return Path(folder)
    except OSError as error:
        raise ResourceError(f"cannot write to {folder}: {error.strerror}; choose another --{field}.") from error


@contextlib.contextmanager
def device_memory(what: str, advice: str, *, first: bool = False) -> Iterator[None]:
    """Turns the device's out-of-memory error into a sentence: what was being done, and what to try.

    first: nothing has been computed yet, so that another process may have taken the memory.

    Raises:
        ResourceError: the device has not enough memory.
    """
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", "ALLOC_FAILED")):
            raise
        shared = f"{SHARED}\n" if first else ""
        raise ResourceError(f"{what}: the device has not enough memory.\n{shared}{advice}") from error


def say(message: str) -> None:
    """A line for the person at the terminal, which no prompt commands; of several processes the first speaks."""
    if peers.writes():
        progress.tell(f"{message.translate(_CONTROL)}\n", sys.stderr)


def say_device(params: Any, mesh: Any) -> None:
    """Says what models with these parameters, which may be abstract, will be computed on."""
    import jax

    count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))

    device, several = jax.devices()[0], f"{mesh.devices} x " if mesh else ""
    shared = f", mesh {mesh}" if mesh else ""
    say(f"device: {several}{device.device_kind} ({jax.default_backend()}){shared}, jax {jax.__version__}")
    if jax.default_backend() == "cpu" and count >= LARGE:
        say("warning: no GPU was found; a model of this size takes hours on a CPU (see docs for the GPU extras)")


@contextlib.contextmanager
def plain_logs(room: str = "jvdiff") -> Iterator[None]:
    """Shows what jvdiff, or a room of it, logs as plain lines on stderr, whatever format other packages have set."""
    logger, handler = logging.getLogger(room), logging.StreamHandler()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if peers.writes() else logging.ERROR)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def compile_cache(where: str | None) -> None:
    """Turns on JAX's compilation cache, in a folder that nobody else can write: what it holds is run as code.

    `where`: a folder, "off", or None for the user's cache folder.

    Raises:
        SetupError: the folder is another user's, or its group or others may write into it.
    """
    import jax

    if where == "off":
        return
    chosen = where or jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    folder = Path(chosen or cache.folder("compiled"))
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        cache.check_private(folder, "the compilation cache", ", or choose --compile_cache=FOLDER, or off")
    except OSError as error:
        say(f"notice: no compilation cache, {folder} cannot be used: {error.strerror}")
        return
    if not os.access(folder, os.W_OK):
        say(f"notice: no compilation cache, {folder} cannot be written")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _sentence(error: Exception, folder: Any) -> tuple[int, str]:
    """(exit status, what to say) of an error; the traceback of a bug goes to a file."""
    if isinstance(error, JvdiffError):
        return error.exit_code, str(error)
    if isinstance(error, MemoryError):
        return ResourceError.exit_code, "not enough memory on this machine."
    where = _log_traceback(error, folder)
    return 1, f"{type(error).__name__}: {str(error)[:500]}\nThis is a bug; please report it with {where}."


def _log_traceback(error: BaseException, folder: Any) -> Path:
    """Writes the traceback where the user finds it: the output folder, else the temporary folder."""
    text = "".join(traceback.format_exception(error))
    for place in (folder, tempfile.gettempdir()):
        with contextlib.suppress(OSError, TypeError):
            path = Path(place) / f"jvdiff-error-{os.getpid()}.log"  # type: ignore[arg-type]
            path.write_text(text, encoding="utf-8")
            return path
    return Path("--traceback")
