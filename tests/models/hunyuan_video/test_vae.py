"""HunyuanVideo's VAE: published files read unchanged, numbers beside a plain program in numpy, streamed, on a mesh.

B batch · T latent frames · H W latent grid · C channels · F pixel frames · Y X pixel height, width.
"""

import collections
import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff.errors import CheckpointError
from jvdiff.models.family import Forward, Models
from jvdiff.models.hunyuan_video import decoding, vae, vae_layers, vae_names
from jvdiff.models.hunyuan_video.vae_config import HUNYUAN_VIDEO_VAE, VAEConfig
from jvdiff.models.vae_tiles import Tiles
from jvdiff.sharding import MeshShape, Placement, make_mesh
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


CFG = VAEConfig(block_out_channels=(4, 4, 8), latent_channels=3, layers_per_block=1, norm_num_groups=2)


@pytest.fixture(scope="module")
def params(random_params):
    return random_params(vae.abstract_params(CFG))


def given(T, H, W, seed=0):
    return np.random.default_rng(seed).standard_normal((1, T, H, W, 3), np.float32)


def error(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return np.linalg.norm(a - b) / np.linalg.norm(b)


class Plain:
    """The networks as they are defined, [T,H,W,C] in float64: nothing folded, nothing left out, one frame not apart."""

    def __init__(self, params, groups):
        self.params, self.groups = params, groups

    def leaf(self, path, name):
        tree = self.params
        for key in (*path.split("/"), name):
            tree = tree[key]
        return np.asarray(tree, np.float64)

    def dense(self, path, x):
        return x @ self.leaf(path, "kernel") + self.leaf(path, "bias")

    def conv(self, path, x, stride=(1, 1, 1)):
        kernel, padded = self.leaf(path, "kernel"), np.pad(x, ((2, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
        taps = np.lib.stride_tricks.sliding_window_view(padded, (3, 3, 3), axis=(0, 1, 2))
        t, h, w = stride
        return np.einsum("thwiabc,abcio->thwo", taps[::t, ::h, ::w], kernel) + self.leaf(path, "bias")

    def norm(self, path, x):
        parts = x.reshape(-1, self.groups, x.shape[-1] // self.groups)
        parts = (parts - parts.mean((0, 2), keepdims=True)) / np.sqrt(parts.var((0, 2), keepdims=True) + 1e-6)
        return parts.reshape(x.shape) * self.leaf(path, "scale") + self.leaf(path, "bias")

    def active(self, path, x):
        x = self.norm(path, x)
        return x / (1 + np.exp(-x))

    def residual(self, path, x, width):
        y = self.conv(f"{path}/conv_1", self.active(f"{path}/norm_1", x))
        y = self.conv(f"{path}/conv_2", self.active(f"{path}/norm_2", y))
        return y + (x if x.shape[-1] == width else self.dense(f"{path}/shortcut", x))

    def mid(self, path, x):
        x = self.residual(f"{path}/res_0", x, x.shape[-1])
        normed, frame = self.norm(f"{path}/attn/norm", x), np.arange(len(x)).repeat(x[0, ..., 0].size)
        q, k, v = (self.dense(f"{path}/attn/{name}", normed).reshape(-1, x.shape[-1]) for name in "qkv")
        logits = np.where(frame[:, None] >= frame, q @ k.T / x.shape[-1] ** 0.5, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        mixed = (weights / weights.sum(-1, keepdims=True) @ v).reshape(x.shape)
        return self.residual(f"{path}/res_1", x + self.dense(f"{path}/attn/out", mixed), x.shape[-1])

    def head(self, path, x):
        return self.conv(f"{path}/conv_out", self.active(f"{path}/norm_out", x))

    def encode(self, x):  # with three levels both steps halve time, too
        x = self.conv("encoder/conv_in", x)
        for i, width in enumerate(CFG.block_out_channels):
            x = self.residual(f"encoder/down_{i}/res_0", x, width)
            x = self.conv(f"encoder/down_{i}/downsample", x, (2, 2, 2)) if i < 2 else x
        return self.dense("quant_conv", self.head("encoder", self.mid("encoder/mid", x)))

    def decode(self, x):
        x = self.mid("decoder/mid", self.conv("decoder/conv_in", self.dense("post_quant_conv", x)))
        for i, width in enumerate(reversed(CFG.block_out_channels)):
            for block in (0, 1):
                x = self.residual(f"decoder/up_{i}/res_{block}", x, width)
            if i < 2:
                x = np.concatenate([x[:1], x[1:].repeat(2, axis=0)]).repeat(2, axis=1).repeat(2, axis=2)
                x = self.conv(f"decoder/up_{i}/upsample", x)
        return self.head("decoder", x)

    def windows(self, latents):
        """Five latent frames: two windows, of which the second gives the last four frames, once they fade in."""
        first, second = self.decode(latents), self.decode(latents[3:])[1:]
        share = (np.arange(4) / 4)[:, None, None, None]
        return np.concatenate([first[:13], first[13:] * (1 - share) + second * share])


@pytest.fixture(scope="module")
def plain(params):
    return Plain(params, CFG.norm_num_groups)


def run(params):
    return lambda stage, *arguments: stage.program(params, *arguments)


def streamed(params, latents, tiles=None, **how):
    """Pixels [F,Y,X,3] as clips are decoded, and how many latent frames were done after each piece."""
    frames = 1 + 4 * (latents.shape[1] - 1), *(4 * n for n in latents.shape[2:4])
    settings = SimpleNamespace(vae_windows=True)
    clip: Any = SimpleNamespace(latents=latents.shape[1:], frames=frames, vae_tiles=tiles, settings=settings)
    given = Models({"vae": CFG}, {}, {}), clip, Forward(**how), run(params), latents * 0.476986
    pieces, bad, done = zip(*decoding.decode(*given), strict=True)
    assert not any(bad)
    return np.concatenate(pieces, axis=1)[0].astype(int), done


def as_pixels(x):
    return np.round(np.clip(x / 2 + 0.5, 0, 1) * 255)


def test_decoded_in_windows_as_a_plain_program_does_it(params, plain, monkeypatch):
    """The windows are on unless told otherwise; two programs decode any number of them. Large layers go by frames."""
    monkeypatch.setattr(vae_layers, "_LARGEST", 3000)
    latents = given(5, 3, 2)
    pixels, done = streamed(params, latents)
    assert done == (0, 4, 4, 5) and pixels.shape == (17, 12, 8, 3) and pixels.std() > 40
    assert np.abs(pixels - as_pixels(plain.windows(latents[0]))).max() <= 1  # a number may cross a half
    assert np.abs(pixels - as_pixels(plain.decode(latents[0]))).max() > 10


def test_a_longer_clip_takes_no_more_memory():
    """129 frames are eleven windows, of which ten are alike; nothing that a program is given or gives depends on T."""
    calls = collections.Counter()

    def run(stage, *arguments):
        calls[stage.name, str(jax.tree.map(np.shape, arguments))] += 1
        frames = np.zeros((1, 17, 8, 8, 3), np.float32)
        return frames if stage.name.startswith("decode") else (frames, 0.0, frames[:, 13:])

    settings = SimpleNamespace(vae_windows=True)
    clip: Any = SimpleNamespace(latents=(33, 2, 2, 3), frames=(129, 8, 8), vae_tiles=None, settings=settings)
    for _ in decoding.decode(Models({"vae": CFG}, {}, {}), clip, Forward(), run, jnp.zeros((1, 33, 2, 2, 3))):
        pass
    rows, tail = "[[(1, 17, 8, 8, 3)]]", "(1, 4, 8, 8, 3)"
    assert calls == {
        ("decode window", "((1, 5, 2, 2, 3),)"): 10,
        ("decode last window", "((1, 3, 2, 2, 3),)"): 1,
        ("join window", f"({rows}, None)"): 1,
        ("join window", f"({rows}, {tail})"): 9,
        ("join last window", f"({rows}, {tail})"): 1,
    }


def test_tiles_of_a_window(params, plain):
    """Two columns, of which the second fades in over four pixels; and products as TF32 has them, within a level."""
    latents = given(1, 1, 6)
    pixels, done = streamed(params, latents, Tiles((16, 16), (16, 12)), decode="tf32")
    left, right = (plain.decode(latents[0, :, :, part]) for part in (slice(4), slice(3, 6)))
    share = (np.arange(4) / 4)[:, None]
    seam = left[:, :, 12:] * (1 - share) + right[:, :, :4] * share
    assert done == (0, 0, 1)
    assert np.abs(pixels - as_pixels(np.concatenate([left[:, :, :12], seam, right[:, :, 4:]], axis=2))).max() <= 1


def test_eight_devices_share_every_frame(params, plain):
    """Four rows by two columns of them, of one cell by three each: neighbours, sums and attention cross all seams."""
    placement = Placement(make_mesh(MeshShape(sequence=4, tensor=2)))
    latents, video = given(2, 4, 6), np.clip(given(5, 16, 24), -1, 1)
    everywhere = jax.device_put(params, placement.everywhere)
    how = dict(static_argnums=1, static_argnames="placement")
    frames = jax.jit(vae.decode_piece, **how)(everywhere, CFG, latents, placement=placement)
    assert frames.addressable_shards[0].data.size * 8 == frames.size
    assert error(frames[0], plain.decode(latents[0])) <= 1e-5
    mean = jax.jit(vae.encode, **how)(everywhere, CFG, video, placement=placement)
    assert error(mean[0], plain.encode(video[0])[..., :3]) <= 1e-5


def test_scale():
    latents = jnp.full((1, 1, 1, 1, 1), 2.0)
    assert vae.normalize_latents(HUNYUAN_VIDEO_VAE, latents) == np.float32(2 * 0.476986)
    assert vae.denormalize_latents(HUNYUAN_VIDEO_VAE, latents) == np.float32(2 / 0.476986)
