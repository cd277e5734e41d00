"""Training: a loop that any task can use. A task is data, not a class to inherit from; those of a model family are
beside its networks, in the family's folder."""

from typing import TYPE_CHECKING

from jvdiff.lazy import attach

if TYPE_CHECKING:
    from jvdiff.training import fields, loop, metrics, options
    from jvdiff.training.loop import State, Task, each, fit

__all__ = ["State", "Task", "each", "fields", "fit", "loop", "metrics", "options"]

__getattr__ = attach(__name__, __all__, ("loop",))  # `options` is read without JAX
