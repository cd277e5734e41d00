"""HunyuanVideo's VAE against diffusers' AutoencoderKLHunyuanVideo, live, with weights of which none is idle.

B batch · T latent frames · H W latent grid · C channels · F pixel frames · Y X pixel height, width.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from jvdiff.models.hunyuan_video import vae, vae_names  # noqa: E402
from jvdiff.models.hunyuan_video.vae_config import VAEConfig  # noqa: E402
from jvdiff.models.vae_tiles import Tiles  # noqa: E402
from jvdiff.weights import naming as rules  # noqa: E402

pytestmark = pytest.mark.parity

TINY = VAEConfig(block_out_channels=(4, 8, 12), latent_channels=3, layers_per_block=1, norm_num_groups=2)
LEVELS = VAEConfig(block_out_channels=(4, 8, 12, 12), latent_channels=3, layers_per_block=1, norm_num_groups=2)
WIDE = VAEConfig(block_out_channels=(32, 32, 64), latent_channels=3, layers_per_block=1, norm_num_groups=8)
# To compile in a quarter of the time.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
encode, decode = (
    jax.jit(f, static_argnums=1, static_argnames=("tiles", "windows", how), compiler_options=QUICKLY)
    for f, how in ((vae.encode, "dtype"), (vae.decode, "arithmetic"))
)
decode_piece = jax.jit(vae.decode_piece, static_argnums=1, compiler_options=QUICKLY)
join_window = jax.jit(vae.join_window, static_argnums=2)


def reference(cfg, seed):
    """A torch model whose every layer changes the result, and its weights in our tree."""
    torch.manual_seed(seed)
    model = diffusers.AutoencoderKLHunyuanVideo.from_config(cfg.to_json()).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                tensor.normal_(1, 0.3)
            elif name.endswith("weight"):
                tensor.normal_(0, tensor[0].numel() ** -0.5)
            else:
                tensor.normal_(0, 0.1)
    tensors = {k: v.numpy() for k, v in model.state_dict().items()}
    source = SimpleNamespace(tensors=tensors, read=tensors.__getitem__)
    return model, jax.tree.map(jnp.asarray, rules.assemble(vae_names.vae(cfg), vae.abstract_params(cfg), source))


def inputs(cfg, B, T, H, W, seed):
    rng, scale = np.random.default_rng(seed), cfg.spatial_factor
    video = rng.uniform(-1, 1, (B, 1 + 4 * (T - 1), H * scale, W * scale, 3)).astype(np.float32)
    return video, rng.standard_normal((B, T, H, W, cfg.latent_channels), np.float32)


def their_mean(model, video, dtype=torch.float32):
    with torch.inference_mode():
        return from_torch(model.encode(to_torch(video, dtype)).latent_dist.mode())


def their_frames(model, latents, dtype=torch.float32):
    with torch.inference_mode():
        return from_torch(model.decode(to_torch(latents, dtype)).sample)


def to_torch(x, dtype):
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 4, 1, 2, 3))).to(dtype)


def from_torch(x):
    return x.float().numpy().transpose(0, 2, 3, 4, 1)


def error(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def streamed(params, cfg, latents):
    """Window by window, as clips are decoded; windows of one length share a program."""
    tail, frames = None, []
    for cut in vae.cut_in_windows(latents.shape[1]):
        piece, tail = join_window(decode_piece(params, cfg, latents[:, cut]), tail, 4)
        frames.append(piece)
    return np.concatenate(frames, axis=1)


def test_decoding_in_windows():
    """Clips of one, two, five and nine latent frames: from five on in windows, and without if asked to."""
    model, params = reference(TINY, 0)
    for T in (1, 2, 5, 9):
        _, latents = inputs(TINY, 1, T, 3, 5, seed=T)
        assert error(streamed(params, TINY, latents), their_frames(model, latents)) <= 1e-5
    _, latents = inputs(TINY, 1, 5, 3, 5, seed=5)
    whole = decode_piece(params, TINY, latents)
    assert error(whole, their_frames(model, latents)) > 1e-2
    model.use_framewise_decoding = False
    assert error(whole, their_frames(model, latents)) <= 1e-5


@pytest.mark.parametrize("T, windows", [(1, True), (9, True), (6, False)])
def test_encoding_in_windows(T, windows):
    model, params = reference(TINY, T)
    model.use_framewise_encoding = windows
    video, _ = inputs(TINY, 1, T, 3, 2, seed=T)
    assert error(encode(params, TINY, video, windows=windows), their_mean(model, video)) <= 1e-5


@pytest.mark.parametrize("cfg, size, seed", [(LEVELS, (2, 2, 1, 3), 1), (WIDE, (1, 2, 2, 3), 2)])
def test_both_networks(cfg, size, seed):
    model, params = reference(cfg, seed)
    video, latents = inputs(cfg, *size, seed=seed)
    errors = (
        error(encode(params, cfg, video), their_mean(model, video)),
        error(decode(params, cfg, latents), their_frames(model, latents)),
    )
    print(f"encode {errors[0]:.1e}, decode {errors[1]:.1e}")
    assert max(errors) <= 1e-5


def test_tiles():
    """Several on each axis, the last of them narrow."""
    model, params = reference(TINY, 6)
    q = TINY.spatial_factor
    tiles = Tiles((4 * q, 4 * q), (3 * q, 2 * q))
    model.enable_tiling(*tiles.tile, None, *tiles.stride)
    video, latents = inputs(TINY, 1, 1, 7, 6, seed=6)
    assert error(decode(params, TINY, latents, tiles=tiles), their_frames(model, latents)) <= 1e-5
    video = video[:, :, : 4 * q]
    assert error(encode(params, TINY, video, tiles=tiles), their_mean(model, video)) <= 1e-5


def test_bfloat16_is_no_further_from_float32_than_diffusers():
    """Of weights in float32, as they are stored: kernels are rounded once they are folded."""
    model, params = reference(WIDE, 3)
    video, latents = inputs(WIDE, 1, 2, 2, 3, seed=3)
    exact = their_mean(model, video), their_frames(model, latents)
    model.to(torch.bfloat16)
    rounded = their_mean(model, video, torch.bfloat16), their_frames(model, latents, torch.bfloat16)
    ours = encode(params, WIDE, video, dtype="bfloat16"), decode(params, WIDE, latents, arithmetic="bf16")
    for name, mine, other, truth in zip(("encode", "decode"), ours, rounded, exact, strict=True):
        print(f"{name}: ours {error(mine, truth):.4f}, diffusers {error(other, truth):.4f}")
        assert error(mine, truth) <= error(other, truth)
