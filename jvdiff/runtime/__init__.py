"""What a process owes its machine: it joins others, stops when asked, writes whole files, shows progress."""

import importlib
from typing import Any

__all__ = ["files", "interrupts", "peers", "progress", "run_state", "staging", "verdict"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
