"""The causal video VAE of HunyuanVideo, encoder and decoder, in windows of time.

    B batch · T latent frames · H W latent grid · C channels · F pixel frames · Y X pixel height, width

A clip is 1 + 4k frames and becomes 1 + k latent frames. Convolutions look back only, but norms take the statistics of
all frames that are computed together: no cache makes pieces of a clip what the whole is. So longer clips are cut, as
the published model cuts them: in windows of 17 frames (5 latent ones) that begin every 12 (3). Each is computed on its
own; of each but the first the first frame is dropped, and the next four (or the latent one) fade in over the last of
the window before. The windows are part of what the model gives: without them (`windows=False`) its numbers are others,
and memory grows with the clip.

On several devices each has a part of every frame, see `vae_layers`.

Parity: diffusers' AutoencoderKLHunyuanVideo (0.42), whose windows are on unless it is told otherwise.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jvdiff.models import vae_tiles
from jvdiff.models.hunyuan_video.vae_config import VAEConfig
from jvdiff.models.hunyuan_video.vae_layers import Decoder, Encoder, How, pointwise
from jvdiff.models.layers import compute_dtype, computing
from jvdiff.models.pixels import check_video
from jvdiff.models.vae_tiles import Cut, Tiles
from jvdiff.sharding import Placement
from jvdiff.types import Array, Params

WINDOW = 4  # k of a window's 1 + k latent frames
STRIDE = 3  # latent frames from one window to the next
_FADE = WINDOW - STRIDE  # latent frames that two windows share, but for the one that the latter drops


def abstract_params(cfg: VAEConfig, dtype=jnp.float32) -> Params:
    """The parameter tree as ShapeDtypeStructs: what conversion, restore and sharding all read."""
    leaves = jax.eval_shape(partial(_init, cfg=cfg), jax.random.key(0))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), leaves)


def _init(key: Array, cfg: VAEConfig) -> Params:
    def dense(width: int) -> Params:
        return {"kernel": jnp.zeros((width, width)), "bias": jnp.zeros(width)}

    picture = jnp.zeros((1, 1, cfg.spatial_factor, cfg.spatial_factor, 3))
    return {
        "encoder": Encoder(cfg).init(key, picture)["params"],
        "quant_conv": dense(2 * cfg.latent_channels),
        "post_quant_conv": dense(cfg.latent_channels),
        "decoder": Decoder(cfg).init(key, jnp.zeros((1, 1, 1, 1, cfg.latent_channels)))["params"],
    }


def cut_in_windows(frames: int) -> list[slice]:
    """Where the windows of a clip of so many latent frames begin and end, in latent frames; a short clip is one.

    All but the last are equally long. diffusers may compute one more, of one frame, which adds nothing to the clip.
    """
    if frames <= WINDOW:
        return [slice(0, frames)]
    return [slice(start, min(start + WINDOW + 1, frames)) for start in range(0, frames - 1, STRIDE)]


def encode(
    params: Params,
    cfg: VAEConfig,
    video: Array,
    *,
    placement: Placement | None = None,
    dtype: Any = None,
    tiles: Tiles | str | None = None,
    windows: bool = True,
    logvar: bool = False,
) -> Any:
    """video [B,1+4k,Y,X,3] in [-1,1] -> posterior mean [B,1+k,H,W,C] float32, not scaled.

    Args:
      placement: the devices that share every frame, `params` a copy on each; the results stay divided among them.
      dtype: of the products and of the stream between them. None: that of the parameters.
      tiles: of pictures larger than one, as a value or as text, see `models.vae_tiles`; None: the whole picture.
      windows: see above.
      logvar: return (mean, log-variance), the latter within -30 and 20.

    Raises:
      UsageError: frames that are not 1 + 4k, or a height or width that is not a multiple of the VAE's factor.
    """
    check_video(video.shape, cfg.temporal_factor, cfg.spatial_factor)
    run = partial(_encode_piece, params, cfg, placement=placement, dtype=dtype)
    if where := _cut(cfg, vae_tiles.read(tiles), *video.shape[2:4], encode=True):
        run = partial(_in_tiles, run, where)
    time = cfg.temporal_factor
    moments = _in_windows(run, video, time, 1) if windows else run(video)
    mean, spread = jnp.split(moments, 2, axis=-1)
    return (mean, jnp.clip(spread, -30.0, 20.0)) if logvar else mean


def decode(
    params: Params,
    cfg: VAEConfig,
    latents: Array,
    *,
    placement: Placement | None = None,
    arithmetic: str | None = None,
    tiles: Tiles | str | None = None,
    windows: bool = True,
) -> Array:
    """latents [B,T,H,W,C], not scaled -> float32 video [B,1+4(T-1),Y,X,3], around [-1,1] but not clamped.

    arithmetic: a name of `jvdiff.precision.DECODING`. None: in the dtype of the parameters, as JAX multiplies.
    placement, tiles, windows: see `encode`.
    """
    run = partial(decode_piece, params, cfg, placement=placement, arithmetic=arithmetic)
    if where := cut_to_decode(cfg, vae_tiles.read(tiles), *latents.shape[2:4]):
        run = partial(_in_tiles, run, where)
    return _in_windows(run, latents, 1, cfg.temporal_factor) if windows else run(latents)


def decode_piece(
    params: Params,
    cfg: VAEConfig,
    latents: Array,
    *,
    placement: Placement | None = None,
    arithmetic: str | None = None,
) -> Array:
    """A window of a clip, or a tile of one, [B,T,H,W,C] -> float32 frames [B,1+4(T-1),Y,X,3], not clamped."""
    dtype, tf32, products = computing(arithmetic)

    def run(params: Params, x: Array, how: How) -> Any:
        x = pointwise(x, params["post_quant_conv"], how)
        return Decoder(cfg, how).apply({"params": params["decoder"]}, x)

    with products:
        return _shared(run, params, latents, latents.shape[2:4], placement, dtype, tf32)


def _encode_piece(params: Params, cfg: VAEConfig, video: Array, *, placement: Placement | None, dtype: Any) -> Array:
    """A window of a clip, or a tile of one, [B,F,Y,X,3] -> mean and log-variance [B,T,H,W,2C] float32."""
    grid = [size // cfg.spatial_factor for size in video.shape[2:4]]

    def run(params: Params, x: Array, how: How) -> Array:
        moments: Any = Encoder(cfg, how).apply({"params": params["encoder"]}, x)
        return pointwise(moments, params["quant_conv"], how)

    return _shared(run, params, video, grid, placement, dtype, False)


def _shared(
    run: Callable[[Params, Array, How], Any],
    params: Params,
    x: Array,
    grid: Sequence[int],
    placement: Placement | None,
    dtype: Any,
    tf32: bool,
) -> Array:
    """A network on pictures [B,T,...,C] that are divided among the devices as their latent grid is; float32 out."""
    x = x.astype(compute_dtype(params["quant_conv"]["kernel"], dtype))
    if placement is None:
        return run(params, x, How(tf32=tf32)).astype(jnp.float32)
    picture = placement.spread(*grid)
    how: Any = dict(mesh=picture.mesh, in_specs=(PartitionSpec(), picture.spec), out_specs=picture.spec)
    local = jax.shard_map(lambda params, x: run(params, x, How(picture, tf32)), **how, check_vma=False)
    return local(params, x).astype(jnp.float32)


def _cut(cfg: VAEConfig, tiles: Tiles | None, height: int, width: int, *, encode: bool) -> Cut | None:
    """The tiles of a picture in pixels, or of a latent grid, that is larger than one; None: it is computed whole."""
    if tiles is None:
        return None
    tiles.check(cfg.spatial_factor)
    down = 1 if encode else cfg.spatial_factor
    tile, stride = ([n // down for n in sizes] for sizes in (tiles.tile, tiles.stride))
    if height <= tile[0] and width <= tile[1]:
        return None
    factor = {"down" if encode else "up": cfg.spatial_factor}
    return vae_tiles.cut((height, width), tile, stride, **factor)


def cut_to_decode(cfg: VAEConfig, tiles: Tiles | None, height: int, width: int) -> Cut | None:
    """The tiles of a latent grid that is larger than one. None: the whole grid at once."""
    return _cut(cfg, tiles, height, width, encode=False)


def _in_tiles(run: Callable[[Array], Array], where: Cut, x: Array) -> Array:
    return vae_tiles.join(vae_tiles.each(run, x, where), where)


def normalize_latents(cfg: VAEConfig, latents: Array) -> Array:
    """Latents as the VAE makes them -> as the transformer sees them."""
    return latents * cfg.scaling_factor


def denormalize_latents(cfg: VAEConfig, latents: Array) -> Array:
    """The inverse of `normalize_latents`."""
    return latents / cfg.scaling_factor


def _in_windows(run: Callable[[Array], Array], x: Array, time: int, factor: int) -> Array:
    """A clip [B,F,...] through `run`, window by window.

    time, factor: how many frames of x, and of the result, there are to a latent frame after the first.
    """
    *full, last = (
        slice(time * cut.start, time * (cut.stop - 1) + 1) for cut in cut_in_windows(1 + (x.shape[1] - 1) // time)
    )
    if len(full) > 1:  # of one program, in a loop
        starts = jnp.array([cut.start for cut in full], jnp.int32)
        results = list(lax.map(lambda start: run(lax.dynamic_slice_in_dim(x, start, full[0].stop, axis=1)), starts))
    else:
        results = [run(x[:, cut]) for cut in full]
    kept, tail = [], None
    for result in [*results, run(x[:, last])]:
        piece, tail = join_window(result, tail, factor)
        kept.append(piece)
    return jnp.concatenate(kept, axis=1)


def join_window(frames: Array, tail: Array | None, factor: int) -> tuple[Array, Array]:
    """What a clip gets of a window's result [B,1+n,...], and the end of it, over which the next one fades in.

    tail: that of the window before; None at first.
    factor: frames of the result that there are to a latent frame after the first.
    """
    first, rest = frames[:, :1], frames[:, 1:]
    if tail is not None:
        first, rest = first[:, :0], vae_tiles.faded(tail, rest, factor * _FADE, axis=1)
    return jnp.concatenate([first, rest[:, : factor * STRIDE]], axis=1), rest[:, -factor * _FADE :]
