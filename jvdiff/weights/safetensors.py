"""Reads the JSON and safetensors files of a Hugging Face folder, trusting none of them.

Only bytes are read: no pickle, no code, no memory map (a file that shrinks under a map kills the process). Headers
are checked in full before any tensor is read: what the safetensors library refuses, and also what it accepts
(repeated names, empty tensors, NaN and infinity). The format: https://github.com/huggingface/safetensors#format
"""

import contextlib
import itertools
import json
import math
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from jvdiff.errors import CheckpointError, CorruptFile, IntegrityError, JvdiffError, MissingTensor, UnsafeFormat
from jvdiff.weights.hub import unfinished
from jvdiff.weights.naming import count_nonfinite, is_ignored, listed, shown

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Formats of safetensors that are well-formed and still not for us, with their bits per number.
_OTHER_BITS = {
    **dict.fromkeys(["BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"], 8),
    **dict.fromkeys(["U16", "I16"], 16),
    **dict.fromkeys(["U32", "I32"], 32),
    **dict.fromkeys(["U64", "I64", "F64", "C64"], 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
_HEADER_LIMIT = 100_000_000  # bytes, the library's own limit
_JSON_LIMIT = 64 * 2**20  # bytes; the largest published tokenizer.json has 17 MB
STEM = "diffusion_pytorch_model"  # as diffusers writes it
_UNSAFE = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npz", ".npy", ".msgpack", ".h5"}
_AGAIN = "Download it again, from a repository that publishes safetensors files."


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what the system says of a file that cannot be read into a CheckpointError that says what to do."""
    try:
        yield
    except OSError as error:
        lines = [f"{path}: cannot be read ({error.strerror})."]
        if isinstance(error, FileNotFoundError) and path.is_symlink():
            lines = [f"{path}: a link to {os.readlink(path)}, which is not there."]
            if ".git/annex" in os.readlink(path):
                lines += ["Its content was not fetched: run `git annex get` in that folder."]
            else:
                lines += ["A download was not finished, or its cache was cleaned: run hf download OWNER/NAME again."]
        elif isinstance(error, FileNotFoundError):
            lines += filter(None, [(unfinished(path.parent) or unfinished(path.parent.parent)).strip()])
        elif isinstance(error, PermissionError):
            lines += [
                f"{_whose(path)}Ask its owner for `chmod -R a+rX FOLDER`, or download a copy of your own "
                "(HF_HOME=FOLDER names another cache)."
            ]
        raise CheckpointError("\n".join(lines)) from error


def _whose(path: Path) -> str:
    """Whose a file is that cannot be read, as a sentence; empty where that cannot be told either."""
    with contextlib.suppress(OSError, KeyError):
        real = path.resolve()
        return f"The file is of {real.owner()}, mode {stat.S_IMODE(real.stat().st_mode):04o}. "
    return ""


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file of at most 64 MiB; refuses repeated keys, NaN and infinity.

    Raises:
        CheckpointError: there is no such file, or it cannot be read.
        CorruptFile: it is too large, or not one JSON object.
    """
    with readable(path):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _JSON_LIMIT:
            raise CorruptFile(
                f"{path}: expected a JSON file of at most {_JSON_LIMIT:,} bytes, found {status.st_size:,}.\n{_AGAIN}"
            )
        text = path.read_bytes()
    if real := what_it_is(text[:64]):
        raise CorruptFile(f"{path}: this is {real}.\nExpected a JSON file.")
    return _parse_json(text, str(path))


def _parse_json(text: bytes, where: str, repeated: str = "repeated key") -> dict[str, Any]:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        unique: dict[str, Any] = {}
        for name, value in items:
            if name in unique:
                raise ValueError(f"{repeated} {shown(name)}")
            unique[name] = value
        return unique

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
        if not isinstance(value, dict):
            raise ValueError("it is not one {...} object")
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{where}: not usable as JSON: {error}.\n{_AGAIN}") from error
    return value


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies.

    file: that holds it
    stored: dtype, as safetensors calls it
    shape: as it is stored
    begin, end: in the file, its first byte and the one after its last
    """

    file: Path
    stored: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.stored]

    def rows(self, start: int, stop: int) -> "Tensor":
        """The tensor of the rows from `start` to `stop`, which lie behind one another in the file."""
        row = (self.end - self.begin) // self.shape[0]
        begin, end = self.begin + start * row, self.begin + stop * row
        return replace(self, shape=(stop - start, *self.shape[1:]), begin=begin, end=end)


def what_it_is(start: bytes) -> str | None:
    """What a file under another's name really is, and what to do, judged by its first bytes."""
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, saved instead of the file (log in or accept the licence, then download again)"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself (run `git lfs pull`)"
    if start.startswith(b"PK\x03\x04"):
        return "a zip archive (a PyTorch or NumPy file under another name)"
    if start.startswith(b"\x80") and start[1:2] in b"\x02\x03\x04\x05" and start[2:8] != bytes(6):
        return "a Python pickle, which can run code and is never opened"
    return "a gzip archive" if start.startswith(b"\x1f\x8b") else None


def read_header(path: Path, ignored: Sequence[str] = ()) -> dict[str, Tensor]:
    """The tensors that one safetensors file holds; every byte of its data belongs to exactly one of them.

    Those that a pattern of `ignored` names may be of any dtype: they are never read.

    Raises:
        CorruptFile: truncated, malformed, or something else under that name.
        CheckpointError: well-formed, with a tensor that cannot be used (empty, fp8, whole numbers).
    """
    with readable(path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(64)
        if real := what_it_is(start):
            raise CorruptFile(f"{path}: this is {real}.\nExpected a safetensors file.")
        if size < 8:
            raise CorruptFile(f"{path}: {size} bytes, too short for a safetensors file.\n{_AGAIN}")
        length = struct.unpack("<Q", start[:8])[0]
        if length > _HEADER_LIMIT:
            raise CorruptFile(
                f"{path}: claims a header of {length:,} bytes; the format allows {_HEADER_LIMIT:,}.\n"
                f"The file is damaged, or not safetensors. {_AGAIN}"
            )
        if 8 + length > size:
            raise CorruptFile(
                f"{path}: cut off inside its header: expected at least {8 + length:,} bytes, found {size:,}.\n{_AGAIN}"
            )
        file.seek(8)
        header = file.read(length)
    if not header.startswith(b"{"):
        raise CorruptFile(f"{path}: its header does not start with '{{', so it is not safetensors.\n{_AGAIN}")
    entries = _parse_json(header, str(path), repeated="duplicate tensor name")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptFile(f"{path}: __metadata__ must map text to text.\n{_AGAIN}")
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in entries.items()}
    for name, tensor in tensors.items():
        if not is_ignored(name, ignored):
            _check_usable(name, tensor)
    _check_layout(path, tensors, 8 + length, size)
    return tensors


def _whole(value: Any) -> bool:
    return type(value) is int and value >= 0


def _tensor(path: Path, name: str, entry: Any, data: int) -> Tensor:
    """One entry of a header; `data` is where the data begin in the file."""

    def damaged(what: str) -> CorruptFile:
        return CorruptFile(f"{path}: tensor {shown(name)}: {what}.\nThe header is damaged. {_AGAIN}")

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise damaged("expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or len(shape) > 16 or not all(map(_whole, shape)):
        raise damaged("its shape is not a list of at most 16 whole numbers")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_whole, offsets)):
        raise damaged("its data_offsets are not two whole numbers")
    bits = 8 * DTYPES[dtype].itemsize if dtype in DTYPES else _OTHER_BITS.get(dtype)
    if bits is None:
        raise damaged(f"unknown dtype {shown(str(dtype))}")
    begin, end = offsets
    if end < begin:
        raise damaged(f"ends at byte {end:,}, before it begins at {begin:,}")
    if math.prod(shape) * bits != (end - begin) * 8:
        raise damaged(f"{dtype} of shape {shape!s:.80} does not take {end - begin:,} bytes")
    return Tensor(path, dtype, tuple(shape), data + begin, data + end)


def _check_usable(name: str, tensor: Tensor) -> None:
    if tensor.stored not in DTYPES:
        kind = "fp8 checkpoints are" if tensor.stored.startswith("F8") else f"{tensor.stored} tensors are"
        raise CheckpointError(
            f"{tensor.file}: tensor {shown(name)} is {tensor.stored}; {kind} not supported.\n"
            "Use the repository's F32, F16 or BF16 files."
        )
    if tensor.begin == tensor.end:
        raise CheckpointError(
            f"{tensor.file}: empty tensor {shown(name)} of shape {list(tensor.shape)!s:.80}.\n{_AGAIN}"
        )


def _check_layout(path: Path, tensors: Mapping[str, Tensor], data: int, size: int) -> None:
    """No hole, no overlap, nothing before, nothing after: a file has one meaning."""
    place = data
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].begin):
        if tensor.begin != place:
            what = "leaves a hole before" if tensor.begin > place else "overlaps the tensor before"
            raise CorruptFile(f"{path}: {what} tensor {shown(name)} at byte {tensor.begin:,}.\n{_AGAIN}")
        place = tensor.end
    if place > size:
        raise CorruptFile(f"{path}: truncated: expected {place:,} bytes, found {size:,}.\n{_AGAIN}")
    if place < size:
        raise CorruptFile(f"{path}: {size - place:,} extra bytes after the last tensor.\n{_AGAIN}")


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev


