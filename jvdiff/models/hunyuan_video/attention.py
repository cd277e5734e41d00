"""The joint attention of the transformer's blocks: video tokens and text rows, which all see each other.

B batch · L video tokens · S text rows · N heads · K head dim.
"""

from typing import Any

import jax.numpy as jnp

from jvdiff.models.hunyuan_video.plan import Plan
from jvdiff.sharding import sequence
from jvdiff.types import Array

Heads = tuple[Array, Array, Array]  # queries, keys and values


def attend(plan: Plan, lengths: Array, chosen: Array | None, video: Heads, text: Heads) -> tuple[Array, Array]:
    """Queries, keys and values of the video [B,L,N,K], in the pattern's order, and of the text [B,S,N,K] -> the same
    shapes. Of the text's keys the first `lengths` [B] count; its later queries give numbers that nobody uses."""

    def local(q: Array, k: Array, v: Array, lengths: Array, first_head: Any = None, chosen: Any = None) -> Array:
        common: Any = dict(grid=plan.grid, first_head=first_head, implementation=plan.implementation)
        common |= {} if chosen is None else {"chosen": chosen}
        return plan.pattern.attend(q, k, v, None, text_length=lengths, target=plan.target, **common)

    if plan.split is not None:
        return sequence.joint_attention(local, plan.split, video, text, lengths, plan.implementation, chosen)
    L = video[0].shape[1]
    q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(video, text, strict=True))  # [B,L+S,N,K]
    out = local(q, k, v, lengths, None, chosen)
    return out[:, :L], out[:, L:]
