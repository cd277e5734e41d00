"""Networks as pure functions over nested dicts of arrays; a folder for each family, and what families share."""

import importlib
from typing import Any

__all__ = ["latent_video", "layers", "quantised", "text", "wan"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
