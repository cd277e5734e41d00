"""The quality report compares each pattern's clips with dense ones, from the same prompts and noise."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jvdiff.digits import clips as digits
from jvdiff.models.wan import family


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("sparsity_quality")


def fake(weights, pattern, factor, log):
    """A run whose latents are `factor` times the batch's seed."""

    def step(inputs):
        log.append(pattern)
        run.latents.append(np.full((2, 1, 1, 1, 1), factor * inputs[0], np.float32))

    run = SimpleNamespace(
        weights=weights,
        pattern=pattern,
        kept=0.5,
        pipe=SimpleNamespace(context=None, run=None),
        clip=None,
        latents=[],
        seconds=[],
        inputs=lambda prompts, seed: (float(seed),),
        denoise=lambda inputs: log.append("warm up"),
        step=step,
    )
    return run


def test_patterns_take_turns_and_are_compared_with_the_first(quality, monkeypatch, tmp_path):
    wanted = sorted(digits.HELD_OUT)[:3]
    log = []
    runs = [fake("dense", "dense", 1.0, log), fake("tuned", "video_sparse:1x2x2:0.75", 1.5, log)]
    quality.sample(runs, wanted, seed=7, batch=2)
    assert log == ["warm up"] * 2 + ["dense", "video_sparse:1x2x2:0.75"] * 2
    monkeypatch.setattr(quality.digits_judge, "train", lambda: None)
    monkeypatch.setattr(quality.digits_judge, "look", lambda judge, video: list(wanted))
    monkeypatch.setattr(quality.pipeline, "decode", lambda context, clip, latents, run: latents)
    rows = quality.judged(runs, wanted)
    assert [row["latent_error"] for row in rows] == [0.0, 0.5] and all(len(r["all_seconds"]) == 2 for r in rows)
    assert all(row["percent"]["all"] == 100 for row in rows)
    assert "| tuned | `video_sparse:1x2x2:0.75` | 50%" in quality.table(rows)
    quality.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_as_many_patterns_as_programs_are_kept(quality):
    assert len(quality.PATTERNS) <= family._velocity.cache_info().maxsize
