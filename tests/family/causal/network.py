"""The transformer: another family's, under a type of its own."""

from dataclasses import dataclass

from jvdiff.models import wan


@dataclass(frozen=True)
class DiTConfig(wan.DiTConfig):
    """Read and written as the other."""
