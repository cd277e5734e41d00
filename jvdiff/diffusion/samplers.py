"""Samplers as values: what a run says of its solver and noise levels, frozen, hashable, with a text form.

A sampler makes its solver when steps are computed; until then it is compared, recorded, and told to a plan. Its
schedule is worked out once, when somebody first asks.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from jvdiff.diffusion import schedules, solvers, variance_preserving
from jvdiff.errors import UsageError
from jvdiff.types import Array

RENOISE = re.compile(r"renoise:([0-9]+(?:,[0-9]+)*)")


@dataclass(frozen=True)
class FlowSampler:
    """A solver of the flow's equation on a grid of noise levels (`schedules.make`).

    solver: "unipc" or "euler"
    steps: number of them
    shift: how much the noise levels lean towards noise
    grid: "diffusers" or "training"
    """

    solver: str
    steps: int
    shift: float
    grid: str = "diffusers"

    @functools.cached_property
    def schedule(self) -> schedules.Schedule:
        """Noise levels and timesteps."""
        return schedules.make(self.steps, shift=self.shift, grid=self.grid, solver=self.solver)

    def make(self) -> solvers.Solver:
        """The solver, its table worked out."""
        return solvers.SOLVERS[self.solver](self.schedule)

    def begin(self, noise: Array) -> Array:
        """Latents at the first noise level, from standard normal noise."""
        return noise


@dataclass(frozen=True)
class RenoiseSampler:
    """Few steps of a distilled network, noised anew between them (`schedules.self_forcing`, `solvers.renoise`).

    timesteps: entries of the training table, falling, 1000 to 0
    shift: that of the training
    warp: the network gets the timestep of the entry, not the entry's number
    """

    timesteps: tuple[int, ...]
    shift: float
    warp: bool = True

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.timesteps)

    @functools.cached_property
    def schedule(self) -> schedules.Schedule:
        """Noise levels and timesteps."""
        return schedules.self_forcing(self.timesteps, shift=self.shift, warp=self.warp)

    def make(self) -> solvers.Solver:
        """The solver, its table worked out."""
        return solvers.renoise(self.schedule)

    def begin(self, noise: Array) -> Array:
        """Latents at the first noise level, from standard normal noise."""
        return noise


@dataclass(frozen=True)
class VarianceSampler:
    """A solver for a network trained as DDPM defines diffusion (`variance_preserving`).

    solver: "ddim", "ddpm", "unipc" or "euler"; DDIM is Euler's step in these coordinates
    steps: number of them
    noise_schedule: "cosine" or "linear", what the network was trained with
    """

    solver: str
    steps: int
    noise_schedule: str

    @functools.cached_property
    def schedule(self) -> schedules.Schedule:
        """Noise levels and timesteps."""
        return variance_preserving.schedule(variance_preserving.alphas_cumprod(self.noise_schedule), self.steps)

    def make(self) -> solvers.Solver:
        """The solver, its table worked out."""
        kinds = {**solvers.SOLVERS, "ddim": solvers.euler, "ddpm": solvers.ddpm}
        return kinds[self.solver](self.schedule)

    def begin(self, noise: Array) -> Array:
        """Latents at the first noise level, from standard normal noise."""
        return variance_preserving.initial(noise, self.schedule)


Sampler: TypeAlias = FlowSampler | RenoiseSampler | VarianceSampler


def read(text: str, steps: int, shift: float, grid: str) -> FlowSampler | RenoiseSampler:
    """The sampler that a setting `solver` names: "unipc", "euler", or "renoise:1000,750,500,250" (timesteps).

    Raises:
        UsageError: another name, or `steps` that contradict the list.
    """
    if text in solvers.SOLVERS:
        return FlowSampler(text, steps, shift, grid)
    if match := RENOISE.fullmatch(text):
        sampler = RenoiseSampler(tuple(map(int, match[1].split(","))), shift)
        if steps != (count := len(sampler.schedule)):
            raise UsageError(f"steps is {steps}, and solver lists {count} timesteps ({text}); leave steps out.")
        return sampler
    raise UsageError(f"solver is {text!r:.80}; expected unipc, euler, or renoise:1000,750,500,250 (timesteps).")


def own_steps(text: str) -> int | None:
    """How many steps a setting `solver` lists itself; None where `steps` decides."""
    match = RENOISE.fullmatch(text)
    return len(match[1].split(",")) if match else None


def sigmas(solver: solvers.Solver) -> list[float]:
    """The noise levels of a solver's steps and the last one, for the record of a run."""
    return np.asarray(solver.sigmas, np.float64).tolist()
