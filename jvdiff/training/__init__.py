"""Training: a loop that any task can use. A task is data, not a class to inherit from; those of a model family are
beside its networks (`jvdiff.models.wan.flow_matching` and so on)."""

from jvdiff.training.loop import State, Task, each, fit

__all__ = ["State", "Task", "each", "fit"]
