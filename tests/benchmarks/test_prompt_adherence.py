"""The benchmark's bookkeeping: which prompts are asked, and how clips with their prompts are read back."""

import importlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from jvdiff.digits import clips as digits
from jvdiff.errors import UsageError
from jvdiff.media import video


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("prompt_adherence")


def test_prompts_are_the_held_out_combinations_evenly(benchmark):
    wanted = benchmark.prompts_for(200, "held_out")
    counts = Counter(wanted)
    assert set(counts) == digits.HELD_OUT and set(counts.values()) == {6, 7}
    assert wanted == benchmark.prompts_for(200, "held_out")


def test_clips_are_read_with_their_prompts(benchmark, tmp_path):
    clips, prompts = digits.batch(np.random.default_rng(0), 3)
    np.savez(tmp_path / "clips.npz", video=clips, prompts=prompts)
    for i, clip in enumerate(clips):
        video.write_mp4(tmp_path / "out" / f"{i}.mp4", clip, 16, {"prompt": prompts[i]})
    for source in (tmp_path / "clips.npz", tmp_path / "out"):
        found, wanted = benchmark.read_clips(source)
        assert found.shape == clips.shape
        assert [digits.prompt(*w) for w in wanted] == prompts
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no \.mp4"):
        benchmark.read_clips(tmp_path / "empty")


def test_a_perfect_vae_has_no_error_and_the_last_batch_is_cut(benchmark):
    clips, _ = digits.batch(np.random.default_rng(0), 7, frames=1)
    back = np.concatenate(list(benchmark._through(lambda params, x: x, {}, clips, size=3)))
    np.testing.assert_array_equal(back, clips)
