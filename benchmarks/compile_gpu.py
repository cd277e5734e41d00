"""Compiles the attention kernels and whole DiT steps for GPUs that are not there, and prints what the compiler says.

    python benchmarks/compile_gpu.py                          # every kernel, every production shape, for an H200
    python benchmarks/compile_gpu.py --model "Wan 1.3B 480p" --pattern "VSA 4x4x4"
    python benchmarks/compile_gpu.py --implementation triton --target a100
    python benchmarks/compile_gpu.py --step                   # one DiT step on one and on eight H200s: memory of each

It needs no GPU and no driver, only the compiler's packages (`make kernels` installs them) and a few seconds a kernel.
Registers are per thread, shared memory per CTA; `CTAs` is how many of them fit on an SM at once. The exit status is 1
if a kernel spills registers or asks for more shared memory than there is.

B batch · L video tokens · N heads · K head dim.
"""

import argparse
import functools
import itertools
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax: its CUDA plugin would ask for a driver
# What the compilers print, which is read below: that of Mosaic's kernels, and that of all others.
os.environ["MOSAIC_GPU_DUMP_PTXAS"] = os.environ["MOSAIC_GPU_DUMP_RESOURCES"] = "1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "0"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_force_compilation_parallelism=1"  # in order
os.environ["TF_CPP_VMODULE"] = "subprocess_compilation=2,xtile_compiler=2,thunk_emitter=3"

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jvdiff import plan
from jvdiff.errors import JvdiffError, UsageError
from jvdiff.kernels import VideoSparse, block_sparse_attention, tiles
from jvdiff.kernels.block_sparse import mosaic_gpu, triton

# Grid of tokens after patchify, and heads; 81 frames, HunyuanVideo 117. All have head dim 128, --head-dim asks what if.
MODELS = {
    "Wan 1.3B 480p": ((21, 30, 52), 12),
    "Wan 14B 480p": ((21, 30, 52), 40),
    "Wan 1.3B 720p": ((21, 45, 80), 12),
    "Wan 14B 720p": ((21, 45, 80), 40),
    "HunyuanVideo 768p": ((30, 48, 80), 24),
}
# Tile, and how many tiles each tile sees of so many.
PATTERNS: dict[str, tuple[tuple[int, int, int], Callable[[int], int]]] = {
    "STA 6x8x8": ((6, 8, 8), lambda n: min(n, 27)),
    "VSA 4x4x4": ((4, 4, 4), lambda n: tiles.top_k_count(0.9, n)),
    "VSA 4x4x8": ((4, 4, 8), lambda n: tiles.top_k_count(0.9, n)),
    "VSA 4x8x8": ((4, 8, 8), lambda n: tiles.top_k_count(0.9, n)),
}
KERNELS = ("forward", "dq", "dkv")
KINDS = {"h200": "NVIDIA H200", "a100": "NVIDIA A100-SXM4-80GB"}  # as the driver names them
SHARED_MEMORY = {"h200": 232_448, "a100": 166_912}  # bytes that one CTA may have
REGISTERS, MAX_THREADS = 65_536, 2048  # of an SM


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=sorted(SHARED_MEMORY), default="h200")
    parser.add_argument("--implementation", choices=["mosaic_gpu", "triton"], default="mosaic_gpu")
    parser.add_argument("--model", choices=MODELS, action="append", help="only this one; may be given again")
    parser.add_argument("--pattern", choices=PATTERNS, action="append", help="only this one; may be given again")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--step", action="store_true", help="compile DiT steps instead of kernels")
    parser.add_argument("--output", type=Path, help="write the rows to this JSON file as well")
    args = parser.parse_args()
    try:
        plan.check_target(args.target)
        if (args.implementation, args.target) == ("mosaic_gpu", "a100"):
            raise UsageError("mosaic_gpu is for Hopper: compile it for h200, or --implementation triton for a100.")
        if args.step:
            print(f"{'GiB of each GPU':<24}{'GPUs':>5}{'weights':>10}{'data':>8}{'temporary':>11}{'seconds':>9}")
            rows, line = [], "{step:<24}{gpus:>5}{weights:>10.2f}{data:>8.2f}{temporary:>11.2f}{seconds:>9.1f}"
            for row in steps(args.target):
                rows.append(row)
                print(line.format(**row), flush=True)
            failures = []
        else:
            line = "{shape:<32}{kernel:<9}{registers:>10}{spills:>8}{shared_memory:>15}{ctas:>6}{seconds:>9}"
            print(line.format_map({name: name.replace("_", " ") for name in re.findall(r"{(\w+)", line)}))
            rows = []
            for row in kernels(
                args.target,
                args.implementation,
                args.model or MODELS,
                args.pattern or PATTERNS,
                args.dtype,
                args.head_dim,
            ):
                rows.append(row)
                print(line.format(**row), flush=True)
            limit = SHARED_MEMORY[args.target]
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