def _runs(tensor: Tensor, index: Sequence[slice] | None) -> tuple[list[int], list[int], int]:
    """(shape of a part of a tensor, where its contiguous runs of bytes begin in the file, bytes of each run)."""
    spans = [s.indices(n)[:2] for s, n in zip(index or [slice(None)] * len(tensor.shape), tensor.shape, strict=True)]
    shape = [stop - start for start, stop in spans]
    cut = max((axis for axis, n in enumerate(tensor.shape) if shape[axis] < n), default=-1)  # whole axes follow it
    places, stride = np.array(tensor.begin), tensor.end - tensor.begin
    for axis in range(cut + 1):
        stride //= tensor.shape[axis]
        start, stop = spans[axis]
        places = np.add.outer(places, stride * np.arange(start, stop if axis < cut else start + 1))
    return shape, places.reshape(-1).tolist(), math.prod(shape[max(cut, 0) :]) * tensor.dtype.itemsize


Renamed = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass
class Folder:
    """One component of a Hugging Face repository, opened: a source of tensors for `jvdiff.weights.naming`.

    path: the folder
    tensors: where each lies, by name
    files: size, mtime, inode and device of each file when its header was read
    allow_nonfinite: let NaN and infinite numbers through
    nonfinite: how many of them were let through, by tensor, of those read so far
    """

    path: Path
    tensors: dict[str, Tensor]
    files: dict[Path, tuple[int, ...]]
    allow_nonfinite: bool = False
    nonfinite: dict[str, int] = field(default_factory=dict)

    def read(self, name: str, index: Sequence[slice] | None = None) -> np.ndarray:
        """One tensor's numbers, exactly as stored; `index` is the part to read, with a slice for each axis.

        Raises:
            CorruptFile: the file became shorter since it was opened.
            IntegrityError: it was changed or replaced since.
            CheckpointError: it holds NaN or infinity (unless `allow_nonfinite`).
        """
        tensor = self.tensors[name]
        shape, places, run = _runs(tensor, index)
        array = np.empty(shape, tensor.dtype)
        view = array.reshape(-1).view(np.uint8).data
        with readable(tensor.file), open(tensor.file, "rb", buffering=0) as file:
            for number, place in enumerate(places):
                read_into(tensor.file, file, view[number * run : (number + 1) * run], place)
            self.check_same(tensor.file, file)
        self.judge(name, count_nonfinite(array))
        return array

    def check_same(self, file: Path, opened: BinaryIO) -> None:
        """Raises IntegrityError where a file is not the one whose header was read."""
        if _identity(os.fstat(opened.fileno())) != self.files[file]:
            raise IntegrityError(
                f"{file}: source changed while reading.\nWait until the download or copy is finished, then start again."
            )

    def judge(self, name: str, nonfinite: int) -> None:
        """Raises CheckpointError where a tensor holds NaN or infinity, or notes how many where they are let through."""
        if nonfinite and not self.allow_nonfinite:
            tensor = self.tensors[name]
            raise CheckpointError(
                f"{tensor.file}: tensor {shown(name)} holds {nonfinite:,} NaN or infinite numbers of "
                f"{math.prod(tensor.shape):,}.\n"
                "The weights are damaged; take another copy (convert has --allow_nonfinite to keep them)."
            )
        if nonfinite:
            self.nonfinite[name] = nonfinite


