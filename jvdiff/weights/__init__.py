"""Weights as files, in both layouts; knows no model.

restore(folder, abstract, names, ...)   parameters onto devices, from safetensors or an Orbax directory
save(path, tree, ...)                   an Orbax directory, whole or not at all
naming                                  published tensors <-> leaves, as tables
safetensors, orbax, manifest            the files of the two layouts, and the digests of the second
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jvdiff.weights import manifest, naming, orbax, safetensors
    from jvdiff.weights.orbax import save
    from jvdiff.weights.restoring import LeafTransform, restore, transformed

# A name, and the file where it is.
_NAMES = {"LeafTransform": "restoring", "restore": "restoring", "transformed": "restoring", "save": "orbax"}

__all__ = ["LeafTransform", "manifest", "naming", "orbax", "restore", "safetensors", "save", "transformed"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_NAMES.get(name, name)}")
    return getattr(module, name) if name in _NAMES else module
