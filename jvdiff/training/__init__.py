"""Training: a loop that any task can use. A task is data, not a class to inherit from; those of a model family are
beside its networks, in the family's folder."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jvdiff.training import fields, loop, metrics, options
    from jvdiff.training.loop import State, Task, each, fit

__all__ = ["State", "Task", "each", "fields", "fit", "loop", "metrics", "options"]


def __getattr__(name: str) -> Any:
    """Imported when it is first used: `options` is read without JAX."""
    if name in ("fields", "loop", "metrics", "options"):
        return importlib.import_module(f"{__name__}.{name}")
    if name in __all__:
        return getattr(importlib.import_module(f"{__name__}.loop"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