def read_into(path: Path, file: BinaryIO, view: Any, place: int) -> None:
    """Fills a buffer of bytes from a place in a file; raises CorruptFile where the file became too short for that."""
    done = 0
    while done < len(view):
        got = os.preadv(file.fileno(), [view[done : done + 2**30]], place + done)
        if got == 0:
            raise CorruptFile(f"{path}: became shorter while it was being read.\n{_AGAIN}")
        done += got


def open_folder(
    path: Path,
    stem: str = STEM,
    *,
    ignored: Sequence[str] = (),
    renamed: Renamed | None = None,
    follow_symlinks: bool = False,
    allow_nonfinite: bool = False,
) -> Folder:
    """Opens the weights of one component and reads every header; no tensor yet.

    Takes STEM.safetensors, or the files that STEM.safetensors.index.json names; variants beside them
    (STEM.fp16.safetensors) are not the weights.
    `ignored`: see `naming.check`; such tensors may be of any dtype.
    `renamed`: makes of the tensors of another layout those of the published one, by whose names they are read.
    `follow_symlinks`: see `check_link`.

    Raises:
        MissingTensor: no weights, a shard is missing, or the index and the shards disagree.
        UnsafeFormat: only pickles or archives, or a name that points outside the folder.
        CorruptFile, CheckpointError: see `read_header`; or the folder holds two sets of weights.
    """
    if not (files := weight_files(path, stem)):
        raise _no_weights(path, stem)
    first, *shards = files
    check_link(first, path.parent, follow_symlinks)
    weight_map = _weight_map(first) if shards else {}
    if missing := [file for file in shards if _is_gone(file)]:
        names = list(weight_map.values())
        counts = [f"{file.name} ({names.count(file.name)} tensors)" for file in missing]
        raise MissingTensor(
            f"{path}: {len(missing)} of {len(shards)} shards are missing: {listed(counts)}.\n{_AGAIN}"
            f"{unfinished(path.parent)}"
        )
    for file in shards:
        check_link(file, path.parent, follow_symlinks)

    tensors: dict[str, Tensor] = {}
    problems, identities = [], {}
    for file in shards or files:
        identities[file] = _identity(file.stat())
        for name, tensor in read_header(file, ignored).items():
            if name in tensors:
                problems.append(f"{shown(name)} is in both {tensors[name].file.name} and {file.name}")
            elif weight_map and weight_map.get(name) != file.name:
                problems.append(f"{shown(name)} is in {file.name}, where the index has no such tensor")
            tensors[name] = tensor
    problems += [f"{shown(name)} is not in {shard}" for name, shard in weight_map.items() if name not in tensors]
    if problems:
        raise MissingTensor(
            f"{first}: disagrees with its shards ({len(problems)} times): {listed(problems)}.\n{_AGAIN}"
        )
    return Folder(path, dict(renamed(tensors)) if renamed else tensors, identities, allow_nonfinite)


