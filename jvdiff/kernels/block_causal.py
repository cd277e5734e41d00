"""Block-causal attention: the frames of a chunk see one another, and chunks that came before; no frame sees the future.

B batch · T latent frames · L tokens · N heads · K head dim · V tokens of a frame.

Source: the masks of CausVid (arXiv 2412.07772) and Self-Forcing (arXiv 2506.08009). `window` and `sink` are counted as
FlashDreams counts them: what a chunk sees are `sink` + `window` frames, its own among the window's. (Self-Forcing's
`local_attn_size` is the sum of both.)
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvdiff.kernels import block_sparse, layout, tiles
from jvdiff.kernels.sliding_tile import window_lists
from jvdiff.kernels.tiles import Grid
from jvdiff.runtime.target import Target


def visible(queries: Any, keys: Any, chunk: int, window: int | None, sink: int) -> Any:
    """bool [T,S]: which frames `keys` int32 [S] of a video the frames `queries` int32 [T] see; numpy or traced."""
    end = (queries // chunk + 1)[:, None] * chunk
    keys = keys[None]
    seen = keys < end
    return seen if window is None else seen & ((keys < sink) | (keys >= end - window))


def near(queries: Any, keys: Any, window: int, sink: int) -> Any:
    """bool [T,S]: whether tiles in time, `keys` int32 [S], are at most `window` // 2 from `queries` int32 [T], or among
    the first `sink`; numpy or traced."""
    keys = keys[None]
    return (abs(queries[:, None] - keys) <= window // 2) | (keys < sink)


def block_causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: Any,
    *,
    implementation: str | None = None,
    target: Target | None = None,
) -> jax.Array:
    """Attention in which the frames of a video see those frames that a matrix names; differentiable in q, k and v.

    Args:
      q, k, v: [B,L,N,K] of one float dtype: T frames of L/T tokens each.
      visible: bool [T,T], whether the frame of a row sees the frame of a column; numpy, or traced.
      implementation: of `block_sparse_attention`; None takes the best.
      target: what the program is made for; None: the devices at hand.

    Returns:
      [B,L,N,K] in the dtype of q.

    Raises:
      ValueError: T does not divide L, or the operands do not fit together.
      NotImplementedError: the named implementation cannot do this.
    """
    layout.check("block_causal_attention", {"q": q, "k": k, "v": v}, q.shape[1], "the video")
    if q.shape[1] % len(visible):
        raise ValueError(f"block_causal_attention: {len(visible)} frames do not divide the {q.shape[1]} tokens of q")
    if isinstance(visible, np.ndarray):
        visible = _coarser(visible)
    count, tokens = block_causal_blocks(visible, q.shape[1])
    name, block = layout.choose(q, count, tokens, implementation, target)
    blocks = layout.blocks(target, name, block, layout.segment_places((tokens,) * count, tokens, block))
    q, k, v = blocks.enter(q), blocks.enter(k), blocks.enter(v)
    return blocks.leave(blocks.attend(q, k, v, *_lists(visible), blocks.sizes, start=0, end=count)[0])


def causal_tile_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: Any,
    *,
    frame: tuple[int, int],
    tile: Grid,
    window: Grid,
    most: int | None = None,
    implementation: str | None = None,
    target: Target | None = None,
) -> jax.Array:
    """Sliding tile attention within a frame, where a matrix says which tiles in time see which; differentiable.

    Args:
      q: [B,T*H*W,N,K] of one float dtype: T frames of (H,W) tokens in raster order.
      k, v: [B,S*H*W,N,K], of S frames.
      seen: bool [T/a,S/a], whether the tiles of a row see those of a column in time; numpy, or traced. Every row sees
        something.
      frame: (H,W).
      tile: (a,b,c) tokens; a divides T and S, b and c need not divide the frame.
      window: (wt,wh,ww) tiles, of which wh and ww count here; at the border of the frame the box is shifted inwards.
      most: how many tiles in time a row sees at most; None: as many as there are, or as a numpy matrix says.
      implementation: of `block_sparse_attention`; None takes the best.
      target: what the program is made for; None: the devices at hand.

    Returns:
      [B,T*H*W,N,K] in the dtype of q.

    Raises:
      ValueError: what does not fit together.
      NotImplementedError: the named implementation cannot do this.
    """
    rows, columns = seen.shape
    grids: Any = [(n * tile[0], *frame) for n in (rows, columns)]
    for name, x, grid in (("q", q, grids[0]), ("k", k, grids[1]), ("v", v, grids[1])):
        if x.ndim != 4 or x.shape[1] != np.prod(grid) or x.shape[2:] != q.shape[2:]:
            raise ValueError(
                f"causal_tile_attention: {name} is {list(x.shape)}; expected [B,{np.prod(grid)},N,K], the frames of "
                f"{rows} by {columns} tiles in time of {tile} tokens"
            )
    counts = tiles.counts(grids[0], tile)
    each = counts[1] * counts[2]  # tiles of the same frames
    name, block = layout.choose(q, rows * each, int(np.prod(tile)), implementation, target)
    (place, sizes), (place_k, sizes_k) = (layout.video_places(grid, tile, False, block) for grid in grids)
    near, _ = window_lists((1, *counts[1:]), ((1, *window[1:]),))  # [1,1,each,M]
    order, count = _lists(seen)  # [1,1,rows,most], [1,1,rows]
    order = order[..., :most]
    q2k = order[:, :, :, None, :, None] * np.int32(each) + near[:, :, None, :, None]  # [1,1,rows,each,most,M]
    q2k = q2k.reshape(1, 1, rows * each, -1)
    count = (count * np.int32(near.shape[-1])).repeat(each, axis=2)
    to = lambda x, place, sizes: layout.to_blocks(x, place, sizes.size * block)  # noqa: E731
    out = block_sparse.block_sparse_attention(
        to(q, place, sizes), to(k, place_k, sizes_k), to(v, place_k, sizes_k), q2k, count, sizes_k,
        q_sizes=sizes, block=block, implementation=name, target=target,
    )  # fmt: skip
    return layout.from_blocks(out, place)


def block_causal_blocks(visible: Any, length: int) -> tuple[int, int]:
    """(blocks, tokens of one) in which the kernel takes `length` tokens; visible: bool [T,T], numpy or traced."""
    count = len(_coarser(visible) if isinstance(visible, np.ndarray) else visible)
    return count, length // count


def _coarser(visible: np.ndarray) -> np.ndarray:
    """The same matrix for groups of frames, as large as they can be: one entry where a square has one value."""
    frames = len(visible)
    for size in range(frames, 1, -1):
        if frames % size == 0:
            squares = visible.reshape(frames // size, size, frames // size, size)  # [group,query,group,key]
            if (squares == squares[:, :1, :, :1]).all():
                return squares[:, 0, :, 0]
    return visible


def _lists(visible: Any) -> tuple[Any, Any]:
    """(q2k int32 [1,1,T,M], count int32 [1,1,T]) of a matrix [T,T]."""
    xp = np if isinstance(visible, np.ndarray) else jnp
    counts = visible.sum(axis=1, dtype=np.int32)
    order = xp.argsort(~visible, axis=1, stable=True).astype(np.int32)  # [T,T]: the visible frames of a row first
    most = int(counts.max()) if xp is np else visible.shape[1]
    return order[None, None, :, :most], counts[None, None]
