"""A converted or trained repository becomes a Diffusers folder that its published pipeline class loads.

The conversion's tables are read backwards, one array in memory at a time. Without a dtype every number is written as it
is stored, so that Hugging Face -> Orbax -> Hugging Face gives the same bits; with it, all weights are cast. A causal
repository keeps its class names, which diffusers does not have. The folder has a manifest for `jvdiff verify`.
"""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from jvdiff.config import expanded
from jvdiff.errors import CheckpointError, UsageError
from jvdiff.models import layouts
from jvdiff.models.family import Family, Part, read_config
from jvdiff.pipeline.repository import inspect
from jvdiff.runtime.staging import staged
from jvdiff.weights import orbax
from jvdiff.weights import safetensors as reader
from jvdiff.weights.manifest import PUBLISHED, verify_files, write_manifest
from jvdiff.weights.naming import by_leaf, expected, flatten
from jvdiff.weights.restoring import check_leaves

from .from_diffusers import DTYPES, copy_small_files, versions

_CODES = {dtype: code for code, dtype in reader.DTYPES.items()}


def to_hf(
    source: Path,
    target: Path,
    dtype: str | None = None,
    vae: Path | None = None,
    *,
    family: Family | None = None,
    follow_symlinks: bool = False,
) -> None:
    """Writes the folder, complete or not at all.

    Args:
        source: an Orbax directory of jvdiff with all components; its digests are checked first.
        target: the folder to write; it must not exist, and the folder it lies in must.
        dtype: a key of DTYPES for all weights; None keeps them as they are.
        vae: a VAE that takes the place of the source's, with the same configuration: one whose decoder was trained on.
        family: your own Family, where the repository is of none that jvdiff has; None: as its files say.
        follow_symlinks: allow files that are links out of the repository.

    Raises:
        UsageError: `target` exists; `source` is a Hugging Face folder already, its family has no published layout, or
            it has no part `vae` to replace; or `vae` has another configuration.
        IntegrityError, CheckpointError: `source` is damaged, or holds numbers too large for `dtype`.
        ResourceError: the disk is full.
    """
    repository = inspect(source, family=family, follow_symlinks=follow_symlinks)
    source = repository.path  # where `source` is a name, the folder that it names
    configs, parts = repository.models.configs, repository.family.parts
    if unpublished := [name for name in configs if parts[name].names is None]:
        raise UsageError(f"{source}: {repository.family.name} has no published layout ({unpublished[0]}) to write.")
    if repository.kind != "orbax":
        raise UsageError(f"{source}: is a Hugging Face folder already. Give an Orbax directory.")
    verify_files(source, follow_symlinks)
    folders = {name: source / name for name in configs}
    if vae is not None:
        vae = Path(expanded("vae", vae))
        if "vae" not in parts:
            raise UsageError(f"{source}: {repository.family.name} has no part vae; leave --vae out.")
        folders["vae"] = vae
        if not (vae / orbax.PARAMS).is_dir():
            raise UsageError(
                f"{vae}: is not an Orbax directory of a VAE. Give the result of training one (its `vae` folder)."
                f"{layouts.inside(vae, 'vae')}"
            )
        if read_config(vae, parts["vae"]) != configs["vae"]:
            raise UsageError(
                f"{vae}: its configuration, latent statistics included, is not that of {source / 'vae'}.\n"
                "The transformer knows the latents of the latter only. Give the result of training its decoder."
            )
        verify_files(vae, follow_symlinks)
    with staged(target) as staging:
        copy_small_files(repository, staging)
        for name, cfg in configs.items():
            file = staging / name / f"{parts[name].stem}.safetensors"
            _write(folders[name], parts[name], cfg, file, DTYPES[dtype] if dtype else None)
        origin = {"folder": source.resolve().name, "sha256": repository.digest}
        facts = {"source": origin, "dtype": dtype or "as stored", "versions": versions()}
        write_manifest(staging, {}, facts, manifest=PUBLISHED)


def _write(source: Path, part: Part, cfg: Any, file: Path, dtype: np.dtype | None) -> None:
    """One component as one safetensors file; the header comes first, so leaves may come in any order."""
    assert part.names is not None
    abstract, stored = part.abstract(cfg, np.float32), orbax.stored_leaves(source)
    check_leaves(source, flatten(abstract), stored)
    entries = expected(part.names(cfg), abstract)
    kinds = {name: dtype or np.dtype(stored[entry.path].dtype) for name, entry in entries.items()}
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name in sorted(entries, key=lambda name: (-kinds[name].itemsize, name)):  # wide numbers first: all aligned
        size = int(np.prod(entries[name].shape)) * kinds[name].itemsize
        header[name] = {
            "dtype": _CODES[kinds[name]],
            "shape": list(entries[name].shape),
            "data_offsets": [place, place + size],
        }
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    leaves = by_leaf(entries)
    with open(file, "xb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for path, array in orbax.read_leaves(source):
            for name, entry in leaves[path].items():
                leaf = array if entry.layer is None else array[entry.layer]
                with np.errstate(over="ignore"):
                    tensor = np.ascontiguousarray(entry.transform.inverse(leaf), kinds[name])
                if tensor.dtype != leaf.dtype and np.isinf(tensor).any() and not np.isinf(leaf).any():
                    raise CheckpointError(
                        f"{source}: {path} holds values too large for {kinds[name]}.\nChoose bfloat16 or float32."
                    )
                out.seek(8 + len(text) + header[name]["data_offsets"][0])
                out.write(tensor.reshape(-1).view(np.uint8).data)
            del array, leaf, tensor  # before the next one is read
