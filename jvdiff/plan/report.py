"""What a run would take, found out without weights: parameters, operations, memory of every compiled program.

The programs are those that a run itself compiles (`pipeline.traced`), with abstract weights, for the device at hand or
for a GPU that is not there: JAX's CUDA compiler needs no GPU, only the description in `targets/`.

L video tokens.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jvdiff.errors import ResourceError, UsageError
from jvdiff.plan.targets import check_target, target_memory, target_mesh

ROWS = 512  # plan for the longest prompt
DECODE = ("decode first", "decode next")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8, "c64": 8}


class Program(NamedTuple):
    """One compiled program, on one device.

    flops: of one call, a multiplication and an addition are two; under a mesh the share of one device, as if all were
    divided evenly. weights, data, temporary: bytes of its weights, of its other arguments and results, and of its
    temporary arrays. largest: array in it. seconds: to compile it. sends: kind of collective -> (how often it runs,
    bytes that one device sends) in one call. asynchronous: how many of its `collectives` (those in its text) are.
    """

    name: str
    flops: float
    weights: int
    data: int
    temporary: int
    largest: str
    largest_elements: int
    seconds: float
    sends: Mapping[str, tuple[int, int]]
    asynchronous: int
    collectives: int

    @property
    def needs(self) -> int:
        """Bytes besides the weights."""
        return self.data + self.temporary


def show(config: Any) -> None:
    """Prints the plan of a sampling config to stdout.

    Raises:
        UsageError: neither a folder nor a published model, settings that cannot be, or a mesh that they do not allow.
        SetupError: the compiler for plan_target is not installed.
        ResourceError: mesh is "auto", and no mesh fits.
    """
    if config.plan_target is not None:
        check_target(config.plan_target)
    from jvdiff.sharding import read_mesh

    shape = read_mesh(config.mesh)
    configs, settings, dtypes = resolved(config)
    if shape == "auto":
        devices, limit = (8, target_memory(config.plan_target)) if config.plan_target else (None, None)
        shape, sentence = smallest_mesh(configs, settings, dtypes, devices, limit, config.plan_target)
        print(sentence, flush=True)
    for line in lines(configs, settings, dtypes, config.plan_target, shape):
        print(line, flush=True)


def resolved(config: Any) -> tuple[Any, Any, Any]:
    """(configs, settings, precision) of a sampling config, without its weights."""
    from jvdiff import precision
    from jvdiff.pipeline.settings import FIELDS, resolve

    configs, scheduler, defaults = describe(config.checkpoint)
    settings = resolve(configs, scheduler, defaults, **{name: config[name] for name in FIELDS})
    return configs, settings, precision.choose(config.precision, "gpu" if config.plan_target else None)


def describe(checkpoint: str | None) -> tuple[Any, Mapping[str, Any], Mapping[str, Any]]:
    """(configs, scheduler_config.json, defaults) of a repository, or of a published one that is not downloaded."""
    from jvdiff.models import wan
    from jvdiff.models.text import umt5
    from jvdiff.pipeline import repository
    from jvdiff.pipeline.settings import Configs, read_defaults

    if checkpoint and Path(checkpoint).exists():
        found = repository.inspect(checkpoint, causal=False)
        configs = Configs(found.transformer, found.vae, found.text_encoder)
        return configs, found.scheduler, read_defaults(checkpoint)
    published = {
        "Wan2.1-T2V-1.3B-Diffusers": wan.WAN_2_1_T2V_1_3B,
        "Wan2.1-T2V-14B-Diffusers": wan.WAN_2_1_T2V_14B,
    }
    if (name := Path(checkpoint or "").name) not in published:
        raise UsageError(
            f"checkpoint {checkpoint!r} is neither a folder nor a model to plan without one.\n"
            f"Those are {', '.join(published)}."
        )
    configs = Configs(published[name], wan.WAN_2_1_VAE, umt5.UMT5_XXL)
    return configs, {}, {"solver": "unipc", "shift": 3.0, "grid": "diffusers"}


def lines(configs: Any, settings: Any, dtypes: Any, target: str | None, shape: Any = None) -> Iterator[str]:
    """The plan, line by line, each as soon as it is known; shape: a MeshShape, None for one device.

    Raises:
        UsageError: the mesh cannot be.
    """
    import jax

    from jvdiff import pipeline
    from jvdiff.pipeline.settings import latent_shape
    from jvdiff.sharding import check_mesh

    if shape is not None:
        there = shape.devices if target else jax.device_count()
        check_mesh(shape, pipeline.mesh_sizes(configs, settings, 1, shape), there)
    device = f"{target} (compiled without the device)" if target else jax.devices()[0].device_kind
    frames, height, width = settings.num_frames, settings.height, settings.width
    yield f"plan: {width}x{height}, {frames} frames, {settings.steps} steps, guidance {settings.guidance}"
    yield f"device: {device}   precision: {dtypes.name}   jax {jax.__version__}"
    if shape is not None:
        yield f"mesh: {shape}, {shape.devices} devices; bytes and FLOPs are those of one"
    abstract = pipeline.abstract_params(configs, dtypes)
    resident = 0
    for part, tree in abstract.items():
        count, size = sum(math.prod(x.shape) for x in jax.tree.leaves(tree)), _weights(part, tree, shape)
        resident += size
        yield f"  {part:<13}{count:>16,} parameters {gib(size)}"
    tokens = token_count(configs, settings)
    yield f"video tokens L: {tokens:,}   self-attention: {settings.pattern}"
    columns = "".join(f"{title:>12}" for title in ("weights", "data", "temporary", "in all"))
    yield f"{'program':<13}{'FLOPs':>10}{columns}   compiled in   largest array"
    most, total, sent = 0, 0.0, 0
    for program in programs(configs, settings, abstract, target, shape):
        most = max(most, program.needs)
        calls = {"denoise": settings.steps, "decode next": latent_shape(configs, settings)[0] - 1}.get(program.name, 1)
        total += program.flops * calls
        sent += calls * sum(size for _, size in program.sends.values())
        columns = (program.weights, program.data, program.temporary, program.weights + program.needs)
        yield (
            f"{program.name:<13}{flops(program.flops):>10}{''.join(gib(size) for size in columns)}"
            f"{program.seconds:>12.1f} s   {program.largest}"
            + (" (L x L!)" if program.largest_elements >= tokens**2 > 2**24 else "")
        )
        if program.collectives:
            kinds = (f"{gib(size).strip()} in {runs:,} {kind}" for kind, (runs, size) in program.sends.items())
            asynchronous = f"{program.asynchronous} of {program.collectives} collectives are asynchronous"
            yield f"{'':<13}sends {', '.join(kinds)}; {asynchronous}"
    communication = f" sends {gib(sent).strip()};" if shape is not None else ""
    memory = f"device memory, all weights resident: {gib(resident + most).strip()}"
    yield f"one clip: {flops(total)}FLOPs;{communication} {memory}"
    yield f"host memory for its frames: {gib(frames * height * width * 3).strip()}"
    if target and settings.attention is None:
        yield "Attention is planned as the blocked XLA form; cuDNN's, which a GPU takes in bfloat16, needs no more."


def programs(
    configs: Any,
    settings: Any,
    abstract: Mapping[str, Any],
    target: str | None = None,
    shape: Any = None,
    without: Collection[str] = (),
) -> Iterator[Program]:
    """Compiles each stage's program with abstract weights and measures it.

    shape: a MeshShape, None for one device. without: names of programs to leave out.
    """
    from jvdiff import pipeline
    from jvdiff.models import wan
    from jvdiff.sharding import Placement, collectives

    mesh = target_mesh(target, shape) if target else None
    placement = Placement(mesh, shape and shape.ring) if mesh else pipeline.place(shape)
    decoder = {part: abstract["vae"][part] for part in wan.DECODER}
    needed = {"text": ("text_encoder", abstract["text_encoder"]), "denoise": ("transformer", abstract["transformer"])}
    # Operations are counted in the XLA form, whose loops say how often they run; GPU kernels hide theirs.
    stages = pipeline.traced(configs, settings, abstract, ROWS, placement)
    open_form = pipeline.traced(configs, dataclasses.replace(settings, attention="xla"), abstract, ROWS, placement)
    for (name, traced), (_, counted) in zip(stages, open_form, strict=True):
        if name in without:
            continue
        began = time.monotonic()
        lowered = traced.lower(lowering_platforms=("cuda",)) if target else traced.lower()
        compiled = lowered.compile()
        took = time.monotonic() - began
        memory: Any = compiled.memory_analysis()
        weights = _weights(*needed.get(name, ("vae", decoder)), shape)
        data = memory.argument_size_in_bytes - weights + memory.output_size_in_bytes - memory.alias_size_in_bytes
        text = compiled.as_text() or ""
        largest, elements = largest_array(text)
        found = collectives.read(text)
        yield Program(
            name,
            count_flops(counted.jaxpr.jaxpr) / (shape.devices if shape else 1),
            weights,
            data,
            memory.temp_size_in_bytes,
            largest,
            elements,
            took,
            collectives.by_kind(found),
            sum(each.asynchronous for each in found),
            len(found),
        )


def leaves(tree: Any, rules: Any, shape: Any) -> Iterator[tuple[str, Any, Any, int]]:
    """(path, leaf, PartitionSpec, bytes on one device) of every leaf of a parameter tree under a MeshShape."""
    import jax

    from jvdiff.sharding import AXES, bytes_per_device, specs

    axes = {axis: getattr(shape, axis) for axis in AXES}
    found = jax.tree.leaves(specs(rules, tree, axes), is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))
    for (path, leaf), spec in zip(jax.tree.leaves_with_path(tree), found, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        yield name, leaf, spec, bytes_per_device(axes, spec, leaf)


def _weights(part: str, tree: Any, shape: Any) -> int:
    """Bytes of a component's weights on one device."""
    import jax

    from jvdiff import pipeline

    if shape is None:
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
    return sum(size for *_, size in leaves(tree, pipeline.RULES[part], shape))


