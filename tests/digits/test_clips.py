"""The moving digits: what a prompt says is what the clip shows, and what is held out stays held out."""

import itertools
from collections import Counter

import numpy as np
import pytest

from jvdiff.digits import clips as digits
from jvdiff.errors import SetupError, UsageError


def test_prompts_round_trip_for_every_combination():
    assert len(digits.COMBOS) == 320
    texts = {digits.prompt(*c) for c in digits.COMBOS}
    assert len(texts) == 320
    assert all(digits.parse_prompt(digits.prompt(*c)) == c for c in digits.COMBOS)
    assert digits.prompt("red", 7, "left") == "a red seven moving left"
    assert digits.prompt("orange", "zero", "up") == "an orange zero moving up"


@pytest.mark.parametrize("text", ["", "a red seven", "a pink seven moving left", "a red 7 moving left"])
def test_other_prompts_are_refused_with_the_vocabulary(text):
    with pytest.raises(UsageError, match="magenta") as error:
        digits.parse_prompt(text)
    assert str(error.value).count("\n") < 6


def test_held_out_combinations_are_fixed_and_balanced():
    assert len(digits.HELD_OUT) == 32
    assert digits.Combo("red", 0, "left") in digits.HELD_OUT
    for axis, (low, high) in enumerate([(4, 4), (3, 4), (8, 8)]):
        counts = Counter(c[axis] for c in digits.HELD_OUT).values()
        assert (min(counts), max(counts)) == (low, high)


def test_training_never_shows_a_held_out_combination():
    rng = np.random.default_rng(0)
    seen = [digits.parse_prompt(digits.sample(rng, frames=1)[1]) for _ in range(2000)]
    assert not digits.HELD_OUT & set(seen)
    assert len(set(seen)) > 280
    fresh = {digits.parse_prompt(digits.sample(rng, "test", "held_out", 1)[1]) for _ in range(400)}
    assert fresh == digits.HELD_OUT


def test_no_glyph_is_in_both_splits():
    train, test = digits.glyphs("train"), digits.glyphs("test")
    assert train.shape == (10, 400, 20, 20) and test.shape == (10, 100, 20, 20)
    assert not {g.tobytes() for g in train.reshape(-1, 20, 20)} & {g.tobytes() for g in test.reshape(-1, 20, 20)}


@pytest.mark.parametrize("direction", digits.DIRECTIONS)
def test_a_clip_moves_at_its_speed_in_its_direction(direction):
    dy, dx = digits.DIRECTIONS[direction]
    video = digits.render(digits.glyphs()[3, 0], "white", direction, 1.25, (16 - 10 * dy, 16 - 10 * dx))
    weight = video[..., 0].astype(np.float64)
    mass = weight.sum((1, 2))
    centre = np.stack([(weight.sum(2) @ np.arange(64)) / mass, (weight.sum(1) @ np.arange(64)) / mass], 1)
    np.testing.assert_allclose(np.diff(centre, axis=0), np.broadcast_to([1.25 * dy, 1.25 * dx], (16, 2)), atol=0.05)


def test_colour_scales_the_glyph():
    glyph = np.full((20, 20), 255, np.uint8)
    video = digits.render(glyph, "orange", "right", 1.0, (16, 8))
    assert video.shape == (17, 64, 64, 3) and video.dtype == np.uint8
    assert tuple(video[0, 32, 24]) == (255, 128, 0)
    assert not video[0, :, :7].any() and not video[-1, :, 57:].any()


def test_every_clip_stays_inside():
    videos, prompts = digits.batch(np.random.default_rng(1), 300, "train", "all")
    assert videos.shape == (300, 17, 64, 64, 3) and len(prompts) == 300
    border = np.ones((64, 64), bool)
    border[1:-1, 1:-1] = False
    assert not videos[:, :, border].any()
    assert videos.max(axis=(1, 2, 3, 4)).min() > 200


def test_the_generator_decides_everything():
    first, second = (digits.batch(np.random.default_rng(7), 4, "test", "held_out", 5) for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])
    assert first[1] == second[1]


def _paths(video):
    """Circular centroid [F,2] of a clip, in radians along each axis."""
    light = video.max(-1).astype(np.float64)
    turn = np.exp(2j * np.pi * np.arange(64) / 64)
    return np.angle(np.stack([light.sum(2) @ turn, light.sum(1) @ turn], 1))


