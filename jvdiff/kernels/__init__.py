"""Attention as operations with a contract: references, backends, and a way to tell which one will run."""

from jvdiff.kernels import mask_search, patterns, tiles
from jvdiff.kernels.block_causal import block_causal_attention
from jvdiff.kernels.block_sparse import block_sparse_attention
from jvdiff.kernels.dense import IMPLEMENTATIONS, attention, choose, merge
from jvdiff.kernels.patterns import BlockCausal, Dense, Pattern, SlidingTile, VideoSparse
from jvdiff.kernels.sliding_tile import sliding_tile_attention
from jvdiff.kernels.video_sparse import sparsity_schedule, video_sparse_attention

__all__ = [
    "IMPLEMENTATIONS",
    "BlockCausal",
    "Dense",
    "Pattern",
    "SlidingTile",
    "VideoSparse",
    "attention",
    "block_causal_attention",
    "block_sparse_attention",
    "choose",
    "mask_search",
    "merge",
    "patterns",
    "sliding_tile_attention",
    "sparsity_schedule",
    "tiles",
    "video_sparse_attention",
]
