"""Reads parameters onto devices, part by part, from a published (safetensors) folder or from an Orbax directory.

Where there are many processes, all call `restore` and see the same folders: each reads what its own devices hold.
"""

import functools
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from jvdiff.config import expanded
from jvdiff.errors import MissingTensor, ShapeMismatch, UsageError
from jvdiff.types import Params
from jvdiff.weights import manifest
from jvdiff.weights import safetensors as reader
from jvdiff.weights.naming import Entry, Rule, by_leaf, check, fill, flatten, listed, unflatten
from jvdiff.weights.one_pass import Wanted, aligned, read_all
from jvdiff.weights.orbax import PARAMS, orbax_errors, read_leaves, read_verified, stored_leaves

_log = logging.getLogger(__name__)
_LARGE = 2**24  # bytes of a leaf that grows on its devices
_BLOCK = 256  # numbers along the last axis that are rearranged at once, within the processor's cache
_METADATA = 2**22  # bytes of the largest file of an Orbax directory that is compared before Orbax reads


class LeafTransform(Protocol):
    """What becomes of each leaf between the file and the devices, for instance int8 values and their scales.

    A frozen value. It sees whole arrays, on the host, so that what it makes does not depend on the mesh.

    digest: what names it in the record of a run: with the weights' own digest it says what ran
    abstract: the path of a leaf ("a/b/kernel") and its struct -> a struct, or a pytree of structs
    apply: the path and the array (numpy, shape and dtype of that struct) -> arrays of what `abstract` gives
    """

    @property
    def digest(self) -> str: ...

    def abstract(self, path: str, struct: jax.ShapeDtypeStruct) -> Any: ...

    def apply(self, path: str, array: np.ndarray) -> Any: ...


def transformed(abstract: Params, transform: LeafTransform | None) -> dict[str, Any]:
    """The abstract tree of what `restore` gives: `abstract` with a pytree of structs in the place of each leaf."""
    leaves = flatten(abstract)
    return _like(abstract, {name: transform.abstract(name, x) for name, x in leaves.items()} if transform else leaves)


def restore(
    folder: str | Path,
    abstract: Params,
    names: Sequence[Rule],
    shardings: Any = None,
    *,
    stem: str = reader.STEM,
    transform: LeafTransform | None = None,
    ignored: Sequence[str] = (),
    renamed: reader.Renamed | None = None,
    verify: bool = True,
    cast: bool = True,
    follow_symlinks: bool = False,
    digests: dict[Path, str] | None = None,
) -> dict[str, Any]:
    """Reads one component onto devices, from a published (safetensors) folder or from an Orbax directory.

    Alone, a process reads each file once, from its first byte to its last, and hashes it meanwhile; a few tensors are
    in host memory at a time. One of many reads what its own devices hold, one part of one array at a time. With a
    `transform` each process reads every array, whole, one at a time. The sharding that the arrays were saved under does
    not matter.

    Args:
        folder: one with safetensors in a published layout, or one that `save` or the converter wrote.
        abstract: the tree of ShapeDtypeStructs (nested dicts) that the files are to hold.
        names: the published layout (`jvdiff.weights.naming`); empty for a model that has none. An Orbax directory has
            the tree's own names.
        shardings: one sharding for all leaves, or a tree of them like the result; None is the default device.
        stem: name of the published file, without suffix.
        transform: applied to every leaf, after the cast to the dtype of `abstract`.
        ignored: see `naming.check`.
        renamed: see `safetensors.open_folder`.
        verify: compare what is read with the manifest (Orbax only; safetensors are checked as they are read).
        cast: convert to the dtypes of `abstract`, and log it; False refuses another dtype.
        follow_symlinks: see `jvdiff.weights.safetensors.check_link`.
        digests: gets the sha256 of each safetensors file; of many processes each hashes a share.

    Returns:
        A nested dict of jax.Arrays with the shapes and dtypes of `transformed(abstract, transform)`.

    Raises:
        MissingTensor, ShapeMismatch: names, shapes or (with cast=False) dtypes differ from `abstract`; all are listed.
        IntegrityError: the manifest is missing, or a file or an array differs from it.
        UnsafeFormat: a file is a link to elsewhere.
        CheckpointError: damaged or unusable files; see `jvdiff.weights.safetensors`.
        UsageError: the transform gives something other than its `abstract` says.
    """
    path, wanted = Path(expanded("folder", folder)), flatten(abstract)
    reader.weight_files(path, stem)  # raises where there are two
    if (path / PARAMS).is_dir():
        return _like(abstract, _from_orbax(path, wanted, shardings, transform, verify, cast, follow_symlinks))
    opened, entries = _open_published(path, abstract, names, stem, ignored, renamed, cast, follow_symlinks)
    if transform is None and jax.process_count() == 1:
        leaves, found = _one_pass(opened, entries, wanted, _places(wanted, shardings))
    else:
        with manifest.hashing({file: file for file in opened.files if digests is not None}) as hashed:
            leaves = _leaf_by_leaf(opened, entries, wanted, shardings, transform)
            found = hashed()
    if digests is not None:
        digests.update(found)
    return _like(abstract, leaves)


