"""Video files: colours, tags and metadata survive; a failure leaves nothing behind; hostile input is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jvdiff.errors import CheckpointError, CorruptFile, ResourceError, SetupError, UsageError
from jvdiff.media import video

av = pytest.importorskip("av")

PATCHES = np.array(
    [
        [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]],
        [[0, 255, 255], [255, 0, 255], [255, 255, 255], [255, 128, 0]],
        [[0, 0, 0], [128, 128, 128], [30, 60, 90], [200, 180, 140]],
    ],
    np.uint8,
)


@pytest.fixture
def patches():
    return np.repeat(PATCHES.repeat(32, 0).repeat(32, 1)[None], 5, 0)  # [5,96,128,3]


@pytest.fixture
def noise():
    return np.random.default_rng(0).integers(0, 256, (8, 32, 48, 3)).astype(np.uint8)


# --- writing ---------------------------------------------------------------------------------------------------


def test_colours_survive_within_3_of_255(tmp_path, patches):
    back = video.read_video(video.write_mp4(tmp_path / "a.mp4", patches, 16))
    assert back.shape == patches.shape and back.dtype == np.uint8
    centres = back[:, 16::32, 16::32].astype(int)
    assert np.abs(centres - PATCHES[None].astype(int)).max() <= 3


def test_the_file_is_what_browsers_play(tmp_path, patches):
    path = video.write_mp4(tmp_path / "a.mp4", patches, 24000 / 1001)
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        codec = stream.codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
        assert (codec.color_primaries, codec.color_trc, codec.colorspace, codec.color_range) == (1, 1, 1, 1)
        assert float(stream.average_rate) == pytest.approx(24000 / 1001)
    data = path.read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")  # faststart: the index comes before the pictures


def test_the_same_frames_are_the_same_file_whatever_memory_holds(tmp_path):
    rng = np.random.default_rng(0)
    texture = np.kron(rng.integers(0, 256, (12, 14, 3)), np.ones((8, 8, 1)))  # [96,112,3]
    moving = np.stack([np.roll(texture, 3 * i, 1) + rng.normal(size=texture.shape) * 6 for i in range(17)])
    moving, files = moving.clip(0, 255).astype(np.uint8), set()
    for i in range(4):
        left = [np.full(rng.integers(1, 200_000), 60 * i, np.uint8) for _ in range(20)]
        left = left[::2]  # what the encoder gets next was somebody's
        files.add(video.write_mp4(tmp_path / "a.mp4", moving, 16).read_bytes())
        del left
    assert len(files) == 1


def test_metadata_round_trip(tmp_path, noise):
    record = {"prompt": "一只猫 'a' \"b\"; #c = d\n\\e", "seed": 3, "guidance": 5.0, "shift": None}
    path = video.write_mp4(tmp_path / "a.mp4", noise, 16, record)
    assert video.read_metadata(path) == record
    with av.open(str(path)) as file:
        assert json.loads(file.metadata["comment"]) == json.loads(file.metadata["jvdiff"]) == record
    assert video.read_metadata(video.write_mp4(tmp_path / "b.mp4", noise, 16)) == {}


@pytest.mark.parametrize(
    ("shape", "dtype", "fps", "says"),
    [
        ((4, 33, 48, 3), np.uint8, 16, "48x33"),
        ((4, 32, 47, 3), np.uint8, 16, "even width"),
        ((0, 32, 48, 3), np.uint8, 16, "0, 32, 48, 3"),
        ((32, 48, 3), np.uint8, 16, "frames, height, width"),
        ((4, 32, 48, 3), np.float32, 16, "float32"),
        ((4, 32, 48, 3), np.uint8, 0, "fps"),
    ],
)
def test_unusable_video_is_refused_before_writing(tmp_path, shape, dtype, fps, says):
    with pytest.raises(UsageError, match=says):
        video.write_mp4(tmp_path / "a.mp4", np.zeros(shape, dtype), fps)
    assert list(tmp_path.iterdir()) == []


def test_f54_disk_full_leaves_nothing(tmp_path):
    # A limit on file size makes the writing process meet the same failure as a full disk, on any machine.
    code = """if True:
        import resource, sys, numpy as np
        from jvdiff.media import video
        from jvdiff.errors import ResourceError
        frames = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3)).astype(np.uint8)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
        for write in (lambda: video.write_mp4(sys.argv[1] + "/a.mp4", frames, 16),
                      lambda: video.write_png(sys.argv[1] + "/a.png", frames[0])):
            try:
                write()
            except ResourceError as error:
                assert error.exit_code == 4 and str(error).count("\\n") < 6
            else:
                raise SystemExit("no error")
    """
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_f54_unwritable_target(tmp_path, noise):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    for target in (tmp_path / "file" / "a.mp4", tmp_path / "folder.mp4", tmp_path / ("x" * 300 + ".mp4")):
        with pytest.raises(ResourceError, match="cannot write"):
            video.write_mp4(target, noise, 16)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.mp4"]


def test_f54_ffmpeg_takes_no_name_for_a_protocol(tmp_path, noise, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("run:1", "2026-11-29T12:30:00", "file:x", "100%d", "a b#c?d"):
        assert video.read_video(video.write_mp4(f"{folder}/a.mp4", noise, 16)).shape == noise.shape
        assert [path.name for path in Path(folder).iterdir()] == ["a.mp4"]


def test_f55_without_av(tmp_path, noise, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    for ask in (lambda: video.write_mp4(tmp_path / "a.mp4", noise, 16), lambda: video.check_mp4(32, 48)):
        with pytest.raises(SetupError, match="pip install") as error:
            ask()
        assert error.value.exit_code == 7
    assert list(tmp_path.iterdir()) == []
    video.write_png(tmp_path / "a.png", video.contact_sheet(noise))  # pictures need no av


# --- reading ---------------------------------------------------------------------------------------------------


def test_f57_a_bomb_is_refused_from_its_header(tmp_path):
    path = video.write_mp4(tmp_path / "bomb.mp4", np.zeros((60, 512, 512, 3), np.uint8), 16)
    assert path.stat().st_size < 20_000  # 47 MB of pixels
    with pytest.raises(CheckpointError, match="60 frames of 512x512") as error:
        video.read_video(path, max_pixels=59 * 512 * 512)
    assert error.value.exit_code == 3
    assert video.read_video(path, max_pixels=60 * 512 * 512).shape == (60, 512, 512, 3)


def test_f57_odd_sizes_and_webm_are_read(tmp_path):
    path = tmp_path / "odd.webm"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libvpx-vp9", rate=8)
        stream.width, stream.height, stream.pix_fmt = 33, 17, "yuv420p"
        for _ in range(3):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((17, 33, 3), 90, np.uint8), format="rgb24")))
        file.mux(stream.encode())
    back = video.read_video(path)
    assert back.shape == (3, 17, 33, 3)
    assert np.abs(back.astype(int) - 90).max() <= 3
    assert video.read_metadata(path) == {}


@pytest.mark.parametrize("kept", [0, 7, 600, -2000, -1])
def test_f57_truncated(tmp_path, noise, kept):
    whole = video.write_mp4(tmp_path / "a.mp4", noise, 16).read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(whole[:kept])
    with pytest.raises(CorruptFile, match=r"cut\.mp4"):
        video.read_video(path)


@pytest.mark.parametrize(
    "content",
    [b"only text", b"#EXTM3U\n#EXT-X-TARGETDURATION:9\nfile:///etc/hostname\n", b"ffconcat version 1.0\nfile a.mp4\n"],
)
def test_f57_wrong_contents(tmp_path, content):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(CorruptFile, match="neither MP4"):
        video.read_video(path)


def test_f57_only_regular_local_files(tmp_path, noise, monkeypatch):
    video.write_mp4(tmp_path / "a.mp4", noise, 16)
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.mp4")
    for name in ("http://127.0.0.1/a.mp4", "concat:a.mp4", "file:a.mp4", "/dev/zero", "pipe.mp4", ".", "none.mp4"):
        error, says = (UsageError, "an address") if "://" in name else (CorruptFile, "regular local")
        with pytest.raises(error, match=says):
            video.read_video(name)
    assert video.read_video("a.mp4").shape == noise.shape


# --- pictures --------------------------------------------------------------------------------------------------


def test_contact_sheet_shows_first_and_last_frame():
    frames = np.zeros((17, 64, 64, 3), np.uint8) + np.arange(17, dtype=np.uint8)[:, None, None, None]
    sheet = video.contact_sheet(frames)
    assert sheet.shape == (2 * 132 + 4, 4 * 132 + 4, 3) and sheet.dtype == np.uint8
    assert sheet[10, 10, 0] == 0 and sheet[-10, -10, 0] == 16
    assert video.contact_sheet(frames[:1]).shape == (136, 136, 3)
    assert video.contact_sheet(np.zeros((3, 90, 1280, 3), np.uint8)).shape[1] < 1500


def test_png_round_trip(tmp_path, noise):
    path = video.write_png(tmp_path / "new" / "a.png", noise[0], {"prompt": "猫"})
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), noise[0])
        assert json.loads(image.text["jvdiff"]) == {"prompt": "猫"}
    assert [p.name for p in Path(path).parent.iterdir()] == ["a.png"]


def test_preview_recovers_a_linear_decoder():
    rng = np.random.default_rng(1)
    factors, bias = rng.uniform(-0.2, 0.2, (16, 3)).astype(np.float32), np.array([0.1, 0, -0.3], np.float32)
    found = video.fit_preview(lambda z: (z @ factors + bias).repeat(8, 2).repeat(8, 3), 16)
    np.testing.assert_allclose(found[0], factors, atol=1e-5)
    np.testing.assert_allclose(found[1], bias, atol=1e-5)
    strip = video.latent_preview(rng.standard_normal((5, 4, 6, 16), np.float32), *found)
    assert strip.shape == (32, 5 * 48, 3) and strip.dtype == np.uint8
