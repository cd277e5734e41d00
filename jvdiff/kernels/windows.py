"""Windows of sliding tile attention as a file: one for each head of each layer, timestep by timestep.

R rows · I layers · N heads.

The file is a JSON object:

    version     1
    tile        [a,b,c], tokens of a tile, time first
    canvas      [T,H,W], tokens of the video that the windows are for
    choices     [[wt,wh,ww], ...], the windows that there are, in tiles
    table       [R][I][N] numbers of choices, from 0
    timesteps   [R] numbers, falling: what the network was told at each row. null: row i is for step i of R
    recorded    an object, what it was found with: checkpoint_digest, sampler and so on. Nothing is computed of it

A forward pass at timestep t takes the row whose timestep is nearest, the earlier one half way between two; so the
sampler that the table was recorded with gets the row of each of its steps.
"""

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jvdiff.config import expanded
from jvdiff.errors import CorruptFile, UsageError
from jvdiff.kernels import tiles
from jvdiff.kernels.tiles import Grid

VERSION = 1
LIMIT = 2**26  # bytes of a file; the largest published table has 72,000 entries
_FIELDS = ("version", "tile", "canvas", "choices", "table", "timesteps", "recorded")


class Windows(NamedTuple):
    """What a file says.

    tile, canvas: in tokens.
    choices: windows in tiles.
    table: int32 [R,I,N], numbers of choices.
    timesteps: of the rows, falling; None: there is a row for each step.
    recorded: JSON values.
    """

    tile: Grid
    canvas: Grid
    choices: tuple[Grid, ...]
    table: np.ndarray
    timesteps: tuple[float, ...] | None = None
    recorded: Mapping[str, Any] = {}


@functools.lru_cache(maxsize=4)
def _parsed(where: str, text: bytes) -> Windows:
    return parse(text, where)


def read(file: str) -> tuple[Windows, str]:
    """What a file says, and its sha256.

    Raises:
        UsageError: there is no such file, or it cannot be read.
        CorruptFile: it is not such a table; the sentence says where.
    """
    path = Path(expanded("the file of pattern windows", file))
    try:
        with path.open("rb") as data:
            text = data.read(LIMIT + 1)
    except OSError as error:
        raise UsageError(f"pattern windows:{file}: {path} cannot be read ({error.strerror}).") from None
    return _parsed(str(path), text), hashlib.sha256(text).hexdigest()


def parse(text: bytes, where: str) -> Windows:
    """What the text of a file says; raises CorruptFile with `where` and what is wrong."""

    def no_number(name: str) -> None:
        raise ValueError(f"{name} is not a number in JSON")

    try:
        if len(text) > LIMIT:
            raise ValueError(f"it is larger than {LIMIT:,} bytes")
        return _checked(json.loads(text.decode(), parse_constant=no_number))
    except (ValueError, RecursionError) as error:
        raise CorruptFile(
            f"{where}: not a table of windows: {error}.\n"
            "`jvdiff windows` writes one, or makes one of FastVideo's (docs/sparse_attention.md)."
        ) from None


def to_text(windows: Windows) -> str:
    """The text of a file; ValueError for what `parse` would refuse."""
    value = {"version": VERSION, **windows._asdict(), "table": windows.table.tolist()}
    text = json.dumps({name: value[name] for name in _FIELDS}, allow_nan=False) + "\n"
    _checked(json.loads(text))
    return text


def bounds(timesteps: Sequence[float]) -> np.ndarray:
    """float32 [R-1]: half way between each timestep and the next one."""
    each = np.asarray(timesteps, np.float64)
    return ((each[:-1] + each[1:]) / 2).astype(np.float32)


def falling(timesteps: Sequence[float]) -> bool:
    """Whether each timestep is below the one before, by more than rounding."""
    return all(a - b > 1e-3 for a, b in itertools.pairwise(timesteps))


