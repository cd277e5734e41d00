"""A VAE's pictures in tiles: each is computed on its own over all frames, and they are blended where they overlap.

    B batch · F frames · H W rows and columns of whatever is cut · C channels

Tiles take less memory and give other numbers than the whole: what a tile does not hold it does not see. The rules are
those of diffusers' `enable_tiling`, so that its numbers come out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from jvdiff.errors import UsageError
from jvdiff.types import Array

_TWO = "([1-9][0-9]{0,4})x([1-9][0-9]{0,4})"
OFF = "off"


@dataclass(frozen=True)
class Tiles:
    """How a VAE's pictures are cut; `str` gives the text that `read` takes.

    tile, stride: height and width in pixels, of a tile and from one to the next. The numbers are those that diffusers'
        `enable_tiling` takes; where a VAE has patches of pixels it encodes tiles that are as many patches.
    """

    tile: tuple[int, int] = (256, 256)
    stride: tuple[int, int] = (192, 192)

    def __post_init__(self):
        if not all(0 < step <= size for step, size in zip(self.stride, self.tile, strict=True)):
            raise UsageError(f"vae_tiles is {self}; expected strides from 1 to the size of a tile.")

    def check(self, factor: int) -> None:
        """Raises UsageError unless a VAE with this many pixels to a latent cell can be cut so."""
        if any(n % factor for n in (*self.tile, *self.stride)):
            a, b, c, d = (max(round(n / factor), 1) * factor for n in (*self.tile, *self.stride))
            raise UsageError(
                f"vae_tiles is {self}; this VAE has {factor}x{factor} pixels to a latent cell, and needs multiples of "
                f"{factor}. The nearest is {Tiles((a, b), (c, d))}."
            )

    def __str__(self) -> str:
        return ":".join(f"{height}x{width}" for height, width in (self.tile, self.stride))


def read(text: str | Tiles | None) -> Tiles | None:
    """The tiles that a text says, "256x256:192x192" for one; None where it is "off" or None.

    Raises:
        UsageError: anything else.
    """
    if text is None or text == OFF or isinstance(text, Tiles):
        return None if text == OFF else text
    match = re.fullmatch(f"{_TWO}:{_TWO}", text) if isinstance(text, str) else None
    if match is None:
        raise UsageError(
            f"vae_tiles is {text!r:.80}; expected 256x256:192x192 (height x width of a tile, and of the stride) or off."
        )
    height, width, down, right = map(int, match.groups())
    return Tiles((height, width), (down, right))


class Cut(NamedTuple):
    """Where the tiles of a picture are, and how their results are joined.

    rows, columns: of each tile, in what is cut
    overlap, keep: rows and columns of a tile's result that are blended with the one before, and those that stay
    size: rows and columns of the whole result
    """

    rows: tuple[slice, ...]
    columns: tuple[slice, ...]
    overlap: tuple[int, int]
    keep: tuple[int, int]
    size: tuple[int, int]


def cut(size: tuple[int, int], tile: Sequence[int], stride: Sequence[int], up: int = 1, down: int = 1) -> Cut:
    """The tiles of a picture of rows and columns, each of which becomes up / down of it.

    A tile starts wherever its start is inside, also where the one before has all that is left.
    """
    rows, columns = (
        tuple(slice(start, min(start + length, whole)) for start in range(0, whole, step))
        for whole, length, step in zip(size, tile, stride, strict=True)
    )

    def scaled(sizes: Sequence[int]) -> tuple[int, int]:
        height, width = (n * up // down for n in sizes)
        return height, width

    overlap = scaled([length - step for length, step in zip(tile, stride, strict=True)])
    return Cut(rows, columns, overlap, scaled(stride), scaled(size))


def each(run: Callable[[Array], Array], x: Array, where: Cut) -> list[list[Array]]:
    """x [B,F,H,W,C] through `run`, tile by tile, row by row; tiles of one size share one loop and one program."""
    places = [(i, j) for i in range(len(where.rows)) for j in range(len(where.columns))]
    sizes: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for i, j in places:
        size = where.rows[i].stop - where.rows[i].start, where.columns[j].stop - where.columns[j].start
        sizes.setdefault(size, []).append((i, j))
    done = {}
    for (height, width), group in sizes.items():
        starts = jnp.array([(where.rows[i].start, where.columns[j].start) for i, j in group], jnp.int32)

        def one(start: Array, shape: tuple[int, ...] = (*x.shape[:2], height, width, x.shape[4])) -> Array:
            return run(lax.dynamic_slice(x, (0, 0, start[0], start[1], 0), shape))

        results = lax.map(one, starts) if len(group) > 1 else one(starts[0])[None]  # [n,B,F,h,w,C]
        done |= dict(zip(group, results, strict=True))
    return [[done[i, j] for j in range(len(where.columns))] for i in range(len(where.rows))]


def join(tiles: Sequence[Sequence[Array]], where: Cut) -> Array:
    """The results [B,F,h,w,C] of all tiles, row by row -> [B,F,H,W,C].

    Each tile is blended with the one above, then with the one to its left, as these are once they are blended
    themselves; of each its first rows and columns stay.
    """
    (down, right), (height, width), size = where.overlap, where.keep, where.size
    above: Sequence[Array] = []
    rows = []
    for tile_row in tiles:
        blended: list[Array] = []
        for j, tile in enumerate(tile_row):
            tile = faded(above[j], tile, down, 2) if above else tile
            blended.append(faded(blended[-1], tile, right, 3) if blended else tile)
        rows.append(jnp.concatenate([tile[:, :, :height, :width] for tile in blended], axis=3))
        above = blended
    return jnp.concatenate(rows, axis=2)[:, :, : size[0], : size[1]]  # [B,F,H,W,C]


def faded(before: Array, tile: Array, extent: int, axis: int) -> Array:
    """The tile, its beginning along an axis faded in over the end of the one before, as many lines as both have."""
    extent = min(extent, before.shape[axis], tile.shape[axis])
    if extent == 0:
        return tile
    end = lax.slice_in_dim(before, before.shape[axis] - extent, None, axis=axis)
    begin, rest = jnp.split(tile, [extent], axis=axis)
    share = jnp.expand_dims(jnp.arange(extent, dtype=tile.dtype) / extent, [i for i in range(5) if i != axis])
    return jnp.concatenate([end * (1 - share) + begin * share, rest], axis=axis)
