"""The benchmark of clips that continue pictures: what counts as right, and that wrong clips are refused."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from jvdiff.digits.clips import Combo
from jvdiff.digits.judge import Seen

DIRECTIONS = ("left", "right", "up", None)


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    module = importlib.import_module("picture_adherence")
    monkeypatch.setattr(module.digits_judge, "look", look)
    return module


def look(judge, videos):
    """A judge of pixels: a digit is a level of red, a direction how much green grows."""
    red, green = (videos[:, :, 0, 0, channel].astype(int) for channel in (0, 1))
    return [
        Seen("red", int(digit), DIRECTIONS[int(move) % 4])
        for digit, move in zip(red[:, 0], green[:, -1] - green[:, 0], strict=True)
    ]


def clips(*digits):
    """A clip [1,F,1,1,3] with this digit in each frame, which moves to the right."""
    video = np.zeros((1, len(digits), 1, 1, 3), np.uint8)
    video[0, :, 0, 0, 0] = digits
    video[0, -1, 0, 0, 1] = 1
    return video


def test_a_digit_must_stay_in_every_frame_and_move_as_the_prompt_says(benchmark):
    wanted = [Combo("red", 7, "right")]
    score = lambda video, wanted=wanted: benchmark.score(None, video, wanted, video[:, 0])  # noqa: E731
    right = score(clips(7, 7, 7, 7))
    assert [right[name]["right"] for name in ("direction", "colour", "digit_in_every_frame", "all")] == [1, 1, 1, 1]
    assert right["first_frame_db"]["mean"] == 100
    assert score(clips(7, 7, 3, 7))["digit_in_every_frame"]["right"] == 0
    other = score(clips(7, 7, 7, 7), [Combo("red", 7, "up")])
    assert other["direction"]["right"] == other["all"]["right"] == 0 and other["digit_in_every_frame"]["right"] == 1


def test_wrong_clips_are_made_of_real_ones_and_refused(benchmark):
    real = np.concatenate([clips(*[digit] * benchmark.FRAMES) for digit in (1, 2, 3)])
    wanted = [Combo("red", digit, "right") for digit in (1, 2, 3)]
    wrong = benchmark._wrong(real)
    assert all(video.shape == real.shape for video in wrong.values())
    for kind, video in wrong.items():
        assert benchmark.score(None, video, wanted, real[:, 0])["all"]["right"] == 0, kind


def test_decibels_of_the_first_frame(benchmark):
    one = np.zeros((2, 4, 4, 3), np.uint8)
    np.testing.assert_allclose(
        benchmark.psnr(one, one + np.array([1, 255], np.uint8)[:, None, None, None]), [48.13, 0], atol=0.01
    )