def _is_gone(file: Path) -> bool:
    """Whether there is no such file, or it is a link to none; one that cannot be reached is there."""
    try:
        file.stat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def weight_files(path: Path, stem: str = STEM) -> list[Path]:
    """The files of the published weights that a component's folder holds: one, or an index and the shards that it
    names, of which some may be missing; [] where there are none.

    A single file that the index itself names is one of its shards.

    Raises:
        CheckpointError: there are two sets of weights, a converted one (`params`) counted too.
        CorruptFile, UnsafeFormat: the index cannot be used.
    """
    single, index = path / f"{stem}.safetensors", path / f"{stem}.safetensors.index.json"
    indexed = os.path.lexists(index)
    shards = [path / name for name in dict.fromkeys(_weight_map(index).values())] if indexed else []
    alone = os.path.lexists(single) and single not in shards
    words = [single.name] * alone + [f"{index.name} with its shards"] * indexed
    if words and (path / "params").is_dir():
        words.append("params/ of a conversion")
    if len(words) > 1:
        raise CheckpointError(
            f"{path}: holds two sets of weights: {' and '.join(words)}.\n"
            "Which of them is meant cannot be told: some programs read the first, others the second.\n"
            "Move the one that is out of date elsewhere."
        )
    return [index, *shards] if indexed else [single] * alone


