"""What others raise, as errors of ours: one table of (what it is, which of our errors, what to say).

The system, JAX, PyAV, Orbax, TensorStore, tokenizers and Python's own readers each have types of their own, some of
them none (`AssertionError`, `Exception`). What no row is about is a bug.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import zipfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

from jvdiff.errors import (
    CheckpointError,
    CorruptFile,
    JvdiffError,
    NumericsError,
    ResourceError,
    SetupError,
    UsageError,
)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK = (errno.EIO, errno.EROFS, errno.ENXIO, errno.ESTALE)
_LOST = ("CUDA_ERROR", "CUDNN_STATUS", "CUBLAS_STATUS", "NCCL", "ptxas", "DEADLINE_EXCEEDED", "UNAVAILABLE", "PJRT")

_ARRAYS = ("numpy.lib.npyio", "numpy.lib._npyio_impl", "numpy.lib.format", "numpy.lib._format_impl")


class Row(NamedTuple):
    """One kind of error that others raise.

    found: whether an error is one of it
    error: which of ours it becomes
    sentence: what is said of it
    """

    found: Callable[[BaseException], bool]
    error: type[JvdiffError]
    sentence: Callable[[BaseException], str]


def explained(error: BaseException) -> JvdiffError | None:
    """The error of ours that says what another package or the system has raised; None: it is a bug, or ours already."""
    row = next((row for row in TABLE if row.found(error)), None)
    return row.error(row.sentence(error)) if row else None


# ------------------------------------------------------------------------------------------------------ who raised it


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _places(error: BaseException) -> list[tuple[str, str]]:
    """(module, function) of each frame that an error went through, the innermost last."""
    places, trace = [], error.__traceback__
    while trace is not None:
        places.append((str(trace.tb_frame.f_globals.get("__name__")), trace.tb_frame.f_code.co_name))
        trace = trace.tb_next
    return places


def _raised_in(error: BaseException, *packages: str) -> bool:
    """Whether an error was raised inside one of these modules or packages, and not in what they called of ours."""
    inner = [module for module, _ in _places(error)]
    ours = max((i for i, module in enumerate(inner) if module.split(".")[0] == "jvdiff"), default=-1)
    return any(module == name or module.startswith(f"{name}.") for module in inner[ours + 1 :] for name in packages)


def _type_of(error: BaseException, *packages: str) -> bool:
    """Whether the type of an error, or one that it is derived from, is of one of these packages."""
    return any(kind.__module__.split(".")[0] in packages for kind in type(error).__mro__)


# ------------------------------------------------------------------------------------------------------- what is said


def _said(error: BaseException, length: int = 300) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split())[:length] or type(error).__name__


def _where(error: BaseException) -> str:
    name = getattr(error, "filename", None)
    return f"{os.fsdecode(name) if isinstance(name, str | bytes) else name}: " if name is not None else ""


def _system(error: BaseException, advice: str) -> str:
    return f"{_where(error)}{getattr(error, 'strerror', None) or _said(error)}.\n{advice}"


def _jax(error: BaseException) -> bool:
    """Whether an error is one that JAX's runtime raised, by its name: JAX need not be there."""
    return any(kind.__name__ in ("JaxRuntimeError", "XlaRuntimeError") for kind in type(error).__mro__)


def _starting(error: BaseException) -> bool:
    """Whether JAX could not begin: no such device, or a setting of its environment that it does not take."""
    if any(_raised_in(one, "jax._src.xla_bridge", "jax_plugins", "jax_cuda12_plugin") for one in _chain(error)):
        return True
    return not isinstance(error, ImportError) and any(place == ("jax", "<module>") for place in _places(error))


def _start(error: BaseException) -> str:
    asked = os.environ.get("JAX_PLATFORMS")
    named = f" on JAX_PLATFORMS={asked}" if asked else ""
    return (
        f"JAX cannot start{named}: {_said(error) if str(error) else 'there is no such device'}.\n"
        "Expected: a device that is there, and JAX's package for it (jvdiff[cuda12] or jvdiff[cuda13] for NVIDIA's).\n"
        "Install it, or unset JAX_PLATFORMS and other variables of JAX to take what is there."
    )


def _package(error: BaseException) -> bool:
    return isinstance(error, ImportError) and not str(getattr(error, "name", "") or "").startswith("jvdiff")


def _network(error: BaseException) -> bool:
    return isinstance(error, ConnectionError | TimeoutError | socket.gaierror) or _type_of(
        error, "huggingface_hub", "httpx", "requests", "urllib3"
    )


