"""Video sparse attention: pooled tiles choose which tiles each tile attends to, and attend to each other coarsely.

B batch · L tokens · N heads · K head dim · V tokens of a tile · P prefix blocks · n blocks, prefix and video.

Source: arXiv 2505.13389 and FastVideo's code (which, unlike the paper, gates only the coarse branch). Pooling, scores
and coarse softmax are float32 here. The choice of tiles is a constant to the gradient.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jvdiff.kernels import block_sparse, layout, tiles
from jvdiff.kernels.best import best
from jvdiff.kernels.tiles import Grid
from jvdiff.runtime.target import Target

_PRECISION = lax.Precision.HIGHEST  # a score that is rounded differently chooses another tile


def video_sparse_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gate: jax.Array | None,
    *,
    grid: Grid,
    tile: Grid = (4, 4, 4),
    sparsity: float,
    prefix_lengths: tuple[int, ...] = (),
    prefix_policy: str = "exempt",
    text_length: Any = None,
    causal: bool = False,
    scale: float | None = None,
    tiled: bool = False,
    implementation: str | None = None,
    target: Target | None = None,
) -> jax.Array:
    """Fine attention to the best tiles, plus gate times coarse attention between the means of tiles; differentiable.

    Each query tile sees the `tiles.top_k_count(sparsity, tiles)` tiles whose mean key has the highest product with its
    mean query, the lowest tile number first on ties; every head and batch entry chooses for itself.

    Args:
      q, k, v: [B,L,N,K] of one float dtype: the prefix segments' tokens, then the T*H*W video tokens, then text slots
        if `text_length` is given. k and v may have fewer heads, each for as many of q that follow each other.
      gate: [B,L,N,K], factor of the coarse branch for each token and channel; None: the fine branch alone.
      grid: (T,H,W) of the video tokens.
      tile: (a,b,c) tokens of one tile.
      sparsity: in 0..1; 0 keeps every tile, 1 keeps one.
      prefix_lengths: tokens of each prefix segment (text, key frames, ...). Segments are cut into blocks of V, the last
        one ragged; prefix queries see everything.
      prefix_policy: "exempt": video queries see the whole prefix and their best tiles. "compete": they see the same
        number of blocks, the best of prefix and video together.
      text_length: how many of the text slots, from the first on, are keys, a number or int32 [] that may be traced: all
        tokens see those beside what they choose, and text sees everything. Later slots give meaningless values. Not
        beside a gate: text has no part in the coarse branch.
      causal: a tile sees no tile of later frames than its own, and keeps its share of those that it may see; not beside
        a prefix or text, which see everything.
      scale: of the logits; None: K^-1/2.
      tiled: the video tokens are in tile order (`tiles.partition_indices`), not raster order, and so is the result.
      implementation: of `block_sparse_attention`; None takes the best.
      target: what the program is made for; None: the devices at hand.

    Returns:
      [B,L,N,K] in the dtype and order of q.

    Raises:
      ValueError: operands, grid, tile, sparsity or prefix that do not fit together.
      NotImplementedError: the named implementation cannot do this.
    """
    video_tiles = int(np.prod(tiles.counts(grid, tile)))
    if not all(isinstance(x, (int, np.integer)) and x >= 1 for x in prefix_lengths):
        raise ValueError(
            f"video_sparse_attention: prefix_lengths must be whole numbers of at least 1 token, not {prefix_lengths!r}"
        )
    if prefix_policy not in ("exempt", "compete"):
        raise ValueError(f"video_sparse_attention: prefix_policy must be 'exempt' or 'compete', not {prefix_policy!r}")
    if not 0 <= sparsity <= 1:
        raise ValueError(f"video_sparse_attention: sparsity must be a number in 0..1, not {sparsity!r}")
    operands = {"q": q, "k": k, "v": v} | ({} if gate is None else {"gate": gate})
    meaning = f"the grid {tuple(grid)}" + (f" with prefixes of {tuple(prefix_lengths)}" if prefix_lengths else "")
    before = sum(prefix_lengths) + int(np.prod(grid))
    slots = 0 if text_length is None or q.ndim != 4 else max(0, q.shape[1] - before)
    layout.check("video_sparse_attention", operands, before + slots, meaning)

    if causal and (prefix_lengths or slots):
        raise ValueError("video_sparse_attention: causal does not go with a prefix or text, which see everything")
    if gate is not None and slots:
        raise ValueError("video_sparse_attention: a gate does not go with text, which has no coarse branch")

    scale = block_sparse.scale_of(q, scale)
    k, v = layout.grouped(k, q.shape[2]), layout.grouped(v, q.shape[2])
    tokens, frame = (
        int(np.prod(tile)),
        int(np.prod(tiles.counts(grid, tile)[1:])),
    )  # of a tile; tiles of the same frames
    name, block = layout.choose(q, video_tiles, tokens, implementation, target)
    prefix = layout.segment_places(prefix_lengths, tokens, block)
    text = layout.segment_places((slots,), block, block)
    video = layout.video_places(grid, tile, tiled, block)
    blocks = layout.blocks(target, name, block, prefix, video, text, padded=slots > 0)
    n, P = blocks.sizes.size - text[1].size, prefix[1].size
    q, k, v = blocks.enter(q), blocks.enter(k), blocks.enter(v)
    means = [_means(x, blocks)[:, :n] for x in (q, k, v)]  # [B,n,N,K]
    # [B,N,n,n]
    scores = jnp.einsum("bink,bjnk->bnij", *means[:2], precision=_PRECISION) * scale
    fixed = lax.stop_gradient(scores[:, :, P:])
    if causal:
        past = np.arange(n)[None] // frame <= np.arange(n)[:, None] // frame  # [n,n]
        scores = jnp.where(past[None, None], scores, -jnp.inf)
        q2k, count = _best_of_past(fixed, sparsity, frame)
    else:
        q2k = _best(fixed, tiles.top_k_count(sparsity, video_tiles), P, prefix_policy)
        count = np.full((1, 1, 1), q2k.shape[-1], np.int32)
    sizes: Any = blocks.sizes
    if slots:
        sizes = jnp.concatenate([sizes[:n].astype(np.int32), layout.text_sizes(text[1], text_length, block)])
        rows = np.broadcast_to(np.arange(n, sizes.size, dtype=np.int32), (*q2k.shape[:3], text[1].size))
        q2k, count = jnp.concatenate([rows, q2k], axis=-1), count + np.int32(text[1].size)
    parts = [blocks.attend(q, k, v, q2k, count, sizes, start=P, end=n, scale=scale)[0]]
    for start, end in ((0, P), (n, sizes.size)):  # those that see everything
        if start < end:
            everything = layout.everything(end - start, blocks.sizes)
            of_part, _ = blocks.attend(q, k, v, *everything, sizes, start=start, end=end, scale=scale)
            parts.insert(0 if start == 0 else len(parts), of_part)
    out = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)  # all tokens, the prefix first
    out = blocks.leave(out)
    if gate is None:
        return out
    weights = jax.nn.softmax(scores, axis=-1)
    coarse = jnp.einsum("bnij,bjnk->bink", weights, means[2], precision=_PRECISION)  # [B,n,N,K]
    coarse = jnp.broadcast_to(coarse[:, :, None], (*coarse.shape[:2], block, *coarse.shape[2:]))  # [B,n,V,N,K]
    coarse = layout.from_blocks(coarse.reshape(q.shape[0], n * block, *q.shape[2:]), blocks.place)  # [B,L,N,K]
    return (out.astype(jnp.float32) + gate.astype(jnp.float32) * coarse).astype(q.dtype)


def _means(x: jax.Array, blocks: layout.Blocks) -> jax.Array:
    """What has entered the blocks -> float32 [B,n,N,K]: the mean of each block's tokens. Padded places hold zero."""
    if blocks.first is not None:  # which XLA on a GPU makes a part of the sum
        x = layout.to_blocks(x, blocks.place, blocks.sizes.size * blocks.block)
    x = x.reshape(x.shape[0], blocks.sizes.size, blocks.block, *x.shape[2:])  # [B,n,V,N,K]
    return jnp.sum(x, axis=2, dtype=jnp.float32) / blocks.sizes.astype(np.float32)[None, :, None, None]


