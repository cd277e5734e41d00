"""What attention costs as videos grow: dense, sliding tile and video sparse attention of one layer, forward; and of one
block of the latent video transformer, factorised attention against attention among all tokens.

    python benchmarks/attention_cost.py     # tables, benchmarks/results/attention_cost.json and a plot for the docs

Of the patterns two counts of the same thing. `kept`: the products of kept query-key pairs, 4 FLOPs for each and each
channel, from the lists of tiles; of VSA also its coarse branch and scores, between the means of tiles. `program`: all
matrix products of the program that is run (`jvdiff.plan.count_flops`), which also multiplies the padding of ragged
tiles; VSA's coarse products are in it. Factorised attention and attention among all tokens are what XLA counts in the
compiled programs, softmax and all. Needs no weights and no device, and matplotlib for the plot
(pip install "jvdiff[dev]").

F pixel frames · T latent frames · L tokens · N heads · K head dim · n tiles
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from timing import RESULTS, short, write

from jvdiff import kernels
from jvdiff.errors import JvdiffError
from jvdiff.kernels import Dense, SlidingTile, VideoSparse, tiles
from jvdiff.kernels.patterns import read as read_pattern
from jvdiff.kernels.sliding_tile import check_windows, window_lists
from jvdiff.models import latent_video
from jvdiff.plan import count_flops

FRAMES = (21, 41, 81, 161, 321)
PATTERNS = (
    "dense",
    "sliding_tile:6x8x8:3x3x3",
    "sliding_tile:6x8x8:5x5x5",
    "video_sparse:4x4x4:0.8",
    "video_sparse:4x4x4:0.9",
)


class Model(NamedTuple):
    """A video's tokens in height and width, and the attention of one layer."""

    name: str
    height: int
    width: int
    heads: int
    head_dim: int = 128


LATENTS = (1, 4, 32, 32, 4), (1, 16, 32, 32, 4)  # of 16 frames of 256x256 pixels, and of 64
MODELS = Model("Wan 1.3B 480p", 30, 52, 12), Model("Wan 14B 720p", 45, 80, 40)


def kept(grid: tiles.Grid, pattern: Any) -> tuple[float, float]:
    """(query-key pairs between tokens, between means of tiles) of one head.

    Which tiles VSA keeps depends on the operands; each query is taken to see the mean number of tokens.
    """
    L = float(np.prod(grid))
    if isinstance(pattern, Dense):
        return L * L, 0.0
    sizes = tiles.variable_block_sizes(grid, pattern.tile).astype(np.float64)
    if isinstance(pattern, VideoSparse):
        n = sizes.size
        return L * L * tiles.top_k_count(pattern.sparsity, n) / n, float(n) * n
    q2k, count = window_lists(tiles.counts(grid, pattern.tile), check_windows(pattern.window, 1))
    counted = np.arange(q2k.shape[-1]) < count[..., None]
    return float(((sizes[q2k] * counted).sum(-1) * sizes).sum()), 0.0


def program(grid: tiles.Grid, pattern: Any, heads: int, head_dim: int) -> float:
    """FLOPs of the traced program of all heads."""
    x = jax.ShapeDtypeStruct((1, int(np.prod(grid)), heads, head_dim), jnp.bfloat16)
    common: Any = {"grid": grid, "tile": getattr(pattern, "tile", None), "implementation": "xla"}
    if isinstance(pattern, Dense):
        traced = jax.make_jaxpr(lambda q, k, v: kernels.attention(q, k, v, implementation="xla"))(x, x, x)
    elif isinstance(pattern, SlidingTile):
        attend = lambda q, k, v: kernels.sliding_tile_attention(q, k, v, window=pattern.window, **common)  # noqa: E731
        traced = jax.make_jaxpr(attend)(x, x, x)
    else:
        attend = lambda *x: kernels.video_sparse_attention(*x, sparsity=pattern.sparsity, **common)  # noqa: E731
        traced = jax.make_jaxpr(attend)(x, x, x, x)
    return count_flops(traced.jaxpr)


