"""What the command lines do: everything that talks to a terminal."""

import importlib
from typing import Any

__all__ = [
    "arguments",
    "command_line",
    "convert",
    "help",
    "jobs",
    "one_stream",
    "one_video",
    "options",
    "planning",
    "sample",
    "sharding",
    "stream",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
