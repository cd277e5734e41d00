"""Networks as pure functions over nested dicts of arrays: a folder for each family, and what families share.

A family is one folder and one word in FAMILIES. Of a family's folder `settings.py` alone is read, which needs no JAX,
until a repository is found to be of it.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from jvdiff.errors import CheckpointError
from jvdiff.weights import safetensors

FAMILIES = ("wan", "latent_video")

__all__ = ["FAMILIES", "family", "latent_video", "layers", "select", "settings", "text", "wan"]


def select(folder: Path, index: Mapping[str, Any]) -> tuple[str, str]:
    """(package, name in its family.py) of the family that a repository is of; the family itself is not imported.

    Args:
        folder: of the repository. index: the content of its model_index.json.

    Raises:
        CheckpointError: of none, or of one that refuses it; the message says what to use.
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
    """What a user may set of a clip, by family: of this repository's alone where it can be read, else of all.

    A group of options (`jvdiff.config.option`) each. Neither JAX nor a family is imported.
    """
    packages = FAMILIES
    if folder is not None and (folder / "model_index.json").is_file():
        package, _ = select(folder, safetensors.read_json(folder / "model_index.json"))
        packages = (package.rsplit(".", 1)[1],)
    return {package: _settings(package).Settings for package in packages}


def _settings(package: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{package}.settings")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
