"""What a pattern of self-attention is, and what those with tiles share.

B batch · T H W the grid of tokens · L video tokens · N heads · K head dim.

`Pattern` is what models, settings, meshes and records ask; a pattern is one class, here or in `patterns`, whose
attention is a function of `jvdiff.kernels`.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import jax
import numpy as np

from jvdiff.errors import UsageError
from jvdiff.kernels import block_sparse, dense, layout, tiles
from jvdiff.kernels.sliding_tile import window_lists
from jvdiff.kernels.tiles import Grid
from jvdiff.runtime.target import Target, here

TILE_TOKENS = 4096
_log = logging.getLogger("jvdiff.kernels")


class Pattern:
    """Which tokens see each other. What is here is what most patterns answer.

    raster: whether the tokens stay in raster order; otherwise `ordered` and its inverse move them, once each.
    ring: whether keys may go round a ring of devices; if not, devices exchange heads.
    gated: whether a gate for each token and channel is used, where the model has one.
    sha256: of the file that it is read from, where it is.
    recorded_of: the digest of the checkpoint that it was found with, where it is one's.
    example: the text of one, with what its numbers mean; None: there is no text for it.
    """

    raster = True
    ring = False
    gated = False
    sha256: str | None = None
    recorded_of: str | None = None
    example: str | None = None

    def attend(
        self,
        q: Any,
        k: Any,
        v: Any,
        gate: Any,
        *,
        grid: Grid,
        text_length: Any = None,
        first_head: Any = None,
        implementation: str | None = None,
        target: Target | None = None,
    ) -> jax.Array:
        """Attention of the tokens [B,L,N,K] of a grid, in the pattern's order, to one another.

        text_length: int32 [B], where rows of text [B,S,N,K] stand behind the tokens: how many of each clip's count, at
        least one. All tokens see those, and those see everything; rows that do not count give anything finite.
        gate: [B,L,N,K], or None. first_head: int32 [], where the heads of q are those from this one on. implementation:
        one of `implementations`; None takes the best. target: what the program is made for; None: the devices at hand.
        A pattern with `of_layers` also gets a layer's share of it, as `chosen`.
        """
        raise NotImplementedError

    def of_layers(self, timestep: Any, layers: int, heads: int) -> Any:
        """Arrays [layers,B,...] that tell the layers apart at timestep [B,1]; None: nothing does."""
        return None

    def full(self, gated: bool) -> "Pattern":
        """The pattern that leaves nothing out, for a model with a gate or without."""
        return Dense()

    def choose(
        self,
        q: Any,
        grid: Grid,
        *,
        lse: bool = False,
        implementation: str | None = None,
        target: Target | None = None,
    ) -> str:
        """The implementation that `attend` takes for q [B,L,N,K]; lse: where a log-sum-exp is needed (a ring).

        Raises:
            NotImplementedError: the named one cannot do this; the message says why.
        """
        raise NotImplementedError

    @property
    def implementations(self) -> tuple[str, ...]:
        """The names that `implementation` may have."""
        return tuple(block_sparse.IMPLEMENTATIONS)

    def unavailable(self, implementation: str, target: Target) -> str | None:
        """Why an implementation cannot run on the target, or None."""
        if reason := block_sparse.IMPLEMENTATIONS[implementation].unavailable(target):
            return f"block-sparse attention implementation {implementation!r}: {reason}"
        return None

    def frames(self, count: int) -> np.ndarray | None:
        """int32 [T]: the place in the video of each of `count` frames; None: 0, 1, ..."""
        return None

    def ordered(self, x: jax.Array, grid: Grid) -> jax.Array:
        """[B,L,...] in raster order -> in the pattern's."""
        return x

    def unordered(self, x: jax.Array, grid: Grid) -> jax.Array:
        """The inverse of `ordered`."""
        return x

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The pattern that a text says, or None; unchecked."""
        return None

    def check(self, heads: int | None, layers: int | None = None) -> None:
        """Raises UsageError unless a model with that many heads and layers can use it; None: any number."""


@dataclass(frozen=True)
class Dense(Pattern):
    """Every token sees every token."""

    ring = True
    example = "'dense'"

    def attend(self, q, k, v, gate, *, grid, text_length=None, first_head=None, implementation=None, target=None):
        keys = None if text_length is None else math.prod(grid) + text_length
        return dense.attention(q, k, v, kv_length=keys, implementation=implementation, target=target)

    def choose(self, q, grid, *, lse=False, implementation=None, target=None):
        return dense.choose(q, q, q, return_lse=lse, implementation=implementation, target=target)

    @property
    def implementations(self) -> tuple[str, ...]:
        return tuple(dense.IMPLEMENTATIONS)

    def unavailable(self, implementation: str, target: Target) -> str | None:
        return None  # `choose` has looked at the target

    @classmethod
    def parse(cls, text: str) -> Self | None:
        return cls() if text == "dense" else None

    def __str__(self) -> str:
        return "dense"


class Tiled(Pattern):
    """Tokens in the order of tiles, so that every tile is a block of the sparse kernel."""

    raster = False
    tile: Grid

    def choose(self, q, grid, *, lse=False, implementation=None, target=None):
        return self._blocks(q, grid, implementation, target)[0]

    def _blocks(self, q, grid, implementation, target) -> tuple[str, int]:
        """The implementation, and the places of a block in it."""
        count, tokens = math.prod(tiles.counts(grid, self.tile)), math.prod(self.tile)
        return layout.choose(q, count, tokens, implementation, target)

    def share(self, q: Any, grid: Grid, *, implementation: str | None = None, target: Target | None = None) -> float:
        """The query-key pairs that `attend` computes for q [B,L,N,K], padded ones too, as a share of dense attention's.

        It is above 1 where tiles that the grid fills badly cost more than what is skipped.
        """
        name, block = self._blocks(q, grid, implementation, target)
        sizes = tiles.variable_block_sizes(grid, self.tile)
        parts = block_sparse.IMPLEMENTATIONS[name].parts(q, block, target or here())
        queries, keys = (-(-sizes // part) * part for part in parts)  # [tiles]
        seen = self._seen(grid, keys, name in ("xla", "reference"))  # which do not look at how long a list is
        return float(np.sum(queries * seen) / sizes.sum() ** 2)

    def _seen(self, grid: Grid, keys: np.ndarray, widest: bool) -> np.ndarray:
        """[tiles]: how many keys a query of each tile sees, in the mean of all heads; keys [tiles], of each tile.

        widest: each head as many as the one with the widest window.
        """
        raise NotImplementedError

    def _tell(self, q, grid, implementation, target) -> None:
        if (share := self.share(q, grid, implementation=implementation, target=target)) > 1:
            _say_once(
                f"pattern {self}: on {text_of(grid)} tokens it computes {share:.2f} times what dense attention does: "
                f"its tiles fill that grid badly. Expected a smaller window, another tile, or dense."
            )

    def ordered(self, x, grid):
        return layout.tile_order(x, grid, self.tile)

    def unordered(self, x, grid):
        return layout.raster_order(x, grid, self.tile)

    def check(self, heads: int | None, layers: int | None = None) -> None:
        at_most("the number of tokens in a tile of pattern", math.prod(self.tile), 1, TILE_TOKENS)


def seen_of(every: Sequence[Grid], counts: Grid, keys: np.ndarray, widest: bool) -> np.ndarray:
    """[windows,tiles]: how many keys a query of each tile sees in each window; see `Tiled._seen`."""
    q2k, count = window_lists(counts, tuple(every))
    listed = widest | (np.arange(q2k.shape[-1]) < count[..., None])  # [1,windows,tiles,M]
    return (keys[q2k] * listed).sum(axis=-1)[0]


@cache
def _say_once(line: str) -> None:
    _log.warning("%s", line)


def text_of(sizes: Grid) -> str:
    return "x".join(map(str, sizes))


def at_most(name: str, value: float, low: int, high: int) -> None:
    if value > high:
        raise UsageError(f"{name} is {value}; expected {low} to {high}. The nearest is {high}.")
