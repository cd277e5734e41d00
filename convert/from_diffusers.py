"""A Hugging Face repository becomes an Orbax directory.

The target holds the whole repository, every part and every small file of its family, and `jvdiff.json`, the manifest.
It appears by one rename, complete and read back, or not at all. One stacked leaf is in memory at a time.
"""

import importlib.metadata
import json
import platform
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jvdiff.config import expanded
from jvdiff.errors import UsageError
from jvdiff.models.family import Family, Part
from jvdiff.pipeline.repository import Repository, inspect
from jvdiff.runtime.staging import check_target, staged
from jvdiff.weights import locate, manifest, orbax
from jvdiff.weights import safetensors as reader
from jvdiff.weights.naming import by_leaf, check, fill, flatten

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_COPIED = ("model_index.json", "jvdiff_defaults.json", "README.md", "LICENSE*", "NOTICE*", "Notice*")
_PACKAGES = ("jvdiff", "jax", "orbax-checkpoint", "numpy", "ml_dtypes")


class _Recorded:
    """A source of tensors that notes the sha256 of what was read (whole leaves, and so whole tensors)."""

    def __init__(self, folder: reader.Folder):
        self.folder = folder
        self.tensors = folder.tensors
        self.digests: dict[str, str] = {}

    def read(self, name: str, index: Sequence[slice] | None = None) -> np.ndarray:
        array = self.folder.read(name, index)
        self.digests[name] = manifest.array_sha256(array)
        return array


def find(
    source: str, revision: str | None = None, tell: Callable[[str], None] = lambda line: None
) -> tuple[Path, dict[str, Any]]:
    """The source's folder (`jvdiff.weights.locate`), and what the manifest says of where it came from."""
    source = expanded("source", source)
    there = Path(source).exists()
    folder = locate(source if there or not revision else f"{source}@{revision}", tell=tell)
    name = folder.resolve().name
    commit = name if re.fullmatch("[0-9a-f]{40}", name) else None
    if there or commit is None:
        return folder, {"folder": name, "commit": commit}
    return folder, {"repository": source.partition("@")[0], "commit": commit}


