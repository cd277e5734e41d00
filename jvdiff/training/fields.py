"""The fields of a training config, checked: each error names the field, what was expected and the nearest name."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from jvdiff.config import nearest
from jvdiff.errors import CheckpointError, UsageError
from jvdiff.sharding import MeshShape, read_mesh
from jvdiff.training.options import Schedule


def check_names(where: str, given: Any, known: Sequence[str]) -> None:
    """Raises UsageError unless `given` is a dictionary whose names are all `known`."""
    if not isinstance(given, ConfigDict):
        raise UsageError(f"{where} is {given!r:.80}; expected a dictionary.")
    for name in given:
        if name not in known:
            raise UsageError(
                f"{where} has an unknown field {name!r}{nearest(name, known)}.\nFields: {', '.join(known)}."
            )


def check_count(name: str, value: Any) -> None:
    """Raises UsageError unless `value` is a whole number from 1."""
    if type(value) is not int or value < 1:
        raise UsageError(f"{name} is {value!r:.80}; expected a whole number from 1.")


def check_shared(name: str, value: int, shape: MeshShape) -> None:
    """Raises UsageError unless the mesh can share `value` clips."""
    if value % shape.data:
        raise UsageError(f"{name} is {value}; expected a multiple of the {shape.data} that share it (loop.mesh).")


def mesh(loop: ConfigDict, planned: bool = False) -> MeshShape:
    """`loop.mesh`, or one device without it. planned: its devices need not be there.

    Raises:
        UsageError: it cannot be read, has more devices than there are, or fewer than several processes have in all.
    """
    try:
        shape = read_mesh(loop.get("mesh")) or MeshShape()
    except UsageError as error:
        raise UsageError(f"loop.{error}") from None
    if isinstance(shape, str):
        raise UsageError(f"loop.mesh is {shape!r}, which is for sampling; name the axes, for instance fsdp=8.")
    if planned:
        return shape
    there, processes = jax.device_count(), jax.process_count()
    if shape.devices > there:
        raise UsageError(f"loop.mesh {shape}: it has {shape.devices} devices, and there are {there}; name fewer.")
    if processes > 1 and shape.devices < there:
        raise UsageError(
            f"loop.mesh {shape}: it has {shape.devices} devices; expected all {there} of the {processes} processes, "
            f"for instance data={there}."
        )
    return shape


def schedule(config: Any) -> Schedule:
    """`config.schedule`, checked."""
    check_names("schedule", config.schedule, [field.name for field in dataclasses.fields(Schedule)])
    try:
        return Schedule(**config.schedule.to_dict())
    except (TypeError, UsageError) as error:
        raise UsageError(f"schedule: {error}") from None


def model(where: str, kind: Any, values: Any, **fixed: Any) -> Any:
    """A model's configuration, checked as if it had been read from a file."""
    check_names(where, values, [f.name for f in dataclasses.fields(kind) if f.name not in fixed])
    try:
        return kind.from_json(kind(**values.to_dict(), **fixed).to_json())
    except (TypeError, CheckpointError) as error:
        raise UsageError(f"{where}: {str(error).splitlines()[0]}") from None


def check_sizes(what: str, cfg: Any, known: Any) -> None:
    """Raises UsageError that lists every field, but for latent statistics, in which two configurations differ."""
    other = [
        f"{field.name} is {getattr(cfg, field.name)}, there {getattr(known, field.name)}"
        for field in dataclasses.fields(cfg)
        if not field.name.startswith("latents_") and getattr(cfg, field.name) != getattr(known, field.name)
    ]
    if other:
        raise UsageError(f"{what}: {'; '.join(other)}.")
