"""What JAX draws, and what a record says, in environments that people have."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff.diffusion.solvers import _drawn
from jvdiff.pipeline import initial_noise
from jvdiff.runtime import draws, environment


@contextlib.contextmanager
def setting(name, value):
    before = jax.config.values[name]
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


# Name, value, and whether the same program may give other numbers under it, so that a record must have it.
SETTINGS = [
    ("jax_default_prng_impl", "rbg", False),
    ("jax_default_prng_impl", "unsafe_rbg", False),
    ("jax_threefry_partitionable", False, False),
    ("jax_random_seed_offset", 7, False),
    ("jax_debug_nans", True, False),
    ("jax_numpy_dtype_promotion", "standard", False),
    ("jax_numpy_rank_promotion", "allow", False),
    ("jax_debug_key_reuse", True, False),
    ("jax_enable_x64", True, True),
    ("jax_disable_jit", True, True),
    ("jax_default_matmul_precision", "bfloat16", True),
    ("jax_disable_most_optimizations", True, True),
]


def drawn():
    first = initial_noise([3, 2**32 - 1], (1, 2, 2, 3))
    keys = jnp.stack([jax.random.key_data(draws.key(seed)) for seed in (3, 4)])
    return np.asarray(first), np.asarray(_drawn(keys, jnp.int32(2), (2, 3, 5)))


@pytest.fixture(scope="module")
def usual():
    return drawn(), environment.numerics()


@pytest.mark.parametrize("name, value, decides", SETTINGS)
def test_an_environment_changes_no_draw_and_the_record_has_what_decides(usual, name, value, decides):
    with setting(name, value):
        now, numerics = drawn(), environment.numerics()
    for one, other in zip(now, usual[0], strict=True):
        assert one.dtype == np.float32
        np.testing.assert_array_equal(one, other)
    assert (numerics != usual[1]) is decides


def test_draws_inside_a_compiled_program_are_pinned_too():
    with jax.threefry_partitionable(False):
        pinned = jax.jit(lambda: draws.normal(draws.key(3), (7,)))()
        free = jax.random.normal(jax.random.key(3), (7,), jnp.float32)
    np.testing.assert_array_equal(pinned, draws.normal(draws.key(3), (7,)))
    assert (np.asarray(pinned) != np.asarray(free)).any()  # so that there is something to pin


def test_flags_of_xla_are_in_the_record_but_for_those_that_decide_nothing(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_gpu_deterministic_ops=true")
    assert environment.numerics()["XLA_FLAGS"] == "--xla_gpu_deterministic_ops=true"


def test_what_a_state_says_of_its_environment_is_compared():
    now = environment.numerics()
    saved, there = environment.compared({"environment": now | {"jax_enable_x64": True}})
    assert saved["environment.jax_enable_x64"] is True and there["environment.jax_enable_x64"] is False
    assert environment.compared({}) == ({}, {})  # a state of an earlier version
