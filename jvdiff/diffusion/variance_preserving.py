"""Diffusion as DDPM defines it, and how every sampler of flow matching serves it.

A sample at timestep t is sqrt(abar) * clean + sqrt(1 - abar) * noise: its variance stays 1 (arXiv:2006.11239). abar
falls over 1000 timesteps, by the linear schedule of that paper or by the cosine of arXiv:2102.09672. A network is
trained to predict the noise, the clean sample, or v = sqrt(abar) noise - sqrt(1 - abar) clean (arXiv:2202.00512).

Divided by sqrt(abar) + sqrt(1 - abar), such a sample is one of flow matching, (1 - sigma) * clean + sigma * noise:

    sigma = sqrt(1 - abar) / (sqrt(abar) + sqrt(1 - abar))        d x / d sigma = noise - clean

So there is one family of solvers: `schedule` gives the noise levels, `velocity` makes a flow's velocity of a network,
and `initial` gives what to begin with. In these coordinates an Euler step is a step of deterministic DDIM
(arXiv:2010.02502), exactly, and `solvers.ddpm` is DDPM's ancestral step. UniPC, which is made for any such pair, needs
no change.

Samples are float32 [B,...].
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jvdiff.diffusion.schedules import Schedule
from jvdiff.errors import UsageError
from jvdiff.types import Array

NOISE_SCHEDULES = ("cosine", "linear")
PREDICTIONS = ("v_prediction", "epsilon", "sample")  # diffusers' names; epsilon is the noise, sample the clean one


class Level(NamedTuple):
    """What a sample is made of: arrays that broadcast with it.

    signal: how much of it is clean, sqrt(abar)
    spread: how much is noise, sqrt(1 - abar)
    """

    signal: Array
    spread: Array


def alphas_cumprod(kind: str = "cosine", train_steps: int = 1000) -> np.ndarray:
    """abar of every timestep 0..train_steps-1, float64, falling; read-only.

    "linear": beta from 0.0001 to 0.02 (of 1000 steps; fewer are as much larger). "cosine": offset 0.008, betas at most
    0.999, so that abar ends at 2.4e-9 and not at 0.

    Raises UsageError for an unknown name, or fewer than 2 steps.
    """
    if type(train_steps) is not int or train_steps < 2:
        raise UsageError(f"train_steps is {train_steps!r}; expected a whole number from 2.")
    if kind == "linear":
        betas = np.minimum(np.linspace(0.1, 20.0, train_steps) / train_steps, 0.999)
    elif kind == "cosine":
        angles = (np.arange(train_steps + 1) / train_steps + 0.008) / 1.008 * np.pi / 2
        betas = np.minimum(1 - np.cos(angles[1:]) ** 2 / np.cos(angles[:-1]) ** 2, 0.999)
    else:
        raise UsageError(f"the noise schedule is {kind!r}; expected one of {', '.join(NOISE_SCHEDULES)}.")
    abar = np.cumprod(1 - betas)
    abar.flags.writeable = False
    return abar


def level(abar: np.ndarray, timestep: Array, rank: int) -> Level:
    """The level of each timestep [B], whole numbers of any dtype, as float32 [B,1,...] of this rank."""
    index, shape = jnp.asarray(timestep).astype(jnp.int32), (-1, *(1,) * (rank - 1))
    return Level(*(jnp.asarray(table, jnp.float32)[index].reshape(shape) for table in _parts(abar)))


def diffuse(clean: Array, noise: Array, level: Level) -> Array:
    """The sample at a noise level."""
    return level.signal * clean + level.spread * noise


def v_prediction(clean: Array, noise: Array, level: Level) -> Array:
    """v, which the network is to predict of a sample made of these two."""
    return level.signal * noise - level.spread * clean


def target(prediction: str, clean: Array, noise: Array, level: Level) -> Array:
    """What a network with this kind of prediction is trained to give."""
    _check(prediction)
    return {"epsilon": noise, "sample": clean}.get(prediction, v_prediction(clean, noise, level))


def clean_and_noise(prediction: str, predicted: Array, x: Array, level: Level) -> tuple[Array, Array]:
    """The two parts of x, as a network's prediction has them: the inverse of `diffuse` and `target`.

    A predicted noise says little of the clean part where nearly all is noise, and a predicted sample little of the
    noise where there is nearly none: errors grow by 1 / signal, and by 1 / spread. v has neither weakness.
    """
    _check(prediction)
    signal, spread = level
    if prediction == "epsilon":
        return (x - spread * predicted) / signal, predicted
    if prediction == "sample":
        return predicted, (x - signal * predicted) / spread
    return signal * x - spread * predicted, spread * x + signal * predicted


def schedule(abar: np.ndarray, steps: int) -> Schedule:
    """`steps` of the timesteps that a network was trained at, the last one first, then evenly down; and their sigmas.

    diffusers' "trailing" spacing, which alone begins where there is nothing but noise (arXiv:2305.08891).

    Raises UsageError unless there are 1 to len(abar) steps.
    """
    if type(steps) is not int or not 1 <= steps <= len(abar):
        raise UsageError(f"steps is {steps!r}; expected a whole number from 1 to {len(abar)}.")
    timesteps = np.round(np.arange(len(abar), 0, -len(abar) / steps)).astype(int) - 1
    signal, spread = _parts(abar[timesteps])
    return Schedule(np.append(spread / (signal + spread), 0.0), timesteps.astype(np.float64))


def initial(standard: Array, schedule: Schedule) -> Array:
    """Where a flow begins that DDPM would begin at standard normal noise [B,...]."""
    sigma = schedule.sigmas[0]
    return standard * float(np.hypot(1 - sigma, sigma))


def velocity(
    network: Callable[[Array, Array], Array], prediction: str, abar: np.ndarray
) -> Callable[[Array, Array], Array]:
    """The flow's velocity(x, t) of a network(x, t) that predicts v, the noise or the clean part of a DDPM sample.

    Guidance may be applied to either: both are the same affine function of the prediction.
    """
    _check(prediction)

    def flow(x: Array, t: Array) -> Array:
        now = level(abar, t, x.ndim)
        sample = x * (now.signal + now.spread)
        clean, noise = clean_and_noise(prediction, network(sample, t), sample, now)
        return noise - clean

    return flow


def _parts(abar: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.sqrt(abar), np.sqrt(1 - abar)


def _check(prediction: str) -> None:
    if prediction not in PREDICTIONS:
        raise UsageError(f"prediction is {prediction!r}; expected one of {', '.join(PREDICTIONS)}.")
