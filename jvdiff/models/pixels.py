"""What families share around a VAE: frames as pixels, what is not finite in them, sizes, statistics of latents."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jvdiff.errors import NumericsError, UsageError
from jvdiff.types import Array


def to_pixels(frames: Array) -> Array:
    """Frames in -1..1 -> uint8, rounded as diffusers does it: to [0,1], clamped, times 255, halves to even."""
    return jnp.round(jnp.clip(frames / 2 + 0.5, 0.0, 1.0) * 255).astype(jnp.uint8)


def from_pixels(pictures: Array) -> Array:
    """uint8 -> float32 in -1..1: the inverse of `to_pixels`, as diffusers does it."""
    return 2 * (pictures.astype(jnp.float32) / 255) - 1


def nonfinite_share(x: Array) -> Array:
    """The share of numbers that are NaN or infinite, float32."""
    return jnp.mean(1.0 - jnp.isfinite(x).astype(jnp.float32))


def check_video(shape: Sequence[int], temporal: int, spatial: int) -> None:
    """Raises UsageError unless a video [B,F,Y,X,3] is what a causal VAE takes, which makes latents of it.

    temporal, spatial: frames to a latent frame after the first, and pixels to a latent cell along each side.
    """
    frames = shape[1]
    if over := (frames - 1) % temporal:
        below = frames - over
        raise UsageError(f"The VAE takes 1 + {temporal}k frames, found {frames}; use {below} or {below + temporal}.")
    for size, name in zip(shape[2:4], ("height", "width"), strict=True):
        if size % spatial:
            raise UsageError(f"The VAE takes a {name} divisible by {spatial}, found {size}.")


def latent_statistics(latents: np.ndarray, advice: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(means, standard deviations) of the channels of latents [...,C] over all else, for a VAE's configuration.

    advice: what to do about a channel that is not used, for the message.

    Raises:
        NumericsError: a channel is the same everywhere, or not finite, and so cannot be normalised.
    """
    latents = latents.reshape(-1, latents.shape[-1]).astype(np.float64)  # [...,C] -> [N,C]
    mean, std = latents.mean(axis=0), latents.std(axis=0)
    if bad := [i for i, v in enumerate(std.tolist()) if not 0 < v < np.inf]:
        raise NumericsError(
            f"Latent channels {bad} have standard deviation {std[bad].tolist()}; expected above 0.\n"
            f"The VAE does not use them: {advice}."
        )
    means, stds = (tuple(float(f"{v:.5g}") for v in values) for values in (mean.tolist(), std.tolist()))
    return means, stds
