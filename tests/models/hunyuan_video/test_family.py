"""HunyuanVideo as a family: what its settings mean, clips of a tiny repository, and its way through the commands."""

import dataclasses
import json
import logging
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jvdiff
from convert.from_diffusers import convert
from convert.to_diffusers import to_hf
from jvdiff import models, pipeline, plan
from jvdiff.commands import sample
from jvdiff.config import tell_once
from jvdiff.errors import CheckpointError, UsageError
from jvdiff.models.family import Request, read_config
from jvdiff.models.hunyuan_video import settings
from jvdiff.models.hunyuan_video.family import TEXT_TO_VIDEO
from jvdiff.sharding import rules
from tests.models.hunyuan_video import tiny

CHECKPOINTS = Path(__file__).parents[2] / "data" / "hunyuan_video"
PROMPTS = ["a red seven moving left", "two " * 40]
SMALL = {"num_frames": 1, "height": 16, "width": 16, "steps": 3}
PARTS = ["text_encoder", "text_encoder_2", "transformer", "vae"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("hunyuan") / "repository")


@pytest.fixture(scope="module")
def pipe(folder):
    return jvdiff.load(folder, "float32")


@pytest.fixture(scope="module")
def clip(pipe):
    """The clip that most tests make again in other ways."""
    return jvdiff.generate(pipe, PROMPTS[0], seed=3, **SMALL)


# ------------------------------------------------------------------------------------------------- what settings mean


def test_guidance_is_told_and_never_a_second_pass(pipe):
    """The file's shift, on the levels of the pipeline; the network gets 1000 times the guidance, without rounding."""
    found = pipe.clip(steps=4)
    np.testing.assert_array_equal(found.sampler.schedule.timesteps, np.float32([1000, 954.5454, 875, 700]))
    assert found.settings.guidance == 6.0 and not found.guided and found.tokens == 33 * 90 * 160
    for given in ({"guidance": 9.0}, {"guidance": 1.0}, {"negative_prompt": "blue"}, {"true_guidance": 4.0}):
        assert not pipe.clip(**given).guided, given
    assert [pipe.clip(true_guidance=4.0, negative_prompt=text).segments[0].guidance for text in ("", "two")] == [4, 4]
    told = pipe.family.inputs(pipe.models, pipe.clip(**SMALL, guidance=6.0), Request(prompts=("a", "red"))).guidance
    assert told.tolist() == [6000, 6000] and told.dtype == np.float32


def test_what_does_nothing_is_told(pipe, caplog):
    tell_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="jvdiff"):
        pipe.clip(true_guidance=4.0), pipe.clip(negative_prompt="two")
    assert "true_guidance is given without negative_prompt" in caplog.text
    assert "negative_prompt is given without true_guidance above 1" in caplog.text


def test_sizes_and_lists_of_steps(pipe):
    fast = pipe.clip(steps=6, shift=17.0, num_frames=125)
    np.testing.assert_allclose(fast.sampler.schedule.timesteps[:2], [1000, 988.372], rtol=1e-6)
    listed = pipe.clip(grid="sigmas:1,0.5")
    assert listed.settings.steps == 2 and listed.sampler.schedule.timesteps.tolist() == [1000, 875]
    for given, expected in (({"num_frames": 128}, "nearest is 129"), ({"height": 721}, "nearest is 720")):
        with pytest.raises(UsageError, match=expected):
            pipe.clip(**given)
    parts = pipe.clip(dense_steps=1, pattern="sliding_tile:1x1x1:1x1x1", **SMALL).segments
    assert [(s.start, s.stop, str(s.pattern)[:5]) for s in parts] == [(0, 1, "dense"), (1, 3, "slidi")]
    with pytest.raises(UsageError, match="dense_steps is 3 of 3 steps"):
        pipe.clip(dense_steps=3, pattern="sliding_tile:1x1x1:1x1x1", **SMALL)


def test_parts_that_do_not_fit(pipe):
    def misfit(part, **fields):
        configs = {**pipe.models.configs, part: dataclasses.replace(pipe.models.configs[part], **fields)}
        return pipe.family.misfits(dataclasses.replace(pipe.models, configs=configs)) or ""

    assert "takes 4 latent channels, gives 4, and takes text of width 24" in misfit("transformer", text_embed_dim=24)
    assert "pooled text of width 12; text_encoder_2 gives 16" in misfit("text_encoder_2", hidden_size=16)
    assert misfit("vae", scaling_factor=0.5) == ""
    with pytest.raises(CheckpointError, match="The tokenizer and the text encoder do not belong together"):
        misfit("text_encoder", vocab_size=100)


# ------------------------------------------------------------------------------------------------------------ sampling


def test_every_setting_has_its_effect_and_compiles_nothing(pipe, clip):
    compiled = []

    def listen(event, seconds, **_):
        compiled.extend([event] if event == "/jax/core/compile/backend_compile_duration" else [])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for change in ({"guidance": 3.0}, {"shift": 3.0}, {"steps": 4}, {"grid": "diffusers"}, {"seed": 4}):
            other = jvdiff.generate(pipe, PROMPTS[0], **{"seed": 3, **SMALL, **change}).latents
            assert np.abs(other - clip.latents).max() > 1e-3, change
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == []


