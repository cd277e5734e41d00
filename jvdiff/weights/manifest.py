"""The manifest of an Orbax directory, `jvdiff.json`: the sha256 of every file and of every array.

Orbax itself does not notice a flipped bit, so files are compared with it before any of their numbers is used. With
many processes, each compares its share of the files, and all know what any of them found. Files that nobody reads
(those that begin with a dot, a README beside the weights) may come and go.

A folder in Diffusers' layout that was written here has one too, `jvdiff_manifest.json`. Only `jvdiff verify` compares
it: such a folder is its owner's, who may give it another scheduler, and diffusers may write into it.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from jvdiff.errors import CheckpointError, IntegrityError, UsageError
from jvdiff.runtime import peers
from jvdiff.runtime.records import file_sha256
from jvdiff.runtime.staging import MANIFEST
from jvdiff.weights.naming import listed
from jvdiff.weights.safetensors import check_link, read_json

K = TypeVar("K")
PUBLISHED = "jvdiff_manifest.json"  # that of a folder in Diffusers' layout
PARAMS = "params"  # the folder of a component that Orbax writes and reads


def array_sha256(array: np.ndarray) -> str:
    """sha256 of an array's numbers in C order, as they lie in memory (little endian)."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def _files(root: Path) -> dict[str, Path]:
    """Every file below a folder, by its name relative to it."""
    return {str(p.relative_to(root)): p for p in sorted(root.rglob("*")) if not p.is_dir()}


def _is_entry(value: Any) -> bool:
    return isinstance(value, dict) and type(value.get("size")) is int and isinstance(value.get("sha256"), str)


@contextlib.contextmanager
def hashing(files: Mapping[K, Path]) -> Iterator[Callable[[], dict[K, str]]]:
    """Hashes files beside what the block does, several at a time; yields what waits for the sha256 of each by name.

    Of many processes each reads a share, and all call this, and what it yields, equally often.
    """
    first, processes = (jax.process_index(), jax.process_count()) if peers.several() else (0, 1)
    order = sorted(files, key=lambda name: (files[name].stat().st_size, str(name)))
    pool = ThreadPoolExecutor()

    def found() -> dict[K, str]:
        known: dict[K, str] = {}
        for rank, share in enumerate(peers.gather([digest.result() for digest in begun])):
            known.update(zip(order[rank::processes], share, strict=True))
        return known

    try:
        begun = [pool.submit(file_sha256, files[name]) for name in order[first::processes]]
        yield found
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def digests(files: Mapping[K, Path]) -> dict[K, str]:
    """sha256 of each file by name; of many processes, all call this, and each reads a share."""
    with hashing(files) as found:
        return found()


