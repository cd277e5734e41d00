"""The toy family lies outside jvdiff/ and is found as a user's own would be, with its folder on the path."""

import sys
import time
from pathlib import Path

import jax
import pytest

from jvdiff.runtime import ahead

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def compiled():
    """The names of the functions that are compiled from now on, or read from the cache of compiled ones."""
    names, live = [], [True]
    while ahead.busy():  # for a run of another test, which ended with an error
        time.sleep(0.01)

    def note(event, seconds, **facts):
        if live and event == "/jax/core/compile/backend_compile_duration":
            names.append(facts["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(note)
    yield names
    live.clear()  # listeners cannot be taken away