# ---------------------------------------------------------------------------------------------------- the mesh "auto"


def smallest_mesh(
    configs: Any,
    settings: Any,
    dtypes: Any,
    devices: int | None = None,
    limit: int | None = None,
    target: str | None = None,
) -> tuple[Any, str]:
    """(MeshShape, a line that explains it) of the smallest split of one clip whose compiled programs fit.

    Meshes are tried by the devices they use (1, 2, 4, ...), and of as many devices by what they communicate: tokens
    divided, then weights too, then heads. One whose weights alone do not fit is not compiled, and decoding, which is
    spread over all devices whatever the axes, only once for so many devices.

    devices: how many there are, and limit: bytes of memory of one; None: those at hand, with several processes all of
    them, since each has some. target: compile for that GPU.

    Raises:
        ResourceError: none fits; the message has the need of the best.
        UsageError: this model cannot be divided among so many devices.
    """
    import jax

    from jvdiff import pipeline

    exactly = devices is None and jax.process_count() > 1
    devices = jax.device_count() if devices is None else devices
    limit = memory_limit() if limit is None else limit
    abstract = pipeline.abstract_params(configs, dtypes)
    tried: dict[Any, int] = {}
    decoding: dict[int, int] = {}  # bytes besides the weights, by devices
    for shape in candidates(devices):
        if pipeline.mesh_sizes(configs, settings, 1, shape).problem(shape) is not None:
            continue
        if exactly and shape.devices < devices:
            continue
        resident = sum(_weights(part, tree, shape) for part, tree in abstract.items())
        need = resident + decoding.get(shape.devices, 0)
        if need <= limit:
            known = DECODE if shape.devices in decoding else ()
            for program in programs(configs, settings, abstract, target, shape, known):
                need = max(need, resident + program.needs)
                if program.name in DECODE:
                    decoding[shape.devices] = max(decoding.get(shape.devices, 0), program.needs)
        if need <= limit:
            fewer = min((size for other, size in tried.items() if other.devices < shape.devices), default=None)
            reason = f"; fewer devices would need {gib(fewer).strip()} or more" if fewer else ""
            need, most = gib(need).strip(), gib(limit).strip()
            of = f"{shape.devices} of {devices} devices"
            return shape, f"mesh {shape}: {of}, the smallest split that fits, {need} of {most} on each{reason}"
        tried[shape] = need
    if not tried:
        raise UsageError(f"no mesh of {devices} devices can run this; name one to hear why, or use other devices.")
    best = min(tried, key=lambda shape: tried[shape])
    raise ResourceError(
        f"no mesh of {devices} devices fits: the best, {best}, needs at least {gib(tried[best]).strip()} of memory on "
        f"each device, and each has {gib(limit).strip()}.\n"
        "Use more devices, fewer frames or a smaller picture, or --config.precision=bfloat16."
    )


