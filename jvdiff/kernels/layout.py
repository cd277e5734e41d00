"""Tokens into blocks and back: what the tile patterns share around the block-sparse kernel.

B batch · L tokens · N heads · K head dim · V places in a block: a tile's volume, or more · n blocks.

`place` int64 [L] says where each token of the operands goes when every block is padded to V places.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jvdiff.kernels import block_sparse, tiles
from jvdiff.kernels.linear import linear
from jvdiff.runtime.target import Target


class Blocks(NamedTuple):
    """The tokens of a sequence as blocks for a kernel.

    target, name: what the program is made for (None: the devices at hand), and the implementation that is chosen.
    block: V.
    place, sizes: of each token, int64 [L], and how many tokens each block has, int64 [n].
    first: the row of each block's first token, int64 [n], where the kernel takes the tokens as they lie; None: padded.
    """

    target: Target | None
    name: str
    block: int
    place: np.ndarray
    sizes: np.ndarray
    first: np.ndarray | None

    def enter(self, x: jax.Array) -> jax.Array:
        """[B,L,...] -> what the kernel takes: the same, or [B,n*V,...]."""
        return x if self.first is not None else to_blocks(x, self.place, self.sizes.size * self.block)

    def leave(self, x: jax.Array) -> jax.Array:
        """The inverse of `enter`."""
        return x if self.first is not None else from_blocks(x, self.place)

    def attend(
        self,
        q: Any,
        k: Any,
        v: Any,
        q2k: Any,
        count: Any,
        kv_sizes: Any,
        *,
        start: int,
        end: int,
        scale: float | None = None,
    ) -> Any:
        """(out, lse) of the queries in the blocks from `start` to `end`; q, k and v have entered, whole."""
        rows: Any = {"q_sizes": self.sizes[start:end], "scale": scale}
        low, high = start * self.block, end * self.block
        if self.first is not None:
            low, high = (int(self.sizes[:i].sum()) for i in (start, end))
            rows |= {"q_first": self.first[start:end] - low, "kv_first": self.first}
        count = np.broadcast_to(count, q2k.shape[:3]) if isinstance(count, np.ndarray) else count
        rows |= {"block": self.block, "implementation": self.name, "target": self.target}
        return block_sparse.block_sparse_attention(q[:, low:high], k, v, q2k, count, kv_sizes, return_lse=True, **rows)


def blocks(
    target: Target | None, name: str, block: int, *parts: tuple[np.ndarray, np.ndarray], padded: bool = False
) -> Blocks:
    """Tokens as blocks of `block` places; parts: (place, sizes) of what follows each other in the sequence.

    padded: in any case, for keys whose number is known only as the program runs.
    """
    starts = np.cumsum([0, *(sizes.size for _, sizes in parts)]) * block
    place = np.concatenate([start + place for start, (place, _) in zip(starts, parts, strict=False)])
    sizes = np.concatenate([sizes for _, sizes in parts])
    together = np.array_equal(place, tiles.non_pad_index(sizes, block)) and place.size < sizes.size * block
    in_place = name == "mosaic_gpu" and not padded and together and not (sizes % block_sparse.ALIGNED).any()
    return Blocks(target, name, block, place, sizes, np.cumsum(sizes) - sizes if in_place else None)


def video_places(grid: tiles.Grid, tile: tiles.Grid, tiled: bool, block: int) -> tuple[np.ndarray, np.ndarray]:
    """(place [L], sizes [tiles]) of a video whose tokens come in raster order, or in tile order if `tiled`."""
    sizes = tiles.variable_block_sizes(grid, tile)
    place = tiles.non_pad_index(sizes, block)
    return place if tiled else place[tiles.reverse_partition_indices(grid, tile)], sizes


def segment_places(lengths: tuple[int, ...], tokens: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """(place, sizes) of segments that follow each other, each cut into blocks of `tokens`, the last one ragged."""
    sizes = [min(tokens, n - i) for n in lengths for i in range(0, n, tokens)]
    return tiles.non_pad_index(np.array(sizes, np.int64), block), np.array(sizes, np.int64)


def text_sizes(sizes: np.ndarray, text_length: Any, block: int) -> Any:
    """[n]: how many tokens of each block of a text are keys, where its blocks hold `sizes` tokens and the first
    `text_length` tokens count: numpy, or traced as that is."""
    xp: Any = np if isinstance(text_length, int) else jnp
    return xp.clip(text_length - block * np.arange(sizes.size, dtype=np.int32), 0, sizes.astype(np.int32))


def by_clip(attend: Callable[..., jax.Array], text_length: Any, *arrays: Any) -> jax.Array:
    """`attend(length int32 [], *arrays)` for each clip of [B] and [B,...] in turn: one list of blocks serves texts of
    one length. Arrays that are None stay so."""
    if text_length.shape[0] == 1:
        return attend(text_length[0], *arrays)
    one = lambda x: attend(x[0], *jax.tree.map(lambda a: a[None], x[1]))[0]  # noqa: E731
    return jax.lax.map(one, (text_length, arrays))


def to_blocks(x: jax.Array, place: np.ndarray, slots: int) -> jax.Array:
    """[B,L,...] -> [B,slots,...], zero where no token lies. Nothing happens to what is in place already."""
    if np.array_equal(place, np.arange(place.size)):  # all in front, so that XLA need not gather
        return x if place.size == slots else jnp.pad(x, ((0, 0), (0, slots - place.size), *((0, 0),) * (x.ndim - 2)))
    return _take(x, _sources(place, slots), place)


def from_blocks(x: jax.Array, place: np.ndarray) -> jax.Array:
    """The inverse of `to_blocks`: [B,slots,...] -> [B,L,...]."""
    if np.array_equal(place, np.arange(place.size)):
        return x[:, : place.size]
    return _take(x, place, _sources(place, x.shape[1]))


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
    """ValueError unless all operands are [B,tokens,N,K] of one shape, and all but `gate` of one float dtype.

    k and v may have fewer heads, which divide N.
    """
    q = operands["q"]
    for name, x in operands.items():
        heads = operands["k"].shape[2:3] if name in ("k", "v") and x.ndim == q.ndim == 4 else q.shape[2:3]
        whole = not heads or (heads[0] > 0 and q.shape[2] % heads[0] == 0)
        shape = (*q.shape[:2], *heads, *q.shape[3:])
        if x.ndim != 4 or x.shape != shape or not whole or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"{function}: {name} is {x.dtype}{list(x.shape)} beside q {list(q.shape)}; all operands must be "
                f"[B,L,N,K] of one shape and float dtype, k and v of N heads or of a divisor of them"
            )
        if x.dtype != q.dtype and name != "gate":
            raise ValueError(f"{function}: {name} is {x.dtype} and q is {q.dtype}; they must have one dtype")
    if q.shape[1] != tokens:
        raise ValueError(f"{function}: q has {q.shape[1]} tokens, but {meaning} makes {tokens}; pass the grid of q")


def grouped(x: jax.Array, heads: int) -> jax.Array:
    """Keys or values [B,L,G,K] of groups of heads, once for each of them: [B,L,heads,K]."""
    return x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)


def places(tokens: int) -> int:
    """The places of a block of that many tokens in the kernels of GPUs, which work on 64 at once; small ones stay."""
    return -(-tokens // 64) * 64 if tokens >= 64 else tokens


def choose(
    q: Any, count: int, tokens: int, implementation: str | None, target: Target | None = None
) -> tuple[str, int]:
    """The implementation for q [B,L,N,K] in `count` blocks of at most `tokens` tokens, and the places of a block.

    Raises as `block_sparse.choose` does.
    """

    def chosen(block: int) -> str:
        x = jax.ShapeDtypeStruct((q.shape[0], count * block, *q.shape[2:]), q.dtype)
        return block_sparse.choose(x, x, x, block=block, implementation=implementation, target=target)

    wide = places(tokens)
    on_cpus = ("xla", "reference")  # which take blocks of any size
    if implementation not in on_cpus and (name := chosen(wide)) not in on_cpus:
        return name, wide
    return chosen(tokens), tokens
