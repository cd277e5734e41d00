"""From latents to pictures, as the family's stages: window by window, each whole or in tiles; and previews.

B batch · T latent frames · H W latent grid · C latent channels · F pixel frames · Y X pixel height, width
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvdiff.models import vae_tiles
from jvdiff.models.family import Clip, Forward, Models, Run, Stage
from jvdiff.models.hunyuan_video import vae
from jvdiff.models.hunyuan_video.vae_config import VAEConfig
from jvdiff.models.pixels import nonfinite_share, to_pixels
from jvdiff.models.vae_tiles import Tiles
from jvdiff.sharding import Placement
from jvdiff.types import Array, Params


def decode(models: Models, clip: Clip, forward: Forward, run: Run, latents: Array) -> Iterator[tuple[Any, Any, int]]:
    """One window of time after another, of which each fades in over the one before: device memory does not depend on T
    (but where `vae_windows` is off, and the clip is one piece).

    All windows but the last have one program, and so have all tiles of a size.
    """
    cfg, (frames, height, width, _) = models.configs["vae"], clip.latents
    where = vae.cut_to_decode(cfg, clip.vae_tiles, height, width)
    piece = _piece_program(cfg, forward.placement, forward.decode)
    cuts = vae.cut_in_windows(frames) if clip.settings.vae_windows else [slice(0, frames)]
    join = _join_program(cfg, clip.vae_tiles, height, width, len(cuts) > 1, forward.placement)
    tail, done, nothing = None, 0, np.zeros((1, 0, *clip.frames[1:], 3), np.uint8)
    for cut in cuts:
        last = cut == cuts[-1]
        stage = Stage("decode last window" if last else "decode window", "vae", piece)
        rows = []
        for y in where.rows if where else [slice(None)]:
            rows.append([])
            for x in where.columns if where else [slice(None)]:
                rows[-1].append(run(stage, latents[:, cut, y, x]))
                yield nothing, 0.0, done  # progress can be told, and a stop heard
        pixels, bad, tail = run(Stage("join last window" if last else "join window", "vae", join), rows, tail)
        done = frames if last else cut.start + vae.STRIDE + 1
        yield pixels, bad, done


@functools.lru_cache(maxsize=8)
def _piece_program(cfg: VAEConfig, placement: Placement | None, arithmetic: str | None) -> Any:
    """jitted (params, scaled latents [B,T,h,w,C] of a window or a tile of it) -> float32 frames [B,1+4(T-1),y,x,3]."""

    def piece(params: Params, latents: Array) -> Array:
        latents = vae.denormalize_latents(cfg, latents)
        frames = vae.decode_piece(params, cfg, latents, placement=placement, arithmetic=arithmetic)
        return frames if placement is None else placement.replicate(frames)

    return jax.jit(piece)


@functools.lru_cache(maxsize=8)
def _join_program(
    cfg: VAEConfig, tiles: Tiles | None, height: int, width: int, several: bool, placement: Placement | None
) -> Any:
    """jitted (params, rows of tiles [1,1+n,y,x,3] of a window, end of the window before or None)
    -> (uint8 [1,F,Y,X,3], non-finite share, its end). A clip of several windows, or of one, which is left whole."""
    where: Any = vae.cut_to_decode(cfg, tiles, height, width)

    def join(params: Params, rows: Any, tail: Array | None) -> tuple[Array, Array, Array]:
        frames = vae_tiles.join(rows, where) if where else rows[0][0]
        frames, end = vae.join_window(frames, tail, cfg.temporal_factor) if several else (frames, frames[:, :0])
        result = to_pixels(frames), nonfinite_share(frames), end
        return result if placement is None else placement.replicate(result)

    return jax.jit(join)


def preview(models: Models, forward: Forward) -> Stage:
    return Stage("preview", "vae", _first_frames(models.configs["vae"], forward.placement, forward.decode))


@functools.lru_cache(maxsize=8)
def _first_frames(cfg: VAEConfig, placement: Placement | None, arithmetic: str | None) -> Any:
    """jitted (params, scaled latents [B,1,H,W,C]) -> float32 first frames [B,1,Y,X,3] in -1..1, for previews."""
    piece = _piece_program(cfg, placement, arithmetic)

    def first(params: Params, latents: Array) -> Array:
        return jnp.clip(piece(params, latents), -1.0, 1.0)

    return jax.jit(first)
