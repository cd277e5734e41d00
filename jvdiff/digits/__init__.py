"""Moving digits: the clips, a tokenizer for their prompts, a judge, and the runs that make the models that ship."""

import importlib
from typing import Any

__all__ = ["clips", "judge", "runs", "tokenizer"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
