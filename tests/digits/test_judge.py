"""The judge of moving digits: right on real clips it never saw, and silent where there is nothing to see."""

import numpy as np
import pytest

from jvdiff.digits import clips as digits
from jvdiff.digits import judge as digits_judge
from jvdiff.digits.clips import Combo
from jvdiff.media import video


@pytest.fixture(scope="module")
def judge():
    return digits_judge.train(steps=150, batch=64)  # an eighth of what benchmarks see: enough for these bounds


def test_real_held_out_clips_are_read(judge):
    clips, shown = digits_judge.real_clips(100)
    result = digits_judge.score(digits_judge.look(judge, clips), shown)
    assert result["colour"]["right"] == result["direction"]["right"] == result["clips"] == 100
    assert result["digit"]["right"] >= 95


def test_a_video_file_is_read_like_its_frames(judge, tmp_path):
    clips, _ = digits_judge.real_clips(10, seed=1)
    for i, clip in enumerate(clips):
        video.write_mp4(tmp_path / f"{i}.mp4", clip, 16)
    back = np.stack([video.read_video(tmp_path / f"{i}.mp4") for i in range(len(clips))])
    assert digits_judge.look(judge, back) == digits_judge.look(judge, clips)


def test_wrong_clips_are_told_apart(judge):
    glyph = digits.glyphs("test")[7, 0]
    clip = digits.render(glyph, "red", "left", 1.2, (20, 28))
    turned = {
        "as it is": (clip, Combo("red", 7, "left")),
        "backwards": (clip[::-1], Combo("red", 7, "right")),
        "other colour": (clip[..., ::-1], Combo("blue", 7, "left")),
        "dim": (clip // 2, Combo("red", 7, "left")),
        "still": (clip[:1].repeat(17, 0), ("red", 7, None)),
    }
    for name, (changed, expected) in turned.items():
        assert tuple(digits_judge.look(judge, changed[None])[0]) == tuple(expected), name
    assert digits_judge.look(judge, np.zeros_like(clip)[None])[0] == (None, None, None)


@pytest.mark.parametrize("frames", [9, 12])
def test_parts_of_streams_are_read_through_the_border(judge, frames):
    rng = np.random.default_rng(frames)
    made = [digits.stream(rng, frames, split="test", combos="all") for _ in range(50)]
    clips, shown = np.stack([video for video, _ in made]), [digits.parse_prompt(*prompts) for _, prompts in made]
    result = digits_judge.score(digits_judge.look(judge, clips, torus=True), shown)
    assert result["colour"]["right"] == result["direction"]["right"] == 50
    assert result["digit"]["right"] >= 45
    blind = digits_judge.score(digits_judge.look(judge, clips), shown)
    assert blind["direction"]["right"] < 45 and blind["digit"]["right"] < result["digit"]["right"]


@pytest.mark.parametrize("direction", digits.DIRECTIONS)
def test_where_a_stream_is_cut_by_the_border_changes_nothing(judge, direction):
    glyph = digits.glyphs("test")[4, 2]
    clip = digits.render(glyph, "cyan", direction, 1.25, (16, 16), frames=9)
    for by in [(0, 0), (29, 0), (0, 31), (32, 32), (-17, 11)]:
        rolled = np.roll(clip, by, axis=(1, 2))[None]
        assert digits_judge.look(judge, rolled, torus=True) == [("cyan", 4, direction)], by
    still, gone = clip[:1].repeat(9, 0), np.zeros_like(clip)
    assert digits_judge.look(judge, np.stack([still, gone]), torus=True) == [("cyan", 4, None), (None, None, None)]
    holes = np.roll(clip, 32, axis=(1, 2))
    holes[3:5] = 0
    assert digits_judge.look(judge, holes[None], torus=True)[0].direction == direction


def test_score_counts_each_property_and_all_together():
    seen = [digits_judge.Seen("red", 7, "left"), digits_judge.Seen("red", 1, None)]
    result = digits_judge.score(seen, [Combo("red", 7, "left"), Combo("red", 7, "left")])
    assert [result[k]["right"] for k in ("colour", "digit", "direction", "all")] == [2, 1, 1, 1]
    assert result["digit"]["percent"] == 50.0


def test_shapes_of_real_streams_are_accepted():
    made = [digits.stream(np.random.default_rng(i), 60, [20, 41], "test", "all")[0] for i in range(40)]
    first, *later = np.split(np.stack(made), 5, axis=1)
    seen = [shape for part in later for shape in digits_judge.shapes(part, first)]
    assert max(shape.occupied for shape in seen) <= 0.56 and min(shape.likeness for shape in seen) > 0.9
    assert not any(shape.closed or shape.too_long or shape.lost for shape in seen)


def drawn():
    """(part of a stream, whether it is closed, too long, lost) by name; the stream was a seven."""
    seven, nought = (
        digits.render_stream(digits.glyphs("test")[digit, 0], "red", ["left"] * 12, 1.25, (20.3, 28.7))
        for digit in (7, 0)
    )
    y, x = np.mgrid[:64, :64]
    paint = lambda where: np.where(where, np.uint8(255), np.uint8(0))[None, :, :, None].repeat(3, 3).repeat(12, 0)  # noqa: E731
    fading = (seven * np.linspace(1, 0, 12)[:, None, None, None]).astype(np.uint8)
    bar = abs(y - 30) < 3
    return seven, {
        "as it was": (seven, False, False, False),
        "anywhere": (np.roll(seven, (40, 23), axis=(1, 2)), False, False, False),
        "dim": (seven // 2, False, False, False),
        "a jump": (np.concatenate([seven[:6], np.roll(seven[6:], (20, 13), axis=(1, 2))]), False, False, False),
        "backwards": (seven[::-1], False, False, False),
        "a horizontal stripe": (paint(bar), True, True, True),
        "a vertical stripe": (paint(bar.T), True, True, True),
        "a diagonal stripe": (paint((x - y) % 64 < 6), True, True, True),
        "a thin stripe": (paint(y == 30), True, True, True),
        "a stripe with a small gap": (paint(bar & (x > 3)), True, True, True),
        "a seven that grew a stripe": (np.maximum(seven, paint(bar)), True, True, True),
        "a bar that is about to close": (np.maximum(seven, paint(bar & (x > 12))), False, True, True),
        "light all over": (paint(x >= 0), True, True, True),
        "two digits": (np.maximum(seven, np.roll(seven, (24, 24), axis=(1, 2))), False, True, True),
        "a blob": (paint((y - 30) ** 2 + (x - 30) ** 2 < 150), False, False, True),
        "a dot": (paint((y - 30) ** 2 + (x - 30) ** 2 < 9), False, False, True),
        "another digit": (nought, False, False, True),
        "a fade": (fading, False, False, True),
        "nothing but what is faint": (seven // 6, False, False, True),
        "nothing": (0 * seven, False, False, True),
    }  # fmt: skip


@pytest.mark.parametrize("name", drawn()[1])
def test_drawn_stripes_blobs_fades_and_jumps_are_told_apart(name):
    seven, cases = drawn()
    part, *expected = cases[name]
    shape = digits_judge.shapes(part[None], seven[None])[0]
    assert [shape.closed, shape.too_long, shape.lost] == expected, shape
