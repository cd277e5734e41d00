"""The joint attention of the transformer's blocks: video tokens and text rows, which all see each other.

B batch · L video tokens · S text rows · N heads · K head dim.
"""

from typing import Any

import jax.numpy as jnp

from jvdiff.models.hunyuan_video.plan import Plan
from jvdiff.types import Array


def attend(
    plan: Plan, lengths: Array, chosen: Array | None, video: tuple[Array, ...], text: tuple[Array, ...]
) -> tuple[Array, Array]:
    """Queries, keys and values of the video [B,L,N,K], in the pattern's order, and of the text [B,S,N,K] -> the same
    shapes. Of the text's keys the first `lengths` [B] count; its later queries give numbers that nobody uses."""
    L = video[0].shape[1]
    q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(video, text, strict=True))  # [B,L+S,N,K]
    common: Any = dict(grid=plan.grid, implementation=plan.implementation, target=plan.target)
    common |= {} if chosen is None else {"chosen": chosen}
    out = plan.pattern.attend(q, k, v, None, text_length=lengths, **common)
    return out[:, :L], out[:, L:]
