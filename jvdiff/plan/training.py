"""What a training would take, found out without data: parameters, operations and memory of its compiled step."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import jax

from jvdiff.plan.counting import attention_in, count_flops, flops, gib
from jvdiff.plan.targets import check_target, compile_for, target_placement
from jvdiff.sharding import make_mesh
from jvdiff.training import fields
from jvdiff.training.loop import Schedule, Task, batch_sharding, make_step, start, state_shardings


def lines(programs: Callable[..., Iterable[tuple[str, Task, Schedule, Any, int]]], config: Any) -> Iterator[str]:
    """The plan of each part of a run on the devices of `loop.mesh`, or of `plan_target`: each line as it is known.

    programs: (config, placement or None) -> (name, task, schedule, abstract batch, into how many parts a batch is cut)
        of each part.
    """
    target = config.get("plan_target")
    if target:
        check_target(target)
    shape = fields.mesh(config.loop, target is not None)
    placement = target_placement(target, shape) if target else None
    mesh = placement.mesh if placement else make_mesh(shape)
    device = f"{target} (compiled without the device)" if target else jax.devices()[0].device_kind
    yield f"device: {device}   mesh: {shape}   jax {jax.__version__}"
    if shape.devices > 1:
        yield "bytes are those of one device, FLOPs those of all"
    for name, task, schedule, batch, parts in programs(config, placement):
        places = state_shardings(mesh, task, schedule)
        abstract: Any = jax.eval_shape(partial(start, task, schedule, jax.random.key(0)))
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract.params))
        state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, places)
        clips = jax.tree.leaves(batch)[0].shape[0]
        struct = partial(jax.ShapeDtypeStruct, sharding=batch_sharding(mesh, clips))
        placed = jax.tree.map(lambda x, struct=struct: struct(x.shape, x.dtype), batch)
        traced = make_step(task, schedule, jax.random.key(0), places, parts).trace(state, placed)
        began = time.monotonic()
        compiled = compile_for(placement, traced)
        memory: Any = compiled.memory_analysis()
        took = time.monotonic() - began
        total = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        sizes = total, memory.temp_size_in_bytes, total + memory.temp_size_in_bytes
        held, temporary, whole = (gib(size).strip() for size in sizes)
        cut = f" in {parts} parts" if parts > 1 else ""
        yield f"{name}: {count:,} parameters, {schedule.steps:,} steps of {clips} clips{cut}"
        yield (
            f"  a step: {flops(count_flops(traced.jaxpr.jaxpr))}FLOPs; memory: {held} of state and batch, "
            f"{temporary} temporary, {whole} in all; compiled in {took:.1f} s; "
            f"attention: {', '.join(attention_in(compiled.as_text() or '')) or 'none'}"
        )
