"""What the command lines share: errors as sentences with an exit status, what is said, the compilation cache.

Exit status: 0 done · 2 usage · 3 checkpoint or data · 4 memory or disk · 5 interrupted, resumable · 6 NaN or infinity ·
7 set-up · 130 stopped at once · 1 anything else, with the traceback in a file.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import math
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jvdiff import program
from jvdiff.commands.arguments import Request, Told, traced
from jvdiff.config import expanded
from jvdiff.errors import JvdiffError, ResourceError, SetupError, UsageError
from jvdiff.runtime import ahead, cache, environment, foreign, gpus, peers, progress, verdict
from jvdiff.runtime.interrupts import STOPPED, command, over

SHARED = (
    "Another process on it leaves none: JAX takes most of a GPU's memory when it starts. Give each process a GPU of\n"
    "its own, with CUDA_VISIBLE_DEVICES=0, 1 and so on (docs/clusters.md)."
)
_CONTROL = {i: f"\\x{i:02x}" for i in (*range(9), *range(11, 32), *range(127, 160))}  # all but tab and line feed
FILES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif", ".png", ".apng", ".jpg")  # what an output is taken for
LARGE = 500_000_000  # parameters; on a CPU such models take hours


@contextlib.contextmanager
def plain_logs(room: str = "jvdiff", level: int = logging.INFO) -> Iterator[None]:
    """Shows what jvdiff, or a room of it, logs as plain lines on stderr, whatever format other packages have set."""
    logger = logging.getLogger(room)
    before = logger.handlers, logger.level, logger.propagate
    logger.handlers = [logging.StreamHandler()]
    logger.setLevel(level if peers.writes() else logging.ERROR)
    logger.propagate = False
    try:
        yield
    finally:
        logger.handlers, _, logger.propagate = before
        logger.setLevel(before[1])


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
    place: list[Any] = []

    def run() -> int | None:
        request = parse(argv)
        place.append(request.config.get(folder))
        environment.check_flags()
        if (status := _plan_elsewhere(request, argv)) is not None:
            return status
        peers.join(request.config)
        for path in work(request):
            if peers.writes():
                print(path)
        return None

    return ended(run, argv, place)


def ended(
    work: Callable[[], int | None],
    argv: Sequence[str],
    place: Sequence[Any] = (),
    stopped: tuple[int, str] = STOPPED,
) -> int:
    """Runs the work of any command and returns its exit status; errors, others' too, become one message on stderr.

    place: holds the folder that gets the traceback of a bug, once it is known
    stopped: status and message where a signal ends it
    """
    code, message, shown = 0, "", None
    _standard_streams()
    try:
        with plain_logs(level=logging.WARNING), command(*stopped), cache.no_programs():
            try:
                code = work() or 0
            except Told as told:  # --help, --version
                print(told)
        _check_output()
    except KeyboardInterrupt:
        code, message = stopped
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as raised:  # a panic in Rust is no Exception
        shown = verdict.explained(raised) if isinstance(raised, Exception) else raised
        code, message = _sentence(shown, place[0] if place else None)
    if message:
        if shown is not None and traced(argv):
            traceback.print_exception(shown)
        say_always(f"error: {message}")
        if 2 in _lossy:  # a process of ours alone: what threads of other packages still raise comes of the same error
            threading.excepthook = sys.unraisablehook = lambda _: None
    code = verdict.leave(code, message)
    over(code)
    if program.ours() and (ahead.busy() or message == stopped[1]):  # Python would wait for threads that compile or save
        verdict.end_now(code)
    return code


class _Lossy(io.FileIO):
    """A standard stream: what cannot be written there, to a full disk or a reader that has gone, is lost, and no more.

    failed: why, the last time
    """

    failed: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            self.failed = error
            return len(data)


_lossy: dict[int, _Lossy] = {}  # by number, of the streams that are wrapped


def _standard_streams() -> None:
    """Makes the standard streams bear what there is: closed ones, a full disk, names that are not in their encoding.

    Where one is closed, the next file that is opened would take its number, and get what is printed.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None or (stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper)):
            if stream is not None:
                stream.flush()
            _lossy[number] = _Lossy(number, "w", closefd=False)
            how = {"encoding": getattr(stream, "encoding", None), "errors": "backslashreplace", "line_buffering": True}
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(_lossy[number]), **how))


