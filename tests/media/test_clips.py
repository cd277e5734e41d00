"""Clips of a folder: the batch of a step is always the same; hostile and useless files are replaced, up to a limit."""

import itertools
import logging
import os
import sys
import threading
import time

import numpy as np
import pytest

from jvdiff.digits import clips as digits
from jvdiff.digits.__main__ import main
from jvdiff.errors import CheckpointError, CorruptFile, DataError, SetupError, UsageError
from jvdiff.media import clips, video
from jvdiff.media.fragmented_mp4 import FragmentedMP4

av = pytest.importorskip("av")
pytest.importorskip("grain")


def write(path, frames, codec="libx264", pixels="yuv420p", stamps=None, **options):
    """A file of frames [F,Y,X,3] at 24 frames a second, or with time stamps in 24ths of a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=24)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.options = pixels, options
        for stamp, picture in zip(stamps or itertools.count(), frames, strict=False):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = stamp, 1 / stream.codec_context.framerate
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def counted(frames, height=32, width=32):
    """Frame f is grey, of the level 4 f: [F,Y,X,3]."""
    return np.broadcast_to(4 * np.arange(frames, dtype=np.uint8)[:, None, None, None], (frames, height, width, 3))


def numbers(clip):
    """Which frames of counted() these are: [..., F]."""
    return np.rint(clip.mean((-1, -2, -3)) / 4).astype(int).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight clips of 12 frames in two classes; clip i is as light as 30 i, frame after frame lighter by 2 levels."""
    root = tmp_path_factory.mktemp("clips")
    for i in range(8):
        frames = np.full((12, 32, 48, 3), 30 * i, np.uint8) + np.arange(0, 24, 2, np.uint8)[:, None, None, None]
        video.write_mp4(root / ("one", "two")[i // 4] / f"{i}.mp4", frames, 24)
    return root


def first(n, iterator):
    found = list(itertools.islice(iterator, n))
    iterator.close()
    return found


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x.video, y.video)
        np.testing.assert_array_equal(x.labels, y.labels)


SETTINGS = {"batch": 3, "frames": 4, "size": 16, "stride": 2}


# --- finding -----------------------------------------------------------------------------------------------------


def test_a_folder_of_classes_is_found_in_order(tmp_path):
    for name in ("b/2.mp4", "b/1.webm", "a/x.MP4", "10/y.mov", "9/z.mkv", "a/notes.txt", "a/._x.mp4", ".cache/c.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "README.md").touch()
    found = clips.find(tmp_path)
    assert found.classes == ("9", "10", "a", "b")
    assert {str(p.relative_to(tmp_path)): found.classes[n] for p, n in zip(found.paths, found.labels, strict=True)} == {
        "9/z.mkv": "9",
        "10/y.mov": "10",
        "a/x.MP4": "a",
        "b/1.webm": "b",
        "b/2.mp4": "b",
    }
    assert found.labels.dtype == np.int32


def test_a_csv_names_its_clips_relative_to_itself(tmp_path):
    text = 'label,path,more\ncat,films/a.mp4,1\n"dog, small",/films/b.mp4,\ncat,c.mp4,2\n'
    (tmp_path / "clips.csv").write_text(text, encoding="utf-8-sig")  # as spreadsheets write it
    found = clips.find(tmp_path / "clips.csv")
    assert found.classes == ("cat", "dog, small") and found.labels.tolist() == [0, 1, 0]
    assert [str(p) for p in found.paths] == [f"{tmp_path}/films/a.mp4", "/films/b.mp4", f"{tmp_path}/c.mp4"]


@pytest.mark.parametrize(
    ("files", "source", "error", "says"),
    [
        ({}, "nothing", UsageError, "nothing: no such folder or file"),
        ({}, ".", DataError, "there is no clip in it; expected class_name/clip.mp4"),
        ({"a.mp4": b""}, ".", DataError, "there is no clip in it"),
        ({"one/a.mp4": b"", "two/a.txt": b""}, ".", DataError, "two: there is no clip of this class"),
        ({"a.csv": b""}, "a.csv", DataError, r"has the columns "),
        ({"a.csv": b"path,class\na.mp4,cat\n"}, "a.csv", DataError, r"columns \['path', 'class'\].*path and label"),
        ({"a.csv": b"path,label\n"}, "a.csv", DataError, "there is no clip in it"),
        ({"a.csv": b"path,label\na.mp4,cat\nb.mp4\n"}, "a.csv", DataError, "line 3: path is 'b.mp4', label None"),
        ({"a.csv": b"\0\xff\xd8\xff"}, "a.csv", CorruptFile, "cannot be read as a CSV"),
    ],
)
def test_f69_sources_without_clips_are_sentences(tmp_path, files, source, error, says):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=says):
        clips.find(tmp_path / source)


# --- reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"g": "12", "bf": "3"}),
        ("a.mkv", "libx264", {"g": "9", "bf": "4", "x264-params": "open-gop=1"}),
        ("a.mov", "libx265", {"g": "10", "x265-params": "log-level=none"}),
        ("a.webm", "libvpx-vp9", {"g": "8"}),
    ],
)
def test_a_clip_from_anywhere_has_the_frames_of_the_whole_video(tmp_path, name, codec, options):
    path = write(tmp_path / name, counted(40), codec, **options)
    for start in range(30):
        assert numbers(clips.read(path, 4, 32, 3, start / 30)) == [start, start + 3, start + 6, start + 9]
    assert numbers(clips.read(path, 40, 16)) == list(range(40))


