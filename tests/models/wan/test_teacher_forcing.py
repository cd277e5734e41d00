"""What a chunk's past is while a causal model is trained, seen through the loss."""

import functools

import jax
import numpy as np
import pytest

from jvdiff.kernels import BlockCausal
from jvdiff.models import wan
from jvdiff.models.text import umt5
from jvdiff.models.wan.flow_matching import Batch
from jvdiff.models.wan.teacher_forcing import teacher_forcing_task

SIZES = {"num_attention_heads": 2, "attention_head_dim": 12, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2}
DIT = wan.DiTConfig(in_channels=4, out_channels=4, text_dim=16, causal=True, **SIZES)
TEXT = umt5.Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)


@pytest.fixture(scope="module")
def params(random_params):
    return {
        "transformer": random_params(wan.abstract_params(DIT)),
        "text_encoder": random_params(umt5.abstract_params(TEXT, np.float32)),
    }


@functools.cache
def compiled(sink, gradient, **options):
    task = teacher_forcing_task(DIT, TEXT, lambda step: None, BlockCausal(2, 6, sink), text_length=32, **options)
    return jax.jit(jax.value_and_grad(task.loss, has_aux=True) if gradient else task.loss)


def given(chunks, weight=None):
    """Two clips of `chunks` chunks of two latent frames."""
    rng = np.random.default_rng(0)
    ids = rng.integers(2, 32, size=(2, chunks, 5)).astype(np.int32)
    latents = rng.standard_normal((2, 2 * chunks, 4, 4, 4), np.float32)
    return Batch(latents, ids, np.ones(ids.shape, bool), weight=weight)


def value(params, chunks, sink=0, weight=None, **options):
    """The loss."""
    return float(compiled(sink, False, **options)(params, given(chunks, weight), jax.random.key(1))[0])


def values(params, chunks, **options):
    """(loss, gradient norm)."""
    (loss, _), gradient = compiled(0, True, **options)(params, given(chunks), jax.random.key(1))
    return float(loss), float(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(jax.device_get(gradient))))


def test_only_the_past_is_made_worse(params):
    """A clip of one chunk has none: neither loss nor gradient see the difference."""
    worse = {"context_noise": 0.5, "resample": 1.0}
    np.testing.assert_allclose(values(params, 1, **worse), values(params, 1), rtol=2e-6)
    plain = value(params, 2)
    for name, much in worse.items():
        assert abs(value(params, 2, **{name: much}) - plain) > 1e-5 * plain


def test_a_past_that_no_clip_takes_changes_nothing(params):
    np.testing.assert_allclose(value(params, 2, resample=1e-9), value(params, 2), rtol=1e-5)


def test_a_sink_stays_as_it_is(params):
    """Of two chunks the second sees only the sink, which is never the model's own."""
    np.testing.assert_allclose(value(params, 2, sink=2, resample=1.0), value(params, 2, sink=2), rtol=2e-6)
    assert abs(value(params, 2, resample=1.0) - value(params, 2)) > 1e-5


def test_a_chunk_of_no_weight_has_no_part_in_the_loss(params):
    """The mean over all is that over the parts."""
    second = np.array([[0, 1]] * 2, np.float32)
    parts = [value(params, 2, weight=weight) for weight in (second, 1 - second)]
    np.testing.assert_allclose((parts[0] + parts[1]) / 2, value(params, 2), rtol=1e-5)
    assert abs(parts[0] - parts[1]) > 1e-3
