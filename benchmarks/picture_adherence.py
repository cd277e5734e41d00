"""Does a clip begin with the picture that it was given, move as its prompt says, and keep the digit of the picture?

Of clips with held-out glyphs and combinations the first frame is the picture. Before generated clips the judge is shown
real ones and four kinds of wrong ones, made of real clips, each of which it must refuse.

B batch · F pixel frames · Y X pixel height, width.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

import jvdiff
from jvdiff.digits import clips as digits
from jvdiff.digits import judge as digits_judge
from jvdiff.digits.clips import Combo
from jvdiff.media.video import contact_sheet
from jvdiff.types import Params

FRAMES = 17


def measure(
    judge: Params, pipe: Any, count: int, batch: int, seed: int
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """(what is found in `count` generated clips, pictures uint8 [B,Y,X,3], the clips uint8 [B,F,Y,X,3])

    Clip i has seed + i.
    """
    real, prompts = digits.batch(np.random.default_rng(seed), count, "test", "held_out")
    wanted, pictures = [digits.parse_prompt(prompt) for prompt in prompts], real[:, 0]
    found = {
        "real": score(judge, real, wanted, pictures),
        "wrong": {
            kind: score(judge, videos, wanted, pictures)["all"]["percent"] for kind, videos in _wrong(real).items()
        },
    }
    videos = []
    for start in range(0, count, batch):
        rows = np.arange(start, start + batch) % count  # the last batch is filled up: one program serves them all
        chosen = {"image": [*pictures[rows]], "seed": seed + start, "num_frames": FRAMES}
        out = jvdiff.generate(pipe, [prompts[row] for row in rows], height=digits.SIZE, width=digits.SIZE, **chosen)
        videos.append(out.video[: count - start])
        print(f"generated {min(start + batch, count)} of {count}", file=sys.stderr)
    made = np.concatenate(videos)
    found |= {"clips": count, "first_seed": seed, "guidance": pipe.settings().guidance}
    return found | {"generated": score(judge, made, wanted, pictures)}, pictures, made


def sheet(pictures: np.ndarray, videos: np.ndarray) -> np.ndarray:
    """uint8 [Y,X,3]: a row for each picture [B,Y,X,3], and behind it eight frames of the clip that continues it."""
    shown = np.linspace(0, FRAMES - 1, 8).round().astype(int)
    every = np.concatenate([pictures[:, None], videos[:, shown]], axis=1)  # [B,9,Y,X,3]
    return np.concatenate([contact_sheet(row, 9, 9) for row in every])


def _wrong(real: np.ndarray) -> dict[str, np.ndarray]:
    """Clips [B,F,Y,X,3] that are not what the pictures and prompts of the real ones ask for."""
    half, other = FRAMES // 2, np.roll(real, 1, axis=0)
    return {
        "another clip": other,
        "backwards": real[:, ::-1],
        "standing still": real[:, :1].repeat(FRAMES, axis=1),
        "another digit from the middle on": np.concatenate([real[:, :half], other[:, half:]], axis=1),
    }


def score(judge: Params, videos: np.ndarray, wanted: Sequence[Combo], pictures: np.ndarray) -> dict[str, Any]:
    """How many clips [B,F,Y,X,3] move as wanted, show the wanted digit in every frame, and both; and how far the first
    frame is from the picture [B,Y,X,3], in dB."""
    each = digits_judge.look(judge, videos.reshape(-1, 1, *videos.shape[2:]))  # every frame a clip of its own
    read = np.array([-1 if seen.digit is None else seen.digit for seen in each]).reshape(videos.shape[:2])  # [B,F]
    kept = (read == np.array([combo.digit for combo in wanted])[:, None]).all(axis=1)
    seen = digits_judge.look(judge, videos)
    moved = np.array([s.direction == w.direction for s, w in zip(seen, wanted, strict=True)])
    coloured = np.array([s.colour == w.colour for s, w in zip(seen, wanted, strict=True)])
    rights = {"direction": moved, "colour": coloured, "digit_in_every_frame": kept, "all": moved & coloured & kept}
    counts = {name: {"right": int(x.sum()), "percent": round(100 * float(x.mean()), 1)} for name, x in rights.items()}
    decibels = psnr(videos[:, 0], pictures)
    first = {name: round(float(found), 2) for name, found in (("mean", decibels.mean()), ("lowest", decibels.min()))}
    return counts | {"first_frame_db": first}


def psnr(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """float64 [B] dB between pictures uint8 [B,Y,X,3]; 100 where they are the same."""
    errors = np.square(one.astype(np.float64) - other).mean((1, 2, 3))
    return 10 * np.log10(255.0**2 / np.maximum(errors, 255.0**2 * 1e-10))


def show(found: dict[str, Any]) -> None:
    """Prints what `measure` found."""
    for name in ("real", "generated"):
        one = found[name]
        parts = [f"{kind} {one[kind]['percent']} %" for kind in ("direction", "colour", "digit_in_every_frame", "all")]
        print(f"{name} clips: {', '.join(parts)}, first frame {one['first_frame_db']['mean']} dB")
    print("wrong clips that pass: " + ", ".join(f"{kind} {share} %" for kind, share in found["wrong"].items()))