def candidates(devices: int) -> Iterator[Any]:
    """Meshes of up to so many devices, those of fewer devices first, and of as many those that communicate less."""
    from jvdiff.sharding import MeshShape

    counts = [2**i for i in range(devices.bit_length())]
    for count in sorted({*counts, devices}):
        divisors = [n for n in range(2, count + 1) if count % n == 0]
        yield MeshShape(sequence=count)
        yield from (MeshShape(fsdp=n, sequence=count // n) for n in divisors)
        yield from (MeshShape(tensor=n, sequence=count // n) for n in divisors)


def memory_limit() -> int:
    """Bytes that a program may take on a device at hand; a CPU's are the host's."""
    import jax

    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def token_count(configs: Any, settings: Any) -> int:
    """L: the video tokens of one clip."""
    from jvdiff.pipeline.settings import latent_shape

    grid = latent_shape(configs, settings)[:3]
    return math.prod(n // p for n, p in zip(grid, configs.transformer.patch_size, strict=True))


def count_flops(jaxpr: Any) -> float:
    """FLOPs of the matrix products and convolutions of a jaxpr, loops counted as often as they run.

    What a `shard_map` does, every device of its mesh does, and they are added up; the rest counts once. Of branches
    the dearest one counts; a `while` without a known length counts once.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contract, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contract)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / outputs
        elif name == "cond":
            total += max(count_flops(branch.jaxpr) for branch in params["branches"])
        else:
            times = params["length"] if name == "scan" else 1
            if name == "shard_map":
                times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
            total += times * sum(count_flops(j) for value in params.values() for j in _jaxprs(value))
    return total


def _jaxprs(value: Any) -> Iterator[Any]:
    for each in value if isinstance(value, tuple | list) else (value,):
        if hasattr(each, "eqns"):
            yield each
        elif hasattr(each, "jaxpr") and hasattr(each.jaxpr, "eqns"):
            yield each.jaxpr


def largest_array(hlo: str) -> tuple[str, int]:
    """(type, shape and size, elements) of the largest array that a compiled program makes; arguments do not count."""
    best, most = "", 0
    for kinds, operation in re.findall(r" = (\([^)]*\)|\S+) ([\w-]+)\(", re.sub(r"/\*.*?\*/", "", hlo)):
        if operation in ("parameter", "get-tuple-element", "tuple", "while", "bitcast"):
            continue
        for kind, shape in re.findall(r"([a-z]+\d*)\[([\d,]+)\]", kinds):
            elements = math.prod(int(n) for n in shape.split(","))
            if elements > most:
                size = gib(elements * _BYTES.get(kind, 4)).strip()
                best, most = f"{kind}[{shape}] {size}", elements
    return best, most


def gib(size: float) -> str:
    """A number of bytes, in a column of 12 characters."""
    return f"{size / 2**30:>8.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:>8.2f} MiB"


def flops(count: float) -> str:
    """A number of operations, without the unit: "1.30 T"."""
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count / 1e6:.2f} M"