def tensor_names(path: Path, stem: str) -> set[str]:
    """The names of a component's tensors; none where its files are not in order, which `open_folder` tells in full."""
    try:
        return set(open_folder(path, stem, ignored=(".*",), follow_symlinks=True).tensors)  # only headers are read
    except (JvdiffError, OSError):
        return set()


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard file name; names are judged as text, and no file is touched."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFile(f"{index}: has no weight_map of tensor names to file names.\n{_AGAIN}")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors", file):
            raise UnsafeFormat(
                f"{index}: tensor {shown(name)} is said to be in {shown(str(file))}.\n"
                "Expected the plain name of a .safetensors file in the same folder; nothing was opened."
            )
    return weight_map


def _no_weights(path: Path, stem: str) -> CheckpointError:
    if not path.is_dir():
        return MissingTensor(f"{path}: no such folder.\nExpected a component of a Diffusers repository.")
    names = sorted(p.name for p in path.iterdir())
    if unsafe := [name for name in names if Path(name).suffix in _UNSAFE]:
        return UnsafeFormat(
            f"{path}: holds {', '.join(map(shown, unsafe[:3]))} and no safetensors.\n"
            "Files of these kinds can run code and are not opened.\n"
            "Use the repository's safetensors version, usually named OWNER/NAME-Diffusers."
        )
    return MissingTensor(
        f"{path}: no weights: expected {stem}.safetensors, or {stem}.safetensors.index.json.\n"
        f"Found: {', '.join(map(shown, names[:8])) or 'an empty folder'}.{unfinished(path.parent)}"
    )


def check_link(file: Path, root: Path, follow_symlinks: bool = False) -> None:
    """Refuses what is not a regular file, and symbolic links out of the repository `root`.

    Links that end where a cache of the hub or git-annex keeps the content of files (`models--OWNER--NAME/blobs`,
    `.git/annex`) are as good as files.

    Raises:
        UnsafeFormat: not a regular file, or a link to elsewhere without `follow_symlinks`.
        CheckpointError: a link to what is not there, or cannot be reached.
    """
    with readable(file):
        mode = file.stat().st_mode
    if not stat.S_ISREG(mode):
        raise UnsafeFormat(f"{file}: not a regular file.\nExpected weights or JSON.")
    real = file.resolve()
    if follow_symlinks or real.is_relative_to(root.resolve()) or _is_stored(real):
        return
    raise UnsafeFormat(
        f"{file}: a link to {real}, outside the repository.\n"
        "Copy the file into the folder, or give --follow_symlinks if the link is to be trusted."
    )


def check_links(root: Path, follow_symlinks: bool = False) -> None:
    """`check_link` for each small file of a repository: JSON, tokenizers. Weights are checked as they are opened."""
    for pattern in ("*.json", "*/*.json", "*/*.model", "*/*.txt"):
        for file in sorted(root.glob(pattern)):
            if not file.relative_to(root).parts[0].startswith(".") and file.exists():
                check_link(file, root, follow_symlinks)


def _is_stored(real: Path) -> bool:
    """Whether a file lies where the hub's cache or git-annex keep the content of files that are links to it."""
    names = [parent.name for parent in real.parents]
    return any(
        (name == "blobs" and above.startswith("models--")) or (name == "annex" and above == ".git")
        for name, above in itertools.pairwise(names)
    )