def test_a_file_that_grew_is_read_from_anywhere(tmp_path):
    with FragmentedMP4(tmp_path / "a.mp4", 16) as file:
        for at in (0, 5, 10):
            file.append(counted(15)[at : at + 5])
    assert [numbers(clips.read(tmp_path / "a.mp4", 2, 32, 4, start / 10))[0] for start in range(11)] == list(range(11))


def test_f57_frames_that_do_not_last_equally_long_are_taken_by_time(tmp_path):
    stamps = [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]  # twice as long as its twelve frames at 24 a second
    path = write(tmp_path / "a.mp4", counted(12), stamps=stamps)
    assert numbers(clips.read(path, 12, 16)) == [1, 3, 3, 3, 3, 5, 7, 7, 7, 7, 9, 11]
    assert numbers(clips.read(path, 3, 16, start=1.0)) == [7, 9, 11]


def test_the_shorter_side_is_resized_and_the_longer_cut(tmp_path):
    wide = np.zeros((2, 32, 96, 3), np.uint8)
    wide[:, :, :32, 0] = wide[:, :, 32:64, 1] = wide[:, :, 64:, 2] = 255  # red, green, blue
    for frames, crops in ((wide, ((0, 0), (0, 0.5), (0, 1))), (wide.swapaxes(1, 2), ((0, 0), (0.5, 0), (1, 0)))):
        path = video.write_mp4(tmp_path / "a.mp4", frames, 24)
        for channel, crop in enumerate(crops):
            for size in (16, 32, 64):
                clip = clips.read(path, 2, size, crop=crop)
                assert clip.shape == (2, size, size, 3) and clip.dtype == np.uint8
                np.testing.assert_allclose(
                    clip[:, 4:-4, 4:-4].mean((0, 1, 2)), 255 * np.eye(3)[channel], atol=6, err_msg=f"{size} {crop}"
                )


def test_a_clip_of_its_own_size_is_what_read_video_reads(folder):
    path = folder / "one" / "3.mp4"
    np.testing.assert_array_equal(clips.read(path, 12, 32, crop=(0, 0.25)), video.read_video(path)[:, :, 4:36])


