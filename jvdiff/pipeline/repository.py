"""A whole repository: what it says of itself, and how trained components become one.

In either layout it is a folder with model_index.json and one folder for each part and for each set of small files of
its family; what differs is how a part holds its weights: safetensors files, or the Orbax directory `params/`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jvdiff import models as families
from jvdiff.errors import CheckpointError, IntegrityError, UnsafeFormat, UsageError
from jvdiff.models import layouts
from jvdiff.models.family import Family, Models, read_config
from jvdiff.pipeline.settings import DEFAULTS_FILE, read_defaults, resolve
from jvdiff.runtime.staging import MANIFEST, staged
from jvdiff.types import Params
from jvdiff.weights import hub, locate, manifest, orbax, safetensors


@dataclass(frozen=True, eq=False)
class Repository:
    """What a repository says of itself, read once; no weights were read.

    path: its folder
    kind: "hf" or "orbax"
    family: what it is made for
    models: configurations, and what inputs are made with
    defaults: content of jvdiff_defaults.json, settings that suit its weights
    follow_symlinks: whether its files may be links to elsewhere
    digests: sha256 of those files of a Hugging Face folder that were read so far
    """

    path: Path
    kind: str
    family: Family
    models: Models
    defaults: Mapping[str, Any]
    follow_symlinks: bool = False
    digests: dict[Path, str] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def digest(self) -> str:
        """Names all that is read of it: of an Orbax directory the sha256 of its manifest, of a Hugging Face folder that
        of the names and digests of its files. Weights that were loaded were hashed then; others are read for it when
        it is first asked for, by all processes together."""
        if self.kind == "orbax" and (self.path / MANIFEST).is_file():
            return manifest.file_sha256(self.path / MANIFEST)
        files = read_files(self)
        self.note(manifest.digests({file: file for file in files.values() if file not in self.digests}))
        return _fingerprint({name: self.digests[file] for name, file in files.items()})

    def note(self, digests: Mapping[Path, str]) -> None:
        """Takes the digests of files that were read. Raises IntegrityError where one was another before."""
        for file, digest in digests.items():
            if self.digests.setdefault(file, digest) != digest:
                raise IntegrityError(f"{file}: changed since it was read before.\nStart again.")

    def settings(self, **given: Any) -> Any:
        """`resolve` with what this repository says."""
        return resolve(self.family, self.models, self.defaults, given)


def inspect(
    path: str | Path, *, at_once: bool | None = None, family: Family | None = None, follow_symlinks: bool = False
) -> Repository:
    """Reads every configuration of a repository, in either layout, and checks that they fit together.

    Args:
        at_once: which models the caller can run: True those that make a clip at once, False those that make a video
            chunk by chunk; None takes both.
        family: your own Family, where the repository is of none that jvdiff has; None: one of `jvdiff.models.FAMILIES`,
            as its files say.
        follow_symlinks: let files be links to elsewhere (`jvdiff.weights.safetensors.check_link`).

    Raises:
        UsageError: no such folder, or a repository of the other kind.
        UnsafeFormat: a file of pickles instead of a folder, or a repository that wants its own code run.
        CheckpointError: incomplete, damaged, or a model that jvdiff does not have.
        IntegrityError: a small file of a converted directory (a configuration, a tokenizer) is not what was written.
    """
    if not isinstance(path, str | Path):
        raise UsageError(f"the repository is {path!r:.80}; expected the path of a folder, or OWNER/NAME of the hub.")
    path = locate(path)
    if path.is_dir():
        safetensors.check_links(path, follow_symlinks)
    signed = (path / MANIFEST).is_file() and any(path.glob(f"*/{orbax.PARAMS}"))
    if signed:
        manifest.verify_small(path, follow_symlinks)
    index = _model_index(path)
    family = family or _family(path, index)
    converted = any((path / name / orbax.PARAMS).is_dir() for name in family.parts)
    if signed:
        manifest.check_known(path, _small_files(path, family))
    models = _models(path, family, index)
    if (problem := family.misfits(models)) is not None:
        raise CheckpointError(
            f"{path}: its components do not fit together: {problem}\nTake all folders from one repository."
        )
    _check_classes(path, (*models.configs, *models.files), index)
    if at_once is not None:
        check_at_once(path, family, at_once)
    return Repository(
        path=path,
        kind="orbax" if converted else "hf",
        family=family,
        models=models,
        defaults=read_defaults(path, family),
        follow_symlinks=follow_symlinks,
    )


def check_at_once(path: Path, family: Family, at_once: bool) -> None:
    """Raises UsageError unless the models make a clip at once, or with False a video chunk by chunk."""
    if at_once and not family.at_once:
        raise UsageError(f"{path}: a causal model, which makes a video chunk by chunk; run it with `jvdiff stream`.")
    if not at_once and family.at_once:
        raise UsageError(f"{path}: not a causal model: it makes the whole video at once; run it with `jvdiff sample`.")


def _model_index(path: Path) -> dict[str, Any]:
    """model_index.json of a folder, which names classes of known libraries only; jvdiff never imports them."""
    layouts.check(path, [f"{families.__name__}.{package}" for package in families.FAMILIES])
    index = safetensors.read_json(path / layouts.INDEX)
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
        named = isinstance(index.get(name), list) and index[name][:1] not in ([], [None])
        if named and not (path / name).is_dir():
            raise CheckpointError(
                f"{path}: model_index.json names {name}, and there is no such folder: a copy or a download was not "
                f"finished.{hub.unfinished(path)}\nCopy or download it again."
            )
        return not optional or ((path / name).is_dir() and named)

    configs = {
        name: read_config(path / name, part) for name, part in family.parts.items() if there(name, part.optional)
    }
    for name in configs:
        safetensors.weight_files(path / name, family.parts[name].stem)  # raises where there are two
    files = {name: kind.read(path / name) for name, kind in family.files.items() if there(name, kind.optional)}
    return Models(configs, files, index)


def _check_classes(path: Path, folders: Iterable[str], index: Mapping[str, Any]) -> None:
    """Raises CheckpointError where model_index.json and a folder's own file name two classes."""
    for name in folders:
        said = index.get(name)
        for file in (path / name / "config.json", path / name / f"{name}_config.json"):
            own = safetensors.read_json(file).get("_class_name") if file.is_file() else None
            if own is not None and isinstance(said, list) and said[1] not in (own, None):
                raise CheckpointError(
                    f"{path}: model_index.json says that {name} is a {said[1]!r:.80}, {name}/{file.name} that it is a "
                    f"{own!r:.80}.\nWhich of the two is meant cannot be told: diffusers takes the first, with the "
                    "second's values. Change one of the files, so that both say the same."
                )


def _small_files(path: Path, family: Family) -> dict[str, Path]:
    """The files besides weights that are read of a repository, those that are there, by their names in it."""
    files = [path / "model_index.json", path / DEFAULTS_FILE]
    files += [path / name / "config.json" for name in family.parts]
    files += [file for name, kind in family.files.items() for file in kind.files(path / name)]
    return {file.relative_to(path).as_posix(): file for file in files if file.is_file()}


def read_files(repository: Repository) -> dict[str, Path]:
    """Every file that is read of a Hugging Face folder, and no other, by its name in it."""
    path, family, models = repository.path, repository.family, repository.models
    weights = [safetensors.weight_files(path / name, family.parts[name].stem) for name in models.configs]
    there = [file for files in weights for file in files if file.is_file()]
    return _small_files(path, family) | {file.relative_to(path).as_posix(): file for file in there}


def _fingerprint(digests: Mapping[str, str]) -> str:
    """A digest of files by their names and digests."""
    total = hashlib.sha256()
    for name, digest in sorted(digests.items()):
        total.update(f"{name}\0{digest}\n".encode())
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
