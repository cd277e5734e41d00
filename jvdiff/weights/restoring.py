"""Reads parameters onto devices, part by part, from a published (safetensors) folder or from an Orbax directory.

Where there are many processes, all call `restore` and see the same folders: each reads what its own devices hold.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jvdiff.errors import MissingTensor, ShapeMismatch
from jvdiff.types import Params
from jvdiff.weights import safetensors as reader
from jvdiff.weights.manifest import verify_files
from jvdiff.weights.naming import Rule, by_leaf, check, fill, flatten, listed, unflatten
from jvdiff.weights.orbax import PARAMS, orbax_errors, stored_leaves

_log = logging.getLogger(__name__)


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
    with orbax_errors(path):
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