def _check_output() -> None:
    """Raises ResourceError where something that was printed could not be written, and somebody still listens."""
    if sys.stdout is not None:
        sys.stdout.flush()
    error = _lossy[1].failed if 1 in _lossy else None
    if error is not None and error.errno != errno.EPIPE:  # `head`, for instance, has seen enough
        raise ResourceError(f"cannot write to the standard output: {error.strerror}; what was made is kept.")


def say_always(message: str) -> None:
    """A line on standard error, from every process."""
    print(message, file=sys.stderr, flush=True)


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


def use_device(config: Any) -> None:
    """What comes before a run's first look at its devices: how much of them JAX takes, and which kernels are right.

    Raises:
        SetupError: a GPU is there, and JAX cannot use it.
        ResourceError: the field `profile` names a folder in which nothing can be written.
    """
    from jvdiff.kernels import admission

    if config.get("profile"):
        writable(config.profile, "profile")
    gpus.reserve()
    admission.admit(say)


def say_device(params: Any, mesh: Any) -> None:
    """Says what models with these parameters, which may be abstract, will be computed on."""
    import jax

    count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))

    device, several = jax.local_devices()[0], f"{mesh.devices} x " if mesh else ""
    shared = f", mesh {mesh}" if mesh else ""
    say(f"device: {several}{device.device_kind} ({jax.default_backend()}){shared}, jax {jax.__version__}")
    if (pool := (device.memory_stats() or {}).get("bytes_limit")) is not None:
        say(
            f"memory: JAX's pool is {pool / 2**30:.1f} GiB on each device, {gpus.share():g} of it ({gpus.FRACTIONS[0]})"
        )
    if jax.default_backend() == "cpu" and count >= LARGE:
        there = "JAX has no package for the GPU" if gpus.devices() and not gpus.packages() else "no GPU was found"
        say(f"warning: {there}; a model of this size takes hours on a CPU (`jvdiff doctor` says what to do)")


def compile_cache(where: str | None) -> None:
    """Turns on JAX's compilation cache, in a folder that nobody else can write: what it holds is run as code.

    Commands that do not call this have none, whatever the environment says.

    `where`: a folder, "off", or None for what JAX_COMPILATION_CACHE_DIR and JAX_ENABLE_COMPILATION_CACHE say, else the
    user's cache folder. That one is done without, with a notice, where others can write into a folder above it.

    Raises:
        SetupError: the folder that was named is another user's, or others may write into it or replace it.
        UsageError: it is not a path.
    """
    import jax

    chosen, problem = where or cache.named(), None
    if chosen == "off":
        cache.compile_into(None)
        return
    folder = None
    try:
        folder = Path(expanded("the compilation cache", chosen)) if chosen else cache.folder("compiled")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        cache.check_private(folder, "the compilation cache", ", or choose --compile_cache=FOLDER, or off")
        problem = None if os.access(folder, os.W_OK) else f"{folder} cannot be written"
    except SetupError as error:
        if chosen:
            raise
        problem = str(error).splitlines()[0]
    except OSError as error:
        problem = f"{folder} cannot be used: {error.strerror}"
    if problem:
        say(f"notice: no compilation cache, {problem}")
    else:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    cache.compile_into(None if problem else folder)


def _sentence(error: BaseException, folder: Any) -> tuple[int, str]:
    """(exit status, what to say) of an error; the traceback of a bug goes to a file."""
    known = error if isinstance(error, JvdiffError) else foreign.explained(error)
    if known is not None:
        return known.exit_code, str(known)
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
