"""Text encoders and their tokenizers."""

import importlib
from typing import Any

__all__ = ["spiece", "tokenizer", "umt5"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
