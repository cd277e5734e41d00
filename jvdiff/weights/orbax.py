"""Orbax directories: their arrays read one by one, and written whole or not at all.

What was written is read back and compared before it takes its place (`jvdiff.runtime.staging`). Where there are many
processes, all call the same functions; process 0 writes, and an error of one is told to all by
`jvdiff.runtime.verdict`.
"""

import asyncio
import collections
import json
import math
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jvdiff.errors import CorruptFile, IntegrityError, UsageError
from jvdiff.runtime import peers
from jvdiff.runtime.staging import staged
from jvdiff.types import Params
from jvdiff.weights.manifest import PARAMS, array_digests, array_sha256, verify_files, write_manifest
from jvdiff.weights.naming import flatten, listed, unflatten

_CHUNK = 64 * 2**20  # bytes of one chunk in an Orbax array
_AHEAD = 2  # groups that are read at once, while another is used
_GROUP = 64 * 2**20  # bytes of small arrays that are read or written together


# --------------------------------------------------------------------------------------------------------- reading


@contextmanager
def orbax_errors(path: Path) -> Iterator[None]:
    """Orbax and TensorStore raise many types; for a reader they all mean that the directory cannot be read."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        text = str(error).strip().split("\n")[0]
        raise CorruptFile(
            f"{path}: Orbax cannot read it ({type(error).__name__}: {text:.200}).\nConvert it again."
        ) from error


def _orbax(**options: Any) -> ocp.Checkpointer:
    """Orbax for this process alone: it waits for no other."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"jvdiff_{me}"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone, **options)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def stored_leaves(path: Path) -> dict[str, Any]:
    """The arrays of an Orbax directory, {"a/b/kernel": something with .shape and .dtype}; no data is read."""
    with orbax_errors(path), _orbax() as orbax:
        return flatten(orbax.metadata((path / PARAMS).absolute()).item_metadata.tree)


class _Reader(ocp.type_handlers.NumpyHandler):
    """Reads arrays of which one may be damaged. All are waited for, so that none reports its end after ours."""

    async def deserialize(self, *arguments: Any, **named: Any) -> Any:
        async with _all_waited_for():
            return await super().deserialize(*arguments, **named)


@asynccontextmanager
async def _all_waited_for() -> AsyncIterator[None]:
    """Where one read or write of the block fails, the others are waited for too: TensorStore would report their end to
    a loop that is closed, with a traceback on stderr for each."""
    before = asyncio.all_tasks()
    try:
        yield
    finally:
        await asyncio.gather(*(asyncio.all_tasks() - before), return_exceptions=True)


