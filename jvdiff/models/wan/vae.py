"""The causal video VAE of Wan 2.1, encoder and decoder, one chunk of frames at a time.

    B batch · T latent frames · H W latent grid · C channels · F pixel frames · Y X pixel height, width

A clip is 1 + 4k frames and becomes 1 + k latent frames: the first frame stands alone, every later latent frame holds
four. All temporal convolutions are causal and look two frames back, so the whole state of a half-done clip is the last
two input frames of each of them: the `cache`, a nested dict named like the modules. `cache=None` means that the clip
begins. Encoding or decoding a whole clip is a scan over chunks, so its memory does not depend on the clip's length.

On several devices each has a part of every frame and of every frame that the cache remembers: XLA divides the
convolutions and lets neighbours exchange the rows or columns that these look at beyond their part.

Parity: diffusers' AutoencoderKLWan (0.42), whose chunks and first-frame rule these are: the temporal convolutions of
the resamplers never see the first frame when decoding and pass it untouched when encoding.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from jvdiff.errors import UsageError
from jvdiff.models.layers import compute_dtype, computing, row
from jvdiff.models.wan.config import VAEConfig
from jvdiff.models.wan.vae_layers import Cache, Decoder, Encoder, pointwise
from jvdiff.sharding import Picture, Placement
from jvdiff.types import Array, Params

DECODER = ("post_quant_conv", "decoder")  # the parts of the parameters that decoding needs, and no latent depends on


def abstract_params(cfg: VAEConfig, dtype=jnp.float32) -> Params:
    """The parameter tree as ShapeDtypeStructs: what initialisation, conversion, restore and sharding all read."""
    leaves = jax.eval_shape(partial(init_params, cfg=cfg), jax.random.key(0))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), leaves)


def init_params(key: Array, cfg: VAEConfig) -> Params:
    """Float32 parameters to train from: variance-preserving kernels, each temporal one a per-frame one at first."""
    return jax.jit(_init, static_argnames="cfg")(key, cfg=cfg)  # traced once for all trees of a configuration


def _init(key: Array, cfg: VAEConfig) -> Params:
    encoder_key, decoder_key, quant_key, post_key = jax.random.split(key, 4)
    cell = cfg.spatial_factor
    normal = nn.initializers.lecun_normal()

    def dense(key, width):
        return {"kernel": normal(key, (width, width)), "bias": jnp.zeros(width)}

    return {
        "encoder": Encoder(cfg).init(encoder_key, jnp.zeros((1, 1, cell, cell, 3)), None)["params"],
        "quant_conv": dense(quant_key, 2 * cfg.z_dim),
        "post_quant_conv": dense(post_key, cfg.z_dim),
        "decoder": Decoder(cfg).init(decoder_key, jnp.zeros((1, 1, 1, 1, cfg.z_dim)), None)["params"],
    }


def encode_chunk(
    params: Params,
    cfg: VAEConfig,
    frames: Array,
    cache: Cache,
    *,
    placement: Placement | None = None,
    dtype: Any = None,
) -> tuple[Array, Cache]:
    """Encodes the next frames of a clip.

    Args:
      frames: [B,1,Y,X,3] in [-1,1] where the clip begins (cache None), then [B,4n,Y,X,3].
      cache: what the call before returned; None at first.
      placement: the devices that share every frame, `params` a copy on each; the results stay divided among them.
      dtype: of the products, the stream between them and the cache. None: that of the parameters.

    Returns:
      The posterior's mean [B,1 or n,H,W,C], not normalised, and the cache for the next call.
    """
    _check_chunk(frames, cache, cfg.temporal_factor, "pixel frames")
    divide, picture = _divided(placement, frames, cfg.spatial_factor)
    frames, cache = divide((_compute(params, frames, dtype), cache))
    moments, cache = Encoder(cfg, picture).apply({"params": params["encoder"]}, frames, cache)
    mean = pointwise(moments, params["quant_conv"])[..., : cfg.z_dim].astype(jnp.float32)
    return divide((mean, cache))


def decode_chunk(
    params: Params,
    cfg: VAEConfig,
    latents: Array,
    cache: Cache,
    *,
    clip: bool = True,
    placement: Placement | None = None,
    arithmetic: str | None = None,
) -> tuple[Array, Cache]:
    """Decodes the next latent frames of a clip.

    Args:
      latents: [B,1,H,W,C] where the clip begins (cache None), then [B,n,H,W,C]; not normalised.
      cache: what the call before returned; None at first.
      clip: False leaves values beyond [-1,1] as they are, so that they have gradients in training.
      placement: the devices that share every frame, `params` a copy on each; the results stay divided among them.
      arithmetic: a name of `jvdiff.precision.DECODING`. None: in the dtype of the parameters, as JAX multiplies.

    Returns:
      float32 frames [B,1 or 4n,Y,X,3] in [-1,1], and the cache for the next call.
    """
    _check_chunk(latents, cache, 1, "latent frames")
    divide, picture = _divided(placement, latents, 1)
    dtype, tf32, products = computing(arithmetic)
    latents, cache = divide((_compute(params, latents, dtype), cache))
    with products:
        latents = pointwise(latents, params["post_quant_conv"], tf32)
        frames, cache = Decoder(cfg, picture, tf32).apply({"params": params["decoder"]}, latents, cache)
    frames = frames.astype(jnp.float32)
    return divide((jnp.clip(frames, -1.0, 1.0) if clip else frames, cache))


def encode(
    params: Params,
    cfg: VAEConfig,
    video: Array,
    *,
    chunk: int = 1,
    placement: Placement | None = None,
    dtype: Any = None,
) -> Array:
    """video [B,1+4k,Y,X,3] in [-1,1] -> posterior mean [B,1+k,H,W,C] float32, not normalised.

    `chunk` latent frames are made at a time (it must divide k): memory grows with it, never with the clip.
    placement, dtype: see `encode_chunk`.
    """
    _check_video(cfg, video)
    step = partial(encode_chunk, params, cfg, placement=placement, dtype=dtype)
    return _scan_chunks(step, video, chunk * cfg.temporal_factor)


def decode(
    params: Params,
    cfg: VAEConfig,
    latents: Array,
    *,
    chunk: int = 1,
    clip: bool = True,
    placement: Placement | None = None,
    arithmetic: str | None = None,
) -> Array:
    """latents [B,T,H,W,C], not normalised -> float32 video [B,1+4(T-1),Y,X,3] in [-1,1].

    `chunk` latent frames are decoded at a time (it must divide T - 1): memory grows with it, never with the clip.
    placement, arithmetic: see `decode_chunk`.
    """
    step = partial(decode_chunk, params, cfg, clip=clip, placement=placement, arithmetic=arithmetic)
    return _scan_chunks(step, latents, chunk)


def init_cache(cfg: VAEConfig, which: str, batch: int, height: int, width: int, dtype=jnp.float32) -> Cache:
    """Shapes of the cache of "encode" or "decode" after the first frame, as ShapeDtypeStructs.

    height, width: of the latent grid.
    """
    params = abstract_params(cfg, dtype)
    scale, channels, step = (cfg.spatial_factor, 3, encode_chunk) if which == "encode" else (1, cfg.z_dim, decode_chunk)
    first = jax.ShapeDtypeStruct((batch, 1, height * scale, width * scale, channels), dtype)
    return jax.eval_shape(lambda p, x: step(p, cfg, x, None)[1], params, first)


def normalize_latents(cfg: VAEConfig, latents: Array) -> Array:
    """Latents as the VAE makes them -> as the DiT sees them: zero mean, unit variance in every channel."""
    mean, std = _statistics(cfg, latents)
    return (latents - mean) / std


def denormalize_latents(cfg: VAEConfig, latents: Array) -> Array:
    """The inverse of `normalize_latents`."""
    mean, std = _statistics(cfg, latents)
    return latents * std + mean


def _statistics(cfg: VAEConfig, latents: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of each channel, [1,1,1,1,C] in the dtype of the latents."""
    mean, std = (jnp.asarray(v, latents.dtype) for v in (cfg.latents_mean, cfg.latents_std))
    return row(mean, latents), row(std, latents)


