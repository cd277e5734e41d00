"""The whole pipeline against diffusers.WanPipeline with the same noise: prompt in, latents and frames out.

B batch · T latent frames · H W latent grid · C latent channels · F pixel frames · Y X pixel height, width.
"""

import json
import logging
from pathlib import Path

import jax
import numpy as np
import pytest

import jvdiff
from convert.to_diffusers import to_hf
from jvdiff.digits import tokenizer as digits_tokenizer
from jvdiff.models import wan
from jvdiff.models.text import umt5
from jvdiff.models.wan.family import TEXT_TO_VIDEO
from jvdiff.pipeline import repository

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

DIGITS = Path(__file__).parents[2] / "checkpoints" / "digits"
WORDS = ["a", "red", "blue", "seven", "two", "moving", "left", "right", "up"]
SCHEDULERS = {
    "unipc": {
        "_class_name": "UniPCMultistepScheduler",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 3.0,
    },
    "euler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 5.0},
}


def random_components():
    """A tiny model of every kind, every parameter away from zero, so that no layer is idle."""
    dit = wan.DiTConfig(
        in_channels=4, out_channels=4, text_dim=24, num_attention_heads=2, attention_head_dim=24, freq_dim=32,
        ffn_dim=96, num_layers=3,
    )  # fmt: skip
    vae = wan.VAEConfig(
        base_dim=6, z_dim=4, num_res_blocks=1, latents_mean=(0.1, -0.2, 0.0, 0.3), latents_std=(1.0, 0.9, 1.1, 1.2)
    )
    text = umt5.Config(
        vocab_size=digits_tokenizer.build(WORDS).get_vocab_size(),
        d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3,
    )  # fmt: skip
    random = np.random.default_rng(0)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        size = 0.5 if "modulation" in name else 0.2 if leaf.ndim == 1 else leaf[..., 0].size ** -0.5
        return np.float32("scale" in name) + np.float32(size) * random.standard_normal(leaf.shape, np.float32)

    def params(model, cfg):
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), model.abstract_params(cfg))
        return jax.tree_util.tree_map_with_path(fill, zeros)

    return {
        "transformer": (dit, params(wan, dit)),
        "vae": (vae, params(wan, vae)),
        "text_encoder": (text, params(umt5, text)),
    }


@pytest.fixture(scope="module", params=["unipc", "euler", "digits"])
def both(request, tmp_path_factory):
    """(ours, theirs, size of a clip): both programs on the same weights."""
    if request.param == "digits":
        folder = source = DIGITS
        defaults = json.loads((DIGITS / "jvdiff_defaults.json").read_text())
        size = {name: defaults[name] for name in ("num_frames", "height", "width")}
    else:
        root = tmp_path_factory.mktemp(request.param)
        digits_tokenizer.save(digits_tokenizer.build(WORDS), root / "words")
        source, folder = root / "orbax", root / "hf"
        files = {"tokenizer": root / "words", "scheduler": {"scheduler_config.json": SCHEDULERS[request.param]}}
        repository.save(source, TEXT_TO_VIDEO, random_components(), files=files)
        to_hf(source, folder)
        size = {"num_frames": 9, "height": 32, "width": 48}
    theirs = diffusers.WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    return jvdiff.load(source, precision="float32"), theirs, size


CASES = {
    "guided": {"prompts": ["a red seven moving left"], "guidance": 4.0, "negative_prompt": "blue right", "seed": 0},
    "empty negative prompt": {"prompts": ["a blue two moving up"], "guidance": 4.0, "negative_prompt": "", "seed": 1},
    "unguided": {"prompts": ["a red two moving right"], "guidance": 1.0, "negative_prompt": "", "seed": 2},
    "two prompts": {
        "prompts": ["a  red seven\nmoving &amp; LEFT", "up"],
        "guidance": 2.5,
        "negative_prompt": "two",
        "seed": 3,
    },
}


def diffusers_clip(pipe, noise, prompts, guidance, negative_prompt, steps, size, guidance_2=None):
    """(latents [B,T,H,W,C], frames uint8 [B,F,Y,X,3]) of WanPipeline; decoded apart, as its own last lines do."""
    generator = torch.Generator().manual_seed(0)  # never drawn from: noise is given
    latents = pipe(
        prompt=prompts,
        negative_prompt=negative_prompt,
        guidance_scale=guidance,
        guidance_scale_2=guidance_2,
        num_inference_steps=steps,
        latents=torch.from_numpy(noise.transpose(0, 4, 1, 2, 3).copy()),
        generator=generator,
        output_type="latent",
        **size,
    ).frames
    with torch.inference_mode():
        mean, std = (
            torch.tensor(v).view(1, -1, 1, 1, 1) for v in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
        )
        frames = pipe.vae.decode(latents * std + mean, return_dict=False)[0]
        frames = pipe.video_processor.postprocess_video(frames, output_type="np")
    return latents.numpy().transpose(0, 2, 3, 4, 1), np.round(frames * 255).astype(np.uint8)


