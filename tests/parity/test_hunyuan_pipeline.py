"""The whole of HunyuanVideo against diffusers.HunyuanVideoPipeline with the same noise: prompt in, latents and frames
out.

B batch · T latent frames · H W latent grid · C latent channels · F pixel frames · Y X pixel height, width.
"""

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

# Most cases of one transformer have the same shapes, and so share its programs.
PUBLISHED, OTHER = {}, {"num_layers": 2, "num_single_layers": 1, "num_refiner_layers": 2, "mlp_ratio": 3.0}
AREA = {"height": 32, "width": 48}
SHORT, MIDDLE, LONG = ({"num_frames": n, **AREA} for n in (5, 17, 33))
WORDS = "a red seven moving left " * 60  # more than 256 tokens
TILES = "32x32:32x24"


def theirs_of(folder):
    """diffusers' pipeline of a repository, with its Llama 3 tokenizer read as such: transformers 5 splits text as Llama
    2 did where the class is LlamaTokenizerFast, as which it is published."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    pipe = diffusers.HunyuanVideoPipeline.from_pretrained(folder, tokenizer=tokenizer, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("hunyuan") / "hf", 0, **PUBLISHED)


@pytest.fixture(scope="module")
def published(folder):
    """(ours, theirs): both programs on the same weights."""
    return jvdiff.load(folder, "float32"), theirs_of(folder)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    folder = tiny.write(tmp_path_factory.mktemp("hunyuan") / "hf", 1, **OTHER)
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


NAMES = {"guidance": "guidance_scale", "true_guidance": "true_cfg_scale", "negative_prompt": "negative_prompt"}


def check(both, prompts, size, steps=2, windows=True, tiles=None, shift=None, **given):
    """One clip of both programs."""
    ours, theirs = both
    noise = draw(ours, len(prompts), steps + len(given), **size)
    named = {NAMES[name]: value for name, value in given.items()}
    if isinstance(against := named.get("negative_prompt"), str):
        named["negative_prompt"] = [against] * len(prompts)
    theirs.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift or 7.0)
    theirs.vae.use_framewise_decoding, theirs.vae.use_tiling = windows, tiles is not None
    latents, frames = diffusers_clip(theirs, noise, prompts, size, steps, **named)
    given |= {"vae_windows": windows, "vae_tiles": tiles or "off", **({"shift": shift} if shift else {})}
    out = jvdiff.generate(ours, prompts, noise=noise, steps=steps, **given, **size)
    compare(out, latents, frames)
    return noise, out


@pytest.mark.parametrize(
    "given",
    [
        {"guidance": 6.0},
        {"guidance": 3.5, "steps": 4},
        {"true_guidance": 4.0},  # of nothing: there is no second pass
        {"negative_prompt": "blue right"},  # nor here
        {"steps": 6, "shift": 17.0},  # FastHunyuan
    ],
    ids=str,
)
def test_nine_latent_frames_in_windows(published, given):
    check(published, ["a  red seven\n<b>moving</b> &amp; LEFT"], LONG, **given)


def test_an_empty_negative_prompt_beside_a_long_prompt_in_tiles(published):
    """Two prompts, one of them cut after 256 tokens, and the other padded."""
    _, theirs = published
    theirs.vae.enable_tiling(
        tile_sample_min_height=32, tile_sample_min_width=32, tile_sample_stride_height=32, tile_sample_stride_width=24
    )
    check(published, ["up", WORDS], SHORT, tiles=TILES, true_guidance=2.0, negative_prompt="")


@pytest.mark.parametrize("windows", [True, False])
def test_a_negative_prompt_with_five_latent_frames_in_windows_and_whole(other, windows):
    check(other, ["two"], MIDDLE, windows=windows, true_guidance=4.0, negative_prompt="blue right")


def test_one_frame(other):
    check(other, ["a red seven"], {"num_frames": 1, **AREA}, steps=3)


def test_what_changes_a_clip(published):
    """The comparisons above would pass with an encoder that nobody listens to, or a guidance that nobody is told. 6.016
    is what diffusers tells the network in bfloat16; the scheduler's own levels are others."""
    ours, _ = published
    noise = draw(ours, 1, 0, **LONG)
    base = {"prompts": ["a red seven moving left"], "guidance": 6.0, "steps": 2}

    def made(**change):
        return jvdiff.generate(ours, noise=noise, **{**base, **change}, **LONG).latents

    first = made()
    for change in ({"prompts": ["blue"]}, {"guidance": 6.016}, {"shift": 6.9}, {"grid": "diffusers"}):
        assert np.linalg.norm(made(**change) - first) / np.linalg.norm(first) > 1e-4, change


def test_converted_and_written_back(folder, published, tmp_path):
    """Hugging Face -> Orbax -> Hugging Face, which diffusers loads. It draws Llama's last layers anew, which are not
    written back; they change nothing."""
    convert(folder, tmp_path / "orbax")
    to_hf(tmp_path / "orbax", tmp_path / "back")
    both = jvdiff.load(tmp_path / "orbax", "float32"), theirs_of(tmp_path / "back")
    noise, out = check(both, ["a red seven"], LONG)
    again = jvdiff.generate(published[0], ["a red seven"], noise=noise, steps=2, vae_tiles="off", **LONG)
    np.testing.assert_array_equal(again.latents, out.latents)
