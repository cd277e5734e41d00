"""What sparse attention costs in quality, and what it saves, on the moving-digits model.

    python benchmarks/sparsity_quality.py --sparse-checkpoint checkpoints/digits_sparse

Every pattern makes the same clips, from the same prompts and noise: the held-out combinations of prompt_adherence.py,
judged as there. `latent error` is the relative L2 distance of the final latents to those of dense attention with the
weights of --checkpoint. `seconds` is the median time to denoise one batch, patterns in turn, after one that does not
count. The model has a grid of 5x4x4 tokens, so few that nothing is saved: its times show what small videos pay.
Needs matplotlib for the plot (pip install "jvdiff[dev]").

B batch · F pixel frames · T latent frames · H W latent grid · C latent channels · Y X pixel height, width
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from attention_cost import kept
from machine import describe
from prompt_adherence import prompts_for
from timing import RESULTS, in_turn, short, write

import jvdiff
from jvdiff import pipeline
from jvdiff.digits import clips as digits
from jvdiff.digits import judge as digits_judge
from jvdiff.errors import JvdiffError

PATTERNS = (
    "dense",
    "sliding_tile:1x2x2:5x1x1",
    "sliding_tile:1x2x2:1x2x2",
    "sliding_tile:1x2x2:3x1x1",
    "sliding_tile:1x2x2:3x2x2",
    "video_sparse:1x2x2:0.5",
    "video_sparse:1x2x2:0.75",
    "video_sparse:1x2x2:0.9",
)
TRAINED = ("dense", "video_sparse:1x2x2:0.5", "video_sparse:1x2x2:0.75", "video_sparse:1x2x2:0.9")


class Run:
    """A checkpoint with a pattern, and the latents and seconds of every batch so far."""

    def __init__(self, weights: str, pipe: pipeline.Pipeline, pattern: str, steps: int | None):
        self.weights, self.pipe, self.pattern = weights, pipe, pattern
        self.clip = pipe.clip(pattern=pattern, steps=steps, num_frames=17, height=digits.SIZE, width=digits.SIZE)
        self.latents: list[np.ndarray] = []
        self.seconds: list[float] = []

    def inputs(self, prompts: list[str], seed: int) -> tuple[Any, ...]:
        """Seeds, noise, and the conditions with and without the prompts."""
        pipe, clip = self.pipe, self.clip
        seeds = [seed + i for i in range(len(prompts))]
        noise = np.asarray(pipeline.initial_noise(seeds, clip.latents))
        tokens = pipe.family.inputs(pipe.models, clip, pipeline.make_request(pipe.family, clip, tuple(prompts)))
        return seeds, noise, pipeline.encode(pipe.context, clip, tokens, pipe.run)

    def denoise(self, inputs: tuple[Any, ...]) -> np.ndarray:
        """[B,T,H,W,C]"""
        seeds, noise, conditions = inputs
        pipe, solver = self.pipe, self.clip.sampler.make()
        state = pipeline.begin(self.clip, solver, jnp.array(noise), seeds)  # a copy: the sampler consumes its state
        return np.asarray(pipeline.denoise(pipe.context, self.clip, conditions, state, solver, pipe.run).x)

    def step(self, inputs: tuple[Any, ...]) -> None:
        """Denoises one batch and keeps the latents."""
        self.latents.append(self.denoise(inputs))

    @property
    def kept(self) -> float:
        """The share of query-key pairs that are computed."""
        patch = self.pipe.models.configs["transformer"].patch_size
        grid = tuple(n // p for n, p in zip(self.clip.latents[:3], patch, strict=True))
        return kept(grid, self.clip.segments[0].pattern)[0] / float(np.prod(grid)) ** 2


def sample(runs: Sequence[Run], wanted: list[digits.Combo], seed: int, batch: int) -> None:
    """Fills the runs with latents and seconds. At most 8 runs: no more programs are kept."""
    for start in range(0, len(wanted), batch):
        part = wanted[start : start + batch]
        prompts = [digits.prompt(*w) for w in part + part[:1] * (batch - len(part))]  # one compiled program for all
        inputs = [run.inputs(prompts, seed + start) for run in runs]
        if start == 0:
            for run, mine in zip(runs, inputs, strict=True):
                run.denoise(mine)
        taken = in_turn([partial(run.step, mine) for run, mine in zip(runs, inputs, strict=True)], 1)
        for run, (seconds,) in zip(runs, taken, strict=True):
            run.seconds.append(seconds)
        print(f"{min(start + batch, len(wanted))} of {len(wanted)} clips", file=sys.stderr, flush=True)


def judged(runs: Sequence[Run], wanted: list[digits.Combo]) -> list[dict[str, Any]]:
    """A row for each run; the first is what the others' latents are compared with."""
    judge, rows = digits_judge.train(), []
    first = np.concatenate(runs[0].latents)[: len(wanted)]
    for run in runs:
        latents = np.concatenate(run.latents)[: len(wanted)]
        videos = pipeline.decode(run.pipe.context, run.clip, latents, run.pipe.run)
        score = digits_judge.score(digits_judge.look(judge, videos), wanted)
        rows.append(
            {
                "weights": run.weights,
                "pattern": run.pattern,
                "kept": short(run.kept),
                "percent": {name: score[name]["percent"] for name in ("all", "digit", "colour", "direction")},
                "latent_error": short(float(np.linalg.norm(latents - first) / np.linalg.norm(first))),
                "seconds": short(statistics.median(run.seconds)),
                "all_seconds": [short(s) for s in run.seconds],
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| weights | pattern | kept | all right | digit | colour | direction | latent error | seconds |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        percent = " | ".join(f"{row['percent'][name]:.1f} %" for name in ("all", "digit", "colour", "direction"))
        lines.append(
            f"| {row['weights']} | `{row['pattern']}` | {row['kept']:.0%} | {percent} | {row['latent_error']:.2f} | "
            f"{row['seconds']:.3g} |"
        )
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Clips that are all right, and the latent error, over the kept share."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    series: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        series.setdefault(f"{row['pattern'].split(':')[0]}, {row['weights']} weights", []).append(row)
    for name, mine in series.items():
        mine = sorted(mine, key=lambda row: row["kept"])
        x, style = [row["kept"] for row in mine], "o" if len(mine) == 1 else "o-"
        panels[0].plot(x, [row["percent"]["all"] for row in mine], style, label=name)
        panels[1].plot(x, [row["latent_error"] for row in mine], style)
    panels[0].set(title="digit, colour and direction right, % of clips", ylim=(0, 101))
    panels[1].set(title="relative error of the latents", ylim=(0, None))
    for panel in panels:
        panel.set(xlabel="share of query-key pairs that are kept")
        panel.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    print(f"written to {path}")


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/digits", help="trained with dense attention")
    parser.add_argument("--sparse-checkpoint", help="the same, fine-tuned with video sparse attention")
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1000, help="of the first clip; clip i has seed + i")
    parser.add_argument("--steps", type=int, help="default: the checkpoint's")
    parser.add_argument("--patterns", nargs="+", default=PATTERNS, help="of --checkpoint, the first one dense")
    parser.add_argument("--output", type=Path, default=RESULTS / "sparsity_quality.json")
    parser.add_argument("--plot", type=Path, default=RESULTS.parents[1] / "docs" / "images" / "sparsity_quality.png")
    args = parser.parse_args(words)

    began = time.perf_counter()
    pipe = jvdiff.load(args.checkpoint)
    wanted = prompts_for(args.clips, "held_out")
    runs = [Run("dense", pipe, pattern, args.steps) for pattern in args.patterns]
    sample(runs, wanted, args.seed, args.batch)
    if args.sparse_checkpoint:
        tuned = jvdiff.load(args.sparse_checkpoint)
        runs += [Run("tuned", tuned, pattern, args.steps) for pattern in TRAINED]
        sample(runs[len(args.patterns) :], wanted, args.seed, args.batch)
    rows = judged(runs, wanted)
    print(table(rows))
    report = {
        "machine": describe(),
        "checkpoint": Path(args.checkpoint).name,
        "sparse_checkpoint": args.sparse_checkpoint and Path(args.sparse_checkpoint).name,
        "clips": args.clips,
        "batch": args.batch,
        "first_seed": args.seed,
        "steps": runs[0].clip.settings.steps,
        "guidance": runs[0].clip.settings.guidance,
        "minutes": short((time.perf_counter() - began) / 60),
        "rows": rows,
    }
    write(args.output, report)
    plot(rows, args.plot)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except JvdiffError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
