"""What a run would take, found out without weights: parameters, operations, memory of every compiled program.

The programs are those that a run itself compiles (`pipeline.trace`), with abstract weights, for the device at hand or
for a GPU that is not there: JAX's CUDA compiler needs no GPU, only the description in `targets/`.

L video tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from jvdiff import models
from jvdiff.config import nearest
from jvdiff.errors import CheckpointError, UsageError
from jvdiff.media import pictures
from jvdiff.plan.targets import check_target, described, target_memory
from jvdiff.runtime import gpus
from jvdiff.weights import locate


def sampling(config: Any, given: Collection[str] = ()) -> Iterator[str]:
    """The plan of a sampling config, line by line, each as soon as it is known; given: as of `resolved`.

    Raises:
        UsageError: neither a folder nor a published model, settings or a mesh that they cannot use.
        SetupError: the compiler for plan_target is not installed.
        ResourceError: mesh is "auto", and no mesh fits.
    """
    if config.plan_target is not None:
        check_target(config.plan_target)
    from jvdiff.plan.meshes import smallest_mesh
    from jvdiff.sharding import read_mesh

    shape = read_mesh(config.mesh)
    context, clip = resolved(config, given)
    if shape == "auto":
        devices, limit = (8, target_memory(config.plan_target)) if config.plan_target else (None, None)
        shape, sentence = smallest_mesh(context, clip, devices, limit, config.plan_target)
        yield sentence
    yield from lines(context, clip, config.plan_target, shape)


def resolved(config: Any, given: Collection[str] = ()) -> tuple[Any, Any]:
    """(Context, Clip) of a sampling config, without weights.

    given: the fields that the command line itself sets: a height or width among them stays, whatever the proportions of
    the picture that the clip begins with.
    """
    from jvdiff import pipeline, precision
    from jvdiff.config import names

    family, known, defaults = describe(config.checkpoint, config.get("family"), bool(config.get("follow_symlinks")))
    settings = pipeline.resolve(family, known, defaults, {name: config.get(name) for name in names(family.settings)})
    if config.get("image") is not None and "image" in family.takes:
        size = pipeline.size_for(family, known, settings, [pictures.read(config.image)], given)
        settings = dataclasses.replace(settings, **size)
    clip = family.clip(known, settings)
    target = config.plan_target
    dtypes = precision.choose(config.precision, config.get("vae_decode"), described(target) if target else None)
    return pipeline.Context(family, known, dtypes), clip


def describe(checkpoint: str | None, family: str | None = None, follow_symlinks: bool = False) -> tuple[Any, Any, Any]:
    """(family, models, defaults) of a repository, or of a published one that is not downloaded."""
    from jvdiff import pipeline

    try:
        folder = locate(checkpoint or "", download=False)
    except (UsageError, CheckpointError) as error:
        folder, reason = None, str(error).splitlines()[0]
    own = models.named(family)
    if folder is not None:
        repository = pipeline.inspect(folder, at_once=True, family=own, follow_symlinks=follow_symlinks)
        return repository.family, repository.models, repository.defaults
    families = models.families() if own is None else [own]
    published = {name: (each, known) for each in families for name, known in each.published.items()}
    if (name := Path(checkpoint or "").name) not in published:
        raise UsageError(
            f"{reason}\n"
            f"Without a folder there are plans of {', '.join(published) or 'no model'}{nearest(name, published)}."
        )
    return *published[name], {}


def lines(context: Any, clip: Any, target: str | None, shape: Any = None) -> Iterator[str]:
    """The plan, line by line, each as soon as it is known; shape: a MeshShape, None for one device.

    Raises:
        UsageError: an invalid mesh.
    """
    import jax

    from jvdiff.pipeline.lending import PINNED
    from jvdiff.plan import meshes
    from jvdiff.plan.compiled import programs, resident
    from jvdiff.plan.counting import flops, gib
    from jvdiff.plan.residency import Work, choose, in_tiles, ways
    from jvdiff.sharding import check_mesh

    if shape is not None:
        there = shape.devices if target else jax.device_count()
        check_mesh(shape, context.family.mesh_sizes(context.models, clip, 1, shape), there)
    yield from _heading(context, clip, target, shape)
    held = resident(context, shape)
    for part, (count, size) in held.items():
        yield f"  {part:<13}{count:>16,} parameters {gib(size)}"
    patterns = ", ".join(dict.fromkeys(str(segment.pattern) for segment in clip.segments))
    yield f"video tokens L: {clip.tokens:,}   self-attention: {patterns}"
    columns = "".join(f"{title:>12}" for title in ("weights", "data", "temporary", "in all"))
    yield f"{'program':<22}{'runs':>5}{'FLOPs':>10}{columns}   compiled in  attention   largest array"
    every = []
    for program in programs(context, clip, target, shape):
        every.append(program)
        yield from _program(program, clip.tokens)
    total = sum(program.flops * program.times for program in every)
    sent = sum(program.times * sum(size for _, size in program.sends.values()) for program in every)
    communication = f" sends {gib(sent).strip()};" if shape is not None else ""
    yield f"one clip: {flops(total)}FLOPs;{communication} device memory, by whose weights are on the device together:"
    sizes, works = {part: size for part, (_, size) in held.items()}, [Work(p.name, p.part, p.needs) for p in every]
    for way in ways(clip, works, sizes):
        stages = ", ".join(f"{name} {gib(peak).strip()}" for name, peak in way.peaks.items())
        host = sum(sizes[part] for part in way.in_turn)
        waiting = f"; in host memory ({PINNED} on a mesh): {gib(host).strip()}" if host else ""
        yield f"  {way}: {gib(way.peak).strip()} at most ({stages}){waiting}"
    if (pool := target_memory(target) if target else meshes.pool()) is not None:
        if choose(clip, works, sizes, pool)[0].peak > pool and (tiled := in_tiles(clip)) is not None:
            yield f"nothing fits; with the VAE in tiles ({tiled.vae_tiles}), which are then chosen:"
            steps = {segment.part for segment in clip.segments}
            works = [work for work in works if work.part in steps]
            for program in programs(context, tiled, target, shape, steps):
                works.append(Work(program.name, program.part, program.needs))
                yield from _program(program, clip.tokens)
        yield choose(clip, works, sizes, pool)[1]
        yield f"JAX's pool on each device: {gib(pool).strip()}, {gpus.share():g} of it"
    yield "not in these figures: the workspaces of cuDNN, cuBLAS and NCCL"
    frames, height, width = clip.frames
    yield f"host memory for its frames: {gib(frames * height * width * 3).strip()}"


def _heading(context: Any, clip: Any, target: str | None, shape: Any) -> Iterator[str]:
    import jax

    dtypes = context.precision
    device = f"{target} (compiled without the device)" if target else jax.devices()[0].device_kind
    frames, height, width = clip.frames
    guidance = " then ".join(dict.fromkeys(str(segment.guidance) for segment in clip.segments))
    passes = f"guidance {guidance}" if clip.guided else "one pass each"
    yield f"plan: {width}x{height}, {frames} frames, {clip.sampler.steps} steps, {passes}"
    yield f"device: {device}   precision: {dtypes.name}   frames: {dtypes.vae_decode}   jax {jax.__version__}"
    if shape is not None:
        yield f"mesh: {shape}, {shape.devices} devices; FLOPs and bytes are those of one"


def _program(program: Any, tokens: int) -> Iterator[str]:
    from jvdiff.plan.counting import flops, gib

    sizes = (program.weights, program.data, program.temporary, program.weights + program.needs)
    square = " (L x L!)" if program.largest_elements >= tokens**2 > 2**24 else ""
    yield (
        f"{program.name:<22}{program.times:>5}{flops(program.flops):>10}{''.join(gib(size) for size in sizes)}"
        f"{program.seconds:>12.1f} s {'+'.join(program.attention) or '-':>10}   {program.largest}{square}"
    )
    if program.collectives:
        kinds = (f"{gib(size).strip()} in {runs:,} {kind}" for kind, (runs, size) in program.sends.items())
        asynchronous = f"{program.asynchronous} of {program.collectives} collectives are asynchronous"
        yield f"{'':<22}sends {', '.join(kinds)}; {asynchronous}"
