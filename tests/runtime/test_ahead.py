"""Programs that are compiled beside something else: waited for, left to others where they cannot be, or given up."""

import threading
import time
import types

import pytest

from jvdiff.runtime import ahead


def traced(compile):
    return types.SimpleNamespace(lower=lambda: types.SimpleNamespace(compile=compile))


def test_what_cannot_be_compiled_is_left_to_who_runs_it():
    def programs():
        yield "good", traced(lambda: None)
        yield "bad", traced(lambda: 1 / 0)

    with ahead.compiling(programs) as compiled:
        pass
    assert compiled() == {"good": None} and not ahead.busy()
    with ahead.compiling(lambda: 1 / 0) as compiled:
        pass
    assert compiled() == {} and not ahead.busy()


def test_an_error_does_not_wait_for_a_compiler_and_what_has_not_begun_is_given_up():
    begun, go_on, never = threading.Event(), threading.Event(), []

    def programs():
        yield "slow", traced(lambda: begun.set() or go_on.wait(60))
        go_on.wait(60)
        yield "late", traced(lambda: never.append(1))

    with pytest.raises(KeyError), ahead.compiling(programs):
        assert begun.wait(60)
        raise KeyError
    assert ahead.busy()
    go_on.set()
    while ahead.busy():
        time.sleep(0.01)
    assert not never
