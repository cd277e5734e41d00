"""Questions that are put to a process of its own, which may hang, crash or poison a GPU's context: this one goes on."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_PR_SET_PDEATHSIG = 1


class Outcome(NamedTuple):
    """How a question ended.

    answer: the JSON object that the process printed last
    problem: why there is none, the end of a sentence: "it did not end within 60 s"; None: there is
    """

    answer: dict[str, Any]
    problem: str | None


def ask(words: Sequence[str], limit: float, environment: Mapping[str, str] | None = None) -> Outcome:
    """Runs a program whose last line is a JSON object, for at most `limit` seconds; never raises for what it does.

    environment: what differs from this process's
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=os.environ | dict(environment or {})
        )
        try:
            child.wait(limit)
        except subprocess.TimeoutExpired:
            return Outcome({}, f"it did not end within {limit:g} s")
        finally:  # also where a signal ends the wait; a process that a driver holds cannot be ended, and is left
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.kill()
                child.wait(2)
        out.seek(0)
        err.seek(0)
        return _read(child.returncode, out.read().decode(errors="replace"), err.read().decode(errors="replace"))


def _read(code: int, out: str, err: str) -> Outcome:
    if code < 0:
        return Outcome({}, f"it was ended by {signal.Signals(-code).name}")
    with contextlib.suppress(ValueError, IndexError):
        answer = json.loads(out.splitlines()[-1])
        if code == 0 and isinstance(answer, dict):
            return Outcome(answer, None)
    said = [line for line in err.splitlines() if line.strip()]
    return Outcome({}, f"it ended with status {code}: {said[-1].strip()[:300] if said else 'without a word'}")


def answer(value: Mapping[str, Any]) -> None:
    """Prints what `ask` returns, in the process that was asked."""
    print(f"\n{json.dumps(value)}", flush=True)


def end_with_parent() -> None:
    """Called in a child: it does not outlive who asked, whatever ends that one (on Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
