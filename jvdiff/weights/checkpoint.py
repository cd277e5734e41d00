"""Reads parameters from Hugging Face folders and Orbax directories, and writes Orbax directories whole or not at all.

An Orbax directory of jvdiff carries `jvdiff.json`, a manifest with the sha256 of every file and of every array,
because Orbax itself does not notice a flipped bit. Files are compared with it before a number of theirs is used.
What was written is read back and compared before it takes its place (`jvdiff.runtime.staging`).

Where there are many processes, all call the same functions and see the same folders: each reads what its devices hold
and compares its share of the files with the manifest; process 0 writes. An error of one is told to all by
`jvdiff.runtime.distributed`.
"""

import hashlib
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jvdiff.errors import (
    CheckpointError,
    CorruptFile,
    IntegrityError,
    MissingTensor,
    ShapeMismatch,
    UsageError,
)
from jvdiff.runtime import distributed
from jvdiff.runtime.staging import MANIFEST, staged
from jvdiff.types import Params
from jvdiff.weights import safetensors as reader
from jvdiff.weights.naming import Rule, by_leaf, check, fill, flatten, listed, unflatten

PARAMS = "params"
_CHUNK = 64 * 2**20  # bytes of one chunk in an Orbax array; also the pieces in which files are hashed
_GROUP = 64 * 2**20  # bytes of small arrays that are read or written together
_log = logging.getLogger(__name__)


# --------------------------------------------------------------------------------------------------------- reading


def restore(
    folder: str | Path,
    abstract: Params,
    names: Sequence[Rule],
    shardings: Any = None,
    *,
    ignored: Sequence[str] = (),
    verify: bool = True,
    cast: bool = True,
) -> dict[str, Any]:
    """Reads one component onto devices, from a Hugging Face folder or from an Orbax directory.

    Each process reads what its own devices hold; of a Hugging Face folder, one part of one array is in host memory at a
    time. How the arrays lay when they were saved does not matter.

    Args:
        folder: one with safetensors in a published layout, or one that `save` or the converter wrote.
        abstract: the wanted tree of ShapeDtypeStructs (nested dicts).
        names: the published layout (`jvdiff.weights.naming`); empty for a model that has none. An Orbax directory has
            the tree's own names.
        shardings: one sharding for all leaves, or a tree of them like `abstract`; None is the default device.
        ignored: see `naming.check`.
        verify: compare the files with the manifest first (Orbax only; safetensors are checked as they are read).
        cast: convert to the dtypes of `abstract`, and log it; False refuses another dtype.

    Returns:
        A nested dict of jax.Arrays with the shapes and dtypes of `abstract`.

    Raises:
        MissingTensor, ShapeMismatch: names, shapes or (with cast=False) dtypes differ from `abstract`; all are listed.
        IntegrityError: a file differs from the manifest, or there is no manifest.
        CheckpointError: damaged or unusable files; see `jvdiff.weights.safetensors`.
    """
    path = Path(folder)
    if (path / PARAMS).is_dir():
        if verify:
            verify_files(path)
        return _restore_orbax(path, abstract, shardings, cast)
    if not names:
        raise MissingTensor(
            f"{path}: no {PARAMS}/ in it; expected an Orbax directory, the only layout of this model.\n"
            "Give the folder that a training wrote, whole."
        )
    return _restore_published(path, abstract, names, ignored, shardings, cast)


def _places(wanted: Mapping[str, Any], shardings: Any) -> dict[str, Any]:
    if isinstance(shardings, jax.sharding.Sharding):
        return dict.fromkeys(wanted, shardings)
    return flatten(shardings) if shardings is not None else dict.fromkeys(wanted)


def _restore_published(
    path: Path, abstract: Params, names: Sequence[Rule], ignored: Sequence[str], shardings: Any, cast: bool
) -> dict[str, Any]:
    wanted = flatten(abstract)
    places = _places(wanted, shardings)
    folder = reader.open_folder(path)
    entries = check(names, abstract, folder, where=str(path), ignored=ignored)
    _tell_casts(path, [(folder.tensors[name].dtype, wanted[e.path].dtype) for name, e in entries.items()], cast)
    tensors = by_leaf(entries)
    leaves = {}
    for name, leaf in wanted.items():
        load = partial(fill, leaf.shape, leaf.dtype, tensors[name], folder, where=str(path))
        leaves[name] = _placed(leaf, places[name], load)
    return _like(abstract, leaves)


