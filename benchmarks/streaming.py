"""How long a chunk of an endless video takes, and how much memory: Self-Forcing's Wan 2.1 1.3B, or a checkpoint.

    python benchmarks/streaming.py --checkpoint checkpoints/digits-stream     # on whatever is here
    python benchmarks/streaming.py --device gpu                               # 1.3B, 480x832, random weights
    python benchmarks/streaming.py --target h200                              # compiled for one, no GPU needed
    python benchmarks/streaming.py --target h200 --table                      # and where the time should go

The 1.3B model makes chunks of 3 latent (12 pixel) frames in 4 steps, with a window of 21 latent frames. Beside it
stands what FlashDreams publishes for the same (its documentation, 2026): 344 ms for the network's calls of the 6th
chunk on an H100, 432 ms for Self-Forcing's own program. --target needs the CUDA compiler (`python -m
jvdiff.commands.compiler --install`); its times are predictions (`roofline`).

B rollouts.
"""

import argparse
import math
import os
import resource
import statistics
import sys
from pathlib import Path
from typing import Any

if any(word.startswith("--target") for word in sys.argv):
    os.environ["JAX_PLATFORMS"] = "cpu"  # before jax: its CUDA plugin would ask for a driver

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import machine, roofline
from benchmarks.timing import write
from jvdiff import plan, precision, streaming
from jvdiff.errors import JvdiffError, SetupError, UsageError
from jvdiff.models import wan
from jvdiff.models.wan.rollout import SELF_FORCING_WAN_2_1_T2V_1_3B
from jvdiff.sharding import collectives

PUBLISHED = {"FlashDreams, H100, 6th chunk, network": 344.0, "Self-Forcing, H100, 6th chunk, network": 432.0}
FPS_WANTED = 45.0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", help="a causal repository; without it, the 1.3B model with random weights")
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--device", choices=("gpu", "cpu"), help="refuse to run on another")
    parser.add_argument("--target", help="compile for this GPU and print memory, for instance h200")
    parser.add_argument("--table", action="store_true", help="with --target: what each class of kernels should take")
    parser.add_argument("--json", type=Path, help="write the report there")
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(words)
    if args.target:
        if (status := plan.run_with_compiler(args.target, [__file__, *words])) is not None:
            return status
        report: dict[str, Any] = {"target": args.target, "programs": compiled(args.target, args.table)}
    else:
        report = measured(args.checkpoint, args.chunks, args.device)
    report |= {"machine": machine.describe()}
    if args.json:
        write(args.json, report)
    return 0


