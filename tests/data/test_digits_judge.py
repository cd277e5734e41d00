"""The judge of moving digits: right on real clips it never saw, and silent where there is nothing to see."""

import numpy as np
import pytest

from jvdiff.data import digits, digits_judge, video
from jvdiff.data.digits import Combo


@pytest.fixture(scope="module")
def judge():
    return digits_judge.train(steps=250)  # less than the benchmark's 600: enough for these bounds


def test_real_held_out_clips_are_read(judge):
    clips, shown = digits_judge.real_clips(200)
    result = digits_judge.score(digits_judge.look(judge, clips), shown)
    assert result["colour"]["right"] == result["direction"]["right"] == result["clips"] == 200
    assert result["digit"]["right"] >= 190


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


def test_score_counts_each_property_and_all_together():
    seen = [digits_judge.Seen("red", 7, "left"), digits_judge.Seen("red", 1, None)]
    result = digits_judge.score(seen, [Combo("red", 7, "left"), Combo("red", 7, "left")])
    assert [result[k]["right"] for k in ("colour", "digit", "direction", "all")] == [2, 1, 1, 1]
    assert result["digit"]["percent"] == 50.0