def convert(
    source: Path,
    target: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    follow_symlinks: bool = False,
    origin: Mapping[str, Any] | None = None,
    family: Family | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Converts a whole Hugging Face folder.

    Args:
        source: a Diffusers repository.
        target: the folder to write; the folder it lies in must exist.
        dtype: of the large matrices of transformers and text encoders, a key of DTYPES; the few arrays that the models
            keep in float32 whatever their dtype become float32. None keeps what is stored, and so does
            `Part.keeps_dtype`: a VAE is small, and pictures show bfloat16 in flat areas.
        overwrite: swap an existing converted directory for the new one, once that is complete.
        allow_nonfinite: keep NaN and infinity, and count them in the manifest.
        follow_symlinks: allow files that are links out of the repository.
        origin: where the source came from, for the manifest.
        family: your own Family, where the repository is of none that jvdiff has; None: as its files say.
        tell: called with a line on the progress now and then.

    Raises:
        JvdiffError: see `jvdiff.pipeline.repository.inspect`, `jvdiff.weights.safetensors`,
            `jvdiff.weights.naming.check`, `jvdiff.runtime.staging.staged`.
    """
    target = Path(expanded("target", target))
    check_target(target.absolute(), overwrite)
    repository = inspect(source, family=family, follow_symlinks=follow_symlinks)
    source = repository.path  # where `source` is a name, the folder that it names
    if repository.kind == "orbax":
        raise UsageError(f"{source}: is converted already. Give the Hugging Face folder.")
    if repository.family.at_once:
        repository.settings()  # a scheduler that sampling would refuse is refused while it can still be changed
    kinds, folders, parts = repository.family.parts, {}, {}
    for name, cfg in repository.models.configs.items():
        how: Any = {"ignored": kinds[name].ignored(cfg), "renamed": kinds[name].renaming(cfg)}
        how |= {"follow_symlinks": follow_symlinks, "allow_nonfinite": allow_nonfinite}
        folders[name] = reader.open_folder(source / name, kinds[name].stem, **how)
        cast = None if kinds[name].keeps_dtype else dtype
        parts[name] = _leaves(source / name, kinds[name], cfg, folders[name], cast)
    total = sum(leaf.nbytes for part in parts.values() for leaf in part.values())
    with staged(target, needed=total + total // 50 + 2**24, overwrite=overwrite) as staging:
        copy_small_files(repository, staging)
        for name, folder in folders.items():
            _complete(staging / name / "config.json", kinds[name], folder)
        tensors: dict[str, Any] = {}
        for name, part in parts.items():
            size = sum(leaf.nbytes for leaf in part.values())
            tell(f"{name}: {len(folders[name].tensors)} tensors, {size / 1e6:,.1f} MB")
            tensors |= orbax.write_params(staging, name, part)
        facts = {
            "source": dict(origin or {"folder": source.resolve().name}),
            "dtype": dtype or "as stored",
            "nonfinite": {name: folder.nonfinite for name, folder in folders.items() if folder.nonfinite},
            "versions": versions(),
        }
        tell("digests of all files")
        manifest.write_manifest(staging, tensors, facts)


def _complete(file: Path, part: Part, folder: reader.Folder) -> None:
    """What only the names of the source's tensors said, the target's config.json says."""
    config = reader.read_json(file)
    if (complete := part.complete(config, set(folder.tensors))) != config:
        file.write_text(json.dumps(complete, indent=2) + "\n", encoding="utf-8")


def _leaves(path: Path, part: Part, cfg: Any, folder: reader.Folder, dtype: str | None) -> dict[str, orbax.Leaf]:
    """What to write of one component; names and shapes are checked here, numbers are read when a leaf is written."""
    if part.names is None:
        raise UsageError(f"{path}: {type(cfg).__name__} has no published layout to convert from.")
    abstract = part.abstract(cfg, DTYPES[dtype or "float32"])
    entries = by_leaf(check(part.names(cfg), abstract, folder, where=str(path), ignored=part.ignored(cfg)))
    leaves = {}
    for name, leaf in flatten(abstract).items():
        stored = {folder.tensors[tensor].dtype for tensor in entries[name]}
        wanted = stored.pop() if not dtype and len(stored) == 1 else np.dtype(leaf.dtype)
        source = _Recorded(folder)
        load = partial(fill, leaf.shape, wanted, entries[name], source, where=str(path))
        leaves[name] = orbax.Leaf(leaf.shape, wanted, load, {"source": source.digests})
    return leaves


def copy_small_files(repository: Repository, target: Path) -> None:
    """Copies what makes the target a whole repository besides weights: configurations, tokenizers, licence."""
    source, family = repository.path, repository.family
    folders = {
        "": _COPIED,
        **{name: family.files[name].patterns for name in repository.models.files},
        **dict.fromkeys(repository.models.configs, ("config.json",)),
    }
    for folder, patterns in folders.items():
        (target / folder).mkdir(exist_ok=True)
        for file in sorted(p for pattern in patterns for p in (source / folder).glob(pattern)):
            reader.check_link(file, source, repository.follow_symlinks)
            shutil.copyfile(file, target / folder / file.name)


def versions() -> dict[str, str | None]:
    """The version of Python and of each package that has a part in a conversion; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def verify(target: Path, family: Family | None = None, follow_symlinks: bool = False) -> None:
    """Re-reads a converted directory: every file, then every array as Orbax gives it.

    Raises:
        IntegrityError: something differs from the manifest, is missing, or should not be there.
        JvdiffError: see `jvdiff.pipeline.repository.inspect`.
    """
    manifest.verify_files(target, follow_symlinks)
    records = manifest.read_manifest(target)["tensors"]
    for name in inspect(target, family=family, follow_symlinks=follow_symlinks).models.configs:
        orbax.verify_arrays(target / name, f"{name}/{orbax.PARAMS}/", records)
