"""Whose weights are on a device together: all that a clip needs, or some of them only while they work.

A part that is in turn waits in the host's memory (`jvdiff.pipeline.Weights`) and leaves the device as soon as another
one is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from jvdiff.models.family import Clip
from jvdiff.models.vae_tiles import OFF, Tiles
from jvdiff.plan.counting import gib


class Work(NamedTuple):
    """A program of a clip, as far as memory goes.

    name: of the stage
    part: whose weights it needs
    needs: bytes besides weights
    """

    name: str
    part: str
    needs: int


class Residency(NamedTuple):
    """A way to share a device among the parts of a clip.

    in_turn: parts that are there only while they work; the others are there all the time
    peaks: bytes on one device in each program, by the stage's name
    """

    in_turn: tuple[str, ...]
    peaks: Mapping[str, int]

    @property
    def peak(self) -> int:
        """Bytes on one device, at most."""
        return max(self.peaks.values())

    def __str__(self) -> str:
        return f"{', '.join(self.in_turn)} in turn" if self.in_turn else "all weights resident"


def ways(clip: Clip, works: Sequence[Work], held: Mapping[str, int]) -> Iterator[Residency]:
    """The ways to run a clip, from the one that leaves most on the device to the one that needs least.

    All parts are resident; or those that only encode are in turn, with those that this clip does not use; then the
    transformers, where there are several; then all.

    works: the programs in order. held: bytes of each part's weights on one device.
    """
    steps, later = {segment.part for segment in clip.segments}, _later(clip, works)
    idle = [part for part in held if part not in later]
    experts = [part for part in held if part in steps] if len(steps) > 1 else []
    tiers = ((), idle, [part for part in held if part in {*idle, *experts}], held)
    for in_turn in dict.fromkeys(map(tuple, tiers)):
        yield with_turns(in_turn, works, held)


def encoders(clip: Clip, works: Sequence[Work]) -> tuple[str, ...]:
    """The parts that have nothing more to do when the first step begins, in the order in which they work."""
    later = _later(clip, works)
    return tuple(dict.fromkeys(work.part for work in works if work.part not in later))


def _later(clip: Clip, works: Sequence[Work]) -> set[str]:
    """The parts that work from the first step on."""
    steps = {segment.part for segment in clip.segments}
    first = next((i for i, work in enumerate(works) if work.part in steps), len(works))
    return {work.part for work in works[first:]}


def with_turns(in_turn: Sequence[str], works: Sequence[Work], held: Mapping[str, int]) -> Residency:
    """What each program takes where these parts are in turn."""
    there = sum(size for part, size in held.items() if part not in in_turn)
    peaks: dict[str, int] = {}
    for work in works:
        own = held[work.part] if work.part in in_turn else 0
        peaks[work.name] = max(peaks.get(work.name, 0), there + own + work.needs)
    return Residency(tuple(in_turn), peaks)


def choose(clip: Clip, works: Sequence[Work], held: Mapping[str, int], limit: int | None) -> tuple[Residency, str]:
    """The largest of `ways` that fits into `limit` bytes (None: no limit), else the smallest, and a line about it."""
    every = list(ways(clip, works, held))
    chosen = next((way for way in every if limit is None or way.peak <= limit), every[-1])
    line = f"weights on the device: {chosen}; {gib(chosen.peak).strip()} at most"
    if limit is not None:
        line += f", of {gib(limit).strip()}"
        if chosen.peak > limit:
            line += ", which is too little: expect to run out of memory"
    if chosen is not every[0]:
        line += f" (all weights resident: {gib(every[0].peak).strip()})"
    return chosen, line


def in_tiles(clip: Clip) -> Clip | None:
    """The clip with its pictures in tiles, where its settings leave that open; None where they do not."""
    if getattr(clip.settings, "vae_tiles", OFF) is not None or clip.vae_tiles is not None:
        return None
    return dataclasses.replace(clip, vae_tiles=Tiles())


def fitted(
    clip: Clip,
    measured: Callable[[Clip], list[Work]],
    chosen: Callable[[list[Work]], tuple[Residency, str]],
    limit: int | None,
) -> tuple[Clip, Residency, str]:
    """The clip as it is to run, whose weights are in turn, and a line about it.

    Pictures are cut into tiles only where that is left open, nothing else fits into `limit` bytes, and it then fits.

    measured: clip -> its programs. chosen: `choose`, or what was asked for.
    """
    way, line = chosen(measured(clip))
    if limit is None or way.peak <= limit or (tiled := in_tiles(clip)) is None:
        return clip, way, line
    smaller, told = chosen(measured(tiled))
    if smaller.peak > limit:
        return clip, way, line
    return tiled, smaller, f"{told}; with the VAE in tiles ({tiled.vae_tiles}), since nothing else fits"
