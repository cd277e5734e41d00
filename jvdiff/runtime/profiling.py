"""Traces of `jax.profiler`: where the time of a run goes, by stage, step, layer and kernel.

    with profiling.profile("out/trace"):        # what follows, whole
        jvdiff.generate(...)

On a time line (TensorBoard's profile plugin, Perfetto) stages and steps are events of the host, which are made here;
layers and kernels are scopes of the device's operations, and stand in the models and in `kernels`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jvdiff.errors import ResourceError, UsageError


class _Trace:
    """The trace that is asked for, of which a process has one.

    folder: where it goes
    left: how many steps it still takes; None: it ends with its block
    begun: whether it is being taken
    """

    def __init__(self, folder: Path, steps: int | None):
        self.folder, self.left, self.begun = folder, steps, False

    def begin(self) -> None:
        import jax

        options: Any = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # calls of Python are many, and none of them is what is looked for
        try:
            jax.profiler.start_trace(self.folder, profiler_options=options)
        except RuntimeError as error:
            raise UsageError(f"profile is {self.folder}, and another trace is being taken: {error}") from error
        self.begun = True

    def end(self) -> None:
        import jax

        if self.begun:
            self.begun, self.left = False, 0
            jax.profiler.stop_trace()


_now: list[_Trace] = []


@contextlib.contextmanager
def profile(folder: str | Path | None, steps: int | None = None) -> Iterator[None]:
    """Writes a trace of the block into a folder, which it makes; None: does nothing.

    steps: take only so many, from the first on (`step`); None: the whole block.

    Raises:
        UsageError: another trace is being taken.
        ResourceError: nothing can be written there.
    """
    if folder is None:
        yield
        return
    if _now:
        raise UsageError(f"profile is {folder}, and {_now[0].folder} is being written; one at a time.")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"cannot write to {folder}: {error.strerror}; choose another --profile.") from error
    trace = _Trace(Path(folder), steps)
    _now.append(trace)
    try:
        if steps is None:
            trace.begin()
        yield
    finally:
        _now.clear()
        trace.end()


@contextlib.contextmanager
def step(name: str, number: int) -> Iterator[None]:
    """The block is one step, in a trace: "denoise" 3."""
    import jax

    trace = _now[0] if _now and _now[0].left else None
    if trace and not trace.begun:
        trace.begin()
    with jax.profiler.StepTraceAnnotation(name, step_num=number):
        yield
    if trace and trace.left:
        trace.left -= 1
        if not trace.left:
            trace.end()


def stage(name: str) -> contextlib.AbstractContextManager[Any]:
    """The block is a stage, in a trace."""
    import jax

    return jax.profiler.TraceAnnotation(name)