def kernels(
    target: str, implementation: str, models: Iterable[str], patterns: Iterable[str], dtype: str, head_dim: int
) -> Iterator[dict[str, Any]]:
    """Compiles the three kernels of each shape and yields a row for each of them."""
    with _printed():  # the compiler's greeting
        mesh = plan.target_mesh(target)
    here = NamedSharding(mesh, PartitionSpec())
    struct = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=here)  # noqa: E731
    lowering = triton.lowering(KINDS[target], mesh.abstract_mesh) if implementation == "triton" else nullcontext()
    with lowering:
        for model, pattern in itertools.product(models, patterns):
            (grid, heads), (tile, seen) = MODELS[model], PATTERNS[pattern]
            block, blocks = math.prod(tile), math.prod(tiles.counts(grid, tile))
            x = struct((1, blocks * block, heads, head_dim), dtype)
            list_heads = 1 if pattern.startswith("STA") else heads
            lists = [
                struct(shape, jnp.int32)
                for shape in ((1, list_heads, blocks, seen(blocks)), (1, list_heads, blocks), (blocks,))
            ]

            attend = functools.partial(
                block_sparse_attention, block=block, return_lse=True, implementation=implementation
            )

            def both(operands, lists, cotangents, attend=attend):
                out, pull = jax.vjp(lambda *operands: attend(*operands, *lists), *operands)
                return out, pull(cotangents)

            cotangents = x, struct((1, heads, blocks * block), jnp.float32)
            began = time.monotonic()
            with _printed() as log:
                jax.jit(both).trace((x, x, x), lists, cotangents).lower(lowering_platforms=("cuda",)).compile()
            seconds = time.monotonic() - began
            found = read_log(log[0])
            for kernel in KERNELS:
                cut = threads(implementation, kernel, block, head_dim, dtype)
                row = {
                    "shape": f"{model} {pattern}",
                    "kernel": kernel,
                    **found[kernel],
                    "seconds": round(seconds / len(KERNELS), 1),
                }
                yield {**row, "ctas": ctas(target, threads=cut, **found[kernel])}


def threads(implementation: str, kernel: str, block: int, head_dim: int, dtype: str) -> int:
    """Of one CTA."""
    if implementation == "triton":
        return 32 * triton.shapes(block, head_dim, dtype)[kernel].warps
    cut = mosaic_gpu.shapes(block, head_dim)[kernel]
    return 128 * (cut.warpgroups + cut.producer)


