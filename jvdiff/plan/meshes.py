"""The mesh "auto": the smallest split of one clip whose compiled programs fit."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import jax

from jvdiff.errors import ResourceError, UsageError
from jvdiff.models.family import Clip
from jvdiff.pipeline import Context
from jvdiff.plan.compiled import programs, resident
from jvdiff.plan.counting import gib
from jvdiff.plan.residency import Work, ways
from jvdiff.runtime import memory
from jvdiff.sharding import MeshShape
from jvdiff.sharding.rules import REPLICATED


def smallest_mesh(
    context: Context, clip: Clip, devices: int | None = None, limit: int | None = None, target: str | None = None
) -> tuple[MeshShape, str]:
    """(mesh, a line that explains it) of the smallest split of one clip whose compiled programs fit.

    Meshes are tried by the number of devices they use (1, 2, 4, ...); among equally many, those that communicate less
    come first: tokens divided, then weights too, then heads. All weights are resident; where no mesh holds them, all
    are tried again with weights in turn (`jvdiff.plan.residency`). A mesh whose weights alone do not fit is not
    compiled. Programs of parts that every device has whole are spread over all devices whatever the axes, and are
    compiled once for each number of devices.

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
    known: dict[tuple[Any, bool], list[Work]] = {}
    shapes = [
        shape
        for shape in candidates(devices)
        if context.family.mesh_sizes(context.models, clip, 1, shape).problem(shape) is None
        and not (exactly and shape.devices < devices)
    ]
    for in_turn in (False, True):
        for shape in shapes:
            held = {part: size for part, (_, size) in resident(context, shape).items()}
            spread = max((work.needs for work in known.get((shape.devices, True), ())), default=0)
            need = max(held.values()) if in_turn else sum(held.values()) + spread
            if need <= limit:
                every = list(ways(clip, _works(context, clip, target, shape, whole, known), held))
                need = every[-1 if in_turn else 0].peak
                if need <= limit:
                    return shape, _chosen(shape, devices, need, limit, tried, in_turn)
                tried[shape] = need
            tried.setdefault(shape, need)
    raise _none_fits(tried, devices, limit)


def _works(
    context: Context,
    clip: Clip,
    target: str | None,
    shape: MeshShape,
    whole: Collection[str],
    known: dict[tuple[Any, bool], list[Work]],
) -> list[Work]:
    """The programs of a clip on a mesh, those of the parts in `whole` last.

    known: what was compiled before, and what is now: by mesh and False those of parts that are divided, by the number
        of devices and True the others.
    """
    if (shape, False) not in known:
        there = whole if (shape.devices, True) in known else ()
        every = list(programs(context, clip, target, shape, there))
        works = [Work(program.name, program.part, program.needs) for program in every]
        known[shape, False] = [work for work in works if work.part not in whole]
        known.setdefault((shape.devices, True), [work for work in works if work.part in whole])
    return known[shape, False] + known[shape.devices, True]


def _chosen(shape: MeshShape, devices: int, need: int, limit: int, tried: dict[MeshShape, int], in_turn: bool) -> str:
    fewer = min((size for other, size in tried.items() if other.devices < shape.devices), default=None)
    reason = f"; fewer devices would need {gib(fewer).strip()} or more" if fewer else ""
    of, how = f"{shape.devices} of {devices} devices", " with weights in turn" if in_turn else ""
    sizes = f"{gib(need).strip()} of {gib(limit).strip()} on each"
    return f"mesh {shape}: {of}, the smallest split that fits{how}, {sizes}{reason}"


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
