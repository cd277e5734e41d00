"""Traces of jax.profiler: what is in them, how many steps, one at a time. Those of commands: beside their tests."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from jvdiff import kernels
from jvdiff.errors import ResourceError, UsageError
from jvdiff.runtime import profiling
from tests.training.test_loop import SCHEDULE, TASK, loop


def names(folder):
    """The words of the trace in a folder, of which there is one."""
    (path,) = folder.rglob("*.xplane.pb")
    return {word.decode() for word in re.findall(rb"[\w/()\[\] .-]{3,}", path.read_bytes())}


def holds(folder, *words):
    text = " ".join(names(folder))
    return [word for word in words if word not in text] == []


@jax.jit
def layer(x):
    with jax.named_scope("first_layer"):
        return kernels.attention(x, x, x).sum()


def test_a_trace_has_stages_steps_layers_and_kernels(tmp_path):
    x = jnp.ones((1, 8, 1, 8))
    with profiling.profile(tmp_path / "trace"):
        for i in range(2):
            with profiling.step("denoise", i), profiling.stage("transformer"):
                layer(x).block_until_ready()
        with pytest.raises(UsageError, match="one at a time"), profiling.profile(tmp_path / "other"):
            pass
    assert holds(tmp_path / "trace", "denoise", "transformer", "first_layer", "xla_attention")
    assert not holds(tmp_path / "trace", "a name that nobody gave")


def test_of_a_training_it_has_the_first_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "PROFILED", 2)
    begun = []
    monkeypatch.setattr(
        jax.profiler, "StepTraceAnnotation", lambda name, step_num: begun.append(_active()) or _nothing()
    )
    loop.fit(TASK, dataclasses.replace(SCHEDULE, steps=4), tmp_path / "run", profile=tmp_path / "trace")
    assert begun == [True, True, False, False] and names(tmp_path / "trace")


def _active():
    return bool(profiling._now) and profiling._now[0].begun


def _nothing():
    return profiling.contextlib.nullcontext()


def test_where_nothing_can_be_written_it_is_told_first(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="choose another --profile"), profiling.profile(tmp_path / "file" / "trace"):
        pytest.fail("it began")
    with profiling.profile(None):
        pass
