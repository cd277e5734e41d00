"""Sliding tile attention: every tile of a video sees the box of tiles around it.

B batch · L tokens · N heads · K head dim · V tokens of a tile · M places in a row of the lists.

Source: arXiv 2502.04507 and FastVideo's kernels. A window that would leave the video is shifted inwards, never shrunk;
an even window is as wide as the next odd one; one that reaches every tile means the whole axis. Tiles at the end of an
axis may be smaller, which upstream does not allow.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvdiff.kernels import layout, tiles
from jvdiff.kernels.tiles import Grid
from jvdiff.runtime.target import Target

Windows = Grid | tuple[Grid, ...]


def sliding_tile_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    grid: Grid,
    tile: Grid,
    window: Windows,
    text_length: Any = 0,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    tiled: bool = False,
    first_head: Any = None,
    chosen: Any = None,
    implementation: str | None = None,
    target: Target | None = None,
) -> Any:
    """Attention of each video token to the tiles around its own, and to text; differentiable.

    Args:
      q, k, v: [B,L,N,K] of one float dtype: the T*H*W video tokens, then text slots if `text_length` is not 0. k and v
        may have fewer heads, each for as many of q that follow each other.
      grid: (T,H,W) of the video tokens.
      tile: (a,b,c) tokens of one tile.
      window: (wt,wh,ww) tiles that a tile sees on each axis, or a tuple of N of them, one per head.
      text_length: how many text slots, from the first on, are valid keys: video queries see them beside their window,
        text queries see them and the whole video. Later slots are not keys; as queries they give meaningless values.
        0: no text slots. An int32 [] that is traced may be anything up to their number.
      causal: a tile sees no tile of later frames than its own; not beside text, which sees the whole video.
      scale: of the logits; None: K^-1/2.
      return_lse: also return the log-sum-exp of each query's scaled logits.
      tiled: the video tokens are in tile order (`tiles.partition_indices`), not raster order, and so is the result.
      first_head: where there is a window for each of more heads than N, the heads of q are those from this one on
        (int32 [], may be traced; where they are shared among devices). Heads beyond the last window have none of their
        own, and take the last one's.
      chosen: int32 [B or 1,N], may be traced: which of the windows, of which there are any number, each head has.
      implementation: of `block_sparse_attention`; None takes the best.
      target: what the program is made for; None: the devices at hand.

    Returns:
      out [B,L,N,K] in the dtype and order of q; with return_lse, (out, lse), lse natural float32 [B,N,L].

    Raises:
      ValueError: operands, grid, tile, window or text length that do not fit together.
      NotImplementedError: the named implementation cannot do this.
    """
    counts, known = tiles.counts(grid, tile), isinstance(text_length, int)
    video, slots = int(np.prod(grid)), q.shape[1] - int(np.prod(grid)) if q.ndim == 4 else 0
    rows = (max(slots, text_length) if text_length else 0) if known else slots
    meaning = f"the grid {tuple(grid)}" + (f" and {rows} text slots" if rows else "")
    expected = video + (slots if rows else 0)
    layout.check("sliding_tile_attention", {"q": q, "k": k, "v": v}, expected, meaning)
    if known and not 0 <= text_length <= slots:
        raise ValueError(
            f"sliding_tile_attention: text_length {text_length} must lie in 0..{slots}, the slots after the "
            f"{video} video tokens of the grid {tuple(grid)}"
        )
    if causal and slots:
        raise ValueError("sliding_tile_attention: causal does not go with text slots: text sees the whole video")
    k, v = layout.grouped(k, q.shape[2]), layout.grouped(v, q.shape[2])
    own = q.shape[2] if first_head is None and chosen is None else None
    q2k, count = window_lists(counts, check_windows(window, own), causal)

    n = int(np.prod(counts))
    name, block = layout.choose(q, n, int(np.prod(tile)), implementation, target)
    places = layout.video_places(grid, tile, tiled, block), layout.segment_places((slots,), block, block)
    blocks = layout.blocks(target, name, block, *places, padded=not known)
    q, k, v = blocks.enter(q), blocks.enter(k), blocks.enter(v)
    texts = blocks.sizes.size - n
    of_text = layout.text_sizes(blocks.sizes[n:], text_length, block)
    # [tiles + text blocks], those that are keys
    sizes: Any = (np if known else jnp).concatenate([blocks.sizes[:n].astype(np.int32), of_text])

    text = n + (np.flatnonzero(of_text) if known else np.arange(texts)).astype(np.int32)
    q2k = np.concatenate([np.broadcast_to(text, (*q2k.shape[:3], text.size)), q2k], axis=-1)  # [1,heads,tiles,text+M]
    count = count + np.int32(text.size)
    if first_head is not None and q2k.shape[1] > 1:
        heads = jnp.minimum(first_head + np.arange(q.shape[2], dtype=np.int32), q2k.shape[1] - 1)
        q2k, count = jnp.asarray(q2k)[:, heads], jnp.asarray(count)[:, heads]  # rows of the N heads that are here
    if chosen is not None:
        q2k, count = (jnp.take(x[0], chosen, axis=0, mode="clip") for x in (q2k, count))  # [B or 1,N,tiles,...]
    out, lse = blocks.attend(q, k, v, q2k, count, sizes, start=0, end=n, scale=scale)
    if slots:
        everything = layout.everything(texts, sizes if known else blocks.sizes)
        text_out, text_lse = blocks.attend(q, k, v, *everything, sizes, start=n, end=n + texts, scale=scale)
        # The text behind the video: out [B,places,N,K], lse [B,N,places].
        out, lse = jnp.concatenate([out, text_out], axis=1), jnp.concatenate([lse, text_lse], axis=2)
    out = blocks.leave(out)
    if not return_lse:
        return out
    lse = blocks.leave(jnp.moveaxis(lse, 2, 1))  # [B,N,places] -> [B,L,N]
    return out, jnp.moveaxis(lse, 1, 2)  # [B,N,L]


def check_windows(window: Windows, heads: int | None) -> tuple[Grid, ...]:
    """The window of all heads, or one window per head (None: however many); ValueError for anything else."""
    windows: Any = (window,) if np.ndim(window) == 1 else tuple(window)
    ok = all(len(w) == 3 and all(isinstance(x, (int, np.integer)) and x >= 1 for x in w) for w in windows)
    if not ok or not windows or (heads is not None and len(windows) not in (1, heads)):
        raise ValueError(
            f"sliding_tile_attention: window must be three whole numbers of tiles (T, H, W) of at least 1, or one such "
            f"triple for each of the {heads} heads, not {window!r}"
        )
    return tuple(windows)


def axis_window(n: int, window: int) -> tuple[np.ndarray, int]:
    """(first key tile of each query tile [n], how many) on an axis of n tiles."""
    half = window // 2
    width = min(2 * half + 1, n)
    return np.clip(np.arange(n) - half, 0, n - width), width


def window_lists(counts: Grid, windows: tuple[Grid, ...], causal: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(q2k int32 [1,len(windows),tiles,M], count): the key tiles, ascending, of every query tile of a video.

    causal: of its window, a tile sees those tiles that begin no later than it.
    """
    n, frame = int(np.prod(counts)), counts[1] * counts[2]  # tiles, and those of the same frames
    rows, widths = {}, {}
    for window in dict.fromkeys(windows):
        axes = [axis_window(n, w) for n, w in zip(counts, window, strict=True)]
        t, h, w = (start[:, None] + np.arange(width) for start, width in axes)
        # Axes: the query tile in t, h, w, then the key tile in each.
        t, h, w = t[:, None, None, :, None, None], h[None, :, None, None, :, None], w[None, None, :, None, None, :]
        seen = ((t * counts[1] + h) * counts[2] + w).reshape(n, -1)  # [tiles,M]
        past = seen // frame <= np.arange(n)[:, None] // frame  # the first ones of a row, since it ascends
        rows[window], widths[window] = seen, past.sum(axis=1) if causal else np.full(n, seen.shape[1])
    most = max(r.shape[1] for r in rows.values())
    padded = {w: np.pad(r, ((0, 0), (0, most - r.shape[1]))) for w, r in rows.items()}
    q2k = np.stack([padded[w] for w in windows])[None].astype(np.int32)  # [1,windows,tiles,M]
    return q2k, np.stack([widths[w] for w in windows])[None].astype(np.int32)
