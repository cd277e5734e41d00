"""A picture's two ways into networks, against diffusers and transformers as they are installed: every value."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jvdiff.models.vision import pictures

diffusers = pytest.importorskip("diffusers")
clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
PUBLISHED = json.loads((Path(__file__).parents[1] / "models" / "vision" / "preprocessor_config.json").read_text())


@pytest.mark.parametrize("size", [(224, 224), (231, 500), (500, 231), (17, 33), (301, 300)], ids=str)
def test_both_ways_start_from_the_original(size):
    given = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    picture = Image.fromarray(given)
    theirs = clip.CLIPImageProcessorPil.from_dict(PUBLISHED)(picture, return_tensors="np")["pixel_values"]
    ours = pictures.seen_by_clip(given, pictures.Processor.from_json(PUBLISHED))
    np.testing.assert_array_equal(ours, theirs[0].transpose(1, 2, 0))
    video = diffusers.image_processor.VaeImageProcessor().preprocess(picture, height=48, width=80)
    np.testing.assert_array_equal(pictures.squash(given, 48, 80) / np.float32(255) * 2 - 1, video[0].permute(1, 2, 0))
