"""The mesh "auto": the smallest split of one clip whose compiled programs fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax

from jvdiff.errors import ResourceError, UsageError
from jvdiff.models.family import Clip
from jvdiff.pipeline import Context
from jvdiff.plan.compiled import programs, resident
from jvdiff.plan.counting import gib
from jvdiff.runtime import memory
from jvdiff.sharding import MeshShape
from jvdiff.sharding.rules import REPLICATED


def smallest_mesh(
    context: Context, clip: Clip, devices: int | None = None, limit: int | None = None, target: str | None = None
) -> tuple[MeshShape, str]:
    """(mesh, a line that explains it) of the smallest split of one clip whose compiled programs fit.

    Meshes are tried by the number of devices they use (1, 2, 4, ...); among equally many, those that communicate less
    come first: tokens divided, then weights too, then heads. A mesh whose weights alone do not fit is not compiled.
    Programs of parts that every device has whole are spread over all devices whatever the axes, and are compiled once
    for each number of devices.

    devices: how many there are; None: those at hand, with several processes all of them, since each has some.
    limit: bytes of memory of one; None: of those at hand.
    target: compile for that GPU.

    Raises:
        ResourceError: none fits; the message has the need of the best.
        UsageError: this model cannot be divided among `devices` devices.
    """
    exactly = devices is None and jax.process_count() > 1
    devices = jax.device_count() if devices is None else devices
    limit = memory_limit() if limit is None else limit
    whole = {name for name, part in context.family.parts.items() if part.places is REPLICATED}
    tried: dict[MeshShape, int] = {}
    spread: dict[int, int] = {}  # bytes besides the weights, of the programs of `whole`, by devices
    for shape in candidates(devices):
        if context.family.mesh_sizes(context.models, clip, 1, shape).problem(shape) is not None:
            continue
        if exactly and shape.devices < devices:
            continue
        weights = sum(size for _, size in resident(context, shape).values())
        need = weights + spread.get(shape.devices, 0)
        if need <= limit:
            known = whole if shape.devices in spread else ()
            for program in programs(context, clip, target, shape, known):
                need = max(need, weights + program.needs)
                if program.part in whole:
                    spread[shape.devices] = max(spread.get(shape.devices, 0), program.needs)
        if need <= limit:
            return shape, _chosen(shape, devices, need, limit, tried)
        tried[shape] = need
    raise _none_fits(tried, devices, limit)


def _chosen(shape: MeshShape, devices: int, need: int, limit: int, tried: dict[MeshShape, int]) -> str:
    fewer = min((size for other, size in tried.items() if other.devices < shape.devices), default=None)
    reason = f"; fewer devices would need {gib(fewer).strip()} or more" if fewer else ""
    of = f"{shape.devices} of {devices} devices"
    return (
        f"mesh {shape}: {of}, the smallest split that fits, {gib(need).strip()} of {gib(limit).strip()} on each{reason}"
    )


def _none_fits(tried: dict[MeshShape, int], devices: int, limit: int) -> Exception:
    if not tried:
        return UsageError(f"no mesh of {devices} devices can run this; name one to hear why, or use other devices.")
    best = min(tried, key=lambda shape: tried[shape])
    return ResourceError(
        f"no mesh of {devices} devices fits: the best, {best}, needs at least {gib(tried[best]).strip()} of memory on "
        f"each device, and each has {gib(limit).strip()}.\n"
        "Use more devices, fewer frames or a smaller picture, or --precision=bfloat16."
    )


def candidates(devices: int) -> Iterator[MeshShape]:
    """Meshes of at most `devices` devices, fewest first; among equally many, those that communicate less first."""
    counts = [2**i for i in range(devices.bit_length())]
    for count in sorted({*counts, devices}):
        divisors = [n for n in range(2, count + 1) if count % n == 0]
        yield MeshShape(sequence=count)
        yield from (MeshShape(fsdp=n, sequence=count // n) for n in divisors)
        yield from (MeshShape(tensor=n, sequence=count // n) for n in divisors)


def memory_limit() -> int:
    """Bytes that a program may take on a device at hand; a CPU's are what the host has for this process."""
    return pool() or memory.host()[0]


def pool() -> int | None:
    """Bytes that JAX takes of a device at hand; None where that has no memory of its own, or JAX has no bound."""
    stats: Any = jax.local_devices()[0].memory_stats()
    return stats.get("bytes_limit") if stats else None
