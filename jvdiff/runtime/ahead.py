"""Programs are compiled in threads of their own while the main thread reads weights.

Where a compiler is at work when the process ends, it is not waited for: `busy` tells `jvdiff.commands`, which then
leaves without the interpreter's own end.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

_begun: list[Future[Any]] = []


@contextlib.contextmanager
def compiling(
    programs: Callable[[], Iterable[tuple[Hashable, Any]]],
) -> Iterator[Callable[[], dict[Hashable, Any]]]:
    """Traces and compiles beside the block; yields what waits for that, and gives what was compiled by its key.

    A program that cannot be compiled is left to who runs it, and tells why.

    programs: gives (key, `jax.stages.Traced`), in a thread
    """
    pool = ThreadPoolExecutor(1 + (os.cpu_count() or 1), "compiler")

    def begin() -> dict[Hashable, Future[Any]]:
        found = {}
        for key, traced in programs():
            found[key] = pool.submit(lambda traced=traced: traced.lower().compile())
            _begun.append(found[key])
        return found

    def compiled() -> dict[Hashable, Any]:
        found = {} if begun.exception() else begun.result()
        programs = {key: program.result() for key, program in found.items() if not program.exception()}
        pool.shutdown()
        return programs

    begun = pool.submit(begin)
    _begun.append(begun)
    try:
        yield compiled
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)  # where it is tracing, the next program is refused
        raise


def busy() -> bool:
    """Whether a compiler is at work."""
    _begun[:] = [each for each in _begun if not each.done()]
    return bool(_begun)
