"""HunyuanVideo's settings: what its files ask for, which repositories are others, and which sampler it has."""

import json

import numpy as np
import pytest

from jvdiff import models
from jvdiff.errors import CheckpointError
from jvdiff.models import layouts
from jvdiff.models.hunyuan_video import settings

INDEX = {"_class_name": "HunyuanVideoPipeline"}
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 7.0}
PACKAGES = [f"{models.__name__}.{package}" for package in models.FAMILIES]


@pytest.mark.parametrize(
    "name, word",
    [
        ("HunyuanVideoImageToVideoPipeline", "LLaVA"),
        ("HunyuanSkyreelsImageToVideoPipeline", "SkyReels"),
        ("HunyuanVideoFramepackPipeline", "FramePack"),
        ("HunyuanVideo15Pipeline", r"HunyuanVideo 1\.5"),
        ("HunyuanVideo15ImageToVideoPipeline", r"HunyuanVideo 1\.5"),
        ("HunyuanVideoOfTomorrowPipeline", "does not know"),
    ],
)
def test_other_pipelines_are_refused_by_name(tmp_path, name, word):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"{tmp_path}.*{name}: .*{word}.*does not run it") as error:
        models.select(tmp_path, {"_class_name": name})
    assert "hunyuanvideo-community/HunyuanVideo" in str(error.value)


@pytest.mark.parametrize(
    "transformer, word",
    [
        ({"image_condition_type": "token_replace"}, "image-to-video"),
        ({"image_condition_type": "latent_concat"}, "image-to-video"),
        ({"_class_name": "HunyuanVideoFramepackTransformer3DModel"}, "FramePack"),
        ({"_class_name": "HunyuanVideo15Transformer3DModel"}, r"1\.5"),
    ],
)
def test_another_transformer_under_the_same_pipeline_is_refused(transformer, word):
    with pytest.raises(CheckpointError, match=word):
        settings.select(INDEX, {"transformer": transformer})
    assert settings.select(INDEX, {"transformer": {"image_condition_type": None}}) == "TEXT_TO_VIDEO"
    assert settings.select({"_class_name": "HunyuanDiTPipeline"}, {}) is None


def test_a_scheduler_is_read_onto_the_levels_of_the_pipeline(tmp_path):
    """Not onto its own, whose low end is shifted twice; with levels of Karras et al. nothing is guessed."""
    assert settings.defaults(INDEX, tmp_path) == {}
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({**EULER, "shift": 17.0}))
    assert settings.defaults(INDEX, tmp_path) == {
        "solver": "euler", "shift": 17.0, "grid": "linear", "shift_terminal": None
    }  # fmt: skip
    with pytest.raises(CheckpointError, match=r"(?s)noise levels karras.*solver, shift and grid yourself"):
        settings.scheduled({**EULER, "use_karras_sigmas": True})


def test_the_layout_of_the_authors(tmp_path):
    (tmp_path / "hunyuan-video-t2v-720p" / "transformers").mkdir(parents=True)
    assert "hunyuanvideo-community/HunyuanVideo" in str(layouts.misread(tmp_path, PACKAGES))
    other = tmp_path / "i2v"
    (other / "hunyuan-video-i2v-720p").mkdir(parents=True)
    assert "LLaVA" in str(layouts.misread(other, PACKAGES))
    assert settings.foreign(tmp_path, ["notes.txt"]) is None


def test_defaults_are_those_of_the_pipeline():
    found = settings.Settings()
    assert (found.num_frames, found.height, found.width, found.fps, found.steps) == (129, 720, 1280, 24, 50)
    assert (found.guidance, found.true_guidance, found.negative_prompt, found.shift) == (6.0, 1.0, None, 7.0)
    assert np.all([found.vae_windows, found.pattern == "dense", found.solver == "euler", found.grid == "linear"])
