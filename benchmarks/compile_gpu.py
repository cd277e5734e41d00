"""Compiles the attention kernels and whole DiT steps for GPUs that are not there, and prints what the compiler says.

    python benchmarks/compile_gpu.py                          # every kernel, every production shape, for an H200
    python benchmarks/compile_gpu.py --model "Wan 1.3B 480p" --pattern "VSA 4x4x4"
    python benchmarks/compile_gpu.py --target a100            # with the kernels that it would run
    python benchmarks/compile_gpu.py --step                   # a step of each Wan DiT on 1 to 8 H200s: memory, time
    python benchmarks/compile_gpu.py --step --model "Wan 14B 720p" --mesh sequence=8 --target b200
    python benchmarks/compile_gpu.py --step --check           # where there is an H200: measured against predicted

It needs no GPU and no driver, only the compiler's packages (`python -m jvdiff.commands.compiler --install`) and a few
seconds a kernel. Registers are per thread, shared memory per CTA; `CTAs` is how many of them fit on an SM at once. The
exit status is 1 if a kernel spills registers or asks for more shared memory than there is.

B batch · L video tokens · N heads · K head dim.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jvdiff.plan import resources

if __name__ == "__main__":
    if "--check" not in sys.argv:
        os.environ["JAX_PLATFORMS"] = "cpu"  # before jax: its CUDA plugin would ask for a driver
    resources.ask()

import jax
import jax.numpy as jnp
import roofline
from timing import RESULTS, in_turn

from jvdiff import plan
from jvdiff.errors import JvdiffError, SetupError, UsageError
from jvdiff.kernels import Dense, Pattern, block_sparse_attention, layout, tiles, tuning
from jvdiff.kernels.block_sparse import mosaic_gpu, triton
from jvdiff.kernels.block_sparse.cuts import KERNELS
from jvdiff.kernels.tuning import PATTERNS
from jvdiff.models import wan
from jvdiff.models.wan import places
from jvdiff.models.wan.conditions import TEXT_LENGTH
from jvdiff.plan.resources import ctas, printed, read_log, shared_memory_of
from jvdiff.runtime.target import here
from jvdiff.sharding import MeshShape, collectives, param_shardings, read_mesh

MODELS = {("HunyuanVideo 768p" if size == "13B 768p" else f"Wan {size}"): x for size, x in tuning.MODELS.items()}
STEPS = {
    f"{name} {height}p": (cfg, height, width)
    for name, cfg in (("Wan 1.3B", wan.WAN_2_1_T2V_1_3B), ("Wan 14B", wan.WAN_2_1_T2V_14B))
    for height, width in ((480, 832), (720, 1280))
}
MESHES = [
    MeshShape(**axes)
    for axes in (
        {},
        *({axis: n} for n in (2, 4, 8) for axis in ("sequence", "fsdp", "tensor")),
        {"data": 2},
        *({other: 2, "sequence": n} for n in (2, 4) for other in ("data", "fsdp", "tensor")),
    )
]
PREDICTIONS = RESULTS / "steps_h200.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=plan.known_targets(), default="h200")
    parser.add_argument("--implementation", choices=["mosaic_gpu", "triton"], help="default: the target's")
    parser.add_argument("--model", choices=[*MODELS], action="append", help="only this one; may be given again")
    parser.add_argument("--pattern", choices=PATTERNS, action="append", help="only this one; may be given again")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--step", action="store_true", help="compile DiT steps instead of kernels")
    parser.add_argument("--mesh", type=_mesh, action="append", help="of the steps, only this one; may be given again")
    parser.add_argument(
        "--check", action="store_true", help="with --step: run those of one GPU, against the prediction"
    )
    parser.add_argument("--output", type=Path, help="write the rows to this JSON file as well")
    args = parser.parse_args()
    try:
        if args.check:
            return check()
        if (status := plan.run_with_compiler(args.target, [__file__, *sys.argv[1:]])) is not None:
            return status
        plan.check_target(args.target)
        why = mosaic_gpu.unavailable(plan.described(args.target))
        implementation = args.implementation or ("triton" if why else "mosaic_gpu")
        if implementation == "mosaic_gpu" and why:
            raise UsageError(f"--implementation mosaic_gpu {why}; expected triton with --target {args.target}.")
        if args.step:
            print(f"{'one step, both branches':<15}{'mesh':>24}{STEP_COLUMNS}")
            rows, failures = [], []
            for row in steps(args.target, args.model or STEPS, args.mesh or MESHES):
                rows.append(row)
                print(step_line(row), flush=True)
        else:
            line = "{shape:<32}{kernel:<9}{registers:>10}{spills:>8}{shared_memory:>15}{ctas:>6}{seconds:>9}"
            print(line.format_map({name: name.replace("_", " ") for name in re.findall(r"{(\w+)", line)}))
            rows = []
            for row in kernels(
                args.target,
                implementation,
                args.model or MODELS,
                args.pattern or PATTERNS,
                args.dtype,
                args.head_dim,
            ):
                rows.append(row)
                print(line.format(**row), flush=True)
            limit = shared_memory_of(args.target)
            failures = [row for row in rows if row["spills"] or row["shared_memory"] > limit]
    except (JvdiffError, NotImplementedError) as error:
        print(error, file=sys.stderr)
        return error.exit_code if isinstance(error, JvdiffError) else UsageError.exit_code
    if args.output:
        args.output.write_text(
            json.dumps({"jax": jax.__version__, "target": args.target, "rows": rows}, indent=1) + "\n"
        )
    for row in failures:
        print(f"{row['shape']}, {row['kernel']}: spills or asks for too much shared memory", file=sys.stderr)
    return 1 if failures else 0


def _mesh(text: str) -> MeshShape:
    shape = read_mesh(text)
    if not isinstance(shape, MeshShape):
        raise argparse.ArgumentTypeError(f"{text!r} is no mesh, such as sequence=4,tensor=2")
    return shape


def kernels(
    target: str, implementation: str, models: Iterable[str], patterns: Iterable[str], dtype: str, head_dim: int
) -> Iterator[dict[str, Any]]:
    """Compiles the three kernels of each shape and yields a row for each of them."""
    with printed():  # the compiler's greeting
        placement = plan.target_placement(target)
    struct = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=placement.everywhere)  # noqa: E731
    for model, pattern in itertools.product(models, patterns):
        (grid, heads), (tile, seen) = MODELS[model], PATTERNS[pattern]
        block, sizes = math.prod(tile), tiles.variable_block_sizes(grid, tile)
        blocks, list_heads = sizes.size, 1 if pattern.startswith("STA") else heads
        lists = [struct((1, list_heads, blocks, seen(blocks)), jnp.int32), struct((1, list_heads, blocks), jnp.int32)]
        # As the patterns do it: the tokens of ragged tiles stay where they are, if each tile has a multiple of 8.
        ragged = layout.blocks(placement.target, implementation, block, layout.video_places(grid, tile, True, block))
        rows = blocks * block if ragged.first is None else int(sizes.sum())
        x = struct((1, rows, heads, head_dim), dtype)
        attend = functools.partial(
            block_sparse_attention,
            kv_sizes=sizes,
            q_sizes=sizes,
            q_first=ragged.first,
            kv_first=ragged.first,
            block=block,
            return_lse=True,
            implementation=implementation,
            target=placement.target,
        )

        def both(operands, lists, cotangents, attend=attend):
            out, pull = jax.vjp(lambda *operands: attend(*operands, *lists), *operands)
            return out, pull(cotangents)

        cotangents = x, struct((1, heads, rows), jnp.float32)
        began = time.monotonic()
        with printed() as log:
            plan.compile_for(placement, jax.jit(both), (x, x, x), lists, cotangents)
        seconds = time.monotonic() - began
        found = read_log(log[0], KERNELS)
        for kernel in KERNELS:
            cut = threads(placement.target.kind, implementation, kernel, block, head_dim, dtype)
            row = {
                "shape": f"{model} {pattern}",
                "kernel": kernel,
                **found[kernel],
                "seconds": round(seconds / len(KERNELS), 1),
            }
            yield {**row, "ctas": ctas(target, threads=cut, **found[kernel])}


def threads(kind: str, implementation: str, kernel: str, block: int, head_dim: int, dtype: str) -> int:
    """The number of threads of one CTA."""
    if implementation == "triton":
        return 32 * triton.shapes(block, head_dim, dtype, kind)[kernel].warps
    cut = mosaic_gpu.shapes(block, head_dim, dtype, kind)[kernel]
    return 128 * (cut.warpgroups + cut.producer)


STEP_COLUMNS = f"{'GiB weights':>13}{'temporary':>11}{'GB sent':>9}{'async':>9}{'seconds':>17}{'efficiency':>13}"


def step_line(row: Mapping[str, Any]) -> str:
    """One row of `steps` for the terminal."""
    seconds = f"{row['seconds_overlapped']:.3f} - {row['seconds_exposed']:.3f}"
    efficiency = f"{row['efficiency_exposed']:.0%} - {row['efficiency_overlapped']:.0%}"
    return (
        f"{row['step']:<15}{row['mesh']:>24}{row['weights']:>13.2f}{row['temporary']:>11.2f}{row['sent'] / 1e9:>9.2f}"
        f"{row['asynchronous']:>5} / {row['collectives']}{seconds:>17}{efficiency:>13}"
    )


def steps(target: str, models: Iterable[str], meshes: Sequence[MeshShape]) -> Iterator[dict[str, Any]]:
    """A row for one sampling step, both branches of guidance, of each Wan DiT, 81 frames, under each mesh it allows.

    The branches run one after the other, or, where the mesh has an axis `data` or `fsdp`, at once. GiB and bytes sent
    are of one GPU; `collectives` counts those in the program's text, not how often they run.
    """
    for model in models:
        cfg, height, width = STEPS[model]
        alone = predicted(target, model, MeshShape())
        for mesh in sorted(meshes, key=lambda mesh: mesh.devices):
            if reason := wan.mesh_sizes(cfg, (21, height // 8, width // 8), branches(mesh), Dense()).problem(mesh):
                print(f"{model:<15}{mesh!s:>24}  {reason}", flush=True)
                continue
            row = alone if mesh.devices == 1 else predicted(target, model, mesh)
            for way in ("exposed", "overlapped"):
                row[f"efficiency_{way}"] = alone[f"seconds_{way}"] / row[f"seconds_{way}"] / mesh.devices
            yield row


def predicted(target: str, model: str, shape: MeshShape) -> dict[str, Any]:
    """What the compiler says of one step on a mesh of such GPUs, and how long it should take."""
    cfg, height, width = STEPS[model]
    with printed():
        placement = plan.target_placement(target, shape)
    abstract = wan.abstract_params(cfg, jnp.bfloat16)
    params = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        param_shardings(placement.mesh, abstract, places.DIT),
    )
    batch = branches(shape)
    calls = 2 // batch
    inputs = [jax.ShapeDtypeStruct(*x, sharding=placement.everywhere) for x in step_inputs(cfg, batch, height, width)]

    def velocity(params, *inputs):
        return placement.replicate(wan.velocity(params, cfg, *inputs, placement=placement))

    began = time.monotonic()
    with printed():
        compiled = plan.compile_for(placement, jax.jit(velocity), params, *inputs, options=placement.target.options)
    compiled_in = time.monotonic() - began
    text = compiled.as_text() or ""
    memory: Any = compiled.memory_analysis()
    weights = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(params))
    found, work = collectives.read(text), roofline.work(text)
    seconds = roofline.seconds(work, found, roofline.RATES[target])
    kinds = collectives.by_kind(found)
    return {
        "step": model,
        "mesh": str(shape),
        "gpus": shape.devices,
        "weights": weights / 2**30,
        "data": (memory.argument_size_in_bytes - weights + memory.output_size_in_bytes) / 2**30,
        "temporary": memory.temp_size_in_bytes / 2**30,
        "flops": calls * work.flops,
        "attention_flops": calls * work.attention,
        "traffic": calls * work.traffic,
        "sent": calls * sum(sent for _, sent in kinds.values()),
        "sent_by_kind": {kind: calls * sent for kind, (_, sent) in kinds.items()},
        "runs_by_kind": {kind: calls * runs for kind, (runs, _) in kinds.items()},
        "collectives": len(found),
        "asynchronous": sum(each.asynchronous for each in found),
        "seconds_compute": calls * seconds.compute,
        "seconds_overlapped": calls * seconds.shortest,
        "seconds_exposed": calls * seconds.longest,
        "attention": plan.attention_in(text),
        "compiled_in": compiled_in,
    }


def branches(shape: MeshShape) -> int:
    """How many of guidance's two branches a large clip's step computes at once: both where devices share batches."""
    return 2 if shape.data * shape.fsdp > 1 else 1


def step_inputs(cfg: Any, batch: int, height: int, width: int) -> list[tuple[tuple[int, ...], Any]]:
    """(shape, dtype) of the latents of 81 frames, the timestep and the text."""
    latents = (batch, 21, height // 8, width // 8, cfg.in_channels)
    return [(latents, jnp.float32), ((batch,), jnp.float32), ((batch, TEXT_LENGTH, cfg.text_dim), jnp.bfloat16)]


def check() -> int:
    """Runs the steps of one GPU with random weights and prints how far off their prediction is.

    Raises:
        SetupError: there is no H200 here.
    """
    device = jax.devices()[0]
    if "H200" not in device.device_kind:
        raise SetupError(f"--check compares with an H200, and this is {device.device_kind}.")
    print(f"{'one step':<15}{'predicted':>12}{'measured':>12}{'measured / predicted':>24}")
    for row in json.loads(PREDICTIONS.read_text())["rows"]:
        if row["gpus"] == 1:
            predicted, measured = row["seconds_exposed"], measure(*STEPS[row["step"]])
            ratio = measured / predicted
            print(f"{row['step']:<15}{predicted:>10.3f} s{measured:>10.3f} s{ratio:>24.2f}", flush=True)
    return 0


def measure(
    cfg: Any,
    height: int,
    width: int,
    pattern: Pattern = Dense(),  # noqa: B008 - a frozen value
    text_rows: int = TEXT_LENGTH,
) -> float:
    """Seconds of one step, both branches in turn, on the device at hand, with random weights: the best of three.

    text_rows: of a prompt; the last stands for the others, up to TEXT_LENGTH
    """
    cfg = dataclasses.replace(cfg, gate_compress=pattern.gated)
    leaves, tree = jax.tree.flatten(wan.abstract_params(cfg, jnp.bfloat16))

    @jax.jit
    def random(key):
        keys = jax.random.split(key, len(leaves))
        return [0.02 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]

    params = jax.tree.unflatten(tree, random(jax.random.key(0)))
    x, t, text = (jnp.ones(shape, dtype) for shape, dtype in step_inputs(cfg, 1, height, width))
    inputs, how = (x, t, text[:, :text_rows]), dict[str, Any](pattern=pattern, text_length=TEXT_LENGTH)
    network = lambda params, *inputs: wan.velocity(params, cfg, *inputs, **how)  # noqa: E731
    velocity = jax.jit(network, compiler_options=here().options)

    def run() -> None:
        for _ in range(2):
            velocity(params, *inputs).block_until_ready()

    run()
    return min(in_turn([run], 3)[0])


if __name__ == "__main__":
    sys.exit(main())
