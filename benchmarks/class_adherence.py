"""Does a clip show its class, and do the clips of a class differ? The part --classes of prompt_adherence.py.

    python benchmarks/prompt_adherence.py --classes runs/latent_video_digits/repository

Guidance trades the one for the other, so both are measured at several weights, on the same noise each time. How much
the clips of a class differ is said by two numbers:

  kinds   of colour and direction, as if all were equally frequent: the inverse of the share of pairs of a class's
          clips that agree in both (Hill's number of order 2). Real clips have 29, three in 32 being kept from the
          training; from 200 clips that is known to within 4 (a standard deviation), from 400 to within 2. Clips
          without visible colour or direction are left out.
  spread  the mean squared difference of two clips' pixels over that of two real clips, of one class each. It counts
          what has no name as well: places, speeds and handwriting, but also noise.

Beside them stand real clips of glyphs that training never shows, as they are and after the VAE's round trip: the most
that can be reached.

B batch · F pixel frames · Y X pixel height, width · N clips.
"""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

import jvdiff
from jvdiff import pipeline
from jvdiff.digits import clips as digits
from jvdiff.digits import judge as digits_judge
from jvdiff.digits.judge import Seen
from jvdiff.errors import UsageError
from jvdiff.models.latent_video.family import encode_program
from jvdiff.pipeline import Pipeline
from jvdiff.types import Params

SHOWN = 3  # clips of each class and weight in the picture


def measure(
    judge: Params, pipe: Pipeline, weights: Sequence[float], count: int, batch: int, seed: int, steps: int | None = None
) -> tuple[dict[str, Any], np.ndarray]:
    """The report on `count` clips of each weight, and a picture uint8 [Y,X,3] of some: columns are classes.

    Its rows are SHOWN real clips, the same number after the VAE's round trip, and the same number for each weight.
    """
    settings, classes = pipe.settings(steps=steps), pipe.models.index.get("classes", [])
    _check(pipe, settings, classes, count, batch)
    labels = [name for name in classes for _ in range(count // len(classes))]
    wanted = [digits.DIGITS.index(name) for name in labels]
    real = real_clips(wanted, settings.num_frames, seed)
    videos = {"real": real, "real, through the VAE": round_trip(pipe, real)}
    began = time.perf_counter()
    for weight in weights:
        parts = []
        for i in range(0, count, batch):
            part = labels[i : i + batch]
            parts.append(jvdiff.generate(pipe, labels=part, seed=seed + i, guidance=weight, steps=steps).video)
            print(f"guidance {weight:g}: generated {i + batch} of {count} clips", file=sys.stderr)
        videos[f"guidance {weight:g}"] = np.concatenate(parts)
    report = {
        "clips_of_each": count,
        "classes": len(classes),
        "seed": seed,
        "steps": settings.steps,
        "solver": settings.solver,
        "seconds": round(time.perf_counter() - began, 1),
        "measured": {name: score(digits_judge.look(judge, v), v, wanted, real) for name, v in videos.items()},
    }
    return report, _picture(list(videos.values()), len(classes))


def _check(pipe: Pipeline, settings: Any, classes: Sequence[str], count: int, batch: int) -> None:
    """Raises UsageError unless the classes are digits and the clips divide among them and into batches."""
    if (settings.height, settings.width) != (digits.SIZE,) * 2 or not classes or not set(classes) <= set(digits.DIGITS):
        raise UsageError(
            f"{pipe.repository.path} makes clips of {settings.height}x{settings.width} of the classes "
            f"{', '.join(classes):.200}; expected {digits.SIZE}x{digits.SIZE} and digits in words."
        )
    if count % batch or count % len(classes) or count < 2 * len(classes):
        raise UsageError(
            f"{count} clips; expected a multiple of the {len(classes)} classes, at least two of each, and of the "
            f"{batch} clips that are generated at a time."
        )


def real_clips(wanted: Sequence[int], frames: int, seed: int) -> np.ndarray:
    """Held-out glyphs of these digits in combinations that training shows, uint8 [N,F,64,64,3]."""
    rng, videos = np.random.default_rng(seed), []
    for digit in wanted:
        combos = [combo for combo in digits.combinations("train") if combo.digit == digit]
        videos.append(digits.sample(rng, "test", combos[rng.integers(len(combos))], frames)[0])
    return np.stack(videos)


def round_trip(pipe: Pipeline, videos: np.ndarray) -> np.ndarray:
    """uint8 [N,F,Y,X,3] encoded to the mean of its latents and decoded, a clip at a time."""
    program, clip = encode_program(pipe.models.configs["vae"]), pipe.clip(num_frames=videos.shape[1])
    latents = [np.asarray(program(pipe.weights["vae"], video[None])) for video in videos]
    return pipeline.decode(pipe.context, clip, np.concatenate(latents), pipe.run)


def score(seen: Sequence[Seen], videos: np.ndarray, wanted: Sequence[int], real: np.ndarray) -> dict[str, Any]:
    """Digit accuracy, kinds and spread of clips uint8 [N,F,Y,X,3] of the digits `wanted`, beside real ones of them.

    The clips of a class are neighbours, equally many of each. kinds is None where no two clips of a class agree.
    """
    right = sum(s.digit == w for s, w in zip(seen, wanted, strict=True))
    kinds = _kinds(seen, wanted)
    return {
        "digit": {"right": right, "percent": round(100 * right / len(seen), 1)},
        "kinds": kinds and round(kinds, 1),
        "spread": round(_differences(videos, len(set(wanted))) / _differences(real, len(set(wanted))), 3),
    }


def _kinds(seen: Sequence[Seen], wanted: Sequence[int]) -> float | None:
    pairs = agreeing = 0
    for _, group in groupby(zip(wanted, seen, strict=True), lambda pair: pair[0]):
        counts = Counter((s.colour, s.direction) for _, s in group if s.colour and s.direction)
        pairs += counts.total() * (counts.total() - 1)
        agreeing += sum(n * (n - 1) for n in counts.values())
    return pairs / agreeing if agreeing else None


def _differences(videos: np.ndarray, classes: int) -> float:
    """The mean squared difference of two clips of a class: twice the variance."""
    of_classes = np.split(videos, classes)
    return float(np.mean([2 * part.astype(np.float32).var(axis=0, ddof=1).mean() for part in of_classes]))


def show(report: dict[str, Any]) -> None:
    """Prints the measured numbers as a table."""
    print(f"{'':24}{'digit':>20}{'kinds':>10}{'spread':>10}")
    for name, row in report["measured"].items():
        digit = f"{row['digit']['right']}/{report['clips_of_each']} = {row['digit']['percent']} %"
        print(f"  {name:22}{digit:>20}{row['kinds'] or '-':>10}{row['spread']:>10}")


def _picture(sets: Sequence[np.ndarray], classes: int) -> np.ndarray:
    rows = []
    for videos in sets:
        middle = videos[:, videos.shape[1] // 2].reshape(classes, -1, *videos.shape[2:])  # [classes,each,Y,X,3]
        rows += [np.concatenate(list(middle[:, i]), axis=1) for i in range(min(SHOWN, middle.shape[1]))]
    return np.concatenate(rows)
