"""Pictures as people have them: turned, transparent, grey, deep, moving, huge, broken; and the size of their clips."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from jvdiff.errors import CheckpointError, CorruptFile, UsageError
from jvdiff.media import pictures

RANDOM = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)


def test_what_is_given_is_the_original(tmp_path):
    Image.fromarray(RANDOM).save(tmp_path / "plain.png")
    for given in (RANDOM, Image.fromarray(RANDOM), tmp_path / "plain.png", str(tmp_path / "plain.png")):
        np.testing.assert_array_equal(pictures.picture(given), RANDOM)


@pytest.mark.parametrize("turned", range(2, 9))
def test_exif_turns_it_upright(tmp_path, turned):
    """By the eight cases of the standard, written out: what a viewer does to the stored rows and columns."""
    stored = {
        2: RANDOM[:, ::-1],
        3: RANDOM[::-1, ::-1],
        4: RANDOM[::-1],
        5: RANDOM.swapaxes(0, 1),
        6: RANDOM[::-1].swapaxes(0, 1)[::-1, ::-1],
        7: RANDOM[::-1, ::-1].swapaxes(0, 1),
        8: RANDOM[:, ::-1].swapaxes(0, 1)[::-1, ::-1],
    }[turned]
    exif = Image.Exif()
    exif[0x0112] = turned
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(pictures.read(tmp_path / "turned.png"), RANDOM)


def test_what_is_transparent_lies_over_white(tmp_path):
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = 0, 51, 255  # black at 0, 20 and 100 %
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(pictures.read(tmp_path / "rgba.png")[0, :, 0], [255, 204, 0])
    Image.fromarray(rgba[..., 2:]).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(pictures.read(tmp_path / "grey.png")[0, :, 1], [255, 204, 0])
    Image.fromarray(np.array([[0, 9]], np.uint8)).save(tmp_path / "keyed.png", transparency=9)
    np.testing.assert_array_equal(pictures.read(tmp_path / "keyed.png")[0, :, 2], [0, 255])


def test_grey_palette_and_deep(tmp_path):
    """Grey of 16 bits is scaled: 65535 is white, and everything above 255 is not."""
    Image.fromarray(np.array([[0, 128, 129, 32896, 65535]], np.uint16)).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(pictures.read(tmp_path / "deep.png")[0, :, 0], [0, 0, 1, 128, 255])
    older = Image.fromarray(np.array([[0, 65535]], np.int32))
    np.testing.assert_array_equal(pictures.picture(older)[0, :, 0], [0, 255])
    for values in (np.array([[0, 65536]], np.int32), np.ones((1, 2), np.float32)):
        with pytest.raises(UsageError, match="8 or 16 bits"):
            pictures.picture(Image.fromarray(values))
    for mode in ("1", "L", "P", "CMYK"):
        assert pictures.picture(Image.new(mode, (5, 3))).shape == (3, 5, 3)


def test_of_an_animation_the_first_frame_and_a_line(tmp_path, caplog):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for name in ("moving.gif", "moving.png", "moving.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        caplog.clear()
        np.testing.assert_array_equal(pictures.read(tmp_path / name)[0, 0], [255, 0, 0])
        assert [record.message for record in caplog.records] == [
            f"{tmp_path / name} is an animation; its first frame is taken"
        ]


def test_what_is_no_picture(tmp_path, monkeypatch):
    Image.fromarray(RANDOM.repeat(20, 0).repeat(20, 1)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:700])
    (tmp_path / "text.png").write_text("no picture")
    Image.fromarray(RANDOM).save(tmp_path / "other.tiff")
    for name, sentence in (
        ("cut.jpg", r"is damaged \(image file is truncated"),
        ("text.png", "expected a picture .PNG, JPEG, WEBP, GIF or BMP., and it is none"),
        ("other.tiff", "it is none; save it anew as PNG"),
    ):
        with pytest.raises(CorruptFile, match=f"{name}: .*{sentence}|{sentence}") as raised:
            pictures.read(tmp_path / name)
        assert str(tmp_path / name) in str(raised.value) and "\n" not in str(raised.value)
    for given in (tmp_path, tmp_path / "nothing.png"):
        with pytest.raises(UsageError, match=f"^last_image: {given} is not a file"):
            pictures.read(given, "last_image")
    monkeypatch.setattr(pictures, "MAX_PIXELS", 20)
    for given in (tmp_path / "whole.jpg", Image.fromarray(RANDOM)):
        with pytest.raises(CheckpointError, match=r"too large: .* pixels; expected at most 20 pixels"):
            pictures.picture(given)


def test_a_bomb_is_told_by_its_header(tmp_path):
    Image.new("1", (1, 1)).save(tmp_path / "small.png")
    content = bytearray((tmp_path / "small.png").read_bytes())
    for side in (12_000, 20_000):  # Pillow warns of the first and refuses the second
        content[16:24] = struct.pack(">II", side, side)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
        (tmp_path / "bomb.png").write_bytes(content)
        with pytest.raises(CheckpointError, match="too large"):
            pictures.read(tmp_path / "bomb.png")


def test_one_for_all_or_one_each():
    other = RANDOM[::-1]
    assert pictures.one_each(None, 2) is None
    assert [np.array_equal(each, RANDOM) for each in pictures.one_each(RANDOM, 2)] == [True, True]
    assert [np.array_equal(each, RANDOM) for each in pictures.one_each([RANDOM, other], 2)] == [True, False]
    with pytest.raises(UsageError, match="image has 1 pictures for 2 clips; expected one for all, or one each"):
        pictures.one_each([RANDOM], 2)
    for wrong in (RANDOM[0], RANDOM[None], RANDOM[..., :1], RANDOM.astype(np.float32), 5):
        with pytest.raises(UsageError, match=r"^image 2 is .*; expected uint8"):
            pictures.one_each([RANDOM, wrong], 2)


def test_a_digest_is_that_of_the_pixels(tmp_path):
    Image.fromarray(RANDOM).save(tmp_path / "one.png")
    Image.fromarray(RANDOM).save(tmp_path / "other.webp", lossless=True)
    one, other = (pictures.digest(pictures.read(tmp_path / name)) for name in ("one.png", "other.webp"))
    assert one == other != pictures.digest(RANDOM.reshape(4, 6, 3))


def test_the_size_of_a_clip_is_that_of_the_examples():
    """By numpy's rule, over all kinds of proportions; and at the published areas, by hand."""
    for height, width in np.random.default_rng(1).integers(16, 5000, (300, 2)).tolist():
        for area, unit in ((480 * 832, 16), (720 * 1280, 16), (704 * 1280, 32)):
            ratio = height / width
            wanted = tuple(int(round(np.sqrt(side)) // unit * unit) for side in (area * ratio, area / ratio))
            assert pictures.fitting(height, width, area, unit) == tuple(max(side, unit) for side in wanted)
    assert pictures.fitting(1080, 1920, 480 * 832, 16) == (464, 832)
    assert pictures.fitting(1000, 1000, 720 * 1280, 16) == (960, 960)
    assert pictures.fitting(10, 9000, 480 * 832, 16) == (16, 18944)
