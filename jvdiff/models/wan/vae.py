"""The causal video VAEs of Wan 2.1 and 2.2, encoder and decoder, one chunk of frames at a time.

    B batch · T latent frames · H W latent grid · C channels · F pixel frames · Y X pixel height, width

A clip is 1 + 4k frames and becomes 1 + k latent frames: the first frame stands alone, every later latent frame holds
four. All temporal convolutions are causal and look two frames back, so the whole state of a half-done clip is the last
two input frames of each of them: the `cache`, a nested dict named like the modules. `cache=None` means that the clip
begins. Encoding or decoding a whole clip is a scan over chunks, so its memory does not depend on the clip's length.

On several devices each has a part of every frame and of every frame that the cache remembers: XLA divides the
convolutions and lets neighbours exchange the rows or columns that these look at beyond their part.

Parity: diffusers' AutoencoderKLWan (0.42), whose chunks and first-frame rule these are: the temporal convolutions of
the resamplers never see the first frame when decoding and pass it untouched when encoding. Wan 2.2's has patches of
pixels as channels, and a shortcut without parameters round every level (`VAEConfig.is_residual`).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from jvdiff.errors import UsageError
from jvdiff.models import vae_tiles
from jvdiff.models.layers import compute_dtype, computing, row
from jvdiff.models.pixels import check_video
from jvdiff.models.vae_tiles import Cut, Tiles
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
    cell = cfg.spatial_factor // cfg.patch_size
    normal = nn.initializers.lecun_normal()

    def dense(key, width):
        return {"kernel": normal(key, (width, width)), "bias": jnp.zeros(width)}

    return {
        "encoder": Encoder(cfg).init(encoder_key, jnp.zeros((1, 1, cell, cell, cfg.pixel_channels)), None)["params"],
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
    frames = _patches(frames, cfg.patch_size)
    moments, cache = _encode_patches(params, cfg, frames, cache, placement=placement, dtype=dtype)
    return moments[..., : cfg.z_dim], cache


def _encode_patches(
    params: Params, cfg: VAEConfig, patches: Array, cache: Cache, *, placement: Placement | None, dtype: Any
) -> tuple[Array, Cache]:
    """Patches [B,F,Y/p,X/p,3*p*p] -> mean and log-variance [B,T,H,W,2C] float32."""
    divide, picture = _divided(placement, patches, cfg.spatial_factor // cfg.patch_size)
    patches, cache = divide((_compute(params, patches, dtype), cache))
    moments, cache = Encoder(cfg, picture).apply({"params": params["encoder"]}, patches, cache)
    return divide((pointwise(moments, params["quant_conv"]).astype(jnp.float32), cache))


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
    patches, cache = _decode_patches(params, cfg, latents, cache, placement=placement, arithmetic=arithmetic)
    divide, _ = _divided(placement, latents, 1)
    return divide((_frames(cfg, patches, clip), cache))


def _decode_patches(
    params: Params, cfg: VAEConfig, latents: Array, cache: Cache, *, placement: Placement | None, arithmetic: str | None
) -> tuple[Array, Cache]:
    """Latents [B,T,H,W,C] -> patches [B,F,Y/p,X/p,3*p*p] in the dtype of the products."""
    divide, picture = _divided(placement, latents, 1)
    dtype, tf32, products = computing(arithmetic)
    latents, cache = divide((_compute(params, latents, dtype), cache))
    with products:
        latents = pointwise(latents, params["post_quant_conv"], tf32)
        return Decoder(cfg, picture, tf32).apply({"params": params["decoder"]}, latents, cache)


def _frames(cfg: VAEConfig, patches: Array, clip: bool) -> Array:
    """Patches as the decoder makes them -> float32 frames."""
    frames = _pixels(patches, cfg.patch_size).astype(jnp.float32)
    return jnp.clip(frames, -1.0, 1.0) if clip else frames


def encode(
    params: Params,
    cfg: VAEConfig,
    video: Array,
    *,
    chunk: int = 1,
    placement: Placement | None = None,
    dtype: Any = None,
    tiles: Tiles | str | None = None,
    logvar: bool = False,
) -> Any:
    """video [B,1+4k,Y,X,3] in [-1,1] -> posterior mean [B,1+k,H,W,C] float32, not normalised.

    `chunk` latent frames are made at a time (it must divide k): memory grows with it, never with the clip.
    placement, dtype: see `encode_chunk`.
    tiles: of pictures larger than one, as a value or as text, see `models.vae_tiles`; None: the whole picture.
    logvar: return (mean, log-variance), the latter within -30 and 20.
    """
    check_video(video.shape, cfg.temporal_factor, cfg.spatial_factor)
    patches = _patches(video, cfg.patch_size)
    step = partial(_encode_patches, params, cfg, placement=placement, dtype=dtype)
    run = partial(_scan_chunks, step, size=chunk * cfg.temporal_factor)
    where = _cut_to_encode(cfg, vae_tiles.read(tiles), *video.shape[2:4])
    moments = vae_tiles.join(vae_tiles.each(run, patches, where), where) if where else run(patches)
    mean, spread = jnp.split(moments, 2, axis=-1)
    return (mean, jnp.clip(spread, -30.0, 20.0)) if logvar else mean


def encode_shown(
    params: Params,
    cfg: VAEConfig,
    shown: Array,
    frames: int,
    *,
    placement: Placement | None = None,
    tiles: Tiles | str | None = None,
) -> Array:
    """As `encode`, the posterior mean [B,T,H,W,C] of clips that are grey (0) but for one picture or two.

    Args:
      shown: [B,n,Y,X,3] in [-1,1]: the first frame, and for n = 2 the last.
      frames: T, of the latents; at least n.
      placement, tiles: see `encode`.
    """
    step = partial(_encode_patches, params, cfg, placement=placement, dtype=None)

    def run(shown: Array) -> Array:
        first, cache = step(shown[:, :1], None)
        grey = jnp.zeros_like(shown[:, :1])

        def following(cache: Cache, last: Array) -> tuple[Cache, Array]:
            end = jnp.where(last, shown[:, -1:], grey) if shown.shape[1] == 2 else grey
            chunk = jnp.concatenate([grey] * (cfg.temporal_factor - 1) + [end], axis=1)
            moments, cache = step(chunk, cache)
            return cache, moments[:, 0]

        if frames == 1:
            return first
        _, later = lax.scan(following, cache, jnp.arange(1, frames) == frames - 1)  # [T-1,B,H,W,2C]
        return jnp.concatenate([first, jnp.moveaxis(later, 0, 1)], axis=1)

    patches = _patches(shown, cfg.patch_size)
    where = _cut_to_encode(cfg, vae_tiles.read(tiles), *shown.shape[2:4])
    moments = vae_tiles.join(vae_tiles.each(run, patches, where), where) if where else run(patches)
    return moments[..., : cfg.z_dim]


def decode(
    params: Params,
    cfg: VAEConfig,
    latents: Array,
    *,
    chunk: int = 1,
    clip: bool = True,
    placement: Placement | None = None,
    arithmetic: str | None = None,
    tiles: Tiles | str | None = None,
) -> Array:
    """latents [B,T,H,W,C], not normalised -> float32 video [B,1+4(T-1),Y,X,3] in [-1,1].

    `chunk` latent frames are decoded at a time (it must divide T - 1): memory grows with it, never with the clip.
    placement, arithmetic: see `decode_chunk`.
    tiles: of pictures larger than one, as a value or as text, see `models.vae_tiles`; None: the whole picture.
    """
    if where := cut_to_decode(cfg, vae_tiles.read(tiles), *latents.shape[2:4]):
        run = partial(decode_tile, params, cfg, chunk=chunk, placement=placement, arithmetic=arithmetic)
        return join_tiles(cfg, vae_tiles.each(run, latents, where), where, clip=clip)
    step = partial(decode_chunk, params, cfg, clip=clip, placement=placement, arithmetic=arithmetic)
    return _scan_chunks(step, latents, chunk)


def _cut_to_encode(cfg: VAEConfig, tiles: Tiles | None, height: int, width: int) -> Cut | None:
    """The tiles of patches of a picture that is larger than one; of pixels, whatever a patch is."""
    if tiles is None:
        return None
    tiles.check(cfg.spatial_factor)
    if height <= tiles.tile[0] and width <= tiles.tile[1]:
        return None
    size = height // cfg.patch_size, width // cfg.patch_size
    return vae_tiles.cut(size, tiles.tile, tiles.stride, down=cfg.spatial_factor // cfg.patch_size)


def cut_to_decode(cfg: VAEConfig, tiles: Tiles | None, height: int, width: int) -> Cut | None:
    """The tiles of a latent grid that is larger than one; their results are patches. None: the whole grid at once."""
    if tiles is None:
        return None
    tiles.check(cfg.spatial_factor)
    tile, stride = ([n // cfg.spatial_factor for n in sizes] for sizes in (tiles.tile, tiles.stride))
    if height <= tile[0] and width <= tile[1]:
        return None
    return vae_tiles.cut((height, width), tile, stride, up=cfg.spatial_factor // cfg.patch_size)


def decode_tile(
    params: Params,
    cfg: VAEConfig,
    latents: Array,
    *,
    chunk: int = 1,
    placement: Placement | None = None,
    arithmetic: str | None = None,
) -> Array:
    """A tile of a clip's latents [B,T,h,w,C] -> patches float32 [B,F,y,x,3*p*p], for `join_tiles`."""
    step = partial(_decode_patches, params, cfg, placement=placement, arithmetic=arithmetic)
    return _scan_chunks(step, latents, chunk).astype(jnp.float32)


