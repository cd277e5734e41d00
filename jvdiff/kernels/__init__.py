"""Attention as an operation with a contract: a reference, backends, and a way to tell which one will run."""

from jvdiff.kernels.attention import IMPLEMENTATIONS, Dense, attention, choose, merge

__all__ = ["IMPLEMENTATIONS", "Dense", "attention", "choose", "merge"]
