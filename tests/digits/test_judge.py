"""The judge of moving digits: right on real clips it never saw, and silent where there is nothing to see."""

import numpy as np
import pytest

from jvdiff.digits import clips as digits
from jvdiff.digits import judge as digits_judge
from jvdiff.digits.clips import Combo
from jvdiff.media import video


@pytest.fixture(scope="module")
def judge():
    return digits_judge.train(steps=150)  # less than the benchmark's 600: enough for these bounds


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
