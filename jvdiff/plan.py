"""What a run would take, found out without weights: parameters, operations, memory of every compiled program.

The programs are those that a run itself compiles (`pipeline.traced`), with abstract weights, for the device at hand or
for a GPU that is not there: JAX's CUDA compiler needs no GPU, only the description in `plan_targets/`.

L video tokens.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jvdiff.errors import SetupError, UsageError

TARGETS = Path(__file__).parent / "plan_targets"
ROWS = 512  # plan for the longest prompt
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8, "c64": 8}


class Program(NamedTuple):
    """One compiled program.

    flops: of one call, a multiplication and an addition are two. weights, data, temporary: bytes of its weights, of its
    other arguments and results, and of its temporary arrays. largest: array in it. seconds: to compile it.
    """

    name: str
    flops: float
    weights: int
    data: int
    temporary: int
    largest: str
    largest_elements: int
    seconds: float


def show(config: Any) -> None:
    """Prints the plan of a sampling config to stdout.

    Raises:
        UsageError: neither a folder nor a published model, or settings that cannot be.
        SetupError: the compiler for plan_target is not installed.
    """
    if config.plan_target is not None:
        check_target(config.plan_target)
    from jvdiff import precision
    from jvdiff.settings import FIELDS, resolve

    configs, scheduler, defaults = describe(config.checkpoint)
    settings = resolve(configs, scheduler, defaults, **{name: config[name] for name in FIELDS})
    dtypes = precision.choose(config.precision, "gpu" if config.plan_target else None)
    for line in lines(configs, settings, dtypes, config.plan_target):
        print(line, flush=True)


def describe(checkpoint: str | None) -> tuple[Any, Mapping[str, Any], Mapping[str, Any]]:
    """(configs, scheduler_config.json, defaults) of a repository, or of a published one that is not downloaded."""
    from jvdiff import checkpoint as checkpoints
    from jvdiff.models import umt5, wan
    from jvdiff.settings import Configs, read_defaults

    if checkpoint and Path(checkpoint).exists():
        found = checkpoints.inspect(checkpoint)
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


def lines(configs: Any, settings: Any, dtypes: Any, target: str | None) -> Iterator[str]:
    """The plan, line by line, each as soon as it is known."""
    import jax

    from jvdiff import pipeline
    from jvdiff.settings import latent_shape

    device = f"{target} (compiled without the device)" if target else jax.devices()[0].device_kind
    frames, height, width = settings.num_frames, settings.height, settings.width
    yield f"plan: {width}x{height}, {frames} frames, {settings.steps} steps, guidance {settings.guidance}"
    yield f"device: {device}   precision: {dtypes.name}   jax {jax.__version__}"
    abstract = pipeline.abstract_params(configs, dtypes)
    resident = 0
    for part, tree in abstract.items():
        leaves = jax.tree.leaves(tree)
        count, size = sum(math.prod(x.shape) for x in leaves), _size(tree)
        resident += size
        yield f"  {part:<13}{count:>16,} parameters {_gib(size)}"
    tokens = token_count(configs, settings)
    yield f"video tokens L: {tokens:,}   self-attention: {settings.pattern}"
    columns = "".join(f"{title:>12}" for title in ("weights", "data", "temporary", "in all"))
    yield f"{'program':<13}{'FLOPs':>10}{columns}   compiled in   largest array"
    most, total = 0, 0.0
    for program in programs(configs, settings, abstract, target):
        most = max(most, program.data + program.temporary)
        calls = {"denoise": settings.steps, "decode next": latent_shape(configs, settings)[0] - 1}
        total += program.flops * calls.get(program.name, 1)
        needs = program.weights + program.data + program.temporary
        columns = (program.weights, program.data, program.temporary, needs)
        yield (
            f"{program.name:<13}{_flops(program.flops):>10}{''.join(_gib(size) for size in columns)}"
            f"{program.seconds:>12.1f} s   {program.largest}"
            + (" (L x L!)" if program.largest_elements >= tokens**2 > 2**24 else "")
        )
    yield f"one clip: {_flops(total)}FLOPs; device memory, all weights resident: {_gib(resident + most).strip()}"
    yield f"host memory for its frames: {_gib(frames * height * width * 3).strip()}"
    if target and settings.attention is None:
        yield "Attention is planned as the blocked XLA form; cuDNN's, which a GPU takes in bfloat16, needs no more."


def programs(configs: Any, settings: Any, abstract: Mapping[str, Any], target: str | None = None) -> Iterator[Program]:
    """Compiles each stage's program with abstract weights and measures it."""
    from jvdiff import pipeline
    from jvdiff.models import wan
    from jvdiff.sharding import MeshShape, Placement, make_mesh

    placement = Placement(make_mesh(MeshShape(), target_mesh(target).devices.flat)) if target else None
    decoder = {part: abstract["vae"][part] for part in wan.DECODER}
    needed = {"text": abstract["text_encoder"], "denoise": abstract["transformer"]}
    needed |= {"decode first": decoder, "decode next": decoder}
    stages = pipeline.traced(configs, settings, abstract, ROWS, placement)
    # Operations are counted in the XLA form, whose loops say how often they run; GPU kernels hide theirs.
    open_form = pipeline.traced(configs, dataclasses.replace(settings, attention="xla"), abstract, ROWS, placement)
    for (name, traced), (_, counted) in zip(stages, open_form, strict=True):
        began = time.monotonic()
        lowered = traced.lower(lowering_platforms=("cuda",)) if target else traced.lower()
        compiled = lowered.compile()
        took = time.monotonic() - began
        memory: Any = compiled.memory_analysis()
        weights = _size(needed[name])
        data = memory.argument_size_in_bytes - weights + memory.output_size_in_bytes - memory.alias_size_in_bytes
        largest, elements = largest_array(compiled.as_text() or "")
        flops = count_flops(counted.jaxpr.jaxpr)
        yield Program(name, flops, weights, data, memory.temp_size_in_bytes, largest, elements, took)