def factorised(cfg: latent_video.DiTConfig, latents: tuple[int, ...]) -> dict[str, Any]:
    """FLOPs of one block of the model on latents (B,T,H,W,C), forward, and of one with attention among all tokens.

    The latter has one layer of attention less, and so its four linear maps less: its FLOPs are those of the former,
    less the linear maps and the factorised attention, and the attention among all tokens.
    """
    B, T, H, W, _ = latents
    L, D, N = H * W // cfg.patch_size**2, cfg.hidden_size, cfg.num_heads

    def attention(clips: int, length: int) -> float:
        x = jax.ShapeDtypeStruct((clips, length, N, D // N), jnp.bfloat16)
        attend = lambda q, k, v: kernels.attention(q, k, v, implementation="reference")  # noqa: E731 - it has no loops
        return compiled_flops(attend, x, x, x)

    def model(depth: int) -> float:
        deep = dataclasses.replace(cfg, depth=depth)
        params = latent_video.abstract_params(deep, jnp.bfloat16)
        run = lambda params, *x: latent_video.denoise(params, deep, *x, implementation="reference")  # noqa: E731
        shapes = (latents, jnp.float32), ((B,), jnp.float32), ((B,), jnp.int32)
        return count_flops(jax.make_jaxpr(run)(params, *(jax.ShapeDtypeStruct(*s) for s in shapes)).jaxpr)

    apart, full = attention(B * T, L) + attention(B * L, T), attention(B, T * L)
    block = model(2) - model(1)
    return {
        "latents": latents,
        "tokens": T * L,
        "full_flops": short(full),
        "factorised_flops": short(apart),
        "factorised_block_flops": short(block),
        "full_block_flops": short(block - apart + full - 4 * 2 * B * T * L * D**2),
    }


def compiled_flops(function: Any, *shapes: Any) -> float:
    """What XLA counts in a compiled program without loops."""
    analysis: Any = jax.jit(function).lower(*shapes).compile().cost_analysis()
    return analysis["flops"]


def factorised_table(rows: Sequence[dict[str, Any]]) -> str:
    """GFLOP as Markdown, and how many times those of all tokens are those of factorised attention."""
    lines = [
        "| one block | tokens | attention among all | factorised | times | block with all | factorised | times |",
        "| --- |" + " ---: |" * 7,
    ]
    for row in rows:
        cells = [f"{row['latents'][1]} latent frames | {row['tokens']}"]
        for part in ("", "block_"):
            full, apart = row[f"full_{part}flops"], row[f"factorised_{part}flops"]
            cells.append(f"{full / 1e9:.3g} | {apart / 1e9:.3g} | {full / apart:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rows(models: Sequence[Model] = MODELS, frames: Sequence[int] = FRAMES) -> Iterator[dict[str, Any]]:
    """One for each model, pattern and number of pixel frames."""
    for model in models:
        for text in PATTERNS:
            for F in frames:
                grid = 1 + (F - 1) // 4, model.height, model.width
                pattern: Any = read_pattern(text)
                fine, coarse = (4 * pairs * model.heads * model.head_dim for pairs in kept(grid, pattern))
                yield {
                    "model": model.name,
                    "pattern": text,
                    "frames": F,
                    "tokens": int(np.prod(grid)),
                    "kept_flops": short(fine),
                    "coarse_flops": short(coarse),
                    "program_flops": short(program(grid, pattern, model.heads, model.head_dim)),
                }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """TFLOP as Markdown: kept (for VSA + coarse) / program, and the program's share of dense."""
    frames = sorted({row["frames"] for row in rows})
    lines = [
        "| one layer | pattern | " + " | ".join(f"{F} frames" for F in frames) + " |",
        "| --- | --- |" + " ---: |" * len(frames),
    ]
    found = {(row["model"], row["pattern"], row["frames"]): row for row in rows}
    for model, pattern in dict.fromkeys((row["model"], row["pattern"]) for row in rows):
        cells = []
        for F in frames:
            row, dense = found[model, pattern, F], found[model, "dense", F]
            coarse = f" + {row['coarse_flops'] / 1e12:.2g}" if row["coarse_flops"] else ""
            share = "" if pattern == "dense" else f" ({row['program_flops'] / dense['program_flops']:.1%})"
            cells.append(f"{row['kept_flops'] / 1e12:.3g}{coarse} / {row['program_flops'] / 1e12:.3g}{share}")
        lines.append(f"| {model} | `{pattern}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel a model, the program's FLOPs over frames; VSA's coarse part by itself."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = plt.subplots(1, len(models), figsize=(10, 4.2), layout="constrained", squeeze=False)
    for model, panel in zip(models, panels[0], strict=True):
        for pattern in dict.fromkeys(row["pattern"] for row in rows):
            mine = [row for row in rows if (row["model"], row["pattern"]) == (model, pattern)]
            x = [row["frames"] for row in mine]
            panel.plot(x, [row["program_flops"] / 1e12 for row in mine], marker="o", markersize=3, label=pattern)
        panel.plot(x, [row["coarse_flops"] / 1e12 for row in mine], "k:", label="of video_sparse: coarse branch")
        panel.set(
            title=f"{model}, one layer", xlabel="pixel frames", xscale="log", yscale="log", ylabel="TFLOP forward"
        )
        panel.set_xticks(x, [str(F) for F in x])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    print(f"written to {path}")


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "attention_cost.json")
    parser.add_argument("--plot", type=Path, default=RESULTS.parents[1] / "docs" / "images" / "attention_cost.png")
    args = parser.parse_args(words)
    found = list(rows())
    print(table(found))
    apart = [factorised(latent_video.MEDIUM, latents) for latents in LATENTS]
    print(factorised_table(apart))
    write(args.output, {"jax": jax.__version__, "direction": "forward", "rows": found, "factorised": apart})
    plot(found, args.plot)
    return 0


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    try:
        sys.exit(main())
    except JvdiffError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