def _steps(video):
    """Movement into each later frame [F-1,2] in pixels, across the border too."""
    return np.angle(np.exp(1j * np.diff(_paths(video), axis=0))) * 64 / (2 * np.pi)


def test_a_stream_inside_the_picture_is_the_clip_and_one_across_the_border_is_that_clip_rolled():
    glyph = digits.glyphs()[5, 3]
    clip = digits.render(glyph, "orange", "left", 1.2, (20, 28))
    np.testing.assert_array_equal(digits.render_stream(glyph, "orange", ["left"] * 17, 1.2, (20, 28)), clip)
    across = digits.render_stream(glyph, "orange", ["left"] * 17, 1.2, (20 - 128, 28 + 40))
    np.testing.assert_array_equal(across, np.roll(clip, 40, axis=2))


def test_a_stream_goes_on_at_one_speed_and_turns_at_the_frames_of_its_changes():
    changes = (9, 21, 33, 100)
    for seed in range(5):
        video, prompts = digits.stream(np.random.default_rng(seed), 120, changes)
        assert video.shape == (120, 64, 64, 3) and video.dtype == np.uint8 and len(prompts) == 5
        combos = [digits.parse_prompt(p) for p in prompts]
        assert {c[:2] for c in combos} == {combos[0][:2]}
        segment = np.searchsorted(changes, np.arange(1, 120), side="right")  # of the movement into each later frame
        signs = np.array([digits.DIRECTIONS[combos[s].direction] for s in segment])
        steps = _steps(video)
        speed = (steps * signs).sum(1)
        assert digits.SPEEDS[0] - 0.1 < speed.min() and speed.max() < digits.SPEEDS[1] + 0.1 and np.ptp(speed) < 0.2
        np.testing.assert_allclose(steps * (1 - abs(signs)), 0, atol=0.1)


def test_every_change_of_a_stream_is_another_direction_and_training_shows_no_held_out_one():
    rng = np.random.default_rng(0)
    trained = [[digits.parse_prompt(p) for p in digits.stream(rng, 9, range(1, 9))[1]] for _ in range(300)]
    assert not digits.HELD_OUT & {c for combos in trained for c in combos}
    every = [[digits.parse_prompt(p) for p in digits.stream(rng, 9, range(1, 9), "test", "all")[1]] for _ in range(300)]
    assert {c for combos in every for c in combos} > digits.HELD_OUT
    turns = Counter((a.direction, b.direction) for combos in every for a, b in itertools.pairwise(combos))
    assert len(turns) == 12 and min(turns.values()) > 130 and max(turns.values()) < 270


def test_the_generator_decides_every_stream_and_none_is_like_another():
    first, second = (digits.stream(np.random.default_rng(7), 20, (9,)) for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])
    assert first[1] == second[1]
    rng = np.random.default_rng(0)
    firsts = [digits.stream(rng, 1)[0][0] for _ in range(100)]
    border = np.ones((64, 64), bool)
    border[1:-1, 1:-1] = False
    assert 50 < sum(bool(f[border].any()) for f in firsts) < 100  # it begins anywhere, on the border too


@pytest.mark.parametrize("changes", [(0,), (9, 9), (12, 9), (20,)])
def test_changes_that_are_no_rising_frames_are_refused(changes):
    with pytest.raises(UsageError, match=r"changes are .* below 20"):
        digits.stream(np.random.default_rng(0), 20, changes)


def test_a_held_out_stream_keeps_its_direction():
    assert digits.parse_prompt(*digits.stream(np.random.default_rng(0), 2, combos="held_out")[1]) in digits.HELD_OUT
    with pytest.raises(UsageError, match="no other direction"):
        digits.stream(np.random.default_rng(0), 20, (9,), combos="held_out")


def test_impossible_requests_are_refused():
    with pytest.raises(UsageError, match="leaves the picture"):
        digits.render(digits.glyphs()[0, 0], "red", "left", 1.6, (16, 16))
    with pytest.raises(UsageError, match="too many"):
        digits.sample(np.random.default_rng(0), frames=81)
    with pytest.raises(UsageError, match="combos"):
        digits.sample(np.random.default_rng(0), combos="none")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="split"):
        digits.sample(np.random.default_rng(0), split="val")  # type: ignore[arg-type]


def test_missing_package_says_what_to_install(monkeypatch):
    digits._mnist.cache_clear()
    monkeypatch.setattr(digits.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match=r'pip install "jvdiff\[train\]"'):
        digits._mnist()
