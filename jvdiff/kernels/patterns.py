"""The patterns of a model's self-attention: small frozen values that answer whatever is asked of them (`pattern`).

B batch · T H W the grid of tokens · L video tokens · N heads · K head dim.

`read` makes one of text, and `str` gives the text back:

    dense
    sliding_tile:6x8x8:3x3x3    tile in tokens, window in tiles, time first; or a window for each head, with commas
    video_sparse:4x4x4:0.9      tile in tokens, and the share of tiles that a tile does not see
    windows:FILE                tile and windows of each timestep, layer and head, in a file (`windows`)
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from jvdiff.errors import UsageError
from jvdiff.kernels import layout, tiles, windows
from jvdiff.kernels.block_causal import (
    block_causal_attention,
    block_causal_blocks,
    causal_tile_attention,
    near,
    visible,
)
from jvdiff.kernels.pattern import Dense, Pattern, Tiled, at_most, seen_of, text_of
from jvdiff.kernels.sliding_tile import Windows, sliding_tile_attention
from jvdiff.kernels.tiles import Grid
from jvdiff.kernels.video_sparse import video_sparse_attention

_THREE = "[1-9][0-9]{0,3}x[1-9][0-9]{0,3}x[1-9][0-9]{0,3}"


@dataclass(frozen=True)
class SlidingTile(Tiled):
    """The pattern of `sliding_tile_attention`.

    tile: in tokens.
    window: in tiles, one or one for each head.
    """

    tile: Grid = (6, 8, 8)
    window: Windows = (3, 3, 3)
    example = "'sliding_tile:6x8x8:3x3x3' (tile, window)"

    def attend(self, q, k, v, gate, *, grid, text_length=None, first_head=None, implementation=None, target=None):
        common: Any = dict(grid=grid, tile=self.tile, tiled=True, implementation=implementation, target=target)
        common |= dict(window=self.window, first_head=first_head)
        if text_length is None:
            out = sliding_tile_attention(q, k, v, **common)  # which checks
        else:
            one = lambda n, q, k, v: sliding_tile_attention(q, k, v, text_length=n, **common)  # noqa: E731
            out = layout.by_clip(one, text_length, q, k, v)
        self._tell(q, grid, implementation, target)
        return out

    @classmethod
    def parse(cls, text: str) -> Self | None:
        if match := re.fullmatch(f"sliding_tile:({_THREE}):({_THREE}(?:,{_THREE})*)", text):
            windows: Any = tuple(map(_sizes, match[2].split(",")))
            return cls(_sizes(match[1]), windows if len(windows) > 1 else windows[0])
        return None

    def check(self, heads: int | None, layers: int | None = None) -> None:
        windows = self._windows
        if heads is not None and len(windows) not in (1, heads):
            raise UsageError(f"pattern has {len(windows)} windows; expected one, or one for each of the {heads} heads.")
        super().check(heads, layers)

    def _seen(self, grid: Grid, keys: np.ndarray, widest: bool) -> np.ndarray:
        return seen_of(self._windows, tiles.counts(grid, self.tile), keys, widest).mean(axis=0)

    @property
    def _windows(self) -> tuple[Grid, ...]:
        window: Any = self.window
        return (window,) if np.ndim(window) == 1 else window

    def __str__(self) -> str:
        return f"sliding_tile:{text_of(self.tile)}:{','.join(map(text_of, self._windows))}"


@dataclass(frozen=True)
class WindowTable(Tiled):
    """Sliding tile attention with a window for each timestep, layer and head, as a file says (`kernels.windows`).

    One program serves all steps: which windows hold is looked up by the timestep, and which tiles a head sees are
    numbers that its layer is given. Two of them are equal if their files are, and their timesteps.

    file: its path, as it was given.
    digest: its sha256.
    table: its content; timesteps: of its rows, where the file or a sampler says them.
    """

    file: str
    digest: str
    timesteps: tuple[float, ...] | None = field(repr=False)
    table: windows.Windows = field(compare=False, repr=False)
    example = "'windows:FILE' (a file of windows)"

    @property
    def tile(self) -> Grid:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.table.tile

    @property
    def sha256(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.digest

    @property
    def recorded_of(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.table.recorded.get("checkpoint_digest")

    def attend(
        self,
        q,
        k,
        v,
        gate,
        *,
        grid,
        text_length=None,
        first_head=None,
        chosen: Any = None,
        implementation=None,
        target=None,
    ):
        self._check_grid(grid)
        if first_head is not None:  # of the heads of all devices those that are here; padding takes the last one's
            own = jnp.minimum(first_head + np.arange(q.shape[2], dtype=np.int32), chosen.shape[1] - 1)
            chosen = chosen[:, own]
        common: Any = dict(grid=grid, tile=self.tile, tiled=True, implementation=implementation, target=target)
        common |= dict(window=self.table.choices)
        if text_length is None:
            out = sliding_tile_attention(q, k, v, chosen=chosen, **common)
        else:
            one = lambda n, q, k, v, c: sliding_tile_attention(q, k, v, text_length=n, chosen=c, **common)  # noqa: E731
            out = layout.by_clip(one, text_length, q, k, v, chosen)
        self._tell(q, grid, implementation, target)
        return out

    def of_layers(self, timestep: Any, layers: int, heads: int) -> jax.Array:
        """int32 [layers,B,heads]: the number of each head's window at timestep [B,1]."""
        self.check(heads, layers)
        if self.timesteps is None:
            raise UsageError(
                f"pattern {self} has a row for each step of a sampler, and no timesteps; make it one of a sampler's "
                "steps first, with `at`."
            )
        row = jnp.sum(timestep < windows.bounds(self.timesteps)[None], axis=1)  # [B]
        return jnp.moveaxis(jnp.asarray(self.table.table)[row], 0, 1)  # [B,layers,N]

    def at(self, timesteps: Sequence[float], grid: Grid) -> Self:
        """The same for a sampler's steps and a grid of tokens; UsageError where it is for others."""
        self._check_grid(grid)
        if self.timesteps is not None:
            return self
        each = tuple(map(float, timesteps))
        if len(each) != len(self.table.table) or not windows.falling(each):
            raise UsageError(
                f"pattern {self} has rows for {len(self.table.table)} steps, and there are {len(each)}; expected as "
                "many, of falling timesteps, or a table that names the timestep of each row."
            )
        return replace(self, timesteps=each)

    def check(self, heads: int | None, layers: int | None = None) -> None:
        _, *found = self.table.table.shape
        expected = [n if wanted is None else wanted for n, wanted in zip(found, (layers, heads), strict=True)]
        if found != expected:
            raise UsageError(
                f"pattern {self} is for {found[0]} layers of {found[1]} heads, and the model has {expected[0]} of "
                f"{expected[1]}: it was recorded of another model."
            )
        super().check(heads, layers)

    def _check_grid(self, grid: Grid) -> None:
        if tuple(grid) != self.table.canvas:
            raise UsageError(
                f"pattern {self} is for {text_of(self.table.canvas)} tokens, and the video has {text_of(grid)}; "
                "expected another size of the video, or a table that was recorded at this one."
            )

    def _seen(self, grid: Grid, keys: np.ndarray, widest: bool) -> np.ndarray:
        seen = seen_of(self.table.choices, tiles.counts(grid, self.tile), keys, widest)
        return np.average(seen, axis=0, weights=np.bincount(self.table.table.ravel(), minlength=len(seen)))

    @classmethod
    def parse(cls, text: str) -> Self | None:
        if not text.startswith("windows:"):
            return None
        file = text.removeprefix("windows:")
        table, digest = windows.read(file)
        return cls(file, digest, table.timesteps, table)

    def __str__(self) -> str:
        return f"windows:{self.file}"


