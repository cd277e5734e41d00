"""Attention as operations with a contract: references, backends, and a way to tell which one will run."""

from jvdiff.kernels import tiles
from jvdiff.kernels.block_sparse import block_sparse_attention
from jvdiff.kernels.dense import IMPLEMENTATIONS, Dense, attention, choose, merge

__all__ = ["IMPLEMENTATIONS", "Dense", "attention", "block_sparse_attention", "choose", "merge", "tiles"]
