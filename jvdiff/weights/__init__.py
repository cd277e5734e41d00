"""Weights as files, in both layouts; knows no model.

restore(folder, abstract, names, ...)   parameters onto devices, from safetensors or an Orbax directory
save(path, tree, ...)                   an Orbax directory, whole or not at all
locate(name) -> Path                    a folder, a checkpoint that comes with jvdiff, or one of the hub's
LeafTransform, transformed              what becomes of each leaf on its way, and the abstract tree that this gives
naming                                  published tensors <-> leaves, as tables
safetensors, orbax, manifest, hub       the files of the two layouts, the digests of the second, where folders are found
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jvdiff.weights import hub, manifest, naming, orbax, safetensors
    from jvdiff.weights.hub import locate
    from jvdiff.weights.orbax import save
    from jvdiff.weights.restoring import LeafTransform, restore, transformed

# A name, and the file where it is.
_NAMES = {
    "LeafTransform": "restoring",
    "locate": "hub",
    "restore": "restoring",
    "save": "orbax",
    "transformed": "restoring",
}

__all__ = [
    "LeafTransform",
    "hub",
    "locate",
    "manifest",
    "naming",
    "orbax",
    "restore",
    "safetensors",
    "save",
    "transformed",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_NAMES.get(name, name)}")
    return getattr(module, name) if name in _NAMES else module
