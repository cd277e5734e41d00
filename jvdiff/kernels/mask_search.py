"""The search for sliding tile attention's windows: how far each candidate is from full attention, and the best ones.

B batch · L tokens · N heads · K head dim · C candidate windows.

Source: arXiv 2502.04507 and FastVideo's `STA_searching` and `STA_tuning` modes. Run the dense model on a few prompts;
at every timestep and layer take `losses` of q, k, v; then `choose_windows` once over everything recorded.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np

from jvdiff.kernels.dense import attention
from jvdiff.kernels.sliding_tile import sliding_tile_attention
from jvdiff.kernels.tiles import Grid

Table = tuple[tuple[tuple[Grid, ...], ...], ...]  # [timestep][layer][head]: a window


def losses(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    grid: Grid,
    tile: Grid,
    candidates: tuple[Grid, ...],
    text_length: int = 0,
    tiled: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """float32 [C,N]: mean squared difference of each candidate window from full attention, for each head.

    Operands as in `sliding_tile_attention`; the mean is over batch, tokens (valid text too) and channels.
    """
    valid = int(np.prod(grid)) + text_length
    full = attention(q[:, :valid], k[:, :valid], v[:, :valid]).astype(jnp.float32)

    def loss(window: Grid) -> jax.Array:
        out = sliding_tile_attention(
            q,
            k,
            v,
            grid=grid,
            tile=tile,
            window=window,
            text_length=text_length,
            tiled=tiled,
            implementation=implementation,
        )
        return jnp.mean((out[:, :valid].astype(jnp.float32) - full) ** 2, axis=(0, 1, 3))

    return jnp.stack([loss(window) for window in candidates])  # C of [N] -> [C,N]


def choose_windows(losses: np.ndarray, candidates: tuple[Grid, ...], full: Grid, skip: int) -> Table:
    """The candidate with the least mean loss over prompts for each timestep, layer and head; the first one on ties.

    Args:
      losses: [prompts,C,timesteps,layers,heads]; positive and negative passes of guidance may count as prompts.
      candidates: C windows in tiles.
      full: the window of full attention, used in the first `skip` timesteps.
    """
    return tuple(
        tuple(tuple(full if t < skip else candidates[c] for c in heads) for heads in layers)
        for t, layers in enumerate(best(losses, len(candidates)))
    )


def best(losses: np.ndarray, count: int) -> np.ndarray:
    """int [timesteps,layers,heads]: the number of that candidate, of `count`; losses as in `choose_windows`."""
    if losses.ndim != 5 or losses.shape[1] != count or not np.isfinite(losses).all():
        raise ValueError(
            f"choose_windows: losses must be finite [prompts,{count},timesteps,layers,heads], one entry for each "
            f"candidate, not {list(losses.shape)}"
        )
    return np.argmin(losses.mean(axis=0), axis=0)


def sparsity(table: Table, full: Grid) -> float:
    """One minus the windows' share of full attention, by their nominal sizes, over all timesteps, layers and heads."""
    sizes = [np.prod(window) for layers in table for heads in layers for window in heads]
    return 1 - float(np.sum(sizes)) / (len(sizes) * float(np.prod(full)))


def to_json(table: Table) -> str:
    """FastVideo's file format: {"timestep_layer_head": [wt, wh, ww]}."""
    entries = {
        f"{t}_{i}_{h}": [int(x) for x in window]
        for t, layers in enumerate(table)
        for i, heads in enumerate(layers)
        for h, window in enumerate(heads)
    }
    return json.dumps(entries, indent=1)


def from_json(text: str) -> Table:
    """The table of a file; ValueError unless it has one window for every timestep, layer and head."""
    try:
        entries = {tuple(int(x) for x in key.split("_")): tuple(window) for key, window in json.loads(text).items()}
        T, L, N = (max(axis) + 1 for axis in zip(*entries, strict=True))
        table = tuple(tuple(tuple(entries[t, i, h] for h in range(N)) for i in range(L)) for t in range(T))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f'a mask strategy must be JSON {{"timestep_layer_head": [wt, wh, ww]}} with every entry from 0_0_0 to the '
            f"last one; {type(error).__name__}: {error}"
        ) from error
    if len(entries) != T * L * N or not all(
        len(w) == 3 and all(type(x) is int and x >= 1 for x in w) for w in entries.values()
    ):
        raise ValueError("a mask strategy must hold windows of three whole numbers of at least 1")
    return table