def test_a_mesh_makes_the_same_of_a_prompt(folder, pipe, monkeypatch):
    """Of the negative prompt too, one for all; transformer and VAE on a mesh have tests of their own."""
    monkeypatch.setattr(rules, "SMALL", 1)
    divided, found = jvdiff.load(folder, "float32", "data=2,tensor=2"), pipe.clip(true_guidance=2, negative_prompt="")
    inputs = pipe.family.inputs(pipe.models, found, Request(prompts=tuple(PROMPTS)))
    expected, again = (pipeline.encode(each.context, found, inputs, each.run) for each in (pipe, divided))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), again, expected)
    condition, against = expected
    assert condition.text.shape == against.text.shape == (2, 64, 16) and condition.mask.sum() > against.mask.sum() == 2
    assert np.abs(condition.pooled - against.pooled).max() > 0.1 and again[1].guidance.tolist() == [6000, 6000]


def test_the_command_line_makes_the_same_clip_and_resumes_it_bit_for_bit(folder, clip, tmp_path, capsys):
    given = {"checkpoint": folder, "prompt": PROMPTS[0], "seed": 3, "precision": "float32", "output": tmp_path, **SMALL}
    words = [f"--{name}={value}" for name, value in given.items()] + ["--save_arrays=true", "--compile_cache=off"]

    assert sample.main(["jvdiff sample", *words, "--stop_at=1"]) == 0
    kept = Path(capsys.readouterr().out.split()[-1])
    assert sample.main(["jvdiff sample", *words, f"--resume={kept}"]) == 0
    latents = np.load(next(tmp_path.glob("*.npz")))["latents"]
    np.testing.assert_array_equal(latents, clip.latents[0])
    record = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert (record["guidance"], record["true_guidance"], record["grid"]) == (6.0, 1.0, "linear")
    assert sample.main(["jvdiff sample", *words, f"--resume={kept}", "--guidance=5"]) == 3
    assert "guidance: the state has 6.0, this run 5.0" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- repositories


def test_there_and_back(folder, pipe, tmp_path):
    """The last layers of Llama, which nobody uses, are not written back; the notices of the licence go along."""
    source = shutil.copytree(folder, tmp_path / "source")
    for name in ("LICENSE.txt", "Notice.txt", "README.md"):
        (source / name).write_text(name)
    convert(source, tmp_path / "orbax")
    again = jvdiff.load(tmp_path / "orbax", "float32")
    for part in PARTS:
        jax.tree.map(np.testing.assert_array_equal, again.weights[part], pipe.weights[part])
    to_hf(tmp_path / "orbax", tmp_path / "back")
    for part in PARTS:
        file = f"{part}/{TEXT_TO_VIDEO.parts[part].stem}.safetensors"
        before, after = load_file(source / file), load_file(tmp_path / "back" / file)
        left = [name for name in before if name not in after]
        assert left == [name for name in before if part == "text_encoder" and re.match(r"layers\.[23]\.|norm\.", name)]
        for name, tensor in after.items():
            np.testing.assert_array_equal(tensor, before[name])
    for name in ("LICENSE.txt", "Notice.txt", "README.md"):
        assert (tmp_path / "back" / name).read_text() == name


def test_the_published_repository_and_its_plan():
    """hunyuanvideo-community/HunyuanVideo; FastVideo/FastHunyuan-diffusers has the same parts."""
    known = TEXT_TO_VIDEO.published["HunyuanVideo"]
    sizes = {
        name: sum(x.size for x in jax.tree.leaves(TEXT_TO_VIDEO.parts[name].abstract(cfg, "bfloat16")))
        for name, cfg in known.configs.items()
    }
    assert sizes["transformer"] == 12_821_012_544 and sizes["vae"] == 246_478_803
    config = sample.default_config()
    config.checkpoint = "FastHunyuan-diffusers"
    _, clip = plan.resolved(config)
    assert clip.frames == (129, 720, 1280) and clip.latents == (33, 90, 160, 16) and clip.tokens == 118_800
    assert models.configuration("FastVideo/FastHunyuan-diffusers") == "fast_hunyuan"


def test_published_files_are_read(tmp_path):
    """The configurations of the repository, unchanged."""
    for file in CHECKPOINTS.rglob("*.json"):
        place = tmp_path / file.relative_to(CHECKPOINTS)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert models.select(tmp_path, index) == ("jvdiff.models.hunyuan_video", "TEXT_TO_VIDEO")
    known = TEXT_TO_VIDEO.published["HunyuanVideo"].configs
    for name, part in TEXT_TO_VIDEO.parts.items():
        assert read_config(tmp_path / name, part) == known[name]
    assert settings.defaults(index, tmp_path)["shift"] == 7.0
