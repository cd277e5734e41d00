"""Attention of the user's own, and a pattern of the user's own: a function and one class, outside the package."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff import kernels
from jvdiff.errors import UsageError
from jvdiff.kernels import BlockCausal, Dense, Pattern, SlidingTile
from jvdiff.models import wan
from jvdiff.models.wan import places
from jvdiff.sharding import Placement, make_mesh, param_shardings, read_mesh

CFG = wan.DiTConfig(
    num_attention_heads=6,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=16,
    ffn_dim=32,
    num_layers=2,
)
seen = []


def plain(q, k, v):
    """softmax(q k^T / sqrt(K)) v, as one would write it in a notebook; it knows of no mesh."""
    seen.append(q.shape)
    logits = jnp.einsum("blnk,bsnk->bnls", q, k) * q.shape[-1] ** -0.5
    return jnp.einsum("bnls,bsnk->blnk", jax.nn.softmax(logits), v)


@dataclass(frozen=True)
class Backwards(Pattern):
    """Every token sees every token, the last one first."""

    raster = False

    def ordered(self, x, grid):
        return x[:, ::-1]

    unordered = ordered

    def attend(self, q, k, v, gate, *, grid, first_head=None, implementation=None, target=None):
        return kernels.attention(q, k, v, implementation=implementation, target=target)


@functools.cache
def params():
    random = np.random.default_rng(0)
    leaf = lambda x: random.standard_normal(x.shape, np.float32) * np.float32(0.3)  # noqa: E731
    return jax.tree.map(leaf, wan.abstract_params(CFG))


def velocity(mesh=None, **how):
    random = np.random.default_rng(1)
    x, text = random.standard_normal((1, 3, 4, 6, 4), np.float32), random.standard_normal((1, 5, 16), np.float32)
    placement, weights = None, params()
    if mesh:
        shape = read_mesh(mesh)
        placement = Placement(make_mesh(shape), shape.ring)
        weights = jax.device_put(weights, param_shardings(placement.mesh, weights, places.DIT))
    run = jax.jit(lambda p: wan.velocity(p, CFG, x, np.float32([500]), text, placement=placement, **how))
    return np.asarray(run(weights))


@functools.cache
def dense():
    return velocity()


# 18 tokens: 4 devices have 5 each, and 2 heads, of which there are 6.
@pytest.mark.parametrize(
    ("mesh", "shape"), [(None, (1, 18, 6, 12)), ("sequence=4", (1, 18, 2, 12)), ("tensor=2", (1, 18, 3, 12))]
)
def test_a_function_takes_the_place_of_self_attention(mesh, shape):
    seen.clear()
    found = velocity(mesh, implementation=plain)
    assert set(seen) == {shape}  # all tokens of some of the heads; never the text
    np.testing.assert_allclose(found, dense(), atol=1e-5 * np.abs(dense()).max())


def test_a_pattern_is_one_class():
    np.testing.assert_allclose(velocity(pattern=Backwards()), dense(), atol=1e-5 * np.abs(dense()).max())


def test_a_function_is_recorded_by_its_name():
    choice = wan.attention_choice(CFG, (3, 4, 6), implementation=plain)
    assert choice["self"] == f"{__name__}.plain" and choice["cross"] in kernels.IMPLEMENTATIONS


def half(q, k, v):
    return q[:, :9]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"mesh": "sequence=4,ring=2"}, "ring=2 is for dense attention; sparse patterns and attention of your own"),
        ({"pattern": SlidingTile((1, 2, 3), (1, 1, 1))}, r"a function of your own, and the pattern SlidingTile\("),
        ({"pattern": BlockCausal(1)}, r"expected the pattern Dense\(\)"),
        ({"implementation": half}, r"attention: half returned \[1, 9, 6, 12\]; expected \[1, 18, 6, 12\]"),
    ],
)
def test_what_a_function_cannot_do_is_a_sentence(how, message):
    with pytest.raises(UsageError, match=message):
        velocity(**{"implementation": plain, "pattern": Dense()} | how)


def test_a_stream_has_no_attention_of_ones_own():
    span = wan.Span(1, 2)
    cache = jax.eval_shape(lambda: wan.init_kv_cache(CFG, span, 1, (4, 6)))
    text = jax.eval_shape(lambda p: wan.text_keys(p, CFG, jnp.ones((1, 5, 16))), params())
    chunk = functools.partial(wan.chunk_velocity, implementation=plain)
    with pytest.raises(UsageError, match="a function of your own"):
        jax.eval_shape(lambda p, t, c: chunk(p, CFG, span, jnp.ones((1, 1, 4, 6, 4)), jnp.ones(1), t, c),
                       params(), text, cache)  # fmt: skip