def measured(checkpoint: str | None, chunks: int, device: str | None) -> dict[str, Any]:
    """Runs a rollout, each stage waited for, and prints a line a chunk."""
    if device and jax.default_backend() != device:
        raise SetupError(f"--device {device}: JAX runs on {jax.default_backend()} here.")
    if chunks < 20:
        raise UsageError(f"--chunks is {chunks}; expected at least 20, so that the window is full and stays so.")
    if checkpoint:
        config = streaming.derive_config(streaming.config_of(checkpoint), enable_sync_and_profile=True)
        pipe = streaming.load(checkpoint, config=config)
        cache = pipe.initialize_cache(0, prompts=["a red seven moving left"])
    else:
        pipe = random_pipeline(SELF_FORCING_WAN_2_1_T2V_1_3B)
        cache = pipe.initialize_cache(0, text=random_text(pipe.config))
    names = [name for name, _ in pipe.compile(cache)]
    print(f"{pipe.config.name} on {jax.devices()[0].device_kind}; compiled {', '.join(names)}")
    rows = []
    for i in range(chunks):
        frames, cache, final = pipe.generate(i, cache)
        cache, row = pipe.finalize(i, cache, final)
        row |= {"chunk": i + 1, "frames": frames.shape[1], "rss_gib": resident()}
        rows.append(row)
        times = " ".join(f"{k.removesuffix('_ms')} {v:8.1f}" for k, v in row.items() if k.endswith("_ms"))
        print(f"chunk {i + 1:3d}  {times}  GiB {row.get('mem_alloc_gib', row['rss_gib']):.2f}", flush=True)
    steady = rows[chunks // 2 :]
    median = {k: statistics.median(row[k] for row in steady) for k in rows[0] if "_ms" in k}
    frames = steady[0]["frames"]
    report = {
        "config": streaming.to_json(pipe.config),
        "compilations": {name: getattr(pipe.programs, name)._cache_size() for name in pipe.programs._fields},
        "rows": rows,
        "first_frame_ms": rows[0]["total_ms_wo_finalize"],
        "median_of_last_half": median,
        "fps": frames / median["total_ms"] * 1000,
        "fps_wo_finalize": frames / median["total_ms_wo_finalize"] * 1000,
    }
    if not checkpoint:
        report["published"] = {
            name: {"ms": ms, "ours_over_it": rows[5]["diffuse_ms"] / ms} for name, ms in PUBLISHED.items()
        }
    wanted = "" if checkpoint else f" (wanted on an H200: {FPS_WANTED})"
    print(
        f"first frames after {report['first_frame_ms']:.0f} ms; steady: {report['fps']:.1f} frames a second, "
        f"{report['fps_wo_finalize']:.1f} without finalize{wanted}"
    )
    for number in (6, 20):
        print(f"network's calls of chunk {number}: {rows[number - 1]['diffuse_ms']:.1f} ms")
    for name, entry in report.get("published", {}).items():
        print(f"{name}: {entry['ms']:.0f} ms; ours takes {entry['ours_over_it']:.2f} of that (6th chunk)")
    return report


def random_pipeline(config: streaming.StreamInferencePipelineConfig) -> streaming.StreamInferencePipeline:
    """The configuration with random weights of its own sizes, in the precision of this backend."""
    config = streaming.derive_config(streaming.decoding(config, precision.choose()), enable_sync_and_profile=True)
    leaves, tree = jax.tree.flatten(abstract_params(config, precision.choose()))

    def one(key: jax.Array, x: Any) -> jax.Array:
        return jax.jit(lambda key: 0.02 * jax.random.normal(key, x.shape, x.dtype))(key)

    keys = jax.random.split(jax.random.key(0), len(leaves))
    return config.setup(jax.tree.unflatten(tree, [one(key, x) for key, x in zip(keys, leaves, strict=True)]))


def abstract_params(config: streaming.StreamInferencePipelineConfig, dtypes: precision.Precision) -> dict[str, Any]:
    """The trees transformer and vae as ShapeDtypeStructs."""
    transformer: Any = config.diffusion_model.transformer
    decoder: Any = config.decoder
    return {
        "transformer": wan.abstract_params(transformer.network, jnp.dtype(dtypes.transformer)),
        "vae": wan.abstract_params(decoder.vae, jnp.dtype(dtypes.vae)),
    }


def random_text(config: streaming.StreamInferencePipelineConfig) -> jax.Array:
    """Text rows of one rollout: 60 of noise, the others zeros."""
    rows = np.zeros((1, *config.diffusion_model.transformer.text_shape), np.float32)
    rows[:, :60] = np.random.default_rng(0).standard_normal(rows[:, :60].shape)
    return jnp.asarray(rows)


def resident() -> float:
    """GiB of memory that this process has taken at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def compiled(target: str, table: bool = False) -> list[dict[str, Any]]:
    """Compiles the 1.3B model's programs for one such GPU and prints what each needs and should take.

    table: by classes of kernels too.
    """
    placement = plan.target_placement(target)
    here = placement.everywhere
    dtypes = precision.choose("bfloat16", target=plan.described(target))
    config = streaming.decoding(SELF_FORCING_WAN_2_1_T2V_1_3B, dtypes)
    there = lambda tree: jax.tree.map(  # noqa: E731
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here if x.ndim else None), tree
    )
    params = there(abstract_params(config, dtypes))
    pipe = config.setup(params, placement=placement)
    cache = there(pipe.abstract_cache(1))
    rows = []
    print(f"{'program':<14}{'GiB weights':>12}{'cache':>8}{'temporary':>11}{'TFLOP':>8}{'predicted ms':>14}")
    for name, program in pipe.traced(cache):
        done = plan.compile_for(placement, program)
        text, memory = done.as_text() or "", done.memory_analysis()
        assert memory is not None
        work = roofline.work(text, layers=1 + (name == "diffuse"))  # a loop over steps around that over layers
        seconds = roofline.seconds(work, collectives.read(text), roofline.RATES[target])
        part = params["transformer"]
        if name.startswith("decode"):
            part = {kind: params["vae"][kind] for kind in wan.DECODER}
        weights = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(part)) / 2**30
        row = {
            "program": name,
            "weights_gib": weights,
            "cache_gib": memory.argument_size_in_bytes / 2**30 - weights,
            "temporary_gib": memory.temp_size_in_bytes / 2**30,
        }
        if not name.startswith("decode"):  # convolutions are not counted
            row |= {"flops": work.flops, "traffic": work.traffic, "predicted_ms": seconds.longest * 1000}
        rows.append(row)
        told = f"{work.flops / 1e12:>8.1f}{row['predicted_ms']:>14.1f}" if "flops" in row else ""
        print(
            f"{name:<14}{weights:>12.2f}{row['cache_gib']:>8.2f}{row['temporary_gib']:>11.2f}{told}",
            flush=True,
        )
        if table:
            kinds = roofline.table(roofline.kernels(text), collectives.read(text), roofline.RATES[target])
            print(*roofline.printed(kinds), "", sep="\n", flush=True)
    return rows


if __name__ == "__main__":
    try:
        sys.exit(main())
    except JvdiffError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
