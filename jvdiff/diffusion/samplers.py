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

_LISTED = re.compile(r"(renoise|dmd):([0-9]+(?:,[0-9]+)*)")  # solvers that list timesteps of a training table
_PLAIN = re.compile(r"(unipc|euler|renoise)|unipc:([123])")


@dataclass(frozen=True)
class FlowSampler:
    """A solver of the flow's equation on a grid of noise levels (`schedules.make`).

    solver: "unipc", "euler", or "renoise": on Euler's grid, noised anew between the steps (diffusers'
        stochastic_sampling)
    steps: number of them
    shift: how much the noise levels lean towards noise
    grid: one of `schedules.GRIDS`
    values: the ends of the grid, or all of it, where it has numbers
    terminal: the last noise level above 0; None leaves it where it is
    order: of unipc
    """

    solver: str
    steps: int
    shift: float
    grid: str = "diffusers"
    values: tuple[float, ...] = ()
    terminal: float | None = None
    order: int = 2

    @functools.cached_property
    def schedule(self) -> schedules.Schedule:
        """Noise levels and timesteps."""
        return schedules.make(
            self.steps,
            shift=self.shift,
            grid=self.grid,
            solver="unipc" if self.solver == "unipc" else "euler",
            values=self.values,
            terminal=self.terminal,
        )

    def make(self) -> solvers.Solver:
        """The solver, its table worked out."""
        if self.solver == "unipc":
            return solvers.unipc(self.schedule, self.order)
        return {"euler": solvers.euler, "renoise": solvers.renoise}[self.solver](self.schedule)

    def begin(self, noise: Array) -> Array:
        """Latents at the first noise level, from standard normal noise."""
        return noise


@dataclass(frozen=True)
class RenoiseSampler:
    """Few steps of a distilled network, noised anew between them (`schedules.self_forcing`, `solvers.renoise`).

    timesteps: falling, 1000 to 0
    shift: that of the training
    warp: they are entries of the training table, whose timestep the network gets; else the network gets them as they
        are, at the sigma of the entry whose timestep is nearest
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


def read(text: str, steps: int, shift: float, grid: str, terminal: float | None = None) -> FlowSampler | RenoiseSampler:
    """The sampler that the settings `solver` and `grid` name; its noise levels are worked out, so that they can be.

    solver: "unipc", of order 2 ("unipc:1", "unipc:3" of another), "euler" or "renoise"; or "renoise:1000,750,500,250"
        and "dmd:1000,757,522", timesteps of a distilled network that are entries of its training table, or that it is
        told as they are (`RenoiseSampler`). These two need no grid.
    grid: one of `schedules.GRIDS`, with numbers behind it where it takes any: "karras:0.98,0.01" (highest, lowest),
        "sigmas:1,0.9,0.75" (before the shift), "timesteps:1000,750,500".

    Raises:
        UsageError: another name, numbers that cannot be, or `steps` that contradict a list.
    """
    name, values = _read_grid(grid)
    if (count := own_steps(text, grid)) is not None and steps != count:
        what, listed = ("solver", text) if _LISTED.fullmatch(text) else ("grid", grid)
        raise UsageError(f"steps is {steps}, and {what} lists {count} timesteps ({listed:.80}); leave steps out.")
    if match := _LISTED.fullmatch(text):
        if name in schedules.LISTS or terminal is not None:
            other = f"grid is {grid!r:.80}" if terminal is None else f"shift_terminal is {terminal}"
            raise UsageError(f"solver lists its own timesteps ({text:.80}), and {other}; leave one of them out.")
        sampler = RenoiseSampler(tuple(map(int, match[2].split(","))), shift, warp=match[1] == "renoise")
    elif match := _PLAIN.fullmatch(text):
        sampler = FlowSampler(match[1] or "unipc", steps, shift, name, values, terminal, int(match[2] or 2))
    else:
        raise UsageError(
            f"solver is {text!r:.80}; expected unipc, euler, or renoise:1000,750,500,250 (timesteps), unipc:3 (of "
            "another order), renoise, or dmd:1000,757,522."
        )
    assert len(sampler.schedule) == steps
    return sampler


def _read_grid(text: str) -> tuple[str, tuple[float, ...]]:
    """The name of a grid and its numbers."""
    name, colon, numbers = text.partition(":")
    try:
        values = tuple(map(float, numbers.split(","))) if colon else ()
    except ValueError:
        values = None
    if name not in schedules.GRIDS or values is None:
        raise UsageError(
            f"grid is {text!r:.80}; expected a grid's name, karras:0.98,0.01 (highest level, lowest), "
            "sigmas:1,0.9,0.75 or timesteps:1000,750,500."
        )
    return name, values


def own_steps(solver: str, grid: str = "diffusers") -> int | None:
    """How many steps the settings `solver` and `grid` list themselves; None where `steps` decides."""
    if match := _LISTED.fullmatch(solver):
        return len(match[2].split(","))
    name, _, numbers = grid.partition(":")
    return len(numbers.split(",")) if name in schedules.LISTS else None


def sigmas(solver: solvers.Solver) -> list[float]:
    """The noise levels of a solver's steps and the last one, for the record of a run."""
    return np.asarray(solver.sigmas, np.float64).tolist()