def _compute(params: Params, x: Array, dtype: Any) -> Array:
    return x.astype(compute_dtype(params["quant_conv"]["kernel"], dtype))


def _divided(placement: Placement | None, x: Array, factor: int) -> tuple[Any, Picture | None]:
    """(what divides a tree of pictures among the devices, how), for x [B,T,H*factor,W*factor,C]."""
    if placement is None:
        return lambda tree: tree, None
    picture = placement.spread(x.shape[2] // factor, x.shape[3] // factor)
    return picture.divide, picture


def _check_video(cfg: VAEConfig, video: Array) -> None:
    if (video.shape[1] - 1) % cfg.temporal_factor:
        below = video.shape[1] - 1 - (video.shape[1] - 1) % cfg.temporal_factor + 1
        raise UsageError(
            f"The VAE takes 1 + {cfg.temporal_factor}k frames, found {video.shape[1]}; "
            f"use {below} or {below + cfg.temporal_factor}."
        )
    for axis, name in ((2, "height"), (3, "width")):
        if video.shape[axis] % cfg.spatial_factor:
            raise UsageError(f"The VAE takes a {name} divisible by {cfg.spatial_factor}, found {video.shape[axis]}.")


def _check_chunk(x: Array, cache: Cache, multiple: int, what: str) -> None:
    frames = x.shape[1]
    if cache is None and frames != 1:
        raise UsageError(f"A clip begins with exactly 1 of its {what} (cache None), found {frames}.")
    if cache is not None and (frames == 0 or frames % multiple):
        raise UsageError(f"A later chunk holds a multiple of {multiple} {what}, found {frames}.")


def _scan_chunks(step, x: Array, size: int) -> Array:
    """The first frame, then a scan over chunks of `size` frames, their outputs joined along time."""
    rest = x[:, 1:]
    if rest.shape[1] % size:
        raise UsageError(f"Chunks of {size} frames do not divide the {rest.shape[1]} frames after the first.")
    first, cache = step(x[:, :1], None)
    if rest.shape[1] == 0:
        return first
    if rest.shape[1] == size:
        return jnp.concatenate([first, step(rest, cache)[0]], axis=1)  # [B,1+n,H,W,C]
    chunks = rearrange(rest, "B (n f) H W C -> n B f H W C", f=size)
    _, later = lax.scan(lambda cache, piece: step(piece, cache)[::-1], cache, chunks)
    return jnp.concatenate([first, rearrange(later, "n B f H W C -> B (n f) H W C")], axis=1)  # [B,1+n*f,H,W,C]