def _from_orbax(
    path: Path,
    wanted: Mapping[str, Any],
    shardings: Any,
    transform: LeafTransform | None,
    verify: bool,
    cast: bool,
    follow_symlinks: bool,
) -> dict[str, Any]:
    """The leaves of an Orbax directory."""
    many = transform is None and jax.process_count() > 1
    if verify:
        manifest.verify_files(path, follow_symlinks, largest=math.inf if many else _METADATA)
    _check_orbax(path, wanted, cast)
    if many:
        return _read_orbax(path, wanted, _places(wanted, shardings))
    whole = _whole_orbax(path, wanted, verify)
    if transform is not None:
        return dict(_transformed(transform, wanted, whole, shardings))
    places = _places(wanted, shardings)
    return {name: _placed(wanted[name], places[name], partial(_part, array)) for name, array in whole}


def _places(wanted: Mapping[str, Any], shardings: Any) -> dict[str, Any]:
    if isinstance(shardings, jax.sharding.Sharding):
        return dict.fromkeys(wanted, shardings)
    return flatten(shardings) if shardings is not None else dict.fromkeys(wanted)


def _open_published(
    path: Path,
    abstract: Params,
    names: Sequence[Rule],
    stem: str,
    ignored: Sequence[str],
    renamed: reader.Renamed | None,
    cast: bool,
    follow_symlinks: bool,
) -> tuple[reader.Folder, dict[str, Entry]]:
    """The component, and what each of its tensors fills; names, shapes and dtypes are checked."""
    if not names:
        raise MissingTensor(
            f"{path}: no {PARAMS}/ in it; expected an Orbax directory, the only layout of this model.\n"
            "Give the folder that a training wrote, whole."
        )
    wanted = flatten(abstract)
    folder = reader.open_folder(path, stem, ignored=ignored, renamed=renamed, follow_symlinks=follow_symlinks)
    entries = check(names, abstract, folder, where=str(path), ignored=ignored)
    _tell_casts(path, [(folder.tensors[name].dtype, wanted[e.path].dtype) for name, e in entries.items()], cast)
    return folder, entries


def _leaf_by_leaf(
    folder: reader.Folder,
    entries: Mapping[str, Entry],
    wanted: Mapping[str, Any],
    shardings: Any,
    transform: LeafTransform | None,
) -> dict[str, Any]:
    """The leaves one after another, whole where there is a transform, else what this process' devices hold of them."""
    tensors = by_leaf(entries)
    loads = {
        name: partial(fill, leaf.shape, leaf.dtype, tensors[name], folder, where=str(folder.path))
        for name, leaf in wanted.items()
    }
    if transform is not None:
        return dict(_transformed(transform, wanted, ((name, load()) for name, load in loads.items()), shardings))
    places = _places(wanted, shardings)
    return {name: _placed(wanted[name], places[name], load) for name, load in loads.items()}


def _one_pass(
    folder: reader.Folder, entries: Mapping[str, Entry], wanted: Mapping[str, Any], places: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[Path, str]]:
    """The leaves, and the sha256 of each file; tensors go to the devices as they come in the files."""
    leaves = {name: _Leaf(leaf, places[name]) for name, leaf in wanted.items()}
    config: Any = jax.config
    default = config.jax_default_device  # of this thread

    def use(name: str, array: np.ndarray) -> None:
        entry = entries[name]
        with jax.default_device(default):
            leaves[entry.path].take(entry.transform.forward(array), entry.layer)

    kinds = {
        name: Wanted(wanted[e.path].dtype, kept=e.layer is None, all_zero=e.transform.all_zero)
        for name, e in entries.items()
    }
    digests = read_all(folder, kinds, use)
    return {name: leaf.whole() for name, leaf in leaves.items()}, digests


class _Leaf:
    """A leaf whose tensors come in any order, from several threads. A large stacked one grows on its devices, so that
    no more of it than a layer is in the host's memory, unless that is the devices' too.

    Tensors are views with their axes in another order. To make them anew is left to JAX where that can be.
    """

    def __init__(self, struct: Any, place: Any):
        self._struct, self._place, self._lock = struct, place, threading.Lock()
        self._layers: Any = None  # on the host
        self._array: Any = None  # on the devices
        self._on_host = _on_host(place)
        size = math.prod(struct.shape) * np.dtype(struct.dtype).itemsize
        divided = isinstance(place, NamedSharding) and place.spec[:1] not in ((), (None,))
        self._grows = size > _LARGE and not divided and isinstance(place, NamedSharding | None) and not self._on_host

    def take(self, tensor: np.ndarray, layer: int | None) -> None:
        if layer is None:
            self._array = jax.block_until_ready(_placed(self._struct, self._place, partial(_part, tensor)))
        elif self._grows:
            place = self._place and NamedSharding(self._place.mesh, PartitionSpec(*self._place.spec[1:]))
            part = _placed(jax.ShapeDtypeStruct(tensor.shape, tensor.dtype), place, partial(_part, tensor))
            with self._lock:
                if self._array is None:
                    self._array = jnp.zeros(self._struct.shape, self._struct.dtype, device=self._place)
                self._array = jax.block_until_ready(_writer(self._place)(self._array, part, np.int32(layer)))
        else:
            with self._lock:
                if self._layers is None:
                    memory = aligned(math.prod(self._struct.shape) * tensor.dtype.itemsize)
                    self._layers = memory.view(tensor.dtype).reshape(self._struct.shape)
            for start in range(0, tensor.shape[-1] if tensor.ndim else 1, _BLOCK):
                part = np.s_[..., start : start + _BLOCK] if tensor.ndim else ()
                made = np.asarray(jax.device_put(tensor[part])) if self._on_host else tensor[part]
                self._layers[(layer, *part)] = made

    def whole(self) -> jax.Array:
        if self._layers is not None:
            self._array, self._layers = _placed(self._struct, self._place, partial(_part, self._layers)), None
        return self._array


