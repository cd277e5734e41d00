"""Weights as files: safetensors and Orbax, names and digests; knows no model."""

import importlib
from typing import Any

__all__ = ["checkpoint", "naming", "safetensors"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
