"""The whole of HunyuanVideo against diffusers.HunyuanVideoPipeline with the same noise: prompt in, latents and frames
out.

B batch · T latent frames · H W latent grid · C latent channels · F pixel frames · Y X pixel height, width.
"""

import logging

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

import jvdiff  # noqa: E402
from convert.from_diffusers import convert  # noqa: E402
from convert.to_diffusers import to_hf  # noqa: E402
from tests.models.hunyuan_video import tiny  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

VARIANTS = {
    "published layout": {},
    "another shape": {"num_layers": 2, "num_single_layers": 1, "num_refiner_layers": 2, "mlp_ratio": 3.0},
}
SIZE = {"num_frames": 5, "height": 32, "width": 48}
LONG = "a red seven moving left " * 60  # more than 256 tokens


def theirs_of(folder):
    """diffusers' pipeline of a repository, with its Llama 3 tokenizer read as such: transformers 5 splits text as Llama
    2 did where the class is LlamaTokenizerFast, as which it is published."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    pipe = diffusers.HunyuanVideoPipeline.from_pretrained(folder, tokenizer=tokenizer, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=VARIANTS)
def both(request, tmp_path_factory):
    """(ours, theirs): both programs on the same weights."""
    folder = tiny.write(tmp_path_factory.mktemp("hunyuan") / "hf", len(request.param), **VARIANTS[request.param])
    return jvdiff.load(folder, "float32"), theirs_of(folder)


def diffusers_clip(pipe, noise, prompts, size, steps, **given):
    """(latents [B,T,H,W,C], frames uint8 [B,F,Y,X,3]); decoded apart, as its own last lines do."""
    latents = pipe(
        prompt=prompts,
        num_inference_steps=steps,
        latents=torch.from_numpy(noise.transpose(0, 4, 1, 2, 3).copy()),
        output_type="latent",
        **given,
        **size,
    ).frames
    with torch.inference_mode():
        frames = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
        frames = pipe.video_processor.postprocess_video(frames, output_type="np")
    return latents.numpy().transpose(0, 2, 3, 4, 1), np.round(frames * 255).astype(np.uint8)


def compare(out, latents, frames, case=""):
    assert out.latents.shape == latents.shape and out.video.shape == frames.shape
    error = np.linalg.norm(out.latents - latents) / np.linalg.norm(latents)
    difference = out.video.astype(np.float64) - frames
    psnr = 10 * np.log10(255**2 / max(np.mean(difference**2), 1e-12))
    print(f"{case}: latents {error:.1e}, frames {psnr:.1f} dB")
    assert error <= 1e-4 and psnr >= 52
    assert latents.std() > 0.1 and frames.std() > 5  # there is something to compare


def draw(pipe, clips, seed, **size):
    return np.random.default_rng(seed).standard_normal((clips, *pipe.clip(**size).latents), np.float32)


CASES = {  # prompts, what both are given (theirs: by diffusers' names), steps
    "guidance that is told": (["a red seven moving left"], {"guidance": 6.0}, 4),
    "another guidance": (["a  red seven\n<b>moving</b> &amp; LEFT"], {"guidance": 3.5}, 3),
    "a negative prompt": (["a red two"], {"true_guidance": 4.0, "negative_prompt": "blue right"}, 3),
    "an empty negative prompt": (["two"], {"true_guidance": 2.5, "negative_prompt": ""}, 3),
    "true guidance of nothing": (["two"], {"true_guidance": 4.0}, 2),
    "two prompts, a long one": (["up", LONG], {"true_guidance": 2.0, "negative_prompt": "two"}, 2),
}
NAMES = {"guidance": "guidance_scale", "true_guidance": "true_cfg_scale", "negative_prompt": "negative_prompt"}


@pytest.mark.parametrize("case", CASES)
def test_same_noise_same_clip(both, case, caplog):
    (ours, theirs), (prompts, given, steps) = both, CASES[case]
    given = {name: value for name, value in given.items() if name in NAMES}
    noise = draw(ours, len(prompts), len(case), **SIZE)
    named = {NAMES[name]: value for name, value in given.items()}
    if isinstance(against := named.get("negative_prompt"), str):
        named["negative_prompt"] = [against] * len(prompts)
    with caplog.at_level(logging.ERROR):
        latents, frames = diffusers_clip(theirs, noise, prompts, SIZE, steps, **named)
    compare(jvdiff.generate(ours, prompts, noise=noise, steps=steps, **given, **SIZE), latents, frames, case)


def test_what_changes_a_clip(both):
    """The comparisons above would pass with an encoder that nobody listens to, or a guidance that nobody is told."""
    ours, _ = both
    noise = draw(ours, 1, 0, **SIZE)
    base = {"prompts": ["a red seven moving left"], "guidance": 6.0, "steps": 3}

    def made(**change):
        return jvdiff.generate(ours, noise=noise, **{**base, **change}, **SIZE).latents

    first = made()
    for change in ({"prompts": ["blue"]}, {"guidance": 6.016}, {"shift": 6.9}, {"grid": "diffusers"}):
        assert np.linalg.norm(made(**change) - first) / np.linalg.norm(first) > 1e-4, change


# (latent frames, tiles of the VAE in space, windows in time)
DECODINGS = [(1, None, True), (2, None, True), (5, None, True), (5, None, False), (9, "32x32:24x24", True)]


@pytest.mark.parametrize("frames, tiles, windows", DECODINGS)
def test_lengths_and_tiles(both, frames, tiles, windows):
    ours, theirs = both
    size = {"num_frames": 1 + 4 * (frames - 1), "height": 32, "width": 48}
    noise = draw(ours, 1, frames, **size)
    vae = theirs.vae
    vae.use_framewise_decoding, vae.use_tiling = windows, tiles is not None
    if tiles:
        vae.enable_tiling(
            tile_sample_min_height=32, tile_sample_min_width=32, tile_sample_stride_height=24,
            tile_sample_stride_width=24,
        )  # fmt: skip
    try:
        latents, pixels = diffusers_clip(theirs, noise, ["a red seven"], size, 2)
    finally:
        vae.use_framewise_decoding = True
        vae.disable_tiling()
    given = {"vae_tiles": tiles or "off", "vae_windows": windows, "steps": 2}
    compare(jvdiff.generate(ours, ["a red seven"], noise=noise, **given, **size), latents, pixels)


def test_a_fast_clip(both):
    """FastHunyuan: six steps with shift 17."""
    ours, theirs = both
    noise = draw(ours, 1, 3, **SIZE)
    scheduler = theirs.scheduler
    theirs.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=17.0)
    try:
        latents, frames = diffusers_clip(theirs, noise, ["two"], SIZE, 6)
    finally:
        theirs.scheduler = scheduler
    compare(jvdiff.generate(ours, ["two"], noise=noise, steps=6, shift=17.0, **SIZE), latents, frames)


def test_converted_and_written_back(tmp_path):
    """Hugging Face -> Orbax -> Hugging Face, which diffusers loads: Llama's last layers, which are not written back, are
    drawn anew there, and change nothing."""
    folder = tiny.write(tmp_path / "hf", 7)
    convert(folder, tmp_path / "orbax")
    to_hf(tmp_path / "orbax", tmp_path / "back")
    ours, theirs = jvdiff.load(tmp_path / "orbax", "float32"), theirs_of(tmp_path / "back")
    noise = draw(ours, 1, 5, **SIZE)
    latents, frames = diffusers_clip(theirs, noise, ["a red seven"], SIZE, 2)
    out = jvdiff.generate(ours, ["a red seven"], noise=noise, steps=2, **SIZE)
    compare(out, latents, frames)
    again = jvdiff.generate(jvdiff.load(folder, "float32"), ["a red seven"], noise=noise, steps=2, **SIZE)
    np.testing.assert_array_equal(again.latents, out.latents)
