"""From latents to pictures, as the families' stages: latent frame by latent frame, or in tiles; and previews.

B batch · T latent frames · H W latent grid · C latent channels · F pixel frames · Y X pixel height, width
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvdiff.models import wan
from jvdiff.models.family import Clip, Forward, Models, Run, Stage
from jvdiff.models.pixels import nonfinite_share, to_pixels
from jvdiff.models.vae_tiles import Tiles
from jvdiff.sharding import Placement
from jvdiff.types import Array, Params


def decode(
    models: Models, clip: Clip, forward: Forward, run: Run, latents: Array
) -> Iterator[tuple[Array, Array, int]]:
    """One latent frame at a time: device memory does not depend on T. Tiles are decoded one after the other."""
    if wan.cut_to_decode(models.configs["vae"], clip.vae_tiles, *clip.latents[1:3]):
        yield from _decode_tiles(models.configs["vae"], clip, forward, run, latents)
        return
    program, cache = _decode_program(models.configs["vae"], forward.placement, forward.decode), None
    for t in range(clip.latents[0]):
        stage = Stage("decode next" if t else "decode first", "vae", program, pictures=clip.latents[1:3])
        pixels, bad, cache = run(stage, latents[:, t : t + 1], cache)  # [1,1,H,W,C] -> [1,F,Y,X,3]
        yield pixels, bad, t + 1


@functools.lru_cache(maxsize=8)
def _decode_program(cfg: wan.VAEConfig, placement: Placement | None, arithmetic: str | None) -> Any:
    """jitted (params, normalised latents [1,1,H,W,C], cache or None) -> (uint8 [1,F,Y,X,3], non-finite share, cache).

    F is 1 without a cache and 4 with one; the cache is donated.
    """

    def decode(params: Params, latents: Array, cache: Any) -> tuple[Array, Array, Any]:
        latents = wan.denormalize_latents(cfg, latents)
        frames, cache = wan.decode_chunk(params, cfg, latents, cache, placement=placement, arithmetic=arithmetic)
        pixels, bad = to_pixels(frames), nonfinite_share(frames)
        if placement is not None:
            pixels, bad = placement.replicate((pixels, bad))
        return pixels, bad, cache

    return jax.jit(decode, donate_argnums=2)


def _decode_tiles(
    cfg: wan.VAEConfig, clip: Clip, forward: Forward, run: Run, latents: Array
) -> Iterator[tuple[Any, Any, int]]:
    """Every tile over all frames, which go to the host, whence they are put together one latent frame after another."""
    height, width, placement = *clip.latents[1:3], forward.placement
    where = wan.cut_to_decode(cfg, clip.vae_tiles, height, width)
    assert where is not None
    tile, rows = Stage("decode tile", "vae", _tile_program(cfg, placement, forward.decode)), []
    for y in where.rows:
        rows.append([])
        for x in where.columns:
            rows[-1].append(jax.device_get(run(tile, latents[:, :, y, x])))
            yield np.zeros((1, 0, *clip.frames[1:], 3), np.uint8), 0.0, 0
    join = _join_program(cfg, clip.vae_tiles, height, width, placement)
    for t in range(clip.latents[0]):
        stage = Stage("join next" if t else "join first", "vae", join)
        pixels, bad = run(stage, [[tile[t] for tile in row] for row in rows])
        yield pixels, bad, t + 1


@functools.lru_cache(maxsize=8)
def _tile_program(cfg: wan.VAEConfig, placement: Placement | None, arithmetic: str | None) -> Any:
    """jitted (params, normalised latents [1,T,h,w,C] of a tile) -> for each latent frame what `wan.join_tiles` takes,
    float32 [1,F,y,x,C], F as in `_decode_program`."""

    def tile(params: Params, latents: Array) -> list[Array]:
        latents = wan.denormalize_latents(cfg, latents)
        patches = wan.decode_tile(params, cfg, latents, placement=placement, arithmetic=arithmetic)
        patches = patches if placement is None else placement.replicate(patches)
        return jnp.split(patches, list(range(1, patches.shape[1], cfg.temporal_factor)), axis=1)

    return jax.jit(tile)


@functools.lru_cache(maxsize=8)
def _join_program(cfg: wan.VAEConfig, tiles: Tiles, height: int, width: int, placement: Placement | None) -> Any:
    """jitted (params, rows of tiles [1,F,y,x,C]) -> (uint8 [1,F,Y,X,3], non-finite share)."""
    where: Any = wan.cut_to_decode(cfg, tiles, height, width)

    def join(params: Params, rows: Any) -> tuple[Array, Array]:
        frames = wan.join_tiles(cfg, rows, where)
        pixels, bad = to_pixels(frames), nonfinite_share(frames)
        return (pixels, bad) if placement is None else placement.replicate((pixels, bad))

    return jax.jit(join)


def preview(models: Models, forward: Forward) -> Stage:
    return Stage("preview", "vae", _first_frames(models.configs["vae"], forward.placement, forward.decode))


@functools.lru_cache(maxsize=8)
def _first_frames(cfg: wan.VAEConfig, placement: Placement | None, arithmetic: str | None) -> Any:
    """jitted (params, normalised latents [B,1,H,W,C]) -> float32 first frames [B,1,Y,X,3] in -1..1, for previews."""

    def first(params: Params, latents: Array) -> Array:
        latents = wan.denormalize_latents(cfg, latents)
        frames, _ = wan.decode_chunk(params, cfg, latents, None, placement=placement, arithmetic=arithmetic)
        return frames if placement is None else placement.replicate(frames)

    return jax.jit(first)