def _best(scores: jax.Array, kept: int, P: int, policy: str) -> jax.Array:
    """The blocks that each video tile sees, int32 [B,N,tiles,P+kept], from its scores [B,N,tiles,P+tiles]."""
    scores = jnp.where(scores == 0, 0, scores)  # -0 ties with 0
    if policy == "compete" or P == 0:
        return best(scores, P + kept)
    video = best(scores[..., P:], kept) + P
    return jnp.concatenate([lax.broadcasted_iota(jnp.int32, (*video.shape[:3], P), 3), video], axis=-1)  # [...,P+kept]


def _best_of_past(scores: jax.Array, sparsity: float, frame: int) -> tuple[jax.Array, np.ndarray]:
    """(q2k int32 [B,N,n,M], count [1,1,n]) where no tile sees later frames; `frame` tiles are of the same ones."""
    n = scores.shape[-1]
    kept = [tiles.top_k_count(sparsity, end) for end in range(frame, n + 1, frame)]
    rows = []
    for i, k in enumerate(kept):
        row = _best(scores[:, :, i * frame : (i + 1) * frame, : (i + 1) * frame], k, 0, "exempt")
        rows.append(jnp.pad(row, ((0, 0), (0, 0), (0, 0), (0, max(kept) - k))))
    return jnp.concatenate(rows, axis=2), np.repeat(kept, frame)[None, None].astype(np.int32)  # rows of all frames


def sparsity_schedule(step: int, target: float, rate: float, interval: int) -> float:
    """The sparsity to fine-tune a dense model with at `step`: it rises by `rate` every `interval` steps up to `target`.

    Exactly upstream's rule, min(step // interval, target // rate) * rate in doubles, so that its recipes stay the same.
    It is not lifted to the target at the end: it stays at the last whole multiple of `rate`, which is below the target
    when `rate` does not divide it, and also where rounding says so (0.9 by 0.1 ends at 0.8; 0.8 by 0.03 at 0.78).
    """
    if not (0 <= target <= 1 and 0 < rate <= 1 and interval >= 1 and step >= 0):
        raise ValueError(
            f"sparsity_schedule: needs step >= 0, target in 0..1, rate in 0..1 but not 0 and interval >= 1; found step "
            f"{step}, target {target}, rate {rate}, interval {interval}"
        )
    return min(step // interval, target // rate) * rate
