"""What a training step of each latent video model takes, with clips of 16 frames of 256x256 and a batch of 8.

    python benchmarks/training_steps.py                              # compiled for an H200, no GPU needed
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

TARGET = "h200"  # of which `roofline` has the rates
SIZES = ("vae", *latent_video.SIZES)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, action="append", help="only this one; may be given again")
    parser.add_argument("--run", action="store_true", help="run the steps here instead of compiling them")
    parser.add_argument("--device", choices=("gpu", "cpu"), help="with --run: refuse to run on another")
    parser.add_argument("--repeats", type=int, default=3, help="with --run: timed steps, after one that is not")
    parser.add_argument("--json", type=Path, help="write the report there")
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(words)
    if not args.run and (status := plan.run_with_compiler(TARGET, [__file__, *words])) is not None:
        return status
    chosen = [size for size in SIZES if size in (args.size or SIZES)]
    rows = measured(chosen, args.device, args.repeats) if args.run else compiled(chosen)
    report = {"machine": machine.describe(), "target": None if args.run else TARGET, "rows": list(rows)}
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


def compiled(sizes: list[str]) -> Iterator[dict[str, Any]]:
    """Compiles each step for one H200; prints and yields what it needs and should take."""
    plan.check_target(TARGET)
    placement = plan.target_placement(TARGET)
    here = placement.everywhere
    print(f"{'step':<8}{'parameters':>15}{'TFLOP':>9}{'GiB of state':>14}{'temporary':>11}{'predicted s':>13}")
    for size in sizes:
        task, schedule, batch = step_of(size, placement)
        state = jax.eval_shape(partial(start, task, schedule, jax.random.key(0)))
        there = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)  # noqa: E731
        traced = make_step(task, schedule, jax.random.key(0)).trace(there(state), there(batch))
        done = plan.compile_for(placement, traced)
        row = {"size": size, **counted(traced, state)}
        memory: Any = done.memory_analysis()
        row |= {
            "state_gib": short(memory.argument_size_in_bytes / 2**30),
            "temporary_gib": short(memory.temp_size_in_bytes / 2**30),
        }
        if size != "vae":
            row["predicted_s"] = short(
                roofline.seconds(roofline.work(done.as_text() or ""), (), roofline.RATES[TARGET]).longest
            )
        print(
            f"{size:<8}{row['parameters']:>15,}{row['flops'] / 1e12:>9.3g}{row['state_gib']:>14.3g}"
            f"{row['temporary_gib']:>11.3g}{row.get('predicted_s', '-'):>13}",
            flush=True,
        )
        yield row


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
