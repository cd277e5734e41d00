"""Pictures and videos as files, and folders of clips to train on."""

import importlib
from typing import Any

__all__ = ["clips", "fragmented_mp4", "video"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
