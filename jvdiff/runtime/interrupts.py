"""Ctrl-C and SIGTERM (preemption): asked for at any moment, obeyed between two steps, the same two in all processes."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from jvdiff.runtime import peers


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Yields asked(): whether Ctrl-C or SIGTERM has come. The first waits for the step, a second Ctrl-C does not.

    Of several processes each must ask equally often, and the answer is the same for all: whether it came to any.
    """
    seen: list[int] = []

    def handle(number: int, frame: Any) -> None:
        del frame
        if seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        seen.append(number)
        print("\nstopping after this step; Ctrl-C to stop at once", file=sys.stderr, flush=True)

    try:
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: nobody sends signals here
        before = {}
    try:
        yield lambda: any(peers.gather(bool(seen)))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