@pytest.mark.parametrize("case", CASES)
def test_same_noise_same_clip(both, case, caplog):
    ours, theirs, size = both
    given = dict(CASES[case])
    prompts, seed, steps = given.pop("prompts"), given.pop("seed"), 20 if len(size) and size["height"] == 64 else 6
    shape = ours.clip(**size).latents
    noise = np.random.default_rng(seed).standard_normal((len(prompts), *shape), np.float32)
    with caplog.at_level(logging.ERROR):
        latents, frames = diffusers_clip(theirs, noise, prompts, steps=steps, size=size, **given)
    out = jvdiff.generate(ours, prompts, noise=noise, steps=steps, **given, **size)
    assert out.latents.shape == latents.shape and out.video.shape == frames.shape
    error = np.linalg.norm(out.latents - latents) / np.linalg.norm(latents)
    difference = out.video.astype(np.float64) - frames
    psnr = 10 * np.log10(255**2 / max(np.mean(difference**2), 1e-12))
    print(f"{case}: latents {error:.1e}, frames {psnr:.1f} dB, {np.mean(difference != 0):.1e} of the bytes differ")
    assert error <= 1e-4 and psnr >= 55
    assert latents.std() > 0.1 and frames.std() > 5  # there is something to compare


def test_another_prompt_is_another_clip(both):
    """The comparison above would pass with a text encoder that nobody listens to."""
    ours, _, size = both
    noise = np.random.default_rng(0).standard_normal((1, *ours.clip(**size).latents), np.float32)
    one, other = (
        jvdiff.generate(ours, [prompt], noise=noise, steps=3, guidance=4.0, **size).latents
        for prompt in ("a red seven moving left", "a blue two moving right")
    )
    assert np.linalg.norm(one - other) / np.linalg.norm(one) > 1e-3


# ------------------------------------------------------------------------------------------------------- two experts


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """(ours of the folder, ours converted, theirs, size of a clip) of a repository with two transformers."""
    root, components = tmp_path_factory.mktemp("experts"), random_components()
    cfg, params = components["transformer"]
    components["transformer_2"] = cfg, jax.tree.map(lambda x: np.ascontiguousarray(x[::-1]), params)
    digits_tokenizer.save(digits_tokenizer.build(WORDS), root / "words")
    files = {"tokenizer": root / "words", "scheduler": {"scheduler_config.json": SCHEDULERS["unipc"]}}
    repository.save(root / "orbax", TEXT_TO_VIDEO, components, files=files, index={"boundary_ratio": 0.9})
    to_hf(root / "orbax", root / "hf")
    theirs = diffusers.WanPipeline.from_pretrained(root / "hf", torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    ours = [jvdiff.load(root / name, precision="float32") for name in ("hf", "orbax")]
    return *ours, theirs, {"num_frames": 5, "height": 32, "width": 48}


def test_two_experts(experts):
    """The step at t = 900 is the boundary's own; a guidance for each; two prompts, a negative one."""
    ours, converted, theirs, size = experts
    given = {"guidance": 4.0, "guidance_2": 2.5, "negative_prompt": "blue right", "steps": 4}
    prompts = ["a red seven moving left", "two"]
    noise = np.random.default_rng(5).standard_normal((2, *ours.clip(**size).latents), np.float32)
    assert 900 in ours.clip(**size, steps=4).sampler.schedule.timesteps
    latents, frames = diffusers_clip(theirs, noise, prompts, size=size, **given)
    out = jvdiff.generate(ours, prompts, noise=noise, **given, **size)
    same_clip(out, latents, frames)
    again = jvdiff.generate(converted, prompts, noise=noise, **given, **size)
    np.testing.assert_array_equal(again.latents, out.latents)
    for change in ({"boundary": 0.9001}, {"guidance_2": None}):  # what a mistake at the boundary would be
        other = jvdiff.generate(ours, prompts, noise=noise, **{**given, **change}, **size).latents
        assert np.linalg.norm(other - latents) / np.linalg.norm(latents) > 1e-3


def test_one_expert_is_null(experts):
    """All steps of a boundary of 1 are below it, and under the second's guidance."""
    ours, _, theirs, size = experts
    null = diffusers.WanPipeline(**{**theirs.components, "transformer": None}, boundary_ratio=1.0)
    null.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(6).standard_normal((2, *ours.clip(**size).latents), np.float32)
    given = {"guidance": 4.0, "guidance_2": 3.0, "negative_prompt": "", "steps": 3}
    latents, frames = diffusers_clip(null, noise, ["a red two", "up"], size=size, **given)
    same_clip(jvdiff.generate(ours, ["a red two", "up"], noise=noise, boundary=1.0, **given, **size), latents, frames)


def same_clip(out, latents, frames):
    assert out.latents.shape == latents.shape and out.video.shape == frames.shape
    assert np.linalg.norm(out.latents - latents) / np.linalg.norm(latents) <= 1e-4
    assert 10 * np.log10(255**2 / max(np.mean((out.video.astype(np.float64) - frames) ** 2), 1e-12)) >= 52
    assert latents.std() > 0.1 and frames.std() > 5