def _on_host(place: Any) -> bool:
    """Whether the devices of a place, or the default one, are the host's own processor."""
    config: Any = jax.config
    device = next(iter(place.device_set)) if place else config.jax_default_device or jax.devices()[0]
    return getattr(device, "platform", device) == "cpu"


@functools.lru_cache
def _writer(place: NamedSharding | None) -> Any:
    """jitted (stacked leaf, layer, its number) -> the leaf with that layer, in its own memory."""
    write = partial(jax.lax.dynamic_update_index_in_dim, axis=0)
    return jax.jit(write, donate_argnums=0, out_shardings=place)


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


def _check_orbax(path: Path, wanted: Mapping[str, Any], cast: bool) -> None:
    stored = stored_leaves(path)
    check_leaves(path, wanted, stored)
    _tell_casts(path, [(stored[name].dtype, leaf.dtype) for name, leaf in wanted.items()], cast)


def _read_orbax(path: Path, wanted: Mapping[str, Any], places: Mapping[str, Any]) -> dict[str, jax.Array]:
    item = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[name]) for name, leaf in wanted.items()}
    with orbax_errors(path), ocp.StandardCheckpointer() as reader:
        read = reader.restore((path / PARAMS).absolute(), unflatten(item))
    return {name: jax.device_put(leaf, places[name]) for name, leaf in flatten(read).items()}


def _whole_orbax(path: Path, wanted: Mapping[str, Any], verify: bool) -> Iterator[tuple[str, np.ndarray]]:
    for name, array in read_verified(path) if verify else read_leaves(path):
        with np.errstate(over="ignore"):
            array = array.astype(wanted[name].dtype, copy=False)
        yield name, array
        del array  # before the next one is read


def _transformed(
    transform: LeafTransform,
    wanted: Mapping[str, Any],
    arrays: Iterable[tuple[str, np.ndarray]],
    shardings: Any,
) -> Iterator[tuple[str, Any]]:
    """(path, pytree of jax.Arrays) for each leaf; its parts are cut out of what was made of the whole."""
    structs = {name: jax.tree.flatten(transform.abstract(name, leaf)) for name, leaf in wanted.items()}
    places = {}
    for name, (leaves, structure) in structs.items():
        one = shardings is None or isinstance(shardings, jax.sharding.Sharding)
        places[name] = [shardings] * len(leaves) if one else structure.flatten_up_to(_at(shardings, name))
    for name, array in arrays:
        leaves, structure = structs[name]
        made, found = jax.tree.flatten(transform.apply(name, array))
        made = [np.asarray(x) for x in made]
        _check_made(transform, name, (leaves, structure), (made, found))
        loads = [partial(_part, x) for x in made]
        placed = [_placed(*one) for one in zip(leaves, places[name], loads, strict=True)]
        del array, made, loads  # before the next one is read
        yield name, jax.tree.unflatten(structure, placed)


def _at(tree: Any, path: str) -> Any:
    return reduce(getitem, path.split("/"), tree)


def _part(array: np.ndarray, index: Sequence[slice] | None = None) -> np.ndarray:
    return array if index is None else array[tuple(index)]


def _check_made(
    transform: LeafTransform, name: str, expected: tuple[list[Any], Any], made: tuple[list[Any], Any]
) -> None:
    def kinds(leaves: Sequence[Any]) -> list[str]:
        return [f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}" for leaf in leaves]

    if made[1] == expected[1] and kinds(made[0]) == kinds(expected[0]):
        return
    what, said = (f"{structure} of {listed(kinds(leaves))}" for leaves, structure in (made, expected))
    raise UsageError(
        f"the transform {transform.digest:.80} gives for {name}: {what};\nexpected, as its abstract says: {said}.\n"
        "Its `abstract` and its `apply` must agree in structure, shapes and dtypes."
    )


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


def check_leaves(path: Path, wanted: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Raises MissingTensor or ShapeMismatch unless the arrays of a folder are those of a model, by path."""
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
