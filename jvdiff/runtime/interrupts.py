"""Ctrl-C and SIGTERM (preemption): they come at any moment; all processes obey them after the same step."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from jvdiff.runtime import peers


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Yields asked(): whether Ctrl-C or SIGTERM has come. A second Ctrl-C raises KeyboardInterrupt at once.

    Several processes must ask equally often. The answer is the same for all: whether a signal came to any of them.
    """
    signals: list[int] = []

    def handle(number: int, frame: Any) -> None:
        del frame
        if signals and number == signal.SIGINT:
            raise KeyboardInterrupt
        signals.append(number)
        print("\nstopping after this step; Ctrl-C to stop at once", file=sys.stderr, flush=True)

    try:
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, which alone receives signals
        before = {}
    try:
        yield lambda: any(peers.gather(bool(signals)))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
