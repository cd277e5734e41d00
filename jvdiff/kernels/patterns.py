"""Attention patterns as text: what a setting `pattern` says."""

import math
import re
from typing import Any, TypeAlias

from jvdiff.config import within
from jvdiff.errors import UsageError
from jvdiff.kernels.block_causal import BlockCausal
from jvdiff.kernels.dense import Dense
from jvdiff.kernels.sliding_tile import SlidingTile
from jvdiff.kernels.video_sparse import VideoSparse

TILE_TOKENS = 4096
Pattern: TypeAlias = Dense | SlidingTile | VideoSparse | BlockCausal


def read(text: str, heads: int | None = None) -> Dense | SlidingTile | VideoSparse:
    """What `pattern` says, for a model with that many heads:

        dense
        sliding_tile:6x8x8:3x3x3    tile in tokens, window in tiles, time first; or a window for each head, with commas
        video_sparse:4x4x4:0.9      tile in tokens, and the share of tiles that a tile does not see

    Raises:
        UsageError: anything else.
    """
    three = "[1-9][0-9]{0,3}x[1-9][0-9]{0,3}x[1-9][0-9]{0,3}"
    if text == "dense":
        return Dense()
    if match := re.fullmatch(f"sliding_tile:({three}):({three}(?:,{three})*)", text):
        windows: Any = tuple(map(_sizes, match[2].split(",")))
        if heads is not None and len(windows) not in (1, heads):
            raise UsageError(f"pattern has {len(windows)} windows; expected one, or one for each of the {heads} heads.")
        pattern = SlidingTile(_sizes(match[1]), windows if len(windows) > 1 else windows[0])
    elif match := re.fullmatch(rf"video_sparse:({three}):(0|1|[01]?\.[0-9]+)", text):
        pattern = VideoSparse(_sizes(match[1]), float(match[2]))
    else:
        raise UsageError(
            f"pattern is {text!r:.80}; expected 'dense', 'sliding_tile:6x8x8:3x3x3' (tile, window) or "
            f"'video_sparse:4x4x4:0.9' (tile, sparsity)."
        )
    if isinstance(pattern, VideoSparse):
        within("the sparsity of pattern", pattern.sparsity, 0, 1)
    within("the number of tokens in a tile of pattern", math.prod(pattern.tile), 1, TILE_TOKENS)
    return pattern


def _sizes(text: str) -> tuple[int, int, int]:
    t, h, w = map(int, text.split("x"))
    return t, h, w
