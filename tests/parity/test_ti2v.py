"""Wan 2.2 TI2V against diffusers with the same noise, with a picture and without: residual VAE, the first frame given.

B batch · T latent frames · H W latent grid · C latent channels · F pixel frames · Y X pixel height, width.
"""

import logging

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import jvdiff
from convert.from_diffusers import convert
from convert.to_diffusers import to_hf
from jvdiff.digits import tokenizer as digits_tokenizer
from jvdiff.models import wan
from jvdiff.models.text import umt5
from jvdiff.models.wan.family import TEXT_AND_IMAGE_TO_VIDEO
from jvdiff.pipeline import repository

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from tests.parity.test_pipeline import SCHEDULERS, WORDS, diffusers_clip  # noqa: E402 - it is skipped without torch

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

CONFIGS = {
    "transformer": wan.DiTConfig(
        in_channels=6, out_channels=6, text_dim=24, num_attention_heads=2, attention_head_dim=24, freq_dim=32,
        ffn_dim=96, num_layers=2,
    ),
    "vae": wan.VAEConfig(
        base_dim=4, decoder_base_dim=6, z_dim=6, dim_mult=(1, 2, 2), temperal_downsample=(True, True),
        num_res_blocks=1, is_residual=True, patch_size=2,
        latents_mean=(0.1, -0.2, 0.0, 0.3, 0.2, -0.1), latents_std=(1.0, 0.9, 1.1, 1.2, 0.8, 1.0),
    ),
    "text_encoder": umt5.Config(
        vocab_size=digits_tokenizer.build(WORDS).get_vocab_size(), d_model=24, d_kv=8, d_ff=40, num_layers=2,
        num_heads=3,
    ),
}  # fmt: skip


def random_params(cfg):
    random = np.random.default_rng(0)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        size = 0.5 if "modulation" in name else 0.2 if len(leaf.shape) == 1 else np.prod(leaf.shape[:-1]) ** -0.5
        return np.float32("scale" in name) + np.float32(size) * random.standard_normal(leaf.shape, np.float32)

    model = umt5 if isinstance(cfg, umt5.Config) else wan
    return jax.tree_util.tree_map_with_path(fill, model.abstract_params(cfg))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(ours, the folder for theirs)"""
    root = tmp_path_factory.mktemp("ti2v")
    digits_tokenizer.save(digits_tokenizer.build(WORDS), root / "words")
    files = {"tokenizer": root / "words", "scheduler": {"scheduler_config.json": SCHEDULERS["unipc"]}}
    components = {name: (cfg, random_params(cfg)) for name, cfg in CONFIGS.items()}
    more = {"expand_timesteps": True}
    repository.save(root / "orbax", TEXT_AND_IMAGE_TO_VIDEO, components, files=files, index=more)
    to_hf(root / "orbax", root / "hf")
    return jvdiff.load(root / "orbax", precision="float32"), root / "hf"


CASES = {
    "two clips of a picture": {"prompts": ["a red seven moving left", "up"], "guidance": 4.0, "negative_prompt": "two"},
    "one frame of it, in tiles": {"prompts": ["a blue two moving up"], "guidance": 1.0, "tiled": True, "frames": 1},
    "without": {"prompts": ["a red two"], "guidance": 1.0, "image": False},
}


@pytest.mark.parametrize("case", CASES)
def test_same_noise_same_clip(both, case, caplog):
    ours, folder = both
    given = {"negative_prompt": "", "image": True, "tiled": False, "frames": 9} | CASES[case]
    size = {"num_frames": given.pop("frames"), "height": 32, "width": 48}
    random = np.random.default_rng(1)
    cells = random.integers(0, 256, (4, 5, 3), np.uint8)
    picture = Image.fromarray(cells).resize((70, 40), Image.Resampling.BICUBIC)
    shown = {"image": picture} if given.pop("image") else {}
    kind = diffusers.WanImageToVideoPipeline if shown else diffusers.WanPipeline
    tiles = {"vae_tiles": "32x32:32x16"} if given.pop("tiled") else {}
    noise = random.standard_normal((len(given["prompts"]), *ours.clip(**size).latents), np.float32)
    with caplog.at_level(logging.ERROR):
        theirs = kind.from_pretrained(folder, torch_dtype=torch.float32)
        theirs.set_progress_bar_config(disable=True)
        if tiles:
            theirs.vae.enable_tiling(32, 32, 32, 16)
        latents, frames = diffusers_clip(theirs, noise, steps=4, size={**size, **shown}, **given)
    prompts = given.pop("prompts")
    out = jvdiff.generate(ours, prompts, noise=noise, steps=4, **given, **size, **shown, **tiles)
    assert out.latents.shape == latents.shape and out.video.shape == frames.shape
    error = np.linalg.norm(out.latents - latents) / np.linalg.norm(latents)
    difference = out.video.astype(np.float64) - frames
    psnr = 10 * np.log10(255**2 / max(np.mean(difference**2), 1e-12))
    print(f"{case}: latents {error:.1e}, frames {psnr:.1f} dB")
    assert error <= 1e-4 and psnr >= 52
    assert latents.std() > 0.1 and frames.std() > 5  # there is something to compare


def test_there_and_back_is_bit_equal(both, tmp_path):
    _, folder = both
    convert(folder, tmp_path / "orbax")
    to_hf(tmp_path / "orbax", tmp_path / "back")
    files = sorted(file.relative_to(folder) for file in folder.rglob("*.safetensors"))
    assert [file.parent.name for file in files] == ["text_encoder", "transformer", "vae"]
    for file in files:
        there, back = load_file(folder / file), load_file(tmp_path / "back" / file)
        assert there.keys() == back.keys() and all(there[name].tobytes() == back[name].tobytes() for name in there)
