"""Whose weights are on a device together: all that a clip needs, or some of them only while they work.

A part that is in turn waits in the host's memory (`jvdiff.pipeline.Weights`) and leaves the device as soon as another
one is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from jvdiff.models.family import Clip
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
    steps = {segment.part for segment in clip.segments}
    first = next((i for i, work in enumerate(works) if work.part in steps), len(works))
    later = {work.part for work in works[first:]}
    idle = [part for part in held if part not in later]
    experts = [part for part in held if part in steps] if len(steps) > 1 else []
    tiers = ((), idle, [part for part in held if part in {*idle, *experts}], held)
    for in_turn in dict.fromkeys(map(tuple, tiers)):
        yield with_turns(in_turn, works, held)


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
