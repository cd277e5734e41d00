"""What a training step of each latent video model takes, with clips of 16 frames of 256x256 and a batch of 8.

    python benchmarks/training_steps.py                              # compiled for an H200, no GPU needed
    python benchmarks/training_steps.py --target rtx_4090            # for another that plans know
    python benchmarks/training_steps.py --run --size small           # timed on whatever is here
    python benchmarks/training_steps.py --run --device gpu

The programs are those of configs/latent_video_small.py: bfloat16 with float32 masters, rematerialisation, AdamW and an
average of the parameters. Compiling needs the CUDA compiler (`python -m jvdiff.commands.compiler --install`). The
seconds that it prints are predictions (`roofline`) at rates that others have reached; of the VAE there are none,
because its convolutions are the GPU library's, whose choice needs the GPU.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

if "--run" not in sys.argv:
    os.environ["JAX_PLATFORMS"] = "cpu"  # before jax: its CUDA plugin would ask for a driver

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import machine, roofline
from benchmarks.timing import short, write
from jvdiff import plan
from jvdiff.config import load
from jvdiff.errors import JvdiffError, SetupError
from jvdiff.models import latent_video
from jvdiff.models.latent_video.runs import programs
from jvdiff.sharding import Placement
from jvdiff.training.loop import Schedule, Task, make_step, start

FEW = 2  # clips of the smaller of two batches that tell what a clip takes
SIZES = ("vae", *latent_video.SIZES)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, action="append", help="only this one; may be given again")
    parser.add_argument("--target", choices=plan.known_targets(), default="h200", help="the GPU to compile for")
    parser.add_argument("--run", action="store_true", help="run the steps here instead of compiling them")
    parser.add_argument("--device", choices=("gpu", "cpu"), help="with --run: refuse to run on another")
    parser.add_argument("--repeats", type=int, default=3, help="with --run: timed steps, after one that is not")
    parser.add_argument("--json", type=Path, help="write the report there")
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(words)
    if not args.run and (status := plan.run_with_compiler(args.target, [__file__, *words])) is not None:
        return status
    chosen = [size for size in SIZES if size in (args.size or SIZES)]
    rows = measured(chosen, args.device, args.repeats) if args.run else compiled(chosen, args.target)
    report = {"machine": machine.describe(), "target": None if args.run else args.target, "rows": list(rows)}
    if args.json:
        write(args.json, report)
    return 0


def step_of(size: str, placement: Placement | None = None) -> tuple[Task, Schedule, Any]:
    """(task, schedule, abstract batch) of the VAE or of a transformer of this size, as the config trains it."""
    config = load("latent_video_small")
    if size != "vae":
        config.transformer = size
    for name, task, schedule, batch, _ in programs(config, placement):
        if name == ("vae" if size == "vae" else "transformer"):
            return task, schedule, batch
    raise AssertionError(size)


def compiled(sizes: list[str], target: str) -> Iterator[dict[str, Any]]:
    """Compiles each step for one such GPU; prints and yields what it needs and should take, and the largest batch.

    Memory and time grow by the same for every clip, which steps of few clips and of the configuration's 8 tell.
    """
    plan.check_target(target)
    placement = plan.target_placement(target)
    memory = plan.target_memory(target) / 2**30
    print(f"{target}: JAX takes {memory:.1f} GiB; `batch` is the largest that fits, `s` its predicted seconds")
    print(
        f"{'step':<8}{'parameters':>15}{'TFLOP':>9}{'GiB of state':>14}{'temporary':>11}{'predicted s':>13}"
        f"{'attention':>11}{'batch':>7}{'s':>9}"
    )
    for size in sizes:
        row = _compiled(size, placement, target)
        if size != "vae":
            few = _compiled(size, placement, target, FEW)
            row |= _largest(few, row, memory)
        print(
            f"{size:<8}{row['parameters']:>15,}{row['flops'] / 1e12:>9.3g}{row['state_gib']:>14.3g}"
            f"{row['temporary_gib']:>11.3g}{row.get('predicted_s', '-'):>13}{'+'.join(row['attention']):>11}"
            f"{row.get('largest_batch', '-'):>7}{row.get('largest_batch_s', '-'):>9}",
            flush=True,
        )
        yield row


def _compiled(size: str, placement: Placement, target: str, clips: int | None = None) -> dict[str, Any]:
    """What the compiler says of a step of so many clips; None: as the configuration has it."""
    task, schedule, batch = step_of(size, placement)
    state = jax.eval_shape(partial(start, task, schedule, jax.random.key(0)))
    if clips is not None:
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((clips, *x.shape[1:]), x.dtype), batch)
    struct = partial(jax.ShapeDtypeStruct, sharding=placement.everywhere)
    state, batch = jax.tree.map(lambda x: struct(x.shape, x.dtype), (state, batch))
    traced = make_step(task, schedule, jax.random.key(0)).trace(state, batch)
    done = plan.compile_for(placement, traced)
    text, memory = done.as_text() or "", done.memory_analysis()
    assert memory is not None
    row = {
        "size": size,
        "clips": jax.tree.leaves(batch)[0].shape[0],
        **counted(traced, state),
        "state_gib": short(memory.argument_size_in_bytes / 2**30),
        "temporary_gib": short(memory.temp_size_in_bytes / 2**30),
        "attention": plan.attention_in(text),
    }
    if size != "vae":
        row["predicted_s"] = short(roofline.seconds(roofline.work(text), (), roofline.RATES[target]).longest)
    return row


def _largest(few: dict[str, Any], many: dict[str, Any], memory: float) -> dict[str, Any]:
    """The largest batch that fits into so many GiB, and its predicted seconds; 0 where none does."""
    clips = many["clips"] - few["clips"]
    needs = lambda row: row["state_gib"] + row["temporary_gib"]  # noqa: E731
    each, seconds = (needs(many) - needs(few)) / clips, (many["predicted_s"] - few["predicted_s"]) / clips
    batch = max(0, int(many["clips"] + (memory - needs(many)) / each))
    return {
        "largest_batch": batch,
        "largest_batch_s": short(many["predicted_s"] + seconds * (batch - many["clips"])) if batch else 0.0,
    }


def measured(sizes: list[str], device: str | None, repeats: int) -> Iterator[dict[str, Any]]:
    """Runs each step on random data; prints and yields the median of its seconds.

    Raises:
      SetupError: JAX runs on another device than wanted.
    """
    if device and jax.default_backend() != device:
        raise SetupError(f"--device {device}: JAX runs on {jax.default_backend()} here.")
    print(f"{'step':<8}{'parameters':>15}{'TFLOP':>9}{'GiB at most':>13}{'seconds':>9}{'TFLOP/s':>9}")
    for size in sizes:
        task, schedule, abstract = step_of(size)
        batch = jax.tree.map(partial(_random, np.random.default_rng(0)), abstract)
        state, step = start(task, schedule, jax.random.key(0)), make_step(task, schedule, jax.random.key(0))
        row = {"size": size, **counted(step.trace(state, batch), jax.eval_shape(lambda s: s, state))}
        seconds = []
        for _ in range(repeats + 1):  # the first one compiles
            began = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - began)
        row["seconds"] = short(statistics.median(seconds[1:]))
        row["loss"] = short(float(metrics["loss"]))
        stats = jax.devices()[0].memory_stats() or {}
        row["peak_gib"] = short(stats["peak_bytes_in_use"] / 2**30) if "peak_bytes_in_use" in stats else None
        print(
            f"{size:<8}{row['parameters']:>15,}{row['flops'] / 1e12:>9.3g}{row['peak_gib'] or '-':>13}"
            f"{row['seconds']:>9}{row['flops'] / 1e12 / row['seconds']:>9.3g}",
            flush=True,
        )
        yield row
        del state


def counted(traced: Any, state: Any) -> dict[str, Any]:
    """Parameters, and FLOPs of one step, forwards and backwards, with what is computed again."""
    count = sum(x.size for x in jax.tree.leaves(state.params))
    return {"parameters": count, "flops": plan.count_flops(traced.jaxpr.jaxpr)}


def _random(rng: np.random.Generator, like: Any) -> jax.Array:
    """Latents, or else labels of the ten classes of a plan, or dark pixels."""
    if like.dtype == jnp.float32:
        return jnp.asarray(rng.standard_normal(like.shape, np.float32))
    return jnp.asarray(rng.integers(10, size=like.shape), like.dtype)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except JvdiffError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
