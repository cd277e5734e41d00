"""Block-causal attention: the frames of a chunk see one another, and chunks that came before; no frame sees the future.

B batch · T latent frames · L tokens · N heads · K head dim · V tokens of a frame.

Source: the masks of CausVid (arXiv 2412.07772) and Self-Forcing (arXiv 2506.08009). `window` and `sink` are counted as
FlashDreams counts them: what a chunk sees are `sink` + `window` frames, its own among the window's. (Self-Forcing's
`local_attn_size` is the sum of both.)
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvdiff.errors import UsageError
from jvdiff.kernels import layout
from jvdiff.kernels.block_sparse import block_sparse_attention


@dataclass(frozen=True)
class BlockCausal:
    """The pattern of `block_causal_attention`, for the forward pass of a whole video.

    chunk: frames that are made at once. window: frames of the moving past that a chunk sees, itself included; None:
    all. sink: the first so many frames of the video stay visible for ever.
    teacher_forcing: the frames are two copies of a video, one clean and one noisy: the noisy copy of a chunk sees
    itself, and of all others the clean copy, which is what it sees when a video is made chunk by chunk.
    """

    chunk: int = 3
    window: int | None = None
    sink: int = 0
    teacher_forcing: bool = False

    def __post_init__(self):
        window = self.chunk if self.window is None else self.window
        whole = all(type(n) is int for n in (self.chunk, self.sink, window))
        if not whole or self.chunk < 1 or self.sink < 0 or window < self.chunk:
            raise UsageError(
                f"{self}: expected whole numbers, chunk from 1, sink from 0, and a window of at least one chunk, which "
                "counts as a part of it."
            )

    def frames(self, count: int) -> np.ndarray:
        """int32 [T]: the place in the video of each of `count` frames of the forward pass.

        Raises:
            UsageError: chunks do not divide them, or there are not two copies.
        """
        copies = 1 + self.teacher_forcing
        if count % (self.chunk * copies):
            what = f"{copies} copies of a video" if copies > 1 else "a video"
            raise UsageError(
                f"{count} latent frames are not {what} in chunks of {self.chunk}; expected a multiple of "
                f"{self.chunk * copies}."
            )
        return np.tile(np.arange(count // copies, dtype=np.int32), copies)

    def visible(self, count: int) -> np.ndarray:
        """bool [T,T]: whether the frame of a row sees the frame of a column, for `count` frames; see `frames`."""
        frames = self.frames(count)
        own = frames // self.chunk
        seen = visible(frames, frames, self.chunk, self.window, self.sink)
        if not self.teacher_forcing:
            return seen
        half = count // 2
        same = own[:, None] == own[None]
        seen[half:, :half] &= ~same[half:, :half]
        seen[:half, half:] = False
        seen[half:, half:] = same[half:, half:]
        return seen


def visible(queries: Any, keys: Any, chunk: int, window: int | None, sink: int) -> Any:
    """bool [T,S]: which frames `keys` int32 [S] of a video the frames `queries` int32 [T] see; numpy or traced."""
    end = (queries // chunk + 1)[:, None] * chunk
    keys = keys[None]
    seen = keys < end
    return seen if window is None else seen & ((keys < sink) | (keys >= end - window))


def block_causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: Any, *, implementation: str | None = None
) -> jax.Array:
    """Attention in which the frames of a video see those frames that a matrix names; differentiable in q, k and v.

    Args:
      q, k, v: [B,L,N,K] of one float dtype: T frames of L/T tokens each.
      visible: bool [T,T], whether the frame of a row sees the frame of a column; numpy, or traced.
      implementation: of `block_sparse_attention`; None takes the best.

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
    count = len(visible)
    tokens = q.shape[1] // count
    block = -(-tokens // 64) * 64 if tokens >= 64 else tokens  # GPU kernels work on 64 tokens
    place, sizes = layout.segment_places((tokens,) * count, block)
    layout.choose(q, count * block, block, implementation)
    q, k, v = (layout.to_blocks(x, place, count * block) for x in (q, k, v))
    q2k, counts = _lists(visible)
    out = block_sparse_attention(q, k, v, q2k, counts, sizes, block=block, implementation=implementation)
    return layout.from_blocks(out, place)


def _coarser(visible: np.ndarray) -> np.ndarray:
    """The same matrix for groups of frames, as large as they can be: one entry where a square has one value."""
    frames = len(visible)
    for size in range(frames, 1, -1):
        if frames % size == 0:
            squares = visible.reshape(frames // size, size, frames // size, size)
            if (squares == squares[:, :1, :, :1]).all():
                return squares[:, 0, :, 0]
    return visible


def _lists(visible: Any) -> tuple[Any, Any]:
    """(q2k int32 [1,1,T,M], count int32 [1,1,T]) of a matrix [T,T]."""
    xp = np if isinstance(visible, np.ndarray) else jnp
    counts = visible.sum(axis=1, dtype=np.int32)
    order = xp.argsort(~visible, axis=1, stable=True).astype(np.int32)
    most = int(counts.max()) if xp is np else visible.shape[1]
    return order[None, None, :, :most], counts[None, None]
