"""What the command lines do: everything that talks to a terminal."""

from jvdiff.lazy import attach

__all__ = [
    "arguments",
    "command_line",
    "convert",
    "doctor",
    "examinations",
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
    "tune",
    "verify",
    "windows",
]

__getattr__ = attach(__name__, __all__)