@dataclass(frozen=True)
class VideoSparse(Tiled):
    """The pattern of `video_sparse_attention`.

    tile: in tokens.
    sparsity: the fraction of tiles that a tile does not see.
    """

    tile: Grid = (4, 4, 4)
    sparsity: float = 0.9
    gated = True
    example = "'video_sparse:4x4x4:0.9' (tile, sparsity)"

    def attend(self, q, k, v, gate, *, grid, text_length=None, first_head=None, implementation=None, target=None):
        common: Any = dict(grid=grid, tile=self.tile, tiled=True, implementation=implementation, target=target)
        common |= dict(sparsity=self.sparsity)
        if text_length is None:
            out = video_sparse_attention(q, k, v, gate, **common)  # which checks
        else:
            one = lambda n, q, k, v, gate: video_sparse_attention(q, k, v, gate, text_length=n, **common)  # noqa: E731
            out = layout.by_clip(one, text_length, q, k, v, gate)
        self._tell(q, grid, implementation, target)
        return out

    def full(self, gated: bool) -> Pattern:
        return VideoSparse(self.tile, 0.0) if gated else Dense()  # its coarse branch stays

    def _seen(self, grid: Grid, keys: np.ndarray, widest: bool) -> np.ndarray:
        return np.full(keys.size, tiles.top_k_count(self.sparsity, keys.size) * keys.mean())  # whichever they are

    @classmethod
    def parse(cls, text: str) -> Self | None:
        match = re.fullmatch(rf"video_sparse:({_THREE}):(0|1|[01]?\.[0-9]+)", text)
        return match and cls(_sizes(match[1]), float(match[2]))

    def check(self, heads: int | None, layers: int | None = None) -> None:
        at_most("the sparsity of pattern", self.sparsity, 0, 1)
        super().check(heads, layers)

    def __str__(self) -> str:
        return f"video_sparse:{text_of(self.tile)}:{np.format_float_positional(self.sparsity, trim='-')}"


