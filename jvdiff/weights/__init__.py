"""Weights as files, in both layouts; knows no model.

restore(folder, abstract, names, ...)   parameters onto devices, from safetensors or an Orbax directory
save(path, tree, ...)                   an Orbax directory, whole or not at all
locate(name) -> Path                    a folder, a checkpoint that comes with jvdiff, or one of the hub's
LeafTransform, transformed              what becomes of each leaf on its way, and the abstract tree that this gives
naming                                  published tensors <-> leaves, as tables
safetensors, orbax, manifest, hub       the files of the two layouts, the digests of the second, where folders are found
"""

from typing import TYPE_CHECKING

from jvdiff.lazy import attach

if TYPE_CHECKING:
    from jvdiff.weights import hub, manifest, naming, orbax, safetensors
    from jvdiff.weights.hub import locate
    from jvdiff.weights.orbax import save
    from jvdiff.weights.restoring import LeafTransform, restore, transformed

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

__getattr__ = attach(__name__, __all__, ("hub", "orbax", "restoring"))
