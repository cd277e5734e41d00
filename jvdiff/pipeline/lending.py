"""Weights are lent: who computes with a part asks for it, and only for as long."""

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
        self._places[part] = jax.tree.map(lambda x: x.sharding, params)
        self._params[part] = jax.device_get(params)
        jax.tree.map(lambda x: x.delete(), params)

    def away(self) -> tuple[str, ...]:
        """The parts that wait in the host's memory."""
        return tuple(self._places)

    def __getitem__(self, part: str) -> Params:
        if part in self._places:
            self._params[part] = jax.device_put(self._params[part], self._places.pop(part))
        return self._params[part]

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)