@dataclass(frozen=True)
class BlockCausal(Pattern):
    """The pattern of `block_causal_attention`, for the forward pass of a whole video.

    chunk: frames that are made at once.
    window: frames of the moving past that a chunk sees, itself included; None: all.
    sink: how many of the video's first frames stay visible for ever.
    teacher_forcing: the frames are two copies of a video, one clean and one noisy. The noisy copy of a chunk sees
        itself, and of all others the clean copy, which is what it sees when a video is made chunk by chunk.
    near: of what a chunk sees, a tile sees the window of tiles around its own, and of the sink those there, however
        long ago it is. In time the window is cut off where the past, or the chunk, ends. None: all of it.
    """

    chunk: int = 3
    window: int | None = None
    sink: int = 0
    teacher_forcing: bool = False
    near: SlidingTile | None = None

    def __post_init__(self):
        window = self.chunk if self.window is None else self.window
        whole = all(type(n) is int for n in (self.chunk, self.sink, window))
        if not whole or self.chunk < 1 or self.sink < 0 or window < self.chunk:
            raise UsageError(
                f"{self}: expected whole numbers, chunk from 1, sink from 0, and a window of at least one chunk, which "
                "counts as a part of it."
            )
        if self.near is not None:
            self._check_near(self.near)

    def _check_near(self, near: SlidingTile) -> None:
        near.check(None)
        a, kept = near.tile[0], (self.chunk, self.sink, 0 if self.window is None else self.window)
        if len(near._windows) > 1:
            raise UsageError(
                f"pattern {near}: a causal model takes one window for all heads, not {len(near._windows)}."
            )
        if any(n % a for n in kept):
            raise UsageError(
                f"pattern {near}: its tiles have {a} frames, which do not divide the chunk of {self.chunk}, the window "
                f"of {self.window} and the sink of {self.sink}; expected a divisor of these."
            )

    def attend(self, q, k, v, gate, *, grid, text_length=None, first_head=None, implementation=None, target=None):
        if text_length is not None:
            raise UsageError(f"pattern {self}: a text that sees the whole video does not go with it; expected another.")
        how: Any = dict(implementation=implementation, target=target)
        seen = self.visible(grid[0])
        if self.near is None:
            return block_causal_attention(q, k, v, seen, **how)
        frames = self.frames(grid[0])
        return self.attend_near(q, k, v, self.tiles_seen(seen, frames, frames), grid, **how)

    def attend_near(self, q: Any, k: Any, v: Any, seen: Any, grid: Grid, **how: Any) -> jax.Array:
        """Attention of q [B,T*H*W,N,K] to frames k, v [B,S*H*W,N,K], of which tiles see each other as `tiles_seen` has
        it; grid (T,H,W)."""
        assert self.near is not None
        (window,), tile = self.near._windows, self.near.tile
        most = None if isinstance(seen, np.ndarray) else (self.chunk + self.sink) // tile[0] + window[0] // 2
        return causal_tile_attention(q, k, v, seen, frame=grid[1:], tile=tile, window=window, most=most, **how)

    def tiles_seen(self, seen: Any, queries: Any, keys: Any) -> Any:
        """bool [T/a,S/a]: which tiles in time see which, where frames `queries` int32 [T] of a video see frames `keys`
        int32 [S] as `seen` bool [T,S] has it; numpy or traced. Frames of a tile stand together."""
        assert self.near is not None
        (window,), a = self.near._windows, self.near.tile[0]
        return seen[::a, ::a] & near(queries[::a] // a, keys[::a] // a, window[0], self.sink // a)

    def choose(self, q, grid, *, lse=False, implementation=None, target=None):
        if self.near is not None:
            return self.near.choose(q, grid, implementation=implementation, target=target)
        count, tokens = block_causal_blocks(self.visible(grid[0]), q.shape[1])
        return layout.choose(q, count, tokens, implementation, target)[0]

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
        chunks = frames // self.chunk
        seen = visible(frames, frames, self.chunk, self.window, self.sink)
        if not self.teacher_forcing:
            return seen
        half = count // 2  # the clean copy comes first
        same = chunks[:, None] == chunks[None]
        seen[half:, :half] &= ~same[half:, :half]
        seen[:half, half:] = False
        seen[half:, half:] = same[half:, half:]
        return seen


PATTERNS: tuple[type[Pattern], ...] = (Dense, SlidingTile, VideoSparse, WindowTable, BlockCausal)


def read(text: str, heads: int | None = None, layers: int | None = None) -> Pattern:
    """The pattern that a text (above) says, for a model with that many heads and layers; `str` is its inverse.

    Raises:
        UsageError: anything else.
        CheckpointError: a file that is not a table of windows.
    """
    pattern = next((found for kind in PATTERNS if (found := kind.parse(text)) is not None), None)
    if pattern is None:
        *first, last = (kind.example for kind in PATTERNS if kind.example)
        raise UsageError(f"pattern is {text!r:.80}; expected {', '.join(first)} or {last}.")
    pattern.check(heads, layers)
    return pattern


def _sizes(text: str) -> Grid:
    t, h, w = map(int, text.split("x"))
    return t, h, w
