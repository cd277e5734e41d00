"""Published files, each read once from its first byte to its last: hashed, checked and cast on the way.

A file has two threads: one reads it, looks for NaN and casts, the other hashes what was read. As many files as there
are cores are read side by side; of each, a few pieces and one tensor are in memory at a time.
"""

import collections
import hashlib
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jvdiff.errors import CheckpointError
from jvdiff.weights.naming import check_cast, count_nonfinite, shown
from jvdiff.weights.safetensors import Folder, Tensor, read_into, readable

PIECE = 2**22  # bytes that are read, and then hashed while the next are read
_AHEAD = 4  # pieces of a file that are in memory
_ALIGNMENT = 64  # bytes


class Wanted(NamedTuple):
    """What is to become of a tensor.

    dtype: that it is cast to
    kept: whether its array is still looked at when `use` has returned
    all_zero: what is wrong if every number is 0; else empty
    """

    dtype: Any
    kept: bool
    all_zero: str


class _Stopped(Exception):
    """Another file cannot be used, or the user wants no more."""


def read_all(folder: Folder, wanted: Mapping[str, Wanted], use: Callable[[str, np.ndarray], None]) -> dict[Path, str]:
    """Reads every file of a component, whatever is wanted of it, and gives the sha256 of each.

    use: called with the name of each tensor that is wanted and its array, cast, in the order of its file and in the
        thread that reads it. What it raises ends the reading.

    Raises:
        CheckpointError and its kinds: as `Folder.read`; or a finite number does not fit the dtype, or a tensor that
            must not be all zero is.
    """
    tensors: dict[Path, list[tuple[str, Tensor]]] = {file: [] for file in folder.files}
    for name, tensor in sorted(folder.tensors.items(), key=lambda item: item[1].begin):
        tensors[tensor.file].append((name, tensor))
    stop = threading.Event()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            files = {file: pool.submit(_read, folder, file, tensors[file], wanted, use, stop) for file in tensors}
            wait(files.values(), return_when=FIRST_EXCEPTION)
        finally:
            stop.set()  # no thread outlives an error, or Ctrl-C, by more than a piece
    errors = [error for future in files.values() if (error := future.exception())]
    if errors:
        raise next((error for error in errors if not isinstance(error, _Stopped)), errors[0])
    return {file: future.result() for file, future in files.items()}


def _read(
    folder: Folder,
    file: Path,
    tensors: Sequence[tuple[str, Tensor]],
    wanted: Mapping[str, Wanted],
    use: Callable[[str, np.ndarray], None],
    stop: threading.Event,
) -> str:
    """Reads one file, and gives its sha256."""
    digest = hashlib.sha256()
    with readable(file), open(file, "rb", buffering=0) as source, ThreadPoolExecutor(1) as hasher:
        free: Any = [(np.empty(PIECE, np.uint8), hasher.submit(digest.update, b"")) for _ in range(_AHEAD)]
        buffers = collections.deque(free)

        def pieces(begin: int, end: int) -> Iterator[np.ndarray]:
            """The bytes, uint8 [n]; each array holds others after the next few."""
            for start in range(begin, end, PIECE):
                if stop.is_set():
                    raise _Stopped
                buffer, hashed = buffers.popleft()
                hashed.result()
                piece = buffer[: end - start]
                read_into(file, source, piece, start)
                buffers.append((buffer, hasher.submit(digest.update, piece)))
                yield piece
            folder.check_same(file, source)

        for _ in pieces(0, min((tensor.begin for _, tensor in tensors), default=file.stat().st_size)):  # the header
            pass
        scratch = np.empty(0, np.uint8)
        for name, tensor in tensors:
            inside = pieces(tensor.begin, tensor.end)
            if name not in wanted:
                collections.deque(inside, maxlen=0)
                continue
            size = math.prod(tensor.shape) * np.dtype(wanted[name].dtype).itemsize
            if not wanted[name].kept and size > len(scratch):
                scratch = np.empty(size, np.uint8)
            use(name, _cast(folder, name, wanted[name], inside, scratch))
    return digest.hexdigest()


def _cast(folder: Folder, name: str, wanted: Wanted, pieces: Iterator[np.ndarray], scratch: np.ndarray) -> np.ndarray:
    """The array of a tensor, as it lies in the file, in the dtype that is wanted; in `scratch` unless it is kept."""
    tensor, dtype = folder.tensors[name], np.dtype(wanted.dtype)
    size = math.prod(tensor.shape)
    flat = aligned(size * dtype.itemsize) if wanted.kept else scratch[: size * dtype.itemsize]
    flat, done, nonfinite, zero = flat.view(dtype), 0, 0, bool(wanted.all_zero)
    for piece in pieces:
        numbers = piece.view(tensor.dtype)
        part = flat[done : done + numbers.size]
        with np.errstate(over="ignore"):
            part[...] = numbers
        done += numbers.size
        if count_nonfinite(part):  # what is not finite stays so when it is cast
            nonfinite += count_nonfinite(numbers)
            check_cast(name, numbers, part, str(folder.path))
        zero = zero and not numbers.any()
    folder.judge(name, nonfinite)
    if zero:
        raise CheckpointError(f"{folder.path}: {shown(name)}: {wanted.all_zero}")
    return flat.reshape(tensor.shape)


def aligned(size: int) -> np.ndarray:
    """uint8 [size] that begins where JAX takes an array of the host for one of the CPU's as it is, without a copy."""
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % _ALIGNMENT
    return memory[begin : begin + size]