def token_count(configs: Any, settings: Any) -> int:
    """L: the video tokens of one clip."""
    from jvdiff.settings import latent_shape

    grid = latent_shape(configs, settings)[:3]
    return math.prod(n // p for n, p in zip(grid, configs.transformer.patch_size, strict=True))


def count_flops(jaxpr: Any) -> float:
    """FLOPs of the matrix products and convolutions of a jaxpr, loops counted as often as they run.

    Of branches the dearest one counts; a `while` without a known length counts once.
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
            inner = [j for value in params.values() for j in _jaxprs(value)]
            total += (
                params.get("length", 1) * sum(count_flops(j) for j in inner)
                if name == "scan"
                else sum(count_flops(j) for j in inner)
            )
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
                size = _gib(elements * _BYTES.get(kind, 4)).strip()
                best, most = f"{kind}[{shape}] {size}", elements
    return best, most


def _size(tree: Any) -> int:
    import jax

    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _gib(size: float) -> str:
    return f"{size / 2**30:>8.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:>8.2f} MiB"


def _flops(count: float) -> str:
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count / 1e6:.2f} M"


def check_target(target: str) -> None:
    """That the description and the compiler of a GPU are there; before jax is first imported, if possible.

    Raises:
        UsageError: there is no such description in plan_targets/.
        SetupError: the compiler is not installed; the message says how.
    """
    known = sorted(path.stem for path in TARGETS.glob("*.textproto"))
    if target not in known:
        raise UsageError(f"plan_target is {target!r}; expected one of {', '.join(known)}.")
    os.environ["JAX_PLATFORMS"] = "cpu"  # or the plugin asks for a driver, where jax is first imported below
    plugins = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12") if importlib.util.find_spec("jax_plugins") else ()
    if not any(importlib.util.find_spec(name) for name in plugins):
        import jax

        version = jax.__version__
        raise SetupError(
            f"planning for {target} needs the CUDA compiler (no GPU, no driver). Install it with:\n"
            f"pip install --no-deps jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version} nvidia-cuda-nvcc "
            "nvidia-nvvm nvidia-cuda-crt nvidia-cuda-nvdisasm nvidia-cuda-cuobjdump"
        )


def target_mesh(target: str, devices: int = 1) -> Any:
    """A mesh ("device",) of so many of the described GPUs in one machine.

    Raises:
        SetupError: the compiler's packages are there, but cannot be used.
    """
    from jax.experimental import topologies
    from jax.sharding import Mesh

    text = (TARGETS / f"{target}.textproto").read_text()
    try:
        topology = topologies.get_topology_desc(platform="cuda", topology=f"1x1x{devices}", target_config=text)
    except Exception as error:
        raise SetupError(f"the CUDA compiler cannot be used: {error}\nIts packages must have jax's version.") from error
    return Mesh(topology.devices, ("device",))
