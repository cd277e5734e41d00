"""A whole repository: what it says of itself, and how trained components become one.

In either layout it is a folder with model_index.json and one folder for each part and for each set of small files of
its family; what differs is how a part holds its weights: safetensors files, or the Orbax directory `params/`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jvdiff import models as families
from jvdiff.errors import CheckpointError, UnsafeFormat, UsageError
from jvdiff.models.family import Family, Models, read_config
from jvdiff.pipeline.settings import DEFAULTS_FILE, read_defaults, resolve
from jvdiff.runtime.staging import MANIFEST, staged
from jvdiff.types import Params
from jvdiff.weights import locate, manifest, orbax, safetensors


@dataclass(frozen=True, eq=False)
class Repository:
    """What a repository says of itself, read once; no weights were read.

    path: its folder
    kind: "hf" or "orbax"
    family: what it is made for
    models: configurations, and what inputs are made with
    defaults: content of jvdiff_defaults.json, settings that suit its weights
    digest: names the weights: of an Orbax directory the sha256 of its manifest, and so of everything; of a Hugging Face
        folder that of the files in the folders of its parts, but not of those beside them (model_index.json): whole up
        to 64 MiB, of larger ones the size and 64 samples
    """

    path: Path
    kind: str
    family: Family
    models: Models
    defaults: Mapping[str, Any]
    digest: str

    def settings(self, **given: Any) -> Any:
        """`resolve` with what this repository says."""
        return resolve(self.family, self.models, self.defaults, given)


def inspect(path: str | Path, *, at_once: bool | None = None, family: Family | None = None) -> Repository:
    """Reads every configuration of a repository, in either layout, and checks that they fit together.

    Args:
        at_once: which models the caller can run: True those that make a clip at once, False those that make a video
            chunk by chunk; None takes both.
        family: your own Family, where the repository is of none that jvdiff has; None: one of `jvdiff.models.FAMILIES`,
            as its files say.

    Raises:
        UsageError: no such folder, or a repository of the other kind.
        UnsafeFormat: a file of pickles instead of a folder, or a repository that wants its own code run.
        CheckpointError: incomplete, damaged, or a model that jvdiff does not have.
    """
    if not isinstance(path, str | Path):
        raise UsageError(f"the repository is {path!r:.80}; expected the path of a folder, or OWNER/NAME of the hub.")
    path = locate(path)
    index = _model_index(path)
    family = family or _family(path, index)
    models = _models(path, family, index)
    if (problem := family.misfits(models)) is not None:
        raise CheckpointError(
            f"{path}: its components do not fit together: {problem}\nTake all folders from one repository."
        )
    if at_once is not None:
        check_at_once(path, family, at_once)
    converted = (path / next(iter(family.parts)) / orbax.PARAMS).is_dir()
    known = converted and (path / MANIFEST).is_file()
    return Repository(
        path=path,
        kind="orbax" if converted else "hf",
        family=family,
        models=models,
        defaults=read_defaults(path, family),
        digest=manifest.file_sha256(path / MANIFEST) if known else _fingerprint(path, (*family.parts, *family.files)),
    )


def check_at_once(path: Path, family: Family, at_once: bool) -> None:
    """Raises UsageError unless the models make a clip at once, or with False a video chunk by chunk."""
    if at_once and not family.at_once:
        raise UsageError(f"{path}: a causal model, which makes a video chunk by chunk; run it with `jvdiff stream`.")
    if not at_once and family.at_once:
        raise UsageError(f"{path}: not a causal model: it makes the whole video at once; run it with `jvdiff sample`.")


def _model_index(path: Path) -> dict[str, Any]:
    """model_index.json of a folder, which names classes of known libraries only; jvdiff never imports them."""
    if path.is_file():
        raise UnsafeFormat(
            f"{path}: a single file; files such as .pth or .ckpt can run code and are not opened.\n"
            "Give the folder of a Diffusers repository, the one that holds model_index.json."
        )
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder.\nExpected a Diffusers repository or a converted one.")
    index = safetensors.read_json(path / "model_index.json")
    for name, value in index.items():
        component = isinstance(value, list) and (path / name).is_dir()  # other lists are data, names of labels for one
        if component and (len(value) != 2 or value[0] not in ("diffusers", "transformers", "jvdiff", None)):
            raise UnsafeFormat(
                f"{path / 'model_index.json'}: {name} names {str(value)!r:.80}; remote code is not supported.\n"
                "Expected classes of diffusers and transformers only."
            )
    return index


def _family(path: Path, index: Mapping[str, Any]) -> Family:
    package, name = families.select(path, index)
    return getattr(importlib.import_module(f"{package}.family"), name)


def _models(path: Path, family: Family, index: Mapping[str, Any]) -> Models:
    """The configuration of each part, and what is read of each folder without weights."""

    def there(name: str, optional: bool) -> bool:
        return not optional or ((path / name).is_dir() and (index.get(name) or [None])[0] is not None)

    configs = {
        name: read_config(path / name, part) for name, part in family.parts.items() if there(name, part.optional)
    }
    files = {name: kind.read(path / name) for name, kind in family.files.items() if there(name, kind.optional)}
    return Models(configs, files, index)


def _fingerprint(path: Path, folders: tuple[str, ...]) -> str:
    """A digest of these folders of a Hugging Face folder that takes the same short time for 20 MB and for 60 GB.

    Saved states are compared with it: with other files in it, those of earlier versions could not be resumed.
    """
    total = hashlib.sha256()
    for name in folders:
        for file in sorted(p for p in (path / name).glob("*") if p.is_file()):
            size = file.stat().st_size
            total.update(f"{name}/{file.name}\0{size}\0".encode())
            with open(file, "rb") as data:
                for place in [0] if size <= 2**26 else [i * (size - 2**20) // 63 for i in range(64)]:
                    data.seek(place)
                    total.update(data.read(min(size, 2**26 if size <= 2**26 else 2**20)))
    return total.hexdigest()


def save(
    path: str | Path,
    family: Family,
    components: Mapping[str, tuple[Any, Params]],
    *,
    files: Mapping[str, Path | Mapping[str, Any]],
    index: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes trained components as a repository that `inspect` and `load` read, and `convert.to_hf` exports.

    Args:
        components: for each part the configuration and the parameter tree.
        files: for each folder without weights a folder to copy, or the JSON content of its files by name.
        index: what model_index.json says besides the classes of the folders.
        defaults: the content of jvdiff_defaults.json: size, steps and so on that suit these weights.

    Raises: as `weights.save`, and UsageError where a component is missing or they do not fit together.
    """
    for what, folders, kinds in (("components", components, family.parts), ("files", files, family.files)):
        expected = [name for name, kind in kinds.items() if not kind.optional]
        if missing := sorted((set(expected) - set(folders)) | (set(folders) - set(kinds))):
            raise UsageError(f"{what} are {', '.join(folders)}; expected {', '.join(kinds)} (see {missing[0]}).")
    spread: list[jax.Array] = []
    leaves = {name: orbax.leaves_of(tree, spread) for name, (_, tree) in components.items()}

    def write() -> None:
        with staged(path, overwrite=overwrite) as staging:
            for name, content in files.items():
                _write_files(staging / name, content)
            _write_json(staging / "model_index.json", _index(staging, family, components, index or {}))
            if defaults is not None:
                _write_json(staging / DEFAULTS_FILE, defaults)
            records: dict[str, Any] = {}
            for name, (cfg, _) in components.items():
                _write_json(staging / name / "config.json", cfg.to_json())
                records |= orbax.write_params(staging, name, leaves[name])
            manifest.write_manifest(staging, records, {})

    orbax.by_process_0(write, spread)


def _index(folder: Path, family: Family, components: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """The content of model_index.json, checked as a reader will check it."""
    read = {name: family.files[name].read(folder / name) for name in family.files if (folder / name).is_dir()}
    published = {
        name: (part.published, components[name][0]) for name, part in family.parts.items() if name in components
    }
    published |= {name: (family.files[name].published, content) for name, content in read.items()}
    classes = {name: [library, class_of(value)] for name, ((library, class_of), value) in sorted(published.items())}
    index = {"_class_name": family.pipeline, **extra, **classes}
    models = Models({name: cfg for name, (cfg, _) in components.items()}, read, index)
    if (problem := family.misfits(models)) is not None:
        raise UsageError(f"the components do not fit together: {problem}")
    return index


def _write_files(folder: Path, content: Path | Mapping[str, Any]) -> None:
    if isinstance(content, Mapping):
        for name, value in content.items():
            _write_json(folder / name, value)
    else:
        shutil.copytree(content, folder)


def _write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
