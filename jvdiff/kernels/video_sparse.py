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

from jvdiff.kernels import layout, tiles
from jvdiff.kernels.block_sparse import block_sparse_attention
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
    tiled: bool = False,
    implementation: str | None = None,
    target: Target | None = None,
) -> jax.Array:
    """Fine attention to the best tiles, plus gate times coarse attention between the means of tiles; differentiable.

    Each query tile sees the `tiles.top_k_count(sparsity, tiles)` tiles whose mean key has the highest product with its
    mean query, the lowest tile number first on ties; every head and batch entry chooses for itself.

    Args:
      q, k, v: [B,L,N,K] of one float dtype: the prefix segments' tokens, then the T*H*W video tokens.
      gate: [B,L,N,K], factor of the coarse branch for each token and channel; None: the fine branch alone.
      grid: (T,H,W) of the video tokens.
      tile: (a,b,c) tokens of one tile.
      sparsity: in 0..1; 0 keeps every tile, 1 keeps one.
      prefix_lengths: tokens of each prefix segment (text, key frames, ...). Segments are cut into blocks of V, the last
        one ragged; prefix queries see everything.
      prefix_policy: "exempt": video queries see the whole prefix and their best tiles. "compete": they see the same
        number of blocks, the best of prefix and video together.
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
    layout.check("video_sparse_attention", operands, sum(prefix_lengths) + int(np.prod(grid)), meaning)

    block = int(np.prod(tile))
    prefix_place, prefix_sizes = layout.segment_places(prefix_lengths, block)
    place, sizes = layout.video_places(grid, tile, tiled)
    P = prefix_sizes.size
    place, sizes = np.concatenate([prefix_place, P * block + place]), np.concatenate([prefix_sizes, sizes])  # [L], [n]
    layout.choose(q, sizes.size * block, block, implementation, target)
    q, k, v = (layout.to_blocks(x, place, sizes.size * block) for x in (q, k, v))

    coarse_q, coarse_k = _means(q, sizes), _means(k, sizes)  # [B,n,N,K]
    # [B,N,n,n]
    scores = jnp.einsum("bink,bjnk->bnij", coarse_q, coarse_k, precision=_PRECISION) * q.shape[-1] ** -0.5
    kept = tiles.top_k_count(sparsity, video_tiles)
    q2k = _best(lax.stop_gradient(scores[:, :, P:]), kept, P, prefix_policy)
    count = np.full((1, 1, video_tiles), q2k.shape[-1], np.int32)

    def attend(q: jax.Array, q2k: Any, count: Any) -> jax.Array:
        count = np.broadcast_to(count, q2k.shape[:3])
        how: Any = dict(block=block, implementation=implementation, target=target)
        return block_sparse_attention(q, k, v, q2k, count, sizes, **how)

    out = attend(q[:, P * block :], q2k, count)
    if P:
        prefix = attend(q[:, : P * block], *layout.everything(P, sizes))
        out = jnp.concatenate([prefix, out], axis=1)  # [B,n*V,N,K], the prefix first
    if gate is not None:
        weights = jax.nn.softmax(scores, axis=-1)
        coarse = jnp.einsum("bnij,bjnk->bink", weights, _means(v, sizes), precision=_PRECISION)  # [B,n,N,K]
        gate = layout.to_blocks(gate, place, sizes.size * block).astype(jnp.float32)
        gate = gate.reshape(q.shape[0], sizes.size, block, *q.shape[2:])  # [B,n,V,N,K]
        gated = (gate * coarse[:, :, None]).reshape(q.shape)  # [B,n*V,N,K]
        out = (out.astype(jnp.float32) + gated).astype(q.dtype)
    return layout.from_blocks(out, place)


def _means(x: jax.Array, sizes: np.ndarray) -> jax.Array:
    """[B,n*V,N,K] -> float32 [B,n,N,K]: the mean of each block's valid tokens. Padded places hold zero."""
    x = x.reshape(x.shape[0], sizes.size, -1, *x.shape[2:])  # [B,n,V,N,K]
    return jnp.sum(x, axis=2, dtype=jnp.float32) / sizes.astype(np.float32)[None, :, None, None]


def _best(scores: jax.Array, kept: int, P: int, policy: str) -> jax.Array:
    """The blocks that each video tile sees, int32 [B,N,tiles,P+kept], from its scores [B,N,tiles,P+tiles]."""
    scores = jnp.where(scores == 0, 0, scores)  # -0 ties with 0
    if policy == "compete" or P == 0:
        return lax.top_k(scores, P + kept)[1]
    best = lax.top_k(scores[..., P:], kept)[1] + P
    return jnp.concatenate([lax.broadcasted_iota(jnp.int32, (*best.shape[:3], P), 3), best], axis=-1)  # [...,P+kept]


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