def _placed(leaf: Any, sharding: jax.sharding.Sharding | None, load: Callable[..., np.ndarray]) -> jax.Array:
    """An array made shard by shard: `load(index=...)` once for each part of it that this process' devices hold."""
    if sharding is None:
        return jax.device_put(load())
    holders: dict[tuple, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        spans = tuple(part.indices(n)[:2] for part, n in zip(index or (), leaf.shape, strict=True))
        holders.setdefault(spans, []).append(device)
    shards: list[Any] = []
    for spans, devices in holders.items():
        part = load(index=[slice(*span) for span in spans])
        shards += jax.block_until_ready([jax.device_put(part, device) for device in devices])
        del part  # before the next one is read
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards, dtype=leaf.dtype)


def _restore_orbax(path: Path, abstract: Params, shardings: Any, cast: bool) -> dict[str, Any]:
    wanted = flatten(abstract)
    places = _places(wanted, shardings)
    stored = stored_leaves(path)
    _check_leaves(path, wanted, stored)
    _tell_casts(path, [(stored[name].dtype, leaf.dtype) for name, leaf in wanted.items()], cast)
    item = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[name]) for name, leaf in wanted.items()}
    with _orbax_errors(path):
        read = ocp.StandardCheckpointer().restore((path / PARAMS).absolute(), unflatten(item))
    return _like(abstract, {name: jax.device_put(leaf, places[name]) for name, leaf in flatten(read).items()})


