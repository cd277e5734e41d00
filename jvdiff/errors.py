"""The errors a user can meet, each with the exit status that the command lines give it.

A message says what is wrong, where, what was expected, what was found and what to do, in at most six lines.
"""


class JvdiffError(Exception):
    """Base of every error that jvdiff raises on purpose."""

    exit_code = 1


class UsageError(JvdiffError, ValueError):
    """An argument, configuration field or prompt that cannot be used."""

    exit_code = 2


class CheckpointError(JvdiffError):
    """Weights or data that cannot be used as they are."""

    exit_code = 3


class CorruptFile(CheckpointError):
    """A file that is truncated, malformed, or not what its name says."""


class DataError(CheckpointError):
    """Clips, or one of them, that nothing can be trained on."""


class MissingTensor(CheckpointError):
    """A tensor that the model needs and the checkpoint lacks, or one too many."""


class ShapeMismatch(CheckpointError):
    """A tensor whose shape or dtype is not what the model's configuration asks for."""


class UnsafeFormat(CheckpointError):
    """A file that could run code or reach outside its folder; it is not opened."""


class IntegrityError(CheckpointError):
    """Bytes that differ from the recorded digest, or changed while they were read."""


class InUse(CheckpointError):
    """Another process writes there."""


class ResourceError(JvdiffError):
    """Not enough device memory, host memory or disk."""

    exit_code = 4


class Interrupted(JvdiffError):
    """Stopped on request, with everything needed to resume saved."""

    exit_code = 5


class NumericsError(JvdiffError):
    """NaN or infinity where there must be none."""

    exit_code = 6


class SetupError(JvdiffError):
    """The installation or the machine lacks something (a GPU, a package, a version)."""

    exit_code = 7