def unusable(root):
    """What makes a clip unusable: name -> (how the file is made, frames that are asked for, error, its sentence)."""
    good = video.write_mp4(root / "good.mp4", counted(12), 24).read_bytes()
    noise = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3)).astype(np.uint8)
    whole = video.write_mp4(root / "noise.mp4", noise, 24).read_bytes()
    write(root / "grey.mkv", counted(12), "ffv1", "gray")
    write(root / "alpha.mkv", counted(12), "ffv1", "yuva420p")
    with av.open(str(root / "sound.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=16000)
        sound = av.AudioFrame(layout="mono", samples=1024)
        sound.sample_rate = 16000
        file.mux([*stream.encode(sound), *stream.encode()])
    for name, content in (("empty", b""), ("text", b"only text"), ("head", good[:700]), ("cut", whole[:-3000])):
        (root / f"{name}.mp4").write_bytes(content)
    (root / "list.mp4").write_bytes(b"#EXTM3U\nfile:///etc/hostname\n")
    os.mkfifo(root / "pipe.mp4")
    return {
        "empty.mp4": (CorruptFile, "neither MP4"),
        "text.mp4": (CorruptFile, "neither MP4"),
        "list.mp4": (CorruptFile, "neither MP4"),
        "head.mp4": (CorruptFile, "cannot be decoded"),
        "cut.mp4": (CorruptFile, "cut off"),
        "pipe.mp4": (CorruptFile, "only regular local"),
        "none.mp4": (CorruptFile, "only regular local"),
        "x" * 300: (CorruptFile, "cannot be read"),
        "sound.mp4": (CorruptFile, "no video stream"),
        "grey.mkv": (DataError, r"has 1 channels \(gray\); expected 3"),
        "alpha.mkv": (DataError, r"has 4 channels \(yuva420p\)"),
    }


def test_f57_f69_files_that_are_no_clip_are_named(tmp_path):
    for name, (error, says) in unusable(tmp_path).items():
        with pytest.raises(error, match=says) as raised:
            clips.read(tmp_path / name, 12, 16)
        assert name[:100] in str(raised.value) and raised.value.exit_code == 3
    with pytest.raises(DataError, match=r"good\.mp4 has 12 frames; expected 13 or more"):
        clips.read(tmp_path / "good.mp4", 5, 16, 3)
    for name in ("http://127.0.0.1/a.mp4", "concat:a.mp4", f"file:{tmp_path}/good.mp4"):
        with pytest.raises(CorruptFile, match="only regular local"):
            clips.read(name, 4, 16)


def test_f57_bombs_are_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", counted(40, 32, 512), g="40")
    monkeypatch.setattr(video, "MAX_PIXELS", 6 * 32 * 512)
    assert clips.read(path, 6, 32).shape == (6, 32, 32, 3)
    with pytest.raises(CheckpointError, match=r"7 frames of 512x32 are .* pixels"):  # from the header
        clips.read(path, 7, 32)
    with pytest.raises(CheckpointError, match=r"2 frames of 2048x128 are .* pixels"):  # resized
        clips.read(path, 2, 128)
    monkeypatch.setattr(clips, "MOST_DECODED", 20 * 32 * 512)
    with pytest.raises(CheckpointError, match="21 frames of 512x32"):  # from the key frame on
        clips.read(path, 2, 32, start=1.0)


# --- batches -----------------------------------------------------------------------------------------------------


def test_a_batch_has_clips_and_their_labels(folder):
    for batch in first(4, clips.batches(clips.find(folder), **SETTINGS)):
        assert batch.video.shape == (3, 4, 16, 16, 3) and batch.video.dtype == np.uint8
        assert batch.labels.shape == (3,) and batch.labels.dtype == np.int32
        levels = batch.video.mean((2, 3, 4))  # [B,F]
        np.testing.assert_allclose(np.diff(levels, axis=1), 2 * SETTINGS["stride"], atol=2)
        np.testing.assert_array_equal(levels[:, 0] > 115, batch.labels == 1)


def test_every_epoch_has_every_clip_in_an_order_of_its_own(folder):
    found = first(6, clips.batches(clips.find(folder), batch=4, frames=1, size=16))
    shown = np.concatenate([batch.video.mean((1, 2, 3, 4)) for batch in found]).reshape(3, 8) + 2
    orders = [tuple((epoch // 30).astype(int)) for epoch in shown]
    assert all(sorted(order) == list(range(8)) for order in orders) and len(set(orders)) == 3
    assert len(set((shown % 30).astype(int).ravel())) > 4  # random first frames


def test_f65_batches_go_on_where_they_stopped_whatever_the_workers(folder, tmp_path):
    broken = tmp_path / "one" / "bad.mp4"
    broken.parent.mkdir()
    broken.write_bytes(b"nothing")
    whole = clips.find(folder)
    mixed = clips.Clips((*whole.paths[:5], broken, *whole.paths[5:]), np.insert(whole.labels, 5, 0), whole.classes)
    for source in (whole, mixed):
        take = lambda n, **kw: first(n, clips.batches(source, **SETTINGS, most_bad=0.2, **kw))  # noqa: B023, E731
        expected = take(9, seed=5)
        same(expected, take(9, seed=5, workers=3))
        for start in (1, 4):
            same(expected[start:], take(9 - start, seed=5, start=start, workers=1))
        others = take(9, seed=6)
        assert any((a.video != b.video).any() for a, b in zip(expected, others, strict=True))


def test_f69_unreadable_clips_are_replaced_logged_once_and_limited(folder, tmp_path, caplog):
    whole = clips.find(folder)
    names = list(unusable(tmp_path))[:3]
    paths = (*whole.paths, *(tmp_path / name for name in names))
    mixed = clips.Clips(paths, np.append(whole.labels, [1] * len(names)).astype(np.int32), whole.classes)
    with caplog.at_level(logging.WARNING, "jvdiff.media"):
        found = first(12, clips.batches(mixed, **SETTINGS, most_bad=0.3))
    assert len(found) == 12
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3 and all(sum(name in line for line in said) == 1 for name in names)

    with pytest.raises(DataError, match=r"3 of 11 clips .* more than most_bad=0.2 .*first:\n.*mp4") as error:
        first(12, clips.batches(mixed, **SETTINGS, most_bad=0.2))
    assert error.value.exit_code == 3 and str(error.value).count("\n") < 6
    with pytest.raises(DataError, match=r"8 of 8 clips .*\n.* has 12 frames; expected 13"):
        next(clips.batches(whole, batch=8, frames=13, size=16, most_bad=0.99))


def test_workers_read_ahead_and_end_with_the_iterator(folder, monkeypatch):
    running = lambda: [thread for thread in threading.enumerate() if thread.name.startswith("grain")]  # noqa: E731
    until(lambda: not running())  # those of other tests
    reads, read = [], clips.read
    monkeypatch.setattr(clips, "read", lambda *args: (reads.append(threading.get_ident()), read(*args))[1])
    steps = clips.batches(clips.find(folder), **SETTINGS)
    next(steps)
    until(lambda: len(reads) >= 4 * SETTINGS["batch"])
    assert len(set(reads)) == 2 and threading.get_ident() not in reads
    steps.close()
    until(lambda: not running())
    with pytest.raises(StopIteration):
        next(steps)


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("setting", "error", "says"),
    [
        ({"batch": 9}, DataError, "there are 8 clips, fewer than a batch of 9"),
        ({"batch": 0}, UsageError, "batch is 0"),
        ({"frames": 0}, UsageError, "frames is 0"),
        ({"size": 0}, UsageError, "size is 0"),
        ({"stride": 0}, UsageError, "stride is 0"),
        ({"seed": -1}, UsageError, "seed is -1"),
        ({"start": -1}, UsageError, "start is -1"),
        ({"workers": 0}, UsageError, "workers is 0"),
        ({"most_bad": 1}, UsageError, "most_bad is 1; expected a share"),
    ],
)
def test_f69_settings_that_cannot_be(folder, setting, error, says):
    with pytest.raises(error, match=says):
        clips.batches(clips.find(folder), **SETTINGS | setting)


def test_without_grain_it_says_so(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(SetupError, match=r'pip install "jvdiff\[train\]"'):
        clips.batches(clips.find(folder), **SETTINGS)


# --- the moving digits as files ------------------------------------------------------------------------------------


def test_the_digits_command_writes_what_training_may_show(tmp_path, capsys):
    words = ["jvdiff digits", "--output", str(tmp_path / "digits"), "--clips=12", "--seed=3"]
    assert main(words) == 0
    found = clips.find(tmp_path / "digits")
    assert len(found.paths) == 12 and set(found.classes) <= set(digits.DIGITS)
    for path, label in zip(found.paths, found.labels, strict=True):
        meant, text = digits.sample(np.random.default_rng((3, int(path.stem))))
        assert digits.DIGITS[digits.parse_prompt(text).digit] == found.classes[label]
        assert np.abs(clips.read(path, 17, 64).astype(int) - meant).mean() < 2
    assert main(words) == 2 and "exists already" in capsys.readouterr().err
    for wrong, says in (("--clips=0", "clips is 0"), ("--frames=40", "too many")):
        assert main(["jvdiff digits", "--output", str(tmp_path / "none"), "--clips=1", wrong]) == 2
        assert says in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["digits"]