def join_tiles(cfg: VAEConfig, rows: Sequence[Sequence[Array]], where: Cut, *, clip: bool = True) -> Array:
    """Results of `decode_tile`, row by row -> float32 frames [B,F,Y,X,3] in [-1,1], clamped once they are blended."""
    return _frames(cfg, vae_tiles.join(rows, where), clip)


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


def _patches(frames: Array, size: int) -> Array:
    """[B,F,Y,X,C] -> [B,F,Y/size,X/size,C*size*size]: of a patch's pixels the column is the slower."""
    if size == 1:
        return frames
    return rearrange(frames, "B F (Y y) (X x) C -> B F Y X (C x y)", y=size, x=size)


def _pixels(patches: Array, size: int) -> Array:
    """The inverse of `_patches`."""
    if size == 1:
        return patches
    return rearrange(patches, "B F Y X (C x y) -> B F (Y y) (X x) C", y=size, x=size)


def _compute(params: Params, x: Array, dtype: Any) -> Array:
    return x.astype(compute_dtype(params["quant_conv"]["kernel"], dtype))


def _divided(placement: Placement | None, x: Array, factor: int) -> tuple[Any, Picture | None]:
    """(what divides a tree of pictures among the devices, how), for x [B,T,H*factor,W*factor,C]."""
    if placement is None:
        return lambda tree: tree, None
    picture = placement.spread(x.shape[2] // factor, x.shape[3] // factor)
    return picture.divide, picture


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
