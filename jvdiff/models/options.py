"""Options that every family's settings have, and the one that names a family. Without JAX."""

from typing import Any

from jvdiff.config import option


def family() -> Any:
    """A family that is not one of FAMILIES."""
    return option(None, "a family of your own, MODULE:NAME (docs/adding_a_family.md); none: as the files say")


def follow_symlinks() -> Any:
    """Links out of a repository."""
    return option(False, "let a repository's files be links to elsewhere; into a cache of the hub they may be anyway")


def fps(default: int) -> Any:
    """Frames a second of the file."""
    return option(default, "frames a second; only written into the file", low=1, high=240)


def steps(default: int) -> Any:
    """Steps of the sampler."""
    return option(default, "denoising steps", low=1, high=1000)


def guidance(default: float) -> Any:
    """Weight of classifier-free guidance."""
    meaning, note = "weight of classifier-free guidance; 1: none, and half the work", "1 means without guidance"
    return option(default, meaning, low=1.0, high=100.0, note=note)


def profile() -> Any:
    """The option `profile`."""
    meaning = "a folder that gets a trace of jax.profiler: stages, steps, layers and kernels on a time line"
    return option(None, meaning, path=True)
