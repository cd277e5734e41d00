"""Networks as pure functions over nested dicts of arrays: a folder for each family, and what families share.

A family is one folder and one word in FAMILIES. Of a family's folder `settings.py` alone is read, which needs no JAX,
until a repository is found to be of it.
"""

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from jvdiff.errors import CheckpointError, UsageError
from jvdiff.lazy import attach
from jvdiff.weights import safetensors

if TYPE_CHECKING:
    from jvdiff.models.family import Family, Rollout

FAMILIES = ("wan", "hunyuan_video", "latent_video")

__all__ = [
    "FAMILIES",
    "configuration",
    "defaults",
    "families",
    "family",
    "layers",
    "named",
    "options",
    "rollout",
    "rollouts",
    "select",
    "settings",
    "text",
    "vision",
    *FAMILIES,
]


def select(folder: Path, index: Mapping[str, Any]) -> tuple[str, str]:
    """(package, name in its family.py) of the family that a repository is of; the family itself is not imported.

    Args:
        folder: of the repository. index: the content of its model_index.json.

    Raises:
        CheckpointError: of no known family, or of one that refuses it; the message says what to use.
    """
    configs = {
        path.parent.name: safetensors.read_json(path) for path in sorted(folder.glob("*/config.json")) if path.is_file()
    }
    for package in FAMILIES:
        try:
            if name := _settings(package).select(index, configs):
                return f"{__name__}.{package}", name
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from None
    pipelines = [repr(name) for package in FAMILIES for name in _settings(package).PIPELINES]
    raise CheckpointError(
        f"{folder / 'model_index.json'}: describes a {str(index.get('_class_name'))!r:.60}; "
        f"expected {', '.join(pipelines[:-1])} or {pipelines[-1]}."
    )


def settings(folder: Path | None = None) -> dict[str, type]:
    """What a user may set of a clip, by family: of this repository's family alone where it can be read, else of all.

    A group of options (`jvdiff.config.option`) each. Neither JAX nor a family is imported.
    """
    packages = FAMILIES
    if folder is not None and (folder / "model_index.json").is_file():
        package, _ = select(folder, safetensors.read_json(folder / "model_index.json"))
        packages = (package.rsplit(".", 1)[1],)
    return {package: _settings(package).Settings for package in packages}


def defaults(settings: type, folder: Path) -> Mapping[str, Any]:
    """The settings that a repository's own files ask for, for a page of help: what cannot be read is passed over.

    settings: of its family. Beside them stands a function `defaults`, which needs no JAX; jvdiff_defaults.json goes
        before what it says.
    """
    values: dict[str, Any] = {}
    with contextlib.suppress(CheckpointError):
        index = safetensors.read_json(folder / "model_index.json")
        values |= importlib.import_module(settings.__module__).defaults(index, folder)
    with contextlib.suppress(CheckpointError):
        values |= safetensors.read_json(folder / "jvdiff_defaults.json")
    return values


def configuration(checkpoint: str) -> str | None:
    """The name of the configuration with the authors' settings for a published repository; None for any other."""
    name = Path(checkpoint).name.lower()
    known = {
        of.lower(): stem for each in FAMILIES for of, stem in getattr(_settings(each), "CONFIGURATIONS", {}).items()
    }
    return known.get(name)


def families() -> "list[Family]":
    """Every family of FAMILIES; they are imported."""
    values = [
        getattr(importlib.import_module(f"{__name__}.{package}.family"), name)
        for package in FAMILIES
        for names in _settings(package).PIPELINES.values()
        for name in names
    ]
    return list(dict.fromkeys(values))


def named(text: str | None) -> Any:
    """The user's own family that MODULE:NAME names; None for None.

    Raises:
        UsageError: no such module, or no Family of that name in it.
    """
    if text is None:
        return None
    from jvdiff.models.family import Family

    module, _, name = text.partition(":")
    try:
        value = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"family is {text!r:.80}, which cannot be imported ({error}).\n"
            "Expected MODULE:NAME of a Family that Python can import, for instance with PYTHONPATH=FOLDER."
        ) from None
    if not isinstance(value, Family):
        raise UsageError(f"family is {text!r:.80}, a {type(value).__name__}; expected a Family.")
    return value


def rollouts() -> "tuple[Rollout, ...]":
    """How the families that make videos chunk by chunk do it; they are imported."""
    return tuple(one for package in FAMILIES for one in _beside(f"{__name__}.{package}"))


@functools.cache
def _beside(package: str) -> "tuple[Rollout, ...]":
    """The ROLLOUT of a family's folder, where it has one."""
    name = f"{package}.rollout"
    found = package and importlib.util.find_spec(name) and getattr(importlib.import_module(name), "ROLLOUT", None)
    return (found,) if found else ()


def rollout(cfg: Any) -> "Rollout":
    """The rollout of the family that a configuration of a transformer, a VAE or a text encoder is of.

    That of a family outside FAMILIES is ROLLOUT in rollout.py beside the file of the configuration's type.

    Raises:
        UsageError: that family does not make videos chunk by chunk.
    """
    for one in (*rollouts(), *_beside(type(cfg).__module__.rpartition(".")[0])):
        if type(cfg) in one.configs:
            return one
    raise UsageError(f"{type(cfg).__name__} is not a configuration of a model that makes a video chunk by chunk.")


def _settings(package: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{package}.settings")


__getattr__ = attach(__name__, __all__)
