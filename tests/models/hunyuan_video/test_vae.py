"""HunyuanVideo's VAE: the published file read unchanged, and what cannot be.

B batch · T latent frames · H W latent grid · C channels · F pixel frames · Y X pixel height, width.
"""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff.errors import CheckpointError
from jvdiff.models.hunyuan_video import vae, vae_names
from jvdiff.models.hunyuan_video.vae_config import HUNYUAN_VIDEO_VAE, VAEConfig
from jvdiff.weights import naming as rules

LISTS = Path(__file__).parents[2] / "data" / "tensors"
PUBLISHED = {
    "_class_name": "AutoencoderKLHunyuanVideo",
    "_diffusers_version": "0.32.0.dev0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["HunyuanVideoDownBlock3D"] * 4,
    "in_channels": 3,
    "latent_channels": 16,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "scaling_factor": 0.476986,
    "spatial_compression_ratio": 8,
    "temporal_compression_ratio": 4,
    "up_block_types": ["HunyuanVideoUpBlock3D"] * 4,
}


def test_the_published_configuration():
    assert VAEConfig.from_json(PUBLISHED) == VAEConfig.from_json({}) == HUNYUAN_VIDEO_VAE
    stamps = {"_class_name": PUBLISHED["_class_name"], "_diffusers_version": PUBLISHED["_diffusers_version"]}
    assert HUNYUAN_VIDEO_VAE.to_json() | stamps == PUBLISHED
    small = dataclasses.replace(HUNYUAN_VIDEO_VAE, block_out_channels=(32, 32, 64))
    assert VAEConfig.from_json(json.loads(json.dumps(small.to_json()))) == small


@pytest.mark.parametrize(
    "field, value",
    [
        ("block_out_channels", [128, 256]),
        ("block_out_channels", [128, 250, 512, 512]),
        ("block_out_channels", 128),
        ("latent_channels", 0),
        ("layers_per_block", 2.0),
        ("norm_num_groups", True),
        ("scaling_factor", math.nan),
        ("scaling_factor", "1"),
        ("act_fn", "gelu"),
        ("mid_block_add_attention", False),
        ("spatial_compression_ratio", 16),
        ("temporal_compression_ratio", 8),
        ("down_block_types", ["DownBlock3D"] * 4),
        ("sample_posterior", True),
    ],
)
def test_a_value_that_cannot_be_is_named(field, value):
    with pytest.raises(CheckpointError, match=field):
        VAEConfig.from_json(PUBLISHED | {field: value})


def test_published_tensors():
    cfg = HUNYUAN_VIDEO_VAE
    abstract = vae.abstract_params(cfg, jnp.bfloat16)
    ours = {name: entry.shape for name, entry in rules.expected(vae_names.vae(cfg), abstract).items()}
    lines = (line.split("\t") for line in (LISTS / "hunyuan_video_vae.tsv").read_text().splitlines()[1:])
    assert ours == {name: tuple(json.loads(shape)) for name, shape, _ in lines}
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract)) == 246_478_803


@pytest.mark.parametrize(
    "frames, expected",
    [
        (1, [(0, 1)]),
        (4, [(0, 4)]),
        (5, [(0, 5), (3, 5)]),
        (7, [(0, 5), (3, 7)]),
        (8, [(0, 5), (3, 8), (6, 8)]),
        (33, [(start, min(start + 5, 33)) for start in range(0, 31, 3)]),  # 129 frames of pixels
    ],
)
def test_windows_begin_every_three_latent_frames(frames, expected):
    assert [(cut.start, cut.stop) for cut in vae.cut_in_windows(frames)] == expected


def test_scale():
    latents = np.float32([[[[[2.0]]]]])
    assert vae.normalize_latents(HUNYUAN_VIDEO_VAE, latents) == np.float32(2 * 0.476986)
    assert vae.denormalize_latents(HUNYUAN_VIDEO_VAE, latents) == np.float32(2 / 0.476986)
