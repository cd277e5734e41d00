"""A picture as the first frame (Wan 2.2 TI2V): given at every step, with a timestep of its own; diffusers' numbers are
compared in tests/parity/test_ti2v.py.

B batch · T latent frames · H W latent grid · C latent channels · F pixel frames · Y X pixel height, width.
"""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import jvdiff
from jvdiff.errors import CheckpointError, UsageError
from jvdiff.models import wan
from jvdiff.models.pixels import from_pixels, to_pixels
from jvdiff.models.wan import settings
from jvdiff.models.wan.family import TEXT_AND_IMAGE_TO_VIDEO

PROMPT = "a red seven moving left"
SIZE = {"num_frames": 9, "height": 16, "width": 32, "guidance": 1.0}


def picture(seed):
    """Smooth, and of no size that a clip has."""
    cells = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(cells).resize((41, 23), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def pipe(tiny_repository, tmp_path_factory):
    root = shutil.copytree(tiny_repository, tmp_path_factory.mktemp("ti2v") / "repository")
    index = root / "model_index.json"
    more = {"expand_timesteps": True, "boundary_ratio": None, "transformer_2": [None, None]}
    index.write_text(json.dumps(json.loads(index.read_text()) | more))
    return jvdiff.load(root)


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).standard_normal((2, 3, 2, 4, 4), np.float32)


@pytest.fixture(scope="module")
def out(pipe, noise):
    """Two clips with a picture each, one Euler step."""
    images = [picture(0), picture(1)]
    return jvdiff.generate(pipe, [PROMPT, "up"], image=images, noise=noise, steps=1, solver="euler", **SIZE)


def test_the_first_frame_is_the_picture_squashed_and_encoded(pipe, out):
    cfg = pipe.models.configs["vae"]
    squashed = [np.asarray(Image.fromarray(picture(i)).resize((32, 16), Image.Resampling.LANCZOS)) for i in (0, 1)]
    encode = jax.jit(lambda params, x: wan.normalize_latents(cfg, wan.encode(params, cfg, from_pixels(x)[:, None])))
    first = encode(pipe.weights["vae"], np.stack(squashed))
    np.testing.assert_allclose(out.latents[:, :1], first, atol=1e-5)
    np.testing.assert_array_equal(to_pixels(from_pixels(np.arange(256, dtype=np.uint8))), np.arange(256))


def test_the_network_sees_it_at_timestep_0_in_its_modulations(pipe, noise, out):
    """One Euler step is the noise less the velocity, of which each frame's timestep is told by itself here."""
    cfg, first = pipe.models.configs["transformer"], out.latents[:, :1]
    pipeline_clip = pipe.clip(steps=1, solver="euler", **SIZE)
    request = jvdiff.models.family.Request(prompts=(PROMPT, "up"))
    inputs = pipe.family.inputs(pipe.models, pipeline_clip, request)
    condition, _ = jvdiff.pipeline.encode(pipe.context, pipeline_clip, inputs, pipe.run)
    t = np.array([[0.0, 1000.0, 1000.0]] * 2, np.float32)
    x = np.concatenate([first, noise[:, 1:]], axis=1)
    run = jax.jit(lambda params, text: wan.velocity(params, cfg, x, t, text, text_length=512))
    v = run(pipe.weights["transformer"], condition.text)
    np.testing.assert_allclose(out.latents[:, 1:], noise[:, 1:] - v[:, 1:], atol=2e-3)


def test_a_clip_depends_neither_on_its_batch_nor_on_the_noise_of_its_first_frame(pipe, noise, out):
    """Several steps with guidance, tokens in tiles: the frame is put in at each of them, in both branches."""
    noise = noise[:1]
    more = {**SIZE, "guidance": 3.0, "steps": 3, "image": picture(0), "pattern": "sliding_tile:1x1x2:5x5x5"}
    one = jvdiff.generate(pipe, PROMPT, noise=noise, **more)
    changed = noise.copy()
    changed[:, 0] += 3
    np.testing.assert_array_equal(jvdiff.generate(pipe, PROMPT, noise=changed, **more).latents, one.latents)
    np.testing.assert_allclose(one.latents[:, 0], out.latents[:1, 0], atol=1e-5)


def test_only_one_picture_and_only_at_the_beginning(pipe):
    with pytest.raises(UsageError, match=r"takes no last_image; leave it out, or take Wan2\.1-FLF2V"):
        jvdiff.generate(pipe, PROMPT, image=picture(0), last_image=picture(1))


def test_48_channels_are_the_5b(tmp_path):
    published = TEXT_AND_IMAGE_TO_VIDEO.published["Wan2.2-TI2V-5B-Diffusers"]
    clip = TEXT_AND_IMAGE_TO_VIDEO.clip(published, jvdiff.pipeline.resolve(TEXT_AND_IMAGE_TO_VIDEO, published, {}, {}))
    assert clip.frames == (121, 704, 1280) and clip.latents == (31, 44, 80, 48) and clip.settings.fps == 24
    assert TEXT_AND_IMAGE_TO_VIDEO.unit(published) == 32
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps(wan.WAN_2_2_VAE.to_json()))
    assert settings.defaults({}, tmp_path) == {"num_frames": 121, "height": 704, "width": 1280, "fps": 24}


def test_what_model_index_says_is_a_truth_value():
    assert settings.select({"_class_name": "WanPipeline", "expand_timesteps": True}, {}) == "TEXT_AND_IMAGE_TO_VIDEO"
    assert settings.select({"_class_name": "WanPipeline", "expand_timesteps": None}, {}) == "TEXT_TO_VIDEO"
    with pytest.raises(CheckpointError, match="expand_timesteps is 'yes'; expected true or false"):
        settings.select({"_class_name": "WanPipeline", "expand_timesteps": "yes"}, {})
