"""The rotation of queries and keys in Wan's transformer: which channels turn with time, height and width."""

from typing import Any

from jvdiff.models import layers
from jvdiff.types import Array


def rope_tables(grid: tuple[int, int, int], head_dim: int, frames: Any = None) -> tuple[Array, Array]:
    """`layers.rope_tables` with d-4*(d//6), 2*(d//6), 2*(d//6) channels on the axes, and theta 10000 on each."""
    side = 2 * (head_dim // 6)
    return layers.rope_tables(grid, (head_dim - 2 * side, side, side), 10000.0, frames)
