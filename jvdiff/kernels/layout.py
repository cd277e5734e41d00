"""Tokens into blocks and back: what the tile patterns share around the block-sparse kernel.

B batch · L tokens · N heads · K head dim · V tokens in a block, a tile's volume.

`place` int64 [L] says where each token of the operands goes when every block is padded to V places.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvdiff.kernels import block_sparse, tiles
from jvdiff.kernels.linear import linear
from jvdiff.runtime.target import Target


def video_places(grid: tiles.Grid, tile: tiles.Grid, tiled: bool) -> tuple[np.ndarray, np.ndarray]:
    """(place [L], sizes [tiles]) of a video whose tokens come in raster order, or in tile order if `tiled`."""
    sizes = tiles.variable_block_sizes(grid, tile)
    place = tiles.non_pad_index(sizes, int(np.prod(tile)))
    return place if tiled else place[tiles.reverse_partition_indices(grid, tile)], sizes


def segment_places(lengths: tuple[int, ...], block: int) -> tuple[np.ndarray, np.ndarray]:
    """(place, sizes) of segments that follow each other, each cut into blocks of its own, the last one ragged."""
    sizes = [min(block, n - i) for n in lengths for i in range(0, n, block)]
    return tiles.non_pad_index(np.array(sizes, np.int64), block), np.array(sizes, np.int64)


def to_blocks(x: jax.Array, place: np.ndarray, slots: int) -> jax.Array:
    """[B,L,...] -> [B,slots,...], zero where no token lies. Nothing happens to what is in place already."""
    source = _sources(place, slots)
    return x if np.array_equal(place, np.arange(slots)) else _take(x, source, place)


def from_blocks(x: jax.Array, place: np.ndarray) -> jax.Array:
    """The inverse of `to_blocks`: [B,slots,...] -> [B,L,...]."""
    slots = x.shape[1]
    return x if np.array_equal(place, np.arange(slots)) else _take(x, place, _sources(place, slots))


def _sources(place: np.ndarray, slots: int) -> np.ndarray:
    """The token of each slot; L, which is out of range, for a slot without one."""
    source = np.full(slots, place.size)
    source[place] = np.arange(place.size)
    return source


def _take(x: jax.Array, index: np.ndarray, back: np.ndarray) -> jax.Array:
    """x[:, index], zero where out of range. `back` is the inverse, so that the gradient gathers instead of adding."""

    def take(index: np.ndarray, _: tuple[()], x: jax.Array) -> tuple[jax.Array]:
        return (jnp.take(x, index.astype(np.int32), axis=1, mode="fill", fill_value=0),)  # [B,len(index),...]

    like = jax.ShapeDtypeStruct((x.shape[0], index.size, *x.shape[2:]), x.dtype)
    return linear(partial(take, index), partial(take, back), (), [x], [like])[0]


def tile_order(x: jax.Array, grid: tiles.Grid, tile: tiles.Grid) -> jax.Array:
    """[B,L,...] in raster order over `grid` -> the same tokens in the order of `tiles.partition_indices`."""
    (t, h, w), (a, b, c) = tiles.counts(grid, tile), tile
    if (t * a, h * b, w * c) != grid:
        return _permuted(x, tiles.partition_indices(grid, tile))
    y = x.reshape(x.shape[0], t, a, h, b, w, c, -1)  # [B,t,a,h,b,w,c,...]
    y = y.transpose(0, 1, 3, 5, 2, 4, 6, 7)  # [B,t,h,w,a,b,c,...]: tile after tile
    return y.reshape(x.shape)  # [B,L,...]


def raster_order(x: jax.Array, grid: tiles.Grid, tile: tiles.Grid) -> jax.Array:
    """The inverse of `tile_order`."""
    (t, h, w), (a, b, c) = tiles.counts(grid, tile), tile
    if (t * a, h * b, w * c) != grid:
        return _permuted(x, tiles.reverse_partition_indices(grid, tile))
    y = x.reshape(x.shape[0], t, h, w, a, b, c, -1)  # [B,t,h,w,a,b,c,...]
    y = y.transpose(0, 1, 4, 2, 5, 3, 6, 7)  # [B,t,a,h,b,w,c,...]
    return y.reshape(x.shape)  # [B,L,...]


def _permuted(x: jax.Array, index: np.ndarray) -> jax.Array:
    if np.array_equal(index, np.arange(index.size)):
        return x
    return jnp.take(x, index.astype(np.int32), axis=1, mode="clip", unique_indices=True)  # [B,L,...]


def everything(rows: int, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(q2k [1,1,rows,M], count [1,1,rows]) of query blocks that see every key block with valid tokens."""
    blocks = np.flatnonzero(sizes).astype(np.int32)
    q2k = np.broadcast_to(blocks, (1, 1, rows, blocks.size))
    return q2k, np.full((1, 1, rows), blocks.size, np.int32)


def check(function: str, operands: dict[str, Any], tokens: int, meaning: str) -> None:
    """ValueError unless all operands are [B,tokens,N,K] of one shape, and all but `gate` of one float dtype."""
    q = operands["q"]
    for name, x in operands.items():
        if x.ndim != 4 or x.shape != q.shape or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"{function}: {name} is {x.dtype}{list(x.shape)} beside q {list(q.shape)}; all operands must be "
                f"[B,L,N,K] of one shape and float dtype"
            )
        if x.dtype != q.dtype and name != "gate":
            raise ValueError(f"{function}: {name} is {x.dtype} and q is {q.dtype}; they must have one dtype")
    if q.shape[1] != tokens:
        raise ValueError(f"{function}: q has {q.shape[1]} tokens, but {meaning} makes {tokens}; pass the grid of q")


def choose(q: Any, slots: int, block: int, implementation: str | None, target: Target | None = None) -> str:
    """The implementation of the block-sparse kernel for q [B,L,N,K] in `slots` padded places; raises as it does."""
    x = jax.ShapeDtypeStruct((q.shape[0], slots, *q.shape[2:]), q.dtype)
    return block_sparse.choose(x, x, x, block=block, implementation=implementation, target=target)
