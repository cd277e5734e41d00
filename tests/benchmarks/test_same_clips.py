"""The comparison of clips with an earlier commit's: one bit is a difference, and so is a clip that is missing."""

import importlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff.media import video as videos
from jvdiff.runtime import run_state

LATENTS = np.linspace(-1, 1, 2 * 4 * 4 * 3, dtype=np.float32).reshape(2, 4, 4, 3)  # [T,H,W,C]
VIDEO = np.arange(5 * 16 * 16 * 3, dtype=np.uint8).reshape(5, 16, 16, 3)  # [F,Y,X,3]


@pytest.fixture
def same_clips(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("same_clips")


def other(array, value):
    """A copy with another first number."""
    copy = array.copy()
    copy.reshape(-1)[0] = value
    return copy


def test_one_bit_is_a_difference(same_clips):
    clip = {"latents": LATENTS, "video": VIDEO}
    ulp, pixel = other(LATENTS, np.nextafter(LATENTS[0, 0, 0, 0], np.float32(0))), other(VIDEO, 200)
    differing = same_clips.compare(clip, {"latents": ulp, "video": VIDEO})
    assert differing == {"latents": "latents: 5.96e-08", "pixels": same_clips.EQUAL}
    assert same_clips.compare(clip, {"latents": LATENTS, "video": pixel})["pixels"] == "video: 200"
    assert same_clips.compare({"x": np.zeros(3)}, {"x": -np.zeros(3)}) == {"latents": "x: 0"}
    assert same_clips.compare({"x": other(np.zeros(3), np.nan)}, {"x": np.zeros(3)}) == {"latents": "x: nan"}
    assert same_clips.compare(clip, {name: array.copy() for name, array in clip.items()}) == {
        "latents": same_clips.EQUAL,
        "pixels": same_clips.EQUAL,
    }


def test_what_only_one_side_has_is_a_difference(same_clips):
    clip, no_clip = {"latents": LATENTS}, {}
    assert same_clips.compare(clip, no_clip) == {"latents": "latents: only before"}
    assert same_clips.compare(clip, clip | {"video": VIDEO}) == {"latents": "equal", "pixels": "video: only after"}
    halves = {"latents": LATENTS.astype(np.float16)}
    assert same_clips.compare(clip, halves) == {"latents": "latents: float32[2, 4, 4, 3], then float16[2, 4, 4, 3]"}
    assert same_clips.compare({"x": LATENTS}, {"x": LATENTS[:1]})["latents"].endswith("then float32[1, 4, 4, 3]")
    with pytest.raises(ValueError, match="no arrays on either side"):
        same_clips.compare(no_clip, no_clip)


def test_arrays_are_read_from_clips_states_and_videos(same_clips, tmp_path):
    np.savez(tmp_path / "class7_seed5.npz", latents=LATENTS, video=VIDEO)
    videos.write_mp4(tmp_path / "class7_seed5.mp4", VIDEO, 8)  # the .npz has its frames
    videos.write_mp4(tmp_path / "a-stream_seed7.mp4", VIDEO, 8)
    arrays = {"x": jnp.asarray(LATENTS, jnp.bfloat16), "count": np.int32(3), "sheet 0": VIDEO[0]}
    run_state.save(tmp_path / "a-stream_seed7.state", run_state.RunState({}, 2, arrays))
    found = same_clips.read(tmp_path)
    named = [f"seed7.state {name}" for name in arrays]
    assert set(found) == {"seed5.npz latents", "seed5.npz video", "seed7.mp4", *named}
    assert found["seed7.mp4"].shape == VIDEO.shape and found["seed7.mp4"].dtype == np.uint8
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[f"seed7.state {name}"], np.asarray(array))
    np.testing.assert_array_equal(found["seed5.npz latents"], LATENTS)


def test_the_number_of_a_class_may_change(same_clips, tmp_path):
    for number in (5, 7):
        (tmp_path / str(number)).mkdir()
        np.savez(tmp_path / str(number) / f"class{number}_seed5.npz", latents=LATENTS)
    assert same_clips.compare(*(same_clips.read(tmp_path / number) for number in "57")) == {"latents": "equal"}


def test_it_fails_where_a_case_differs_and_says_by_how_much(same_clips, tmp_path, monkeypatch, capsys):
    def make(name, side, earlier):
        if name == "stream":
            raise RuntimeError("exit status 3")
        changed = name == "euler" and side != earlier
        return {"seed3.npz latents": other(LATENTS, 1) if changed else LATENTS}

    monkeypatch.setattr(same_clips, "make", make)
    monkeypatch.setattr(same_clips.Side, "check", lambda side: None)
    words = ["--before", str(same_clips.ROOT), "--output", str(tmp_path), "--cases"]
    assert same_clips.main([*words, "unipc", "euler", "stream"]) == 1
    printed = capsys.readouterr().out
    assert "| unipc | equal |" in printed and "| euler | seed3.npz latents: 2 |" in printed
    assert "| stream | failed: exit status 3 |" in printed and "1 of 3 cases are equal" in printed
    assert same_clips.main([*words, "unipc"]) == 0


def test_a_command_that_fails_and_code_from_elsewhere_are_told(same_clips, tmp_path):
    here = same_clips.Side(same_clips.ROOT, tmp_path / "after")
    elsewhere = here._replace(code=tmp_path)
    with pytest.raises(RuntimeError, match=r"expected the jvdiff of that folder|No module named 'jvdiff'"):
        elsewhere.check()
    with pytest.raises(RuntimeError, match=r"exit status 3 in .*: error: no such thing"):
        here.python("-c", "import sys; print('error: no such thing', file=sys.stderr); sys.exit(3)")


def test_a_commit_that_is_not_here_is_told(same_clips):
    with pytest.raises(RuntimeError, match="0000000 is neither a folder nor a commit"), same_clips.checkout("0000000"):
        pass
