"""What a VAE and CLIP see of a picture; the comparison with diffusers and transformers is in tests/parity."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jvdiff.errors import CheckpointError
from jvdiff.models.vision import pictures

PUBLISHED = json.loads(Path(__file__).with_name("preprocessor_config.json").read_text())
SMALL = pictures.Processor(4, (0.5, 0.25, 0.125), (0.25, 0.5, 0.125))


def test_the_published_file_and_what_is_refused():
    assert pictures.Processor.from_json(PUBLISHED).side == 224
    assert pictures.Processor.from_json(PUBLISHED | {"size": 224, "crop_size": 224}).side == 224
    for change, sentence in (
        ({"resample": 2}, "resample is 2; expected 3"),
        ({"do_center_crop": False}, "do_center_crop is False; expected True"),
        ({"crop_size": {"height": 224, "width": 200}}, "expected one square of both"),
        ({"size": {"height": 224, "width": 224}}, "expected one square of both"),
        ({"image_std": [0.0, 1.0, 1.0]}, "expected 3 numbers"),
        ({"rotate": 90}, "unknown field 'rotate'"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            pictures.Processor.from_json(PUBLISHED | change)


def test_a_vae_sees_all_of_it_squashed():
    picture = np.zeros((8, 16, 3), np.uint8)
    picture[:, 8:] = 255
    seen = pictures.squash(picture, 8, 8)
    assert seen.shape == (8, 8, 3) and seen[:, :3].max() <= 8 and seen[:, 5:].min() >= 247
    np.testing.assert_array_equal(pictures.squash(picture, 8, 16), picture)


def test_clip_sees_the_middle_of_it():
    """At the size where nothing is resized, by hand: the middle columns, and each colour normalised."""
    picture = np.random.default_rng(0).integers(0, 256, (4, 9, 3), np.uint8)
    middle = picture[:, 2:6] / 255
    wanted = (middle - np.array([0.5, 0.25, 0.125])) / np.array([0.25, 0.5, 0.125])
    np.testing.assert_allclose(pictures.seen_by_clip(picture, SMALL), wanted, rtol=0, atol=1e-6)
    upright = pictures.seen_by_clip(np.ascontiguousarray(picture.swapaxes(0, 1)), SMALL)
    np.testing.assert_allclose(upright, wanted.swapaxes(0, 1), rtol=0, atol=1e-6)


def test_the_longer_side_is_cut_to_a_whole_number():
    """7 x 5 at side 4: 4 * 7 / 5 = 5.6, of which diffusers' processor takes 5, and rows 0 to 3 of those."""
    picture = np.random.default_rng(0).integers(0, 256, (7, 5, 3), np.uint8)
    resized = np.asarray(Image.fromarray(picture).resize((4, 5), Image.Resampling.BICUBIC))
    wanted = (resized[:4] / 255 - np.array(SMALL.mean)) / np.array(SMALL.std)
    np.testing.assert_allclose(pictures.seen_by_clip(picture, SMALL), wanted, rtol=0, atol=1e-6)