def write_manifest(
    root: Path, tensors: Mapping[str, Any], facts: Mapping[str, Any], folder: str = "", manifest: str = MANIFEST
) -> None:
    """Writes a manifest: `facts`, the arrays, and size and sha256 of every file below `root`, or of its `folder`."""
    found = {name: file for name, file in _files(root).items() if name.startswith(folder) and name != manifest}
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(file_sha256, found.values()))
    files = {
        name: {"size": path.stat().st_size, "sha256": digest}
        for (name, path), digest in zip(found.items(), digests, strict=True)
    }
    content = {"format": "jvdiff checkpoint", "version": 1, **facts, "tensors": tensors, "files": files}
    (root / manifest).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_manifest(root: Path, name: str = MANIFEST) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        UsageError: no such folder.
        IntegrityError: the folder has no manifest to check its files against.
        CorruptFile, CheckpointError: it is damaged, or of a later version.
    """
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder.\nExpected one that a conversion or a training made.")
    if not (root / name).is_file():
        raise IntegrityError(
            f"{root}: no {name}, so its files cannot be checked.\n"
            "Convert it again. In Python, restore(..., verify=False) reads it unchecked."
        )
    manifest = read_json(root / name)
    whole = all(isinstance(manifest.get(k), dict) for k in ("files", "tensors"))
    if manifest.get("version") != 1 or not whole or not all(map(_is_entry, manifest["files"].values())):
        raise CheckpointError(f"{root / name}: expected a manifest of version 1.\nUpdate jvdiff, or convert again.")
    return manifest


def verify_files(path: Path, follow_symlinks: bool = False, largest: float = math.inf) -> None:
    """Compares every file below `path` (a component, or a whole directory) with the manifest beside or above it.

    A file that no manifest knows counts where Orbax would read it. With several processes, each reads a share, and all
    know what any of them found.

    largest: of files of more bytes only the size is compared

    Raises:
        IntegrityError: it names the files that differ, are missing, or should not be there.
        UnsafeFormat: a link to elsewhere without `follow_symlinks`; see `jvdiff.weights.safetensors.check_link`.
    """
    root, prefix = _root(path)
    there = {prefix + name for name in _files(path) if _of_orbax(prefix + name)}
    _verify(path, root, lambda name: name.startswith(prefix), there, follow_symlinks, largest=largest)


def _root(path: Path) -> tuple[Path, str]:
    """The folder of the manifest of a component or of a whole directory, and what the names of its files begin with."""
    root = path if (path / MANIFEST).is_file() or not (path.parent / MANIFEST).is_file() else path.parent
    return root, "" if root == path else f"{path.name}/"


def array_digests(path: Path) -> dict[str, Any]:
    """The sha256 of each array of a component by its name there, as its manifest has it; None where it has none."""
    root, prefix = _root(path)
    prefix += f"{PARAMS}/"
    records = read_manifest(root)["tensors"]
    return {name.removeprefix(prefix): x.get("sha256") for name, x in records.items() if name.startswith(prefix)}


def verify_small(root: Path, follow_symlinks: bool = False) -> None:
    """Compares all that a manifest knows but the arrays of Orbax. Raises: as `verify_files`."""
    _verify(root, root, lambda name: not _of_orbax(name), (), follow_symlinks)


def verify_published(root: Path, read: Collection[str], follow_symlinks: bool = False) -> None:
    """Compares a folder in Diffusers' layout with its manifest, which must know all files that are `read`. Raises: as
    `verify_files`."""
    _verify(root, root, lambda name: True, read, follow_symlinks, PUBLISHED)


def check_known(root: Path, read: Collection[str]) -> None:
    """Raises IntegrityError where a file that is read, by its name in `root`, is unknown to the manifest."""
    known = read_manifest(root)["files"]
    if unknown := sorted(set(read) - set(known)):
        raise _differs(root, [f"{name} is not in the manifest" for name in unknown])


def _of_orbax(name: str) -> bool:
    """Whether a file, by its name below the root, lies where Orbax reads, and Orbax would look at it."""
    folders = name.split("/")[:-1]
    return PARAMS in folders and not any(part.startswith(".") for part in name.split("/"))


def _verify(
    path: Path,
    root: Path,
    within: Callable[[str], bool],
    read: Collection[str],
    follow_symlinks: bool,
    manifest: str = MANIFEST,
    largest: float = math.inf,
) -> None:
    """Compares what the manifest of `root` records, where `within`; of `read` nothing may be unknown to it."""
    known = read_manifest(root, manifest)["files"]
    recorded = {name: entry for name, entry in known.items() if within(name)}
    there = {name: root / name for name in recorded if (root / name).is_file()}
    for name in recorded:
        if name in there or (root / name).is_symlink():  # to nowhere: git-annex' content that was not fetched
            check_link(root / name, root, follow_symlinks)
    sizes = {name: (file.stat().st_size, recorded[name]["size"]) for name, file in there.items()}
    problems = [f"{name} is missing" for name in recorded if name not in there]
    problems += [f"{name} is not in the manifest" for name in read if name not in known]
    problems += [f"{name} has {size:,} bytes instead of {was:,}" for name, (size, was) in sizes.items() if size != was]
    same_size = {name: file for name, file in there.items() if sizes[name][0] == sizes[name][1] <= largest}
    found = digests(same_size)
    problems += [f"{name} has other content" for name in same_size if found[name] != recorded[name]["sha256"]]
    problems = sorted({text for texts in peers.gather(problems) for text in texts})
    if problems or not recorded:
        raise _differs(path, problems or ["the manifest lists nothing of it"])


def _differs(path: Path, problems: Sequence[str]) -> IntegrityError:
    return IntegrityError(
        f"{path}: differs from what was written: {listed(problems)}.\n"
        "The disk or a copy damaged it. Convert it again, or copy it again from a good place."
    )
