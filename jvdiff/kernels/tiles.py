"""The geometry of tiles: which token lies in which tile, and where. Numpy only; all is known before a program runs.

A grid (T,H,W) of tokens in raster order (T slowest) is cut into tiles (a,b,c), numbered likewise; the last tile of an
axis may be smaller. In tile order, tile follows tile and each holds its tokens in raster order. Padded, every tile has
a*b*c places of which the first are taken.
Source of the conventions: FastVideo's video sparse attention (arXiv 2505.13389).
"""

import math

import numpy as np

Grid = tuple[int, int, int]


def counts(grid: Grid, tile: Grid) -> Grid:
    """Tiles on each axis. ValueError when a size is not a whole number of at least 1."""
    for name, sizes in (("grid", grid), ("tile", tile)):
        if len(sizes) != 3 or not all(isinstance(x, (int, np.integer)) and x >= 1 for x in sizes):
            raise ValueError(f"{name} must be three whole numbers (T, H, W) of at least 1, not {sizes!r}")
    t, h, w = (-(-n // x) for n, x in zip(grid, tile, strict=True))
    return t, h, w


def partition_indices(grid: Grid, tile: Grid) -> np.ndarray:
    """int64 [L]: the raster number of each token in tile order; `x[:, partition_indices(...)]` puts x in tile order."""
    _, h, w = counts(grid, tile)
    t_id, h_id, w_id = (np.arange(n) // x for n, x in zip(grid, tile, strict=True))
    tile_id = (t_id[:, None, None] * h + h_id[:, None]) * w + w_id
    return np.argsort(tile_id.ravel(), kind="stable")


def reverse_partition_indices(grid: Grid, tile: Grid) -> np.ndarray:
    """int64 [L]: the place in tile order of each token in raster order, the inverse of `partition_indices`."""
    return np.argsort(partition_indices(grid, tile))


def variable_block_sizes(grid: Grid, tile: Grid) -> np.ndarray:
    """int64 [tiles]: how many tokens each tile holds."""
    t, h, w = (np.minimum(x, n - x * np.arange(c)) for n, x, c in zip(grid, tile, counts(grid, tile), strict=True))
    return (t[:, None, None] * h[:, None] * w).ravel()


def non_pad_index(sizes: np.ndarray, block: int) -> np.ndarray:
    """int64 [sum(sizes)]: the place of each token when every block is padded to `block` places."""
    return np.flatnonzero(np.arange(block) < np.asarray(sizes)[:, None])


def top_k_count(sparsity: float, n: int) -> int:
    """How many of n blocks a query block keeps: clamp(ceil((1 - sparsity) n), 1, n), in doubles as upstream."""
    if math.isnan(sparsity):
        raise ValueError("sparsity must be a number, not NaN")
    return max(1, min(math.ceil((1 - sparsity) * n), n))
