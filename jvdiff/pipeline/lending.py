"""Weights are lent: a caller asks for a part to compute with it, and has it for that long only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax

from jvdiff.types import Params


class Weights(Mapping[str, Params]):
    """The weights of a repository's parts, by name.

    A part is on its devices unless it was sent away with `leave`; then it waits in the host's memory, and comes back
    to the same devices when it is used.
    """

    def __init__(self, params: Mapping[str, Params]):
        self._params: dict[str, Any] = dict(params)
        self._places: dict[str, Any] = {}

    @contextmanager
    def use(self, part: str) -> Iterator[Params]:
        """The weights of a part on their devices, for the time of the block."""
        yield self[part]

    def leave(self, part: str) -> None:
        """Sends a part's weights to the host; their device memory is free afterwards."""
        if part in self._places:
            return
        params = self._params[part]
        # An uncommitted array comes back uncommitted (place None); committed to a device, it would make programs
        # compile again.
        self._places[part] = [x.sharding if x.committed else None for x in jax.tree.leaves(params)]
        self._params[part] = jax.device_get(params)
        jax.tree.map(lambda x: x.delete(), params)

    def away(self) -> tuple[str, ...]:
        """The parts that wait in the host's memory."""
        return tuple(self._places)

    def __getitem__(self, part: str) -> Params:
        if part in self._places:
            leaves, structure = jax.tree.flatten(self._params[part])
            back = [jax.device_put(x, place) for x, place in zip(leaves, self._places[part], strict=True)]
            self._params[part] = jax.tree.unflatten(structure, back)
            del self._places[part]  # not before: where there is no memory it is still away
        return self._params[part]

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)