def from_strategy(text: bytes, tile: Grid, canvas: Grid, where: str) -> Windows:
    """A table of FastVideo's `mask_strategy` JSON, {"step_layer_head": [wt,wh,ww]}, whose tile and canvas it lacks.

    Exact: every entry becomes the window of the same number of tiles; an even window is as wide as the next odd one
    in both, and one that reaches every tile the whole axis, so it is written as that. Rows stand for steps.

    Raises:
        CorruptFile: an entry is missing, or is no window.
    """
    try:
        entries = {tuple(map(int, key.split("_"))): value for key, value in json.loads(text.decode()).items()}
        if not entries or any(len(key) != 3 or min(key) < 0 for key in entries):
            raise ValueError("keys are step_layer_head")
        sizes = tuple(max(axis) + 1 for axis in zip(*entries, strict=True))
        if len(entries) != math.prod(sizes):
            raise ValueError(f"{len(entries)} entries do not fill {'x'.join(map(str, sizes))} steps, layers and heads")
        most = tiles.counts(canvas, tile)
        windows = {key: tuple(map(min, _window(f"{key}", value), most)) for key, value in entries.items()}
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise CorruptFile(f"{where}: not a mask strategy of FastVideo: {error}.") from None
    choices: Any = tuple(sorted({*windows.values()}))
    table = np.zeros(sizes, np.int32)
    for key, window in windows.items():
        table[key] = choices.index(window)
    recorded = {"mask_strategy": Path(where).name, "sha256": hashlib.sha256(text).hexdigest()}
    return Windows(tile, canvas, choices, table, None, recorded)


def _checked(value: Any) -> Windows:
    if not isinstance(value, dict) or sorted(value) != sorted(_FIELDS):
        raise ValueError(f"expected an object of {', '.join(_FIELDS)}")
    if value["version"] != VERSION:
        raise ValueError(f"version is {value['version']!r:.20}; expected {VERSION}")
    tile, canvas = (_window(name, value[name]) for name in ("tile", "canvas"))
    if not isinstance(value["choices"], list) or not value["choices"]:
        raise ValueError("choices is not a list of windows")
    choices = tuple(_window(f"choices[{i}]", each) for i, each in enumerate(value["choices"]))
    counts = tiles.counts(canvas, tile)
    for i, window in enumerate(choices):
        if any(w > n for w, n in zip(window, counts, strict=True)):
            raise ValueError(f"choices[{i}] is {list(window)}, and the canvas has {list(counts)} tiles")
    table = _table(value["table"], len(choices))
    if not isinstance(value["recorded"], dict):
        raise ValueError("recorded is not an object")
    return Windows(tile, canvas, choices, table, _timesteps(value["timesteps"], len(table)), value["recorded"])


def _window(name: str, value: Any) -> Grid:
    if not isinstance(value, list) or len(value) != 3 or not all(type(x) is int and 1 <= x < 2**16 for x in value):
        raise ValueError(f"{name} is {value!r:.60}; expected three whole numbers from 1, [T,H,W]")
    t, h, w = value
    return t, h, w


def _table(value: Any, choices: int) -> np.ndarray:
    try:
        table = np.array(value)
    except ValueError:  # rows of different lengths
        table = np.zeros(0)
    if table.ndim != 3 or not table.size or table.dtype.kind != "i":
        raise ValueError("table is not [rows][layers][heads] whole numbers, as many in each row and layer")
    if wrong := np.argwhere((table < 0) | (table >= choices)).tolist():
        place = "".join(f"[{i}]" for i in wrong[0])
        raise ValueError(f"table{place} is {table[tuple(wrong[0])]}, and there are {choices} choices, from 0")
    return table.astype(np.int32)


def _timesteps(value: Any, rows: int) -> tuple[float, ...] | None:
    if value is None:
        return None
    numbers = isinstance(value, list) and all(type(x) in (int, float) and 0 <= x <= 1000 for x in value)
    if not numbers or len(value) != rows or not falling(value):
        raise ValueError(f"timesteps is not {rows} falling numbers from 1000 to 0, one for each row of the table")
    return tuple(map(float, value))