def _stored(error: BaseException) -> bool:
    """Whether Orbax or TensorStore raised an error, which has any type."""
    status = r"(NOT_FOUND|DATA_LOSS|FAILED_PRECONDITION|INVALID_ARGUMENT|PERMISSION_DENIED|OUT_OF_RANGE|ABORTED): "
    return _raised_in(error, "orbax", "tensorstore") or (
        isinstance(error, ValueError) and re.match(status, str(error)) is not None
    )


def _number(error: BaseException) -> int | None:
    return error.errno if isinstance(error, OSError) else None


TABLE: tuple[Row, ...] = (
    Row(lambda e: isinstance(e, MemoryError), ResourceError, lambda e: "not enough memory on this machine."),
    Row(
        lambda e: _number(e) in _FULL,
        ResourceError,
        lambda e: _system(e, "Free some space, or choose another folder."),
    ),
    Row(
        lambda e: _number(e) in (errno.EMFILE, errno.ENFILE),
        ResourceError,
        lambda e: _system(e, "Too many files are open: raise the limit (ulimit -n)."),
    ),
    Row(
        lambda e: _number(e) in (errno.ENOMEM, errno.EAGAIN) or "can't start new thread" in str(e),
        ResourceError,
        lambda e: _system(e, "Not enough memory, or too many processes, on this machine."),
    ),
    Row(lambda e: _number(e) in _DISK, ResourceError, lambda e: _system(e, "The disk, or the network to it, fails.")),
    Row(_network, SetupError, lambda e: f"the network fails: {_said(e)}.\nTry again, or name a folder instead."),
    Row(
        lambda e: _type_of(e, "av"),
        CorruptFile,
        lambda e: f"{_where(e)}FFmpeg cannot read or write it: {_said(e)}.\nGive another file, or make it again.",
    ),
    Row(
        lambda e: isinstance(e, OSError),
        CheckpointError,
        lambda e: _system(e, "Expected a file that is there and can be read. Look at its permissions and at links."),
    ),
    Row(_starting, SetupError, _start),
    Row(
        lambda e: _jax(e) and "RESOURCE_EXHAUSTED" in str(e),
        ResourceError,
        lambda e: f"the device has not enough memory: {_said(e)}.\nTry fewer frames or a smaller picture.",
    ),
    Row(
        lambda e: _jax(e) and any(word in str(e) for word in _LOST),
        SetupError,
        lambda e: f"the device, or the way to it, failed: {_said(e)}.\nLook at it with nvidia-smi, and start again.",
    ),
    Row(
        lambda e: _jax(e) and "Disallowed" in str(e) and "transfer" in str(e),
        SetupError,
        lambda e: f"JAX_TRANSFER_GUARD forbids what every run does: {_said(e, 120)}.\nUnset it.",
    ),
    Row(
        lambda e: isinstance(e, FloatingPointError),
        NumericsError,
        lambda e: f"NaN or infinity, where JAX was asked to look for them (JAX_DEBUG_NANS): {_said(e)}.",
    ),
    Row(
        _package,
        SetupError,
        lambda e: f"a package is missing, or cannot be loaded: {_said(e)}.\nInstall jvdiff again, with its extras.",
    ),
    Row(
        lambda e: type(e) is Exception or type(e).__name__ == "PanicException",  # tokenizers, which is written in Rust
        CorruptFile,
        lambda e: f"a tokenizer cannot be used: {_said(e)}.\nDownload the repository's tokenizer folder again.",
    ),
    Row(
        lambda e: isinstance(e, json.JSONDecodeError) or (isinstance(e, RecursionError) and _raised_in(e, "json")),
        CorruptFile,
        lambda e: f"a file is not usable as JSON: {_said(e)}.",
    ),
    Row(
        lambda e: isinstance(e, zipfile.BadZipFile | EOFError) or _raised_in(e, "zipfile", *_ARRAYS),
        CorruptFile,
        lambda e: f"a file of arrays is damaged: {_said(e)}.\nMake it again.",
    ),
    Row(
        lambda e: isinstance(e, UnicodeEncodeError),
        UsageError,
        lambda e: f"text that cannot be written: {_said(e)}.\nExpected Unicode text, for instance UTF-8.",
    ),
    Row(
        lambda e: isinstance(e, UnicodeError),
        CorruptFile,
        lambda e: f"a file is not text in UTF-8: {_said(e)}.",
    ),
    Row(
        lambda e: isinstance(e, ValueError) and "integer string conversion" in str(e),
        UsageError,
        lambda e: f"a number has too many digits: {_said(e)}.",
    ),
    Row(
        lambda e: _stored(e) and any(word in str(e) for word in ("RESOURCE_EXHAUSTED", "No space left", "too large")),
        ResourceError,
        lambda e: f"the disk or memory is full: {_said(e)}.",
    ),
    Row(_stored, CorruptFile, lambda e: f"Orbax cannot read or write: {_said(e)}.\nMake it again, or copy it again."),
)
