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

from jvdiff.kernels import layout
from jvdiff.runtime.target import Target


def visible(queries: Any, keys: Any, chunk: int, window: int | None, sink: int) -> Any:
    """bool [T,S]: which frames `keys` int32 [S] of a video the frames `queries` int32 [T] see; numpy or traced."""
    end = (queries // chunk + 1)[:, None] * chunk
    keys = keys[None]
    seen = keys < end
    return seen if window is None else seen & ((keys < sink) | (keys >= end - window))


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
