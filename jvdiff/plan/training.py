"""What a training would take, found out without data: parameters, operations and memory of its compiled step."""

import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax

from jvdiff.plan.counting import count_flops, flops, gib
from jvdiff.plan.targets import target_mesh
from jvdiff.sharding import make_mesh
from jvdiff.training import fields
from jvdiff.training.loop import Schedule, Task, batch_sharding, make_step, start, state_shardings


def show(programs: Callable[..., Iterable[tuple[str, Task, Schedule, Any]]], config: Any) -> None:
    """Prints the plan of each part of a run on the devices of `loop.mesh`, or on those of `plan_target`.

    programs: (config, MeshShape -> mesh) -> (name, task, schedule, abstract batch) of each part.
    """
    target = config.get("plan_target")
    shape, accumulate = fields.mesh(config.loop, target is not None), config.loop.get("accumulate", 1)
    mesh_of = partial(target_mesh, target) if target else make_mesh
    mesh = mesh_of(shape)
    device = f"{target} (compiled without the device)" if target else jax.devices()[0].device_kind
    print(f"device: {device}   mesh: {shape}   jax {jax.__version__}", flush=True)
    if shape.devices > 1:
        print("bytes are those of one device, FLOPs those of all")
    for name, task, schedule, batch in programs(config, mesh_of):
        places = state_shardings(mesh, task, schedule)
        abstract: Any = jax.eval_shape(partial(start, task, schedule, jax.random.key(0)))
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract.params))
        state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, places)
        parts = 1 if name == "vae" else accumulate
        clips = jax.tree.leaves(batch)[0].shape[0]
        struct = partial(jax.ShapeDtypeStruct, sharding=batch_sharding(mesh, clips))
        placed = jax.tree.map(lambda x, struct=struct: struct(x.shape, x.dtype), batch)
        traced = make_step(task, schedule, jax.random.key(0), places, parts).trace(state, placed)
        began = time.monotonic()
        lowered = traced.lower(lowering_platforms=("cuda",)) if target else traced.lower()
        memory: Any = lowered.compile().memory_analysis()
        took = time.monotonic() - began
        total = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        sizes = total, memory.temp_size_in_bytes, total + memory.temp_size_in_bytes
        held, temporary, whole = (gib(size).strip() for size in sizes)
        print(
            f"{name}: {count:,} parameters, {schedule.steps:,} steps of {clips} clips"
            + (f" in {parts} parts" if parts > 1 else "")
            + f"\n  a step: {flops(count_flops(traced.jaxpr.jaxpr))}FLOPs; memory: {held} of state and batch, "
            f"{temporary} temporary, {whole} in all; compiled in {took:.1f} s",
            flush=True,
        )