def read_leaves(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of an Orbax directory in turn, as stored, the next being read meanwhile; memory is bounded by three of
    the largest, or 192 MiB."""
    leaves = list(stored_leaves(path).items())
    groups = _groups([math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for _, leaf in leaves])
    with ThreadPoolExecutor(_AHEAD) as readers:
        begin = (readers.submit(_read_group, path, dict(leaves[i] for i in group)) for group in groups)
        reading = collections.deque(islice(begin, _AHEAD))
        while reading:
            found = reading.popleft().result()
            reading.extend(islice(begin, 1))
            for name in list(found):
                yield name, found.pop(name)


def _read_group(path: Path, leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    item = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
    arguments = dict.fromkeys(leaves, ocp.RestoreArgs(restore_type=np.ndarray))
    with orbax_errors(path), _orbax(type_handler_registry=_READERS) as orbax:
        read = orbax.restore(
            (path / PARAMS).absolute(),
            args=ocp.args.PyTreeRestore(item=unflatten(item), restore_args=unflatten(arguments), partial_restore=True),
        )
    found = flatten(read)
    return {name: found[name] for name in leaves}


def read_verified(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """`read_leaves`, where each array is compared with the manifest's digest of it while the next are read; memory is
    bounded by four of the largest. What was given before the end may yet turn out to be wrong.

    Raises:
        IntegrityError: an array differs from the manifest, or is missing.
    """
    left, last = array_digests(path), []

    def compare(name: str, digest: Future[str]) -> None:
        if left.pop(name, None) != digest.result():
            verify_files(
                path, follow_symlinks=True
            )  # raises, and names the file, unless what differs is the manifest's own record
            raise IntegrityError(f"{path}: array {name} differs from what was written.\nConvert it again.")

    try:
        with ThreadPoolExecutor(1) as hasher:
            for name, array in read_leaves(path):
                if last:
                    compare(*last.pop())
                last.append((name, hasher.submit(array_sha256, array)))
                yield name, array
                del array  # before the next one is read
            for each in last:
                compare(*each)
    except CorruptFile:
        verify_files(path, follow_symlinks=True)
        raise
    if left:
        raise IntegrityError(f"{path}: arrays are missing: {listed(sorted(left))}.\nConvert it again.")


_READERS = ocp.type_handlers.create_type_handler_registry(
    (np.ndarray, _Reader()),
    (jax.Array, ocp.type_handlers.ArrayHandler()),  # without the second there is a warning
)


def _groups(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Positions of arrays to handle together: one large array, or small ones of 64 MiB in all."""
    group: list[int] = []
    for i, size in enumerate(sizes):
        if group and sum(sizes[j] for j in group) + size > _GROUP:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


# ---------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class Leaf:
    """An array that comes into being when it is written, so that only one needs to be in memory.

    shape, dtype: of the array
    load: makes it
    facts: go into the manifest's record of it; `load` may fill them
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _LeafHandler(ocp.type_handlers.NumpyHandler):
    """Writes leaves a few at a time, complete before the next are made; on disk they are plain arrays."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(self, values: Sequence[Leaf], infos: Any, args: Any = None) -> list[Any]:
        for group in _groups([value.nbytes for value in values]):
            arrays = [values[i].load() for i in group]
            for future in await super().serialize(arrays, [infos[i] for i in group], [args[i] for i in group]):
                future.result()
            del arrays
        return []

    async def _background_serialize(self, *arguments: Any) -> None:
        """Orbax's own, in whose event loop a group is written."""
        async with _all_waited_for():
            await super()._background_serialize(*arguments)


_REGISTRY = ocp.type_handlers.create_type_handler_registry(
    (Leaf, _LeafHandler()), (jax.Array, ocp.type_handlers.ArrayHandler())
)


def save(path: str | Path, tree: Params, *, config: Mapping[str, Any] | None = None, overwrite: bool = False) -> None:
    """Writes a nested dict of arrays to an Orbax directory that `restore` reads; it appears complete or not at all.

    `config`: the content of a config.json beside them, where the directory is to be a component.

    Raises:
        UsageError: a key that is not a plain word, or a `path` that cannot be written.
        ResourceError: the disk is full.
    """
    spread: list[jax.Array] = []
    leaves = leaves_of(tree, spread)

    def write() -> None:
        with staged(path, overwrite=overwrite) as staging:
            if config is not None:
                (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            write_manifest(staging, write_params(staging, "", leaves), {})

    by_process_0(write, spread)


def by_process_0(write: Callable[[], None], spread: Sequence[jax.Array]) -> None:
    """Process 0 runs `write`, which loads leaves; the others help it to gather those of `spread`, until it is done."""
    if peers.writes():
        write()
        peers.gather(None)
    else:
        while (number := peers.gather(None)[0]) is not None:
            multihost_utils.process_allgather(spread[number], tiled=True)


def _gather(array: jax.Array, number: int) -> np.ndarray:
    """In process 0: the whole array number `number` of those for which the others wait in `by_process_0`."""
    peers.gather(number)
    return multihost_utils.process_allgather(array, tiled=True)


def _check_keys(tree: Params) -> None:
    """Orbax would take "a.b" and {"a": {"b": ...}} for one array, and keep only one of them."""
    for key, value in tree.items():
        if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", key):
            raise UsageError(f"the key {key!r:.80} cannot be saved: keys are words of letters, digits, - and _.")
        if isinstance(value, Mapping):
            _check_keys(value)


def leaves_of(tree: Params, spread: list[jax.Array]) -> dict[str, Leaf]:
    """What `write_params` takes, {"a/b/kernel": leaf}; arrays that lie on many processes are appended to `spread`."""
    _check_keys(tree)
    leaves = {}
    for name, array in flatten(tree).items():
        dtype = np.dtype(array.dtype) if hasattr(array, "dtype") else np.asarray(array).dtype
        load = partial(np.asarray, array)
        if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
            load = partial(_gather, array, len(spread))
            spread.append(array)
        leaves[name] = Leaf(np.shape(array), dtype, load)
    return leaves


def write_params(root: Path, component: str, leaves: Mapping[str, Leaf]) -> dict[str, dict[str, Any]]:
    """Writes `root/component/params`, reads it back, and gives the manifest's records of its arrays.

    Raises:
        IntegrityError: what was read back differs.
    """
    prefix = f"{component}/{PARAMS}/" if component else f"{PARAMS}/"
    records: dict[str, dict[str, Any]] = {}

    def recorded(name: str, leaf: Leaf) -> Leaf:
        def load() -> np.ndarray:
            array = leaf.load()
            records[prefix + name] = {
                "shape": list(leaf.shape),
                "dtype": leaf.dtype.name,
                "sha256": array_sha256(array),
                **leaf.facts,
            }
            return array

        return replace(leaf, load=load)

    tree = unflatten({name: recorded(name, leaf) for name, leaf in leaves.items()})
    arguments = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK), tree)
    # Uncompressed: weights shrink by a fifth, and are read at half the rate (benchmarks/loading.py).
    with _orbax(type_handler_registry=_REGISTRY, use_compression=False) as orbax:
        orbax.save((root / component / PARAMS).absolute(), args=ocp.args.PyTreeSave(tree, save_args=arguments))
    mark = root / component / PARAMS / "commit_success.txt"  # Orbax writes the folder's name into it, which is private
    if mark.exists():
        mark.write_text("Checkpoint commit was successful\n", encoding="utf-8")
    verify_arrays(root / component, prefix, records)
    return records


def verify_arrays(path: Path, prefix: str, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Reads every array of an Orbax directory and compares it with its record; raises IntegrityError."""
    left = {name for name in records if name.startswith(prefix)}
    for name, array in read_leaves(path):
        left.discard(prefix + name)
        if (record := records.get(prefix + name)) is None or array_sha256(array) != record["sha256"]:
            raise IntegrityError(f"{path}: array {name} differs from what was written.\nConvert it again.")
        del array  # before the next one is read
    if left:
        raise IntegrityError(f"{path}: arrays are missing: {listed(sorted(left))}.\nConvert it again.")