def _like(abstract: Params, leaves: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The nested dict of `abstract`, empty dicts included, with other leaves."""
    return {
        key: _like(value, leaves, f"{prefix}{key}/") if isinstance(value, Mapping) else leaves[prefix + key]
        for key, value in abstract.items()
    }


def _tell_casts(path: Path, kinds: Sequence[tuple[Any, Any]], cast: bool) -> None:
    """`kinds`: the stored and the wanted dtype of every array."""
    casts = Counter((np.dtype(a).name, np.dtype(b).name) for a, b in kinds if np.dtype(a) != np.dtype(b))
    told = ", ".join(f"{count} of {len(kinds)} from {a} to {b}" for (a, b), count in sorted(casts.items()))
    if casts and not cast:
        raise ShapeMismatch(f"{path}: arrays have another dtype than asked for: {told}.\nConvert it, or allow casts.")
    if casts:
        _log.info("%s: casts %s", path, told)


def _check_leaves(path: Path, wanted: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    missing = [name for name in wanted if name not in stored]
    unexpected = [name for name in stored if name not in wanted]
    shapes = [
        f"{name} is {list(stored[name].shape)}, expected {list(leaf.shape)}"
        for name, leaf in wanted.items()
        if name in stored and tuple(stored[name].shape) != tuple(leaf.shape)
    ]
    if not (missing or unexpected or shapes):
        return
    lines = [f"{path}: its arrays do not fit the model."]
    lines += [f"  missing ({len(missing)}): {listed(missing)}"] if missing else []
    lines += [f"  not expected ({len(unexpected)}): {listed(unexpected)}"] if unexpected else []
    lines += [f"  wrong shape ({len(shapes)}): {listed(shapes)}"] if shapes else []
    lines += ["Use the config.json that belongs to these weights."]
    raise (MissingTensor if missing or unexpected else ShapeMismatch)("\n".join(lines))


@contextmanager
def _orbax_errors(path: Path) -> Iterator[None]:
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
    with _orbax_errors(path), _orbax() as orbax:
        return flatten(orbax.metadata((path / PARAMS).absolute()).item_metadata.tree)


def read_leaves(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of an Orbax directory in turn, as stored; memory is bounded by the largest, or 64 MiB."""
    leaves = list(stored_leaves(path).items())
    for group in _groups([math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for _, leaf in leaves]):
        names = [leaves[i][0] for i in group]
        item = {leaves[i][0]: jax.ShapeDtypeStruct(leaves[i][1].shape, leaves[i][1].dtype) for i in group}
        arguments = dict.fromkeys(names, ocp.RestoreArgs(restore_type=np.ndarray))
        with _orbax_errors(path), _orbax() as orbax:
            read = orbax.restore(
                (path / PARAMS).absolute(),
                args=ocp.args.PyTreeRestore(
                    item=unflatten(item), restore_args=unflatten(arguments), partial_restore=True
                ),
            )
        found = flatten(read)
        del read
        for name in names:
            yield name, found.pop(name)


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


# --------------------------------------------------------------------------------------------------------- manifest


def file_sha256(file: Path) -> str:
    total = hashlib.sha256()
    with open(file, "rb") as data:
        while piece := data.read(_CHUNK // 16):
            total.update(piece)
    return total.hexdigest()


def array_sha256(array: np.ndarray) -> str:
    """sha256 of an array's numbers in C order, as they lie in memory (little endian)."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def _files(root: Path) -> dict[str, Path]:
    """Every file below a folder, by its name relative to it."""
    return {str(p.relative_to(root)): p for p in sorted(root.rglob("*")) if not p.is_dir()}


def write_manifest(root: Path, tensors: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Writes jvdiff.json: `facts`, the arrays, and size and sha256 of every file below `root`."""
    found = _files(root)
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(file_sha256, found.values()))
    files = {
        name: {"size": path.stat().st_size, "sha256": digest}
        for (name, path), digest in zip(found.items(), digests, strict=True)
    }
    manifest = {"format": "jvdiff checkpoint", "version": 1, **facts, "tensors": tensors, "files": files}
    (root / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of an Orbax directory.

    Raises:
        IntegrityError: there is none, so nothing can be checked.
        CorruptFile, CheckpointError: it is damaged, or of a later version.
    """
    if not (root / MANIFEST).is_file():
        raise IntegrityError(
            f"{root}: no {MANIFEST}, so its files cannot be checked.\n"
            "Convert it again, or restore with verify=False if you trust the disk."
        )
    manifest = reader.read_json(root / MANIFEST)
    if manifest.get("version") != 1 or not all(isinstance(manifest.get(k), dict) for k in ("files", "tensors")):
        raise CheckpointError(f"{root / MANIFEST}: expected a manifest of version 1.\nUpdate jvdiff, or convert again.")
    return manifest


def verify_files(path: Path) -> None:
    """Compares every file below `path` (a component, or a whole directory) with the manifest beside or above it.

    Of several processes each reads a share, and all know what any of them found. Raises IntegrityError that names the
    files that differ, are missing, or should not be there.
    """
    root = path if (path / MANIFEST).is_file() or not (path.parent / MANIFEST).is_file() else path.parent
    prefix = "" if root == path else f"{path.name}/"
    recorded = {name: entry for name, entry in read_manifest(root)["files"].items() if name.startswith(prefix)}
    found = {prefix + name: file for name, file in _files(path).items() if prefix + name != MANIFEST}

    by_size = sorted(recorded, key=lambda name: (recorded[name]["size"], name))
    first, processes = (jax.process_index(), jax.process_count()) if distributed.several() else (0, 1)
    mine = set(by_size[first::processes])

    def problem(name: str) -> str | None:
        if name not in found:
            return f"{name} is missing"
        if name not in recorded:
            return f"{name} is not in the manifest"
        size, expected = found[name].stat().st_size, recorded[name]["size"]
        if size != expected:
            return f"{name} has {size:,} bytes instead of {expected:,}"
        if name in mine and file_sha256(found[name]) != recorded[name]["sha256"]:
            return f"{name} has other content"
        return None

    with ThreadPoolExecutor() as pool:
        problems = [text for text in pool.map(problem, sorted(recorded.keys() | found.keys())) if text]
    problems = sorted({text for texts in distributed.gather(problems) for text in texts})
    if problems or not recorded:
        raise IntegrityError(
            f"{path}: differs from what was written: {listed(problems or ['the manifest lists nothing of it'])}.\n"
            "The disk or a copy damaged it. Convert it again, or copy it again from a good place."
        )


# ---------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class Leaf:
    """An array that comes into being when it is written, so that only one needs to be in memory.

    `facts` go into the manifest's record of it; `load` may fill them.
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
    if distributed.writes():
        write()
        distributed.gather(None)
    else:
        while (number := distributed.gather(None)[0]) is not None:
            multihost_utils.process_allgather(spread[number], tiled=True)


def _gather(array: jax.Array, number: int) -> np.ndarray:
    """In process 0: the whole array number `number` of those for which the others wait in `by_process_0`."""
    distributed.gather(number)
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
    with _orbax(type_handler_registry=_REGISTRY) as orbax:
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
