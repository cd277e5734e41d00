"""Draws the curves of training runs from their metrics.jsonl:

    python benchmarks/plot_training.py runs/digits_vae runs/digits_dit --output docs/images/training_digits.png

One row a run, one panel a metric, each value and a running mean over a twentieth of the run. Needs matplotlib
(pip install "jvdiff[dev]").
"""

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("agg")
import matplotlib.pyplot as plt

SKIP = ("step", "seconds_per_step", "grad_norm", "spread", "kl", "skipped")


def curves(folder: Path) -> dict[str, np.ndarray]:
    """{metric: values, one for each line of the run's metrics}, `step` first."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {name: np.array([line[name] for line in lines]) for name in lines[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    rows = {run: curves(run) for run in args.runs}
    figure, panels = plt.subplots(len(rows), 2, figsize=(10, 3 * len(rows)), squeeze=False, layout="constrained")
    for (run, values), row in zip(rows.items(), panels, strict=True):
        width = max(1, len(values["step"]) // 20)
        shown = [name for name in values if name not in SKIP][: len(row)]
        for name, panel in zip(shown, row, strict=False):
            panel.plot(values["step"], values[name], color="tab:blue", alpha=0.25)
            mean = np.convolve(values[name], np.ones(width) / width, "valid")
            panel.plot(values["step"][width - 1 :], mean, color="tab:blue")
            panel.set(title=f"{run.name}: {name}", xlabel="step", yscale="log" if "loss" in name else "linear")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=90)
    print(args.output)


if __name__ == "__main__":
    main()
