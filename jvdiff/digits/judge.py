"""A judge of moving-digit clips: which colour, digit and direction does a video really show?

Colour and direction are measured (mean hue, path of the centroid). The digit is read by a small convolutional
network that is trained on the spot, in well under a minute on two CPU cores, on the training glyphs only, so that
its accuracy on held-out glyphs says how far it can be trusted. It looks at the picture alone and knows no prompt.

B batch · F pixel frames · Y X pixel height, width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jvdiff.digits import clips as digits
from jvdiff.types import Array, Params

WINDOW = 40  # pixels around the centroid that are shown to the network ..
INPUT = 20  # .. after 2 x 2 averaging, so that a 32-pixel digit becomes 16 pixels tall
FAINT = 48  # levels of 255 below which a pixel counts as background
OCCUPIED = 96  # the sum of light above which a row or a column shows something
CLOSED, TOO_LONG = 0.93, 0.65  # shares of rows or columns: a stripe across the picture, and what becomes one
LOST = 0.775  # likeness below which a shape is another


class Seen(NamedTuple):
    """What a clip shows; None where nothing, or nothing that moves, is to be seen. Comparable with a Combo."""

    colour: str | None
    digit: int | None
    direction: str | None


class Shape(NamedTuple):
    """What the light of a part of a stream looks like, which the digit reader does not ask.

    occupied: the greater of the shares of columns and of rows that show something; of real digits at most 0.56
    likeness: to another part of the stream, wherever the digit is, 0..1
    """

    occupied: float
    likeness: float

    @property
    def closed(self) -> bool:
        """Whether it is a stripe that meets itself across the border."""
        return self.occupied >= CLOSED

    @property
    def too_long(self) -> bool:
        """Whether it is longer than any digit."""
        return self.occupied >= TOO_LONG

    @property
    def lost(self) -> bool:
        """Whether it is another shape."""
        return self.likeness < LOST


def train(seed: int = 0, steps: int = 600, batch: int = 128) -> Params:
    """Train the digit reader on augmented training glyphs; the same seed gives the same network on one machine."""
    bank = jnp.asarray(digits.glyphs("train").reshape(-1, digits.GLYPH, digits.GLYPH), jnp.float32) / 255
    labels = jnp.repeat(jnp.arange(10), len(bank) // 10)
    start, key = jax.random.split(jax.random.key(seed))
    params = _init(start)
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 4e-3, steps // 10, steps), weight_decay=1e-2)

    @jax.jit
    def step(params, state, key):
        pick, change = jax.random.split(key)
        chosen = jax.random.randint(pick, (batch,), 0, len(bank))
        pictures = jax.vmap(_augment)(jax.random.split(change, batch), bank[chosen])

        def loss(params):
            targets = optax.smooth_labels(jax.nn.one_hot(labels[chosen], 10), 0.05)
            return optax.softmax_cross_entropy(_logits(params, pictures), targets).mean()

        gradient = jax.grad(loss)(params)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to its int32 step count
            updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for k in jax.random.split(key, steps):
        params, state = step(params, state, k)
    return params


def _init(key: Array) -> Params:
    normal = jax.nn.initializers.he_normal()
    shapes = {"conv_1": (3, 3, 1, 16), "conv_2": (3, 3, 16, 32), "dense": (25 * 32, 96), "out": (96, 10)}
    return {
        name: {"kernel": normal(k, shape, jnp.float32), "bias": jnp.zeros(shape[-1])}
        for k, (name, shape) in zip(jax.random.split(key, len(shapes)), shapes.items(), strict=True)
    }


def _logits(params: Params, pictures: Array) -> Array:
    """[B,20,20] in 0..1 -> [B,10]."""
    x = pictures[..., None] - 0.15
    for layer in (params["conv_1"], params["conv_2"]):
        x = jax.lax.conv_general_dilated(x, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu(x + layer["bias"][None, None, None])
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))
    x = jax.nn.relu(x.reshape(len(x), -1) @ params["dense"]["kernel"] + params["dense"]["bias"][None])
    return x @ params["out"]["kernel"] + params["out"]["bias"][None]


def _augment(key: Array, glyph: Array) -> Array:
    """A glyph [20,20] as it may look in a clip [20,20]: turned, slanted, stretched, moved, blurred, dimmed, noisy."""
    r = jax.random.uniform(key, (8,), minval=-1.0, maxval=1.0)
    grid = jnp.arange(digits.GLYPH, dtype=jnp.float32)
    mass = glyph.sum()
    centre = jnp.stack([(glyph.sum(1) * grid).sum(), (glyph.sum(0) * grid).sum()]) / mass
    cos, sin = jnp.cos(0.2 * r[0]), jnp.sin(0.2 * r[0])
    turn = jnp.stack([jnp.stack([cos, -sin]), jnp.stack([sin, cos])])
    slant = jnp.stack([jnp.stack([1 + 0.12 * r[1], 0.0 * r[0]]), jnp.stack([0.15 * r[2], 1 + 0.12 * r[3]])])
    at = (jnp.arange(INPUT, dtype=jnp.float32) - (INPUT - 1) / 2) * (2 * digits.GLYPH / digits.BOX)
    points = jnp.stack(jnp.meshgrid(at, at, indexing="ij")).reshape(2, -1)  # glyph pixels around the centre
    points = turn @ slant @ points + (centre + 1.2 * r[4:6])[:, None]
    picture = jax.scipy.ndimage.map_coordinates(glyph, list(points), order=1).reshape(INPUT, INPUT)
    padded = jnp.pad(picture, 1)
    blurred = sum(padded[y : y + INPUT, x : x + INPUT] for y in range(3) for x in range(3)) / 9
    mix = 0.4 * (1 + r[6])
    noise = 0.04 * jax.random.normal(jax.random.fold_in(key, 1), picture.shape)
    return jnp.clip(((1 - mix) * picture + mix * blurred) * (1.0 + 0.25 * r[7]) + noise, 0.0, 1.0)


def look(params: Params, videos: np.ndarray, *, torus: bool = False) -> list[Seen]:
    """What each of the clips uint8 [B,F,Y,X,3] shows. The digit is read in every frame, the votes averaged.

    `torus` says that the clips are parts of streams: what is cut by the border goes on at the opposite one.
    """
    light = _light(videos)  # [B,F,Y,X]
    mass = light.sum((2, 3))  # [B,F]
    if torus:
        centre = np.stack([_circular_mean(light.sum(axis)) for axis in (3, 2)], -1)  # [B,F,2]
    else:
        y, x = (np.arange(n, dtype=np.float32) for n in light.shape[2:])
        safe = np.maximum(mass, 1)
        centre = np.stack([light.sum(3) @ y / safe, light.sum(2) @ x / safe], -1)
    crops = np.stack(
        [[_crop(f, c, torus) for f, c in zip(*clip, strict=True)] for clip in zip(light, centre, strict=True)]
    )
    votes = np.stack([np.asarray(_votes(params, clip)) for clip in crops]).mean(1)  # [B,10]
    period = np.array(light.shape[2:]) if torus else None
    return [
        Seen(_colour(video), int(vote.argmax()) if m.any() else None, _direction(c, m, period))
        for video, vote, c, m in zip(videos, votes, centre, mass, strict=True)
    ]


def shapes(videos: np.ndarray, before: np.ndarray) -> list[Shape]:
    """The shape that each part of a stream on the torus shows, and how like it is to that of an earlier part.

    Three frames of each, the first, the middle and the last, stand for it: their shares are averaged, and each frame's
    likeness is the greatest cosine of its light with that of the earlier part's middle frame, moved anywhere.

    videos: uint8 [B,F,Y,X,3].
    before: the earlier parts, uint8 [B,F',Y,X,3].
    """
    light = _light(videos[:, [0, videos.shape[1] // 2, -1]])  # [B,3,Y,X]
    shares = [(light.sum(axis) > OCCUPIED).mean(-1) for axis in (2, 3)]  # of columns and of rows, [B,3]
    occupied = np.maximum(*shares).mean(1)
    earlier = _light(before[:, before.shape[1] // 2])[:, None]  # [B,1,Y,X]
    spectrum = np.fft.rfft2(light) * np.fft.rfft2(earlier).conj()
    match = np.fft.irfft2(spectrum, s=light.shape[2:]).max((2, 3))  # [B,3]
    size = np.sqrt(np.square(light).sum((2, 3)) * np.square(earlier).sum((2, 3)))
    likeness = (match / np.maximum(size, 1)).mean(1)
    return [Shape(float(o), float(s)) for o, s in zip(occupied, likeness, strict=True)]


def _light(frames: np.ndarray) -> np.ndarray:
    """The brightest of the colours of each pixel, float32 [...,Y,X] in 0..255, and 0 where it is faint."""
    light = frames.max(-1)
    return np.where(light < FAINT, 0, light).astype(np.float32)


@jax.jit
def _votes(params: Params, pictures: Array) -> Array:
    return jax.nn.log_softmax(_logits(params, pictures))


def _circular_mean(light: np.ndarray) -> np.ndarray:
    """Where the light [...,n] on a ring of n pixels is centred, in 0..n; no border tears it apart."""
    n = light.shape[-1]
    turn = np.exp(2j * np.pi * np.arange(n) / n)
    return np.angle(light @ turn) * n / (2 * np.pi) % n


def _crop(frame: np.ndarray, centre: np.ndarray, torus: bool) -> np.ndarray:
    """float32 [20,20] in 0..1: the window around the centre, averaged 2 x 2; zeros, or a torus, beyond the border."""
    half = WINDOW // 2
    top, left = (round(float(c) + 0.5) for c in centre)  # corner of the window in the padded frame
    window = np.pad(frame, half, mode="wrap" if torus else "constant")[top : top + WINDOW, left : left + WINDOW]
    return window.reshape(INPUT, 2, INPUT, 2).mean((1, 3)) / np.float32(255)


def _colour(video: np.ndarray) -> str | None:
    pixels = video.reshape(-1, 3).astype(np.float64)
    light = pixels.max(-1)
    mean = (light[:, None] * pixels)[light >= FAINT].sum(0)
    if not mean.any():
        return None
    distance = {name: np.abs(mean / mean.max() - np.array(rgb) / 255).sum() for name, rgb in digits.COLOURS.items()}
    return min(distance, key=distance.__getitem__)


def _direction(centre: np.ndarray, mass: np.ndarray, period: np.ndarray | None) -> str | None:
    seen = centre[mass > 0]  # [F,2]
    if len(seen) < 2:
        return None
    if period is not None:  # the shorter way from each frame to the next, across the border too
        steps = (np.diff(seen, axis=0) + period[None] / 2) % period[None] - period[None] / 2
        seen = np.concatenate([0 * seen[:1], steps.cumsum(0)])
    ends = max(1, len(seen) // 6)
    move = seen[-ends:].mean(0) - seen[:ends].mean(0)
    if np.abs(move).max() < len(seen) / 4:  # a quarter of the slowest speed: standing still
        return None
    return max(digits.DIRECTIONS, key=lambda name: float(np.dot(digits.DIRECTIONS[name], move)))


def score(seen: Sequence[Seen], wanted: Sequence[digits.Combo]) -> dict[str, Any]:
    """Counts and percentages of clips whose colour, digit and direction are as wanted, and all three at once."""
    right = {
        field: sum(getattr(s, field) == getattr(w, field) for s, w in zip(seen, wanted, strict=True))
        for field in digits.Combo._fields
    }
    right["all"] = sum(tuple(s) == tuple(w) for s, w in zip(seen, wanted, strict=True))
    return {"clips": len(seen), **{k: {"right": n, "percent": round(100 * n / len(seen), 2)} for k, n in right.items()}}


def real_clips(count: int, seed: int = 0) -> tuple[np.ndarray, list[digits.Combo]]:
    """Clips of glyphs that nothing was trained on, uint8 [B,17,64,64,3], every combination equally likely."""
    videos, prompts = digits.batch(np.random.default_rng(seed), count, "test", "all")
    return videos, [digits.parse_prompt(p) for p in prompts]
