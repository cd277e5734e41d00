"""The Wan VAE against diffusers' AutoencoderKLWan, live, with weights scaled so that no layer is idle.

B batch · T latent frames · H W latent grid · C channels · F pixel frames · Y X pixel height, width.
"""

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff.models import wan
from jvdiff.models.vae_tiles import Tiles
from jvdiff.models.wan import names
from jvdiff.weights import naming as rules

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.parity

TINY = wan.VAEConfig(base_dim=8, num_res_blocks=1)
TWO_BLOCKS = wan.VAEConfig(base_dim=8, num_res_blocks=2)
DIGITS = wan.VAEConfig(  # the shipped model's proportions
    base_dim=4, dim_mult=(1, 4, 8, 8), num_res_blocks=1, z_dim=8, latents_mean=(0.0,) * 8, latents_std=(1.0,) * 8
)
RESIDUAL = wan.VAEConfig(  # Wan 2.2's, in widths that differ on every level
    base_dim=4,
    decoder_base_dim=8,
    num_res_blocks=1,
    z_dim=6,
    is_residual=True,
    patch_size=2,
    latents_mean=(0.0,) * 6,
    latents_std=(1.0,) * 6,
)
encode = jax.jit(wan.encode, static_argnums=1, static_argnames=("chunk", "logvar"))
decode = jax.jit(wan.decode, static_argnums=1, static_argnames="chunk")


def reference(cfg, seed):
    """A torch model whose every layer changes the result, and its weights in our tree."""
    torch.manual_seed(seed)
    model = diffusers.AutoencoderKLWan.from_config(cfg.to_json()).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "gamma" in name:
                tensor.normal_(1, 0.3)
            elif name.endswith("weight"):
                # Outputs of the decoder stay mostly within [-1,1], so that clamping does not hide errors.
                tensor.normal_(0, (0.3 if "decoder.conv_out" in name else 1) * tensor[0].numel() ** -0.5)
            else:
                tensor.normal_(0, 0.1)
    tensors = {k: v.numpy() for k, v in model.state_dict().items()}
    source = SimpleNamespace(tensors=tensors, read=tensors.__getitem__)
    return model, jax.tree.map(jnp.asarray, rules.assemble(names.vae(cfg), wan.abstract_params(cfg), source))


def to_torch(x, dtype=torch.float32):
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 4, 1, 2, 3))).to(dtype)


def theirs(model, video, latents, dtype=torch.float32, logvar=False):
    with torch.inference_mode():
        posterior = model.encode(to_torch(video, dtype)).latent_dist
        frames = model.decode(to_torch(latents, dtype)).sample
    arrays = (posterior.mean, frames, *([posterior.logvar] if logvar else []))
    return [x.float().numpy().transpose(0, 2, 3, 4, 1) for x in arrays]


def inputs(cfg, B, T, H, W, seed=0):
    rng = np.random.default_rng(seed)
    scale = cfg.spatial_factor
    video = rng.uniform(-1, 1, (B, 1 + 4 * (T - 1), H * scale, W * scale, 3)).astype(np.float32)
    return video, rng.standard_normal((B, T, H, W, cfg.z_dim), np.float32)


def error(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize(
    "cfg, size, chunk, seed",
    [
        (TINY, (2, 1, 3, 5), 1, 0),
        (TINY, (2, 2, 3, 5), 1, 1),
        (TINY, (1, 3, 5, 1), 1, 2),
        (TINY, (1, 5, 1, 3), 1, 3),
        (TINY, (1, 5, 3, 2), 2, 4),
        (TWO_BLOCKS, (1, 2, 3, 5), 1, 5),
        (TWO_BLOCKS, (1, 5, 2, 3), 4, 6),
        (DIGITS, (2, 5, 3, 2), 1, 7),
        (RESIDUAL, (1, 3, 3, 5), 1, 8),
    ],
)
def test_float32(cfg, size, chunk, seed):
    model, params = reference(cfg, seed)
    video, latents = inputs(cfg, *size, seed=seed)
    mean, frames, logvar = theirs(model, video, latents, logvar=True)
    assert frames.std() > 0.02 and (np.abs(frames) == 1).mean() < 0.2
    posterior = encode(params, cfg, video, chunk=chunk, logvar=True)
    errors = (
        error(posterior[0], mean),
        error(posterior[1], logvar),
        error(decode(params, cfg, latents, chunk=chunk), frames),
    )
    print(f"encode {errors[0]:.1e}, log-variance {errors[1]:.1e}, decode {errors[2]:.1e}")
    assert max(errors) <= 1e-5


SMALL = dict(dim_mult=(1, 2, 2), temperal_downsample=(True, True), num_res_blocks=1)


@pytest.mark.parametrize("cfg", [dataclasses.replace(TINY, **SMALL), dataclasses.replace(RESIDUAL, **SMALL)])
def test_tiles(cfg):
    """Several on each axis, the last of them narrow; frames go beyond [-1,1] before they are blended."""
    model, params = reference(cfg, 0)
    with torch.no_grad():
        model.decoder.conv_out.weight.mul_(5)
    params["decoder"]["conv_out"]["kernel"] *= 5
    q = cfg.spatial_factor
    tiles = Tiles((4 * q, 4 * q), (3 * q, 2 * q))
    model.enable_tiling(*tiles.tile, *tiles.stride)
    video, latents = inputs(cfg, 1, 1, 7, 6)
    mean, frames = theirs(model, video, latents)
    assert (np.abs(frames) == 1).mean() > 0.02
    run = partial(jax.jit, static_argnums=1, static_argnames="tiles")
    assert error(run(wan.encode)(params, cfg, video, tiles=tiles), mean) <= 1e-5
    assert error(run(wan.decode)(params, cfg, latents, tiles=tiles), frames) <= 1e-5


@pytest.mark.parametrize("cfg", [wan.WAN_2_1_VAE, dataclasses.replace(wan.WAN_2_2_VAE, num_res_blocks=1)])
def test_the_published_widths(cfg):
    model, params = reference(cfg, 0)
    video, latents = inputs(cfg, 1, 2, 2, 3)
    mean, frames = theirs(model, video, latents)
    assert error(encode(params, cfg, video), mean) <= 1e-5
    assert error(decode(params, cfg, latents), frames) <= 1e-5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bfloat16_is_no_further_from_float32_than_diffusers(seed):
    cfg = dataclasses.replace(TINY, base_dim=16)
    model, params = reference(cfg, seed)
    video, latents = inputs(cfg, 1, 3, 4, 5, seed=seed)
    exact = theirs(model, video, latents)
    rounded = theirs(model.to(torch.bfloat16), video, latents, torch.bfloat16)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    ours = encode(half, cfg, video), decode(half, cfg, latents)
    for name, mine, other, truth in zip(("encode", "decode"), ours, rounded, exact, strict=True):
        print(f"{name}: ours {error(mine, truth):.4f}, diffusers {error(other, truth):.4f}")
        assert error(mine, truth) <= error(other, truth)
