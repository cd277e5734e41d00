"""What every published model takes on H200s that are not there: parameters, operations, memory, predicted seconds.

    python benchmarks/plans.py                              # all of PLANS, as a table and in results/plans_h200.json
    python benchmarks/plans.py --only a14b --target b200    # those whose name contains this, for another GPU

Each row is what `jvdiff plan` says of a configuration, on one GPU and on eight: the same programs. Seconds are
predicted from them (`roofline`), without the time to load weights or to send them to the device and back; of stages
that run side by side with others nothing is taken off. No GPU is needed, but the CUDA compiler is (`python -m
jvdiff.commands.compiler --install`).
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax: its CUDA plugin would ask for a driver

import jax
import roofline
from timing import RESULTS

from jvdiff import config as configs
from jvdiff import plan
from jvdiff.errors import JvdiffError
from jvdiff.sharding import collectives, read_mesh

EIGHT = "sequence=8"
SMALLER = {"height": 480, "width": 832}
TILED = {"num_frames": 117, "height": 768, "width": 1280}  # 30x48x80 tokens, for which STA was published
FOUR = {"steps": 4, "guidance": 1.0, "guidance_2": None, "boundary_step": 2}  # distilled experts, two steps each


@dataclasses.dataclass(frozen=True)
class Row:
    """A clip to plan.

    name: in the table
    config: of `configs/`
    changes: of its fields
    meshes: one GPU is None
    """

    name: str
    config: str
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    meshes: tuple[str | None, ...] = (None, EIGHT)


PLANS = (
    Row("Wan 2.1 T2V 1.3B", "wan2_1_t2v_1_3b"),
    Row("Wan 2.1 T2V 14B", "wan2_1_t2v_14b"),
    Row("Wan 2.1 I2V 14B 480P", "wan2_1_i2v_14b_480p"),
    Row("Wan 2.1 I2V 14B 720P", "wan2_1_i2v_14b_720p"),
    Row("Wan 2.1 FLF2V 14B", "wan2_1_flf2v_14b"),
    Row("Wan 2.2 T2V A14B", "wan2_2_t2v_a14b"),
    Row("Wan 2.2 I2V A14B", "wan2_2_i2v_a14b"),
    Row("Wan 2.2 I2V A14B, 480p", "wan2_2_i2v_a14b", SMALLER),
    Row("Wan 2.2 I2V A14B, 4 steps", "wan2_2_i2v_a14b", FOUR),
    Row("Wan 2.2 I2V A14B, 480p, 4 steps", "wan2_2_i2v_a14b", SMALLER | FOUR),
    Row("Wan 2.2 TI2V 5B", "wan2_2_ti2v_5b"),
    Row("FastWan 2.1 1.3B", "fastwan2_1_t2v_1_3b"),
    Row("FastWan 2.1 14B", "fastwan2_1_t2v_14b"),
    Row("FastWan 2.2 5B", "fastwan2_2_ti2v_5b"),
    Row("HunyuanVideo", "hunyuan_video"),
    Row("HunyuanVideo, 544p", "hunyuan_video", {"height": 544, "width": 960}),
    Row("HunyuanVideo, 768p", "hunyuan_video", TILED, (None,)),
    Row("HunyuanVideo, 768p, 3x3x3 tiles", "hunyuan_video", TILED | {"pattern": "sliding_tile:6x8x8:3x3x3"}, (None,)),
    Row("FastHunyuan", "fast_hunyuan"),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="rows whose name contains this")
    parser.add_argument("--target", choices=plan.known_targets(), default="h200")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/plans_TARGET.json")
    words = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(words)
    if (status := plan.run_with_compiler(args.target, [__file__, *words])) is not None:
        return status
    plan.check_target(args.target)
    rows = []
    print(HEAD)
    for row in PLANS:
        if (args.only or "").lower() in row.name.lower():
            for found in planned(row, args.target):
                rows.append(found)
                print(line(found), flush=True)
    output = args.output or RESULTS / f"plans_{args.target}.json"
    old = json.loads(output.read_text())["rows"] if output.exists() else []
    kept = [each for each in old if (each["name"], each["gpus"]) not in {(new["name"], new["gpus"]) for new in rows}]
    order = [row.name for row in PLANS]
    every = sorted(kept + rows, key=lambda each: (order.index(each["name"]), each["gpus"]))
    report = {"target": args.target, "jax": jax.__version__, "rows": every}
    output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def planned(row: Row, target: str) -> Iterator[dict[str, Any]]:
    """What a clip takes, on each of the row's meshes."""
    config = configs.load(row.config)
    config.update({**row.changes, "precision": "bfloat16", "plan_target": target})
    context, clip = plan.resolved(config)
    rates = roofline.RATES[target]
    for mesh in row.meshes:
        shape: Any = read_mesh(mesh) if mesh else None
        held = plan.resident(context, shape)
        every = list(plan.programs(context, clip, target, shape))
        sizes = {part: size for part, (_, size) in held.items()}
        works = [plan.Work(each.name, each.part, each.needs) for each in every]
        stages = {}
        for each in every:
            found = collectives.read(each.text)
            seconds = roofline.seconds(_work(each), found, rates)
            stages[each.name] = {"part": each.part, "runs": each.times, "seconds": seconds.longest}
        chosen, _ = plan.choose(clip, works, sizes, plan.target_memory(target))
        yield {
            "name": row.name,
            "mesh": mesh,
            "gpus": shape.devices if shape else 1,
            "frames": clip.frames,
            "steps": clip.sampler.steps,
            "parameters": {part: count for part, (count, _) in held.items()},
            "flops": sum(each.flops * each.times for each in every) * (shape.devices if shape else 1),
            "weights_gib": {part: size / 2**30 for part, size in sizes.items()},
            "peak_gib": {str(way): way.peak / 2**30 for way in plan.ways(clip, works, sizes)},
            "chosen": str(chosen),
            "attention": sorted({kind for each in every for kind in each.attention}),
            "stages": stages,
            "seconds": sum(stage["runs"] * stage["seconds"] for stage in stages.values()),
        }


def _work(program: Any) -> roofline.Work:
    """What a program computes; the sparse kernels of it as many pairs as the plan counts, where it counts fewer."""
    whole = roofline.work(program.text)
    if not {"mosaic_gpu", "triton"} & {*program.attention}:
        return whole
    left_out = whole.products + whole.attention + whole.float32 - program.flops
    return roofline.work(program.text, share=min(1.0, max(0.0, 1 - left_out / whole.attention)))


HEAD = "\n".join(
    (
        "| model | transformer | clip | GPUs | PFLOP | all resident | in turn | a step | the clip |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    )
)


def line(found: dict[str, Any]) -> str:
    """A row of the table."""
    frames, height, width = found["frames"]
    peaks = [*found["peak_gib"].values()]
    steps = [stage["seconds"] for name, stage in found["stages"].items() if name.startswith("denoise")]
    step = " and ".join(dict.fromkeys(f"{seconds:.2f}" for seconds in steps))
    sizes = [count for part, count in found["parameters"].items() if part.startswith("transformer")]
    size = f"{len(sizes)} x " * (len(sizes) > 1) + f"{sizes[0] / 1e9:.1f} B"
    return (
        f"| {found['name']} | {size} | {width}x{height}, {frames} frames, {found['steps']} steps "
        f"| {found['gpus']} | {_short(found['flops'] / 1e15)} | {peaks[0]:.0f} GiB | {peaks[-1]:.0f} GiB | {step} s "
        f"| {_short(found['seconds'])} s |"
    )


def _short(number: float) -> str:
    """Two digits at least."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.1f}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except JvdiffError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
