"""Progress on a terminal: one line that is rewritten, with the time left; plain lines in a log file.

Of several processes, process 0 shows it.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from jvdiff.runtime import peers

WIDTH = 24
PLAIN_SECONDS = 10.0  # between two lines in a log file


@contextlib.contextmanager
def bar(
    label: str, total: int | None, *, start: int = 0, stream: TextIO | None = None
) -> Iterator[Callable[[int], None]]:
    """Yields show(done), to be called with the number of units done, of `total`.

    total: None: there is no end
    start: units that an earlier run did; they do not count for the rate
    stream: where to write; None: standard error in process 0, nowhere in others
    """
    out = stream or _terminal()
    live, began, last = out.isatty(), time.monotonic(), float("-inf")

    def show(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        line = f"{label}  {_bar(done, total, live)}{_left(now - began, done, total, start)}"
        if live:
            tell(f"\r\x1b[K{line}", out)
        elif done == total or now - last >= PLAIN_SECONDS:
            tell(line + "\n", out)
        else:
            return
        last = now

    if live:
        show(start)
    try:
        yield show
    finally:
        if live:
            tell("\n", out)


@contextlib.contextmanager
def phase(label: str, seconds: dict[str, float], key: str, *, stream: TextIO | None = None) -> Iterator[None]:
    """Says that something without a countable length is going on, then how long it took; adds that to seconds[key]."""
    out = stream or _terminal()
    live, before = out.isatty(), seconds.get(key, 0.0)
    if live:
        tell(f"{label} ...", out)
    try:
        with timed(seconds, key):
            yield
    finally:
        took = seconds[key] - before
        tell(f"{chr(13) + chr(27) + '[K' if live else ''}{label}: {took:.1f} s\n", out)


@contextlib.contextmanager
def timed(seconds: dict[str, float], key: str) -> Iterator[None]:
    """Adds the time inside the block to seconds[key]."""
    began = time.monotonic()
    try:
        yield
    finally:
        seconds[key] = seconds.get(key, 0.0) + time.monotonic() - began


def tell(text: str, out: TextIO) -> None:
    """Writes text where somebody reads it. Where nobody can any more, work goes on, and what follows goes nowhere.

    A terminal that was closed, a program behind a pipe that ended, a log file on a full disk.
    """
    try:
        out.write(text)
        out.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), out.fileno())


def _terminal() -> TextIO:
    return sys.stderr if peers.writes() else io.StringIO()


def clock(seconds: float) -> str:
    """A duration as 1:05 or 2:00:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _bar(done: int, total: int | None, live: bool) -> str:
    if total is None or not live:
        return str(done) if total is None else f"{done}/{total}"
    full = WIDTH * done // max(total, 1)
    return f"[{'#' * full}{'-' * (WIDTH - full)}] {done}/{total}"


def _left(took: float, done: int, total: int | None, start: int) -> str:
    if done <= start:
        return ""
    each = took / (done - start)
    rate = f"{each:.2f} s each" if each >= 0.1 else f"{each * 1000:.0f} ms each"
    if total is None:
        return f"  {rate}, {clock(took)} so far"
    return f"  {rate}" + (f", {clock(each * (total - done))} left" if done < total else f", {clock(took)} in all")
