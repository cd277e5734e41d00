"""A growing MP4 can be played after every chunk, also of a killed process, and another process goes on with it."""

import subprocess
import sys

import numpy as np
import pytest

from jvdiff.errors import CorruptFile, IntegrityError, ResourceError, UsageError
from jvdiff.media import video
from jvdiff.media.fragmented_mp4 import FragmentedMP4, _boxes

av = pytest.importorskip("av")


@pytest.fixture
def moving():
    """A picture that moves, [24,32,48,3]: blocks large enough to survive H.264."""
    blocks = np.random.default_rng(0).integers(0, 256, (4, 6, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    return np.stack([np.roll(blocks, 2 * i, 1) for i in range(24)])


def stamps(path):
    """Frame numbers that a player computes from time stamps, at 16 frames a second."""
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        return [float(frame.pts * stream.time_base * 16) for frame in file.decode(stream)]


def same_pictures(path, frames):
    back = video.read_video(path)
    assert back.shape == frames.shape
    for shown, meant in zip(back.astype(int), frames.astype(int), strict=True):
        assert np.abs(shown - meant).mean() < 12  # its neighbours are 25 away and more
    assert stamps(path) == list(range(len(frames)))


def test_a_growing_file_has_all_frames_after_each_append(tmp_path, moving):
    path, record = tmp_path / "new" / "a.mp4", {"prompt": "猫"}
    with FragmentedMP4(path, 16, record) as file:
        assert not path.exists()
        for start, stop in ((0, 1), (1, 9), (9, 21), (21, 24)):
            file.append(moving[start:stop])
            assert file.frames == stop
            same_pictures(path, moving[:stop])
    assert video.read_metadata(path) == record
    with av.open(str(path)) as opened:
        codec = opened.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt, codec.has_b_frames) == ("h264", "yuv420p", 0)
        assert (codec.color_primaries, codec.color_trc, codec.colorspace, codec.color_range) == (1, 1, 1, 1)
        keys = [packet.pts for packet in opened.demux(video=0) if packet.is_keyframe]
    assert len(keys) == 4
    kinds = [kind for kind, *_ in boxes(path)]
    assert kinds == [b"ftyp", b"moov", *[b"moof", b"mdat"] * 4]


def boxes(path):
    with path.open("rb") as file:
        return list(_boxes(file, 0, path.stat().st_size))


def test_a_growing_file_of_a_killed_process_is_played(tmp_path, moving):
    np.save(tmp_path / "frames.npy", moving)
    code = """if True:
        import sys, time, numpy as np
        from jvdiff.media.fragmented_mp4 import FragmentedMP4
        moving = np.load(sys.argv[1] + "/frames.npy")
        file = FragmentedMP4(sys.argv[1] + "/a.mp4", 16)
        for start in (0, 8):
            file.append(moving[start : start + 8])
        print("written", flush=True)
        time.sleep(600)
    """
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "written\n"
        child.kill()
    same_pictures(tmp_path / "a.mp4", moving[:16])


def test_another_process_continues_a_growing_file(tmp_path, moving):
    path = tmp_path / "a.mp4"
    for kept, start in ((0, 0), (8, 8), (16, 16), (8, 8)):  # the last time from an earlier frame
        with FragmentedMP4(path, 16, frames=kept) as file:
            file.append(moving[start : start + 4])
            file.append(moving[start + 4 : start + 8])
        same_pictures(path, moving[: start + 8])
    whole = path.read_bytes()
    (*_, (kind, start, _)) = boxes(path)
    assert kind == b"mdat"
    for damaged in (whole[:-10], whole[: start - 30], whole + bytes(8) + whole[:1000]):  # killed while writing
        path.write_bytes(damaged)
        with FragmentedMP4(path, 16, frames=12) as file:
            assert path.read_bytes() == damaged
            file.append(moving[12:20])
        same_pictures(path, moving[:20])


def test_frames_that_are_not_what_was_written_are_not_continued(tmp_path, moving):
    path = tmp_path / "a.mp4"
    with FragmentedMP4(path, 16) as file:
        file.append(moving[:4])
        kept = file.kept()
        file.append(moving[4:8])  # after the state was saved
    data = bytearray(path.read_bytes())
    data[kept["bytes"] + 50] ^= 1
    path.write_bytes(data)
    assert FragmentedMP4(path, 16, frames=4, kept=kept).kept() == kept
    data[kept["bytes"] - 50] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="its first 4 frames are not what was written"):
        FragmentedMP4(path, 16, frames=4, kept=kept)
    assert path.read_bytes() == data


def test_what_is_half_written_is_not_played(tmp_path, moving):
    """The fragment's first eight bytes come last; until then a player stops before it."""
    path = tmp_path / "a.mp4"
    file = FragmentedMP4(path, 16)
    file.append(moving[:8])
    before = path.stat().st_size
    file.append(moving[8:16])
    data = path.read_bytes()
    for size in (before + 4, before + 100, before + 2000, len(data)):
        path.write_bytes((data[:before] + bytes(8) + data[before + 8 :])[:size])
        same_pictures(path, moving[:8])


def test_growing_files_that_cannot_be(tmp_path, moving):
    path = tmp_path / "a.mp4"
    with pytest.raises(UsageError, match="no such file; its first 8 frames"):
        FragmentedMP4(path, 16, frames=8)
    file = FragmentedMP4(path, 16)
    for wrong, says in ((moving[:0], "0, 32, 48, 3"), (moving[:, :31], "even width"), (moving / 2, "float64")):
        with pytest.raises(UsageError, match=says):
            file.append(wrong)
    assert list(tmp_path.iterdir()) == []
    file.append(moving[:8])
    kept = path.read_bytes()
    with pytest.raises(UsageError, match="48x16 at 16 frames"):
        file.append(moving[:, :16])
    with pytest.raises(UsageError, match="another size or rate"):
        FragmentedMP4(path, 24, frames=8).append(moving[:8])
    with pytest.raises(UsageError, match="exists already"):
        FragmentedMP4(path, 16)
    with pytest.raises(CorruptFile, match=r"ends with frame 7 .*ends with 8"):
        FragmentedMP4(path, 16, frames=7)
    with pytest.raises(UsageError, match="fps"):
        FragmentedMP4(tmp_path / "b.mp4", 0)
    with pytest.raises(ResourceError, match="cannot write"):
        FragmentedMP4(path / "b.mp4", 16)
    assert path.read_bytes() == kept and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_keeps_what_was_there(tmp_path, moving):
    np.save(tmp_path / "frames.npy", moving)
    code = """if True:
        import resource, sys, numpy as np
        from jvdiff.media.fragmented_mp4 import FragmentedMP4
        from jvdiff.errors import ResourceError
        moving = np.load(sys.argv[1] + "/frames.npy")
        noise = np.random.default_rng(0).integers(0, 256, (8, 32, 48, 3)).astype(np.uint8)
        file = FragmentedMP4(sys.argv[1] + "/a.mp4", 16)
        file.append(moving[:8])
        with open(sys.argv[1] + "/a.mp4", "rb") as opened:
            size = len(opened.read()) + 2000
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
        for target in (file, FragmentedMP4(sys.argv[1] + "/b.mp4", 16)):
            try:
                target.append(noise)
            except ResourceError as error:
                assert error.exit_code == 4 and str(error).count("\\n") < 6
            else:
                raise SystemExit("no error")
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        file.append(moving[8:16])
    """
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"frames.npy", "a.mp4"}
    same_pictures(tmp_path / "a.mp4", moving[:16])