def ctas(target: str, *, registers: int, shared_memory: int, threads: int, spills: int = 0) -> int:
    """How many CTAs fit on an SM at once: registers come in eights, and each CTA takes 1 KiB more than it asks for."""
    by_registers = REGISTERS // (-(-registers // 8) * 8 * threads)
    by_memory = (SHARED_MEMORY[target] + 1024) // (shared_memory + 1024)
    return min(by_registers, by_memory, MAX_THREADS // threads)


def read_log(log: str) -> dict[str, dict[str, int]]:
    """registers, spills (bytes stored) and shared_memory (bytes) of each kernel, from what the compilers print.

    Shared memory is printed without a name, in the order in which kernels are lowered.
    """
    pattern = (
        r"Function properties for block_sparse_([a-z]+)\w*\s+\d+ bytes stack frame, (\d+) bytes spill stores, "
        r"\d+ bytes spill loads\s+ptxas info\s*: Used (\d+) registers"
    )
    found = {
        kernel: {"registers": int(used), "spills": int(spills)} for kernel, spills, used in re.findall(pattern, log)
    }
    order = re.findall(r"Generating: block_sparse_([a-z]+)", log) or KERNELS
    memory = re.findall(r"Resources\(smem_scratch_bytes=(\d+)|Shared memory usage: (\d+) B", log)
    for kernel, sizes in zip(order, memory, strict=True):
        found[kernel]["shared_memory"] = int(max(sizes))
    return found


@contextmanager
def _printed() -> Iterator[list[str]]:
    """What is written to stdout and stderr within, also outside Python: one text, at the end."""
    texts: list[str] = []
    kept = [os.dup(1), os.dup(2)]
    sys.stdout.flush()
    with tempfile.TemporaryFile() as file:
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            yield texts
        finally:
            sys.stdout.flush()
            for number, old in zip((1, 2), kept, strict=True):
                os.dup2(old, number)
                os.close(old)
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))


def steps(target: str) -> Iterator[dict[str, Any]]:
    """A row for one velocity of each Wan DiT, 81 frames: one clip on one GPU, and eight clips on eight, weights shared.

    On one, also with video sparse attention by this GPU's kernels; dense attention is the blocked XLA form, which needs
    no less memory than cuDNN's. On eight each GPU has one clip and an eighth of every weight, gathered when it is used.
    """
    from jvdiff.models import wan

    models = {"Wan 1.3B": wan.WAN_2_1_T2V_1_3B, "Wan 14B": wan.WAN_2_1_T2V_14B}
    ways = [("dense", 1, {}), ("dense", 8, {})]
    if target == "h200":
        ways.append(("VSA 4x4x4", 1, {"pattern": VideoSparse(sparsity=0.9), "implementation": "mosaic_gpu"}))
    for (name, cfg), (height, width), (attention, gpus, how) in itertools.product(
        models.items(), ((480, 832), (720, 1280)), ways
    ):
        with _printed():
            mesh = plan.target_mesh(target, gpus)
        place = lambda x, *axes, mesh=mesh: jax.ShapeDtypeStruct(  # noqa: E731
            x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes))
        )
        shapes = (gpus, 21, height // 8, width // 8, cfg.in_channels), (gpus,), (gpus, plan.ROWS, cfg.text_dim)
        inputs = [place(jax.ShapeDtypeStruct(shape, jnp.float32), "device") for shape in shapes]
        params = jax.tree.map(
            lambda x, place=place, gpus=gpus: place(x, *_shared(x.shape, gpus)), wan.abstract_params(cfg, jnp.bfloat16)
        )
        velocity = lambda params, *inputs, cfg=cfg, how=how: wan.velocity(params, cfg, *inputs, **how)  # noqa: E731
        began = time.monotonic()
        with _printed():
            compiled = jax.jit(velocity).trace(params, *inputs).lower(lowering_platforms=("cuda",)).compile()
        memory: Any = compiled.memory_analysis()
        weights = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(params))
        data = memory.argument_size_in_bytes - weights + memory.output_size_in_bytes
        sizes = {"weights": weights, "data": data, "temporary": memory.temp_size_in_bytes}
        yield {
            "step": f"{name} {height}p {attention}",
            "gpus": gpus,
            **{part: size / 2**30 for part, size in sizes.items()},
            "seconds": time.monotonic() - began,
        }


def _shared(shape: tuple[int, ...], gpus: int) -> list[str | None]:
    """The largest axis that so many GPUs can share is divided."""
    axes = [axis for axis, size in enumerate(shape) if size % gpus == 0]
    best = max(axes, key=lambda axis: shape[axis], default=None)
    return ["device" if axis == best else None for axis in range(len(shape))]


if __name__ == "__main__":
    sys.exit(main())
