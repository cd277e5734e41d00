"""The compiled programs of a clip, measured with abstract weights: memory, operations, what devices send each other."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from jvdiff import pipeline
from jvdiff.errors import UsageError
from jvdiff.models.family import Clip
from jvdiff.pipeline import Context
from jvdiff.plan.counting import attention_in, count_flops, largest_array
from jvdiff.plan.targets import compile_for, target_placement
from jvdiff.sharding import AXES, MeshShape, bytes_per_device, collectives, specs
from jvdiff.sharding.rules import Rules
from jvdiff.types import Params


class Program(NamedTuple):
    """One compiled program, on one device.

    name: of the stage
    part: whose weights it needs
    times: how often a clip runs it
    flops: of one call, a multiplication and an addition are two; under a mesh the share of one device, as if all were
        divided evenly
    weights, data, temporary: bytes of its weights, of its other arguments and results, and of its temporary arrays
    largest: array in it
    largest_elements: numbers of that array
    seconds: to compile it
    attention: implementations of attention in its text
    sends: kind of collective -> (how often it runs, bytes that one device sends) in one call
    asynchronous: how many of its `collectives` are asynchronous
    collectives: how many its text has
    text: its optimised HLO
    """

    name: str
    part: str
    times: int
    flops: float
    weights: int
    data: int
    temporary: int
    largest: str
    largest_elements: int
    seconds: float
    attention: tuple[str, ...]
    sends: Mapping[str, tuple[int, int]]
    asynchronous: int
    collectives: int
    text: str

    @property
    def needs(self) -> int:
        """Bytes besides the weights."""
        return self.data + self.temporary


def programs(
    context: Context,
    clip: Clip,
    target: str | None = None,
    shape: MeshShape | None = None,
    without: Collection[str] = (),
) -> Iterator[Program]:
    """Compiles each stage's program with abstract weights and measures it.

    shape: a mesh, None for one device. without: names of parts whose programs to leave out.
    """
    context = _placed(context, target, shape)
    family, abstract = context.family, pipeline.abstract_params(context.family, context.models, context.precision)
    calls = _traced(context, clip)
    # Operations are counted in the XLA form, whose loops say how often they run; GPU kernels hide theirs.
    open_form = _traced(context, dataclasses.replace(clip, attention="xla"))
    for call, counted in zip(calls, open_form, strict=True):
        part = call.stage.part
        if part in without:
            continue
        began = time.monotonic()
        compiled = compile_for(context.placement, call.traced)
        took = time.monotonic() - began
        weights, data, temporary = memory_of(call, compiled, abstract[part], family.parts[part].places, shape)
        text = compiled.as_text() or ""
        largest, elements = largest_array(text)
        sent = collectives.read(text)
        yield Program(
            name=call.stage.name,
            part=part,
            times=call.times,
            flops=count_flops(counted.traced.jaxpr.jaxpr) / (shape.devices if shape else 1),
            weights=weights,
            data=data,
            temporary=temporary,
            largest=largest,
            largest_elements=elements,
            seconds=took,
            attention=attention_in(text),
            sends=collectives.by_kind(sent),
            asynchronous=sum(each.asynchronous for each in sent),
            collectives=len(sent),
            text=text,
        )


def memory_of(
    call: pipeline.Call, compiled: Any, tree: Params, places: Rules, shape: MeshShape | None
) -> tuple[int, int, int]:
    """Bytes on one device of a compiled program: its weights, other arguments and results, temporary arrays.

    tree, places: the weights of its part, which may be abstract, and their rules.
    """
    memory = compiled.memory_analysis()
    weights = _weights_used(call.traced, tree, places, shape)
    outside = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return weights, outside - weights, memory.temp_size_in_bytes


def stage_text(
    context: Context,
    clip: Clip,
    stage: str,
    target: str | None = None,
    shape: MeshShape | None = None,
    options: Mapping[str, str | bool] | None = None,
) -> str:
    """The optimised HLO of one stage of a clip, compiled without weights for a GPU that need not be there.

        context, clip = plan.resolved(config)
        text = plan.stage_text(context, clip, "denoise", "h200", MeshShape(sequence=4))

    Args:
        stage: as plans call it: "text", "denoise", "decode first" or "decode next".
        target: a described GPU (`check_target` comes first); None: the devices at hand.
        shape: a mesh; None: one device.
        options: XLA's, for this program alone.

    Raises:
        UsageError: no such stage, or an invalid mesh.
    """
    context = _placed(context, target, shape)
    calls = {call.stage.name: call for call in _traced(context, clip)}
    if stage not in calls:
        raise UsageError(f"stage is {stage!r}; expected one of {', '.join(calls)}.")
    return compile_for(context.placement, calls[stage].traced, options=options).as_text() or ""


def _placed(context: Context, target: str | None, shape: MeshShape | None) -> Context:
    placement = target_placement(target, shape) if target else pipeline.place(shape)
    return dataclasses.replace(context, placement=placement)


def _traced(context: Context, clip: Clip) -> list[pipeline.Call]:
    """The programs of one clip of the longest inputs."""
    abstract = pipeline.abstract_params(context.family, context.models, context.precision)
    return pipeline.trace(context, abstract, clip, context.family.longest(context.models, clip, 1))


def _weights_used(traced: Any, tree: Params, places: Rules, shape: MeshShape | None) -> int:
    """Bytes, on one device, of those weights that a program reads: a decoder needs no encoder's."""
    jaxpr = traced.jaxpr.jaxpr
    read = {id(v) for eqn in jaxpr.eqns for v in eqn.invars} | {id(v) for v in jaxpr.outvars}
    sizes = [size for *_, size in leaves(tree, places, shape)]
    return sum(size for variable, size in zip(jaxpr.invars, sizes, strict=False) if id(variable) in read)


def leaves(tree: Params, places: Rules, shape: MeshShape | None) -> Iterator[tuple[str, Any, Any, int]]:
    """(path, leaf, PartitionSpec, bytes on one device) of every leaf of a parameter tree; shape None: one device."""
    axes = {axis: getattr(shape or MeshShape(), axis) for axis in AXES}
    every = jax.tree.leaves(specs(places, tree, axes), is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))
    for (path, leaf), spec in zip(jax.tree.leaves_with_path(tree), every, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        yield name, leaf, spec, bytes_per_device(axes, spec, leaf)


def resident(context: Context, shape: MeshShape | None) -> dict[str, tuple[int, int]]:
    """(parameters, bytes on one device) of each part's weights."""
    family = context.family
    abstract = pipeline.abstract_params(family, context.models, context.precision)
    return {
        part: (
            sum(math.prod(x.shape) for x in jax.tree.leaves(tree)),
            sum(size for *_, size in leaves(tree, family.parts[part].places, shape)),
        )
        for part, tree in abstract.items()
    }
