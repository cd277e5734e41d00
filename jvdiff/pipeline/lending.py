"""Weights are lent: a caller asks for a part to compute with it, and has it for that long only."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax

from jvdiff.types import Params

PINNED = "pinned_host"  # JAX's name of memory of the host that devices copy from without a detour


class Weights(Mapping[str, Params]):
    """The weights of a repository's parts, by name.

    A part is on its devices unless it was sent away; then it waits in the host's memory, and comes back to the same
    devices when it is used. Those that are `in_turn` are there only while they work: one leaves when another part is
    used, and its copy in the host's memory stays, so that it leaves at no cost the next time.
    """

    def __init__(self, params: Mapping[str, Params], in_turn: Collection[str] = ()):
        self._params: dict[str, Any] = dict(params)
        self._places: dict[str, Any] = {}
        self._copies: dict[str, Any] = {}
        self.in_turn = tuple(in_turn)

    def take_turns(self, parts: Collection[str]) -> None:
        """From now on these parts are in turn, and the others stay once they are used."""
        self.in_turn = tuple(parts)
        self._copies = {part: copy for part, copy in self._copies.items() if part in parts}

    def take(self, part: str, params: Params) -> None:
        """Adds a part, which leaves at once if it is in turn."""
        self._params[part] = params
        if part in self.in_turn:
            self.leave(part)

    @contextmanager
    def use(self, part: str) -> Iterator[Params]:
        """The weights of a part on their devices, for the time of the block."""
        for other in self.in_turn:
            if other != part:
                self.leave(other)
        yield self[part]

    def leave(self, part: str) -> None:
        """Sends a part's weights to the host; their device memory is free afterwards."""
        if part in self._places:
            return
        params = self._params[part]
        # An uncommitted array comes back uncommitted (place None); committed to a device, it would make programs
        # compile again.
        self._places[part] = [x.sharding if x.committed else None for x in jax.tree.leaves(params)]
        copy = self._copies.pop(part, None)
        self._params[part] = jax.tree.map(_on_host, params) if copy is None else copy
        jax.block_until_ready(self._params[part])
        jax.tree.map(lambda x: x.delete(), params)

    def away(self) -> tuple[str, ...]:
        """The parts that wait in the host's memory."""
        return tuple(self._places)

    def __getitem__(self, part: str) -> Params:
        if part in self._places:
            away = self._params[part]
            leaves, structure = jax.tree.flatten(away)
            back = [jax.device_put(x, place) for x, place in zip(leaves, self._places[part], strict=True)]
            self._params[part] = jax.tree.unflatten(structure, back)
            del self._places[part]  # not before: where there is no memory it is still away
            if part in self.in_turn:
                self._copies[part] = away
        return self._params[part]

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)


def _on_host(x: jax.Array) -> Any:
    """A copy in the host's memory: pinned where JAX has such memory and the array has a place to come back to.

    What is not committed to a device has none, and JAX cannot pin it without committing it.
    """
    device = next(iter(x.sharding.addressable_devices))
    if x.committed and PINNED in {memory.kind for memory in device.addressable_memories()}:
        return jax.device_put(x, x.sharding.with_memory_kind(PINNED))
    return jax.device_get(x)
