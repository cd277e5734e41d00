"""A stream whose chunks see windows of tiles: one forward pass of the whole video, meshes, another text.

B batch · T latent frames.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jvdiff.errors import UsageError
from jvdiff.kernels import SlidingTile
from jvdiff.models import wan
from jvdiff.models.wan import places
from jvdiff.models.wan.rollout import ROLLOUT, SELF_FORCING_WAN_2_1_T2V_1_3B
from jvdiff.sharding import Placement, make_mesh, param_shardings, read_mesh
from jvdiff.streaming import derive_config

CFG = wan.DiTConfig(
    num_attention_heads=2, attention_head_dim=12, num_layers=2, ffn_dim=40, in_channels=4, out_channels=4, text_dim=20
)
GRID = (4, 10)  # of latents, 2x5 tokens
NEAR = SlidingTile((2, 1, 2), (3, 1, 1))
SPAN = wan.Span(2, 6, 2, near=NEAR)
ALL = SlidingTile((2, 1, 2), (9, 3, 3))  # in sight of every tile
slower = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="more of the same, for make kernels")


@pytest.fixture(scope="module")
def params(random_params):
    return random_params(wan.abstract_params(CFG))


def inputs(frames):
    random = np.random.default_rng(1)
    draw = lambda *shape: random.standard_normal(shape, np.float32)  # noqa: E731
    return draw(2, frames, *GRID, 4), random.uniform(0, 1000, 2).astype(np.float32), draw(2, 5, 20)


@functools.cache
def programs(span, placement=None):
    how = dict(text_length=7, placement=placement)

    @jax.jit
    def step(weights, *given):
        return [f(weights, CFG, span, *given, **how) for f in (wan.chunk_velocity, wan.extend)]

    return step, jax.jit(lambda weights, *given: wan.reencode(weights, CFG, span, *given, **how))


def rollout(weights, span, latents, timestep, text, placement=None):
    """Velocities [B,T,...], and the cache."""
    step, keys = programs(span, placement)[0], wan.text_keys(weights, CFG, text, placement=placement)
    cache, out = wan.init_kv_cache(CFG, span, len(latents), GRID, placement=placement), []
    for start in range(0, latents.shape[1], span.chunk):
        velocity, cache = step(weights, latents[:, start : start + span.chunk], timestep, keys, cache)
        out.append(velocity)
    return np.concatenate(out, axis=1), cache


def close(found, want):
    np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())


def test_chunk_after_chunk_is_the_whole_video_under_the_mask(params):
    """With a sink and a ring that turns, in one program."""
    given = inputs(10)
    found, cache = rollout(params, SPAN, *given)
    close(found, wan.velocity(params, CFG, *given, pattern=SPAN.pattern, text_length=7))
    assert programs(SPAN, None)[0]._cache_size() == 1
    assert cache.keys.shape == (2, 2, SPAN.slots, 10, 2, 12)  # that of a dense stream


@slower
@pytest.mark.parametrize("relative", [False, True])
def test_everything_in_sight_is_the_dense_stream(params, relative):
    given, dense = inputs(10), wan.Span(2, 6, 2, relative)
    found, want = (rollout(params, span, *given) for span in (dataclasses.replace(dense, near=ALL), dense))
    close(found[0], want[0])
    close(found[1].keys, want[1].keys)
    near = rollout(params, dataclasses.replace(dense, near=NEAR), *given)[0]
    assert np.abs(near - want[0]).max() > 1e-2 * np.abs(want[0]).max()


@slower
def test_the_same_text_gives_the_same_past_again(params):
    span = dataclasses.replace(SPAN, window=10)  # ten slots, six of them filled
    latents, timestep, text = inputs(6)
    cache = rollout(params, span, latents, timestep, text)[1]
    history = np.zeros((2, span.slots, *GRID, 4), np.float32)
    history[:, :6] = latents
    again = programs(span)[1](params, history, timestep, wan.text_keys(params, CFG, text), cache)
    close(again.keys[:, :, :6], cache.keys[:, :, :6])
    close(again.values[:, :, :6], cache.values[:, :, :6])


@slower
def test_a_mesh_gives_the_numbers_of_one_device(params):
    shape = read_mesh("data=2,tensor=2,sequence=2")
    placement = Placement(make_mesh(shape), shape.ring)
    there = jax.device_put(params, param_shardings(placement.mesh, params, places.DIT))
    given = inputs(6)
    close(rollout(there, SPAN, *given, placement=placement)[0], rollout(params, SPAN, *given)[0])


def test_a_configuration_has_the_text_of_a_pattern():
    dense = SELF_FORCING_WAN_2_1_T2V_1_3B
    change = lambda **values: derive_config(dense, diffusion_model={"transformer": values})  # noqa: E731
    near = change(pattern="sliding_tile:3x8x8:13x3x3", sink_size_t=3)
    assert near.diffusion_model.transformer.span.near == SlidingTile((3, 8, 8), (13, 3, 3))
    assert near.digest != change(sink_size_t=3).digest and change(pattern="dense").digest == dense.digest
    for pattern in ("video_sparse:4x4x4:0.9", "nothing"):
        with pytest.raises(UsageError, match=f"pattern .*is '{pattern}'; expected"):
            change(pattern=pattern)
    with pytest.raises(UsageError, match="no causal ones are published"):
        ROLLOUT.span(3, 21, 0, False, "video_sparse:4x4x4:0.9")
    with pytest.raises(UsageError, match="which do not divide the chunk of 3"):
        change(pattern="sliding_tile:2x8x8:3x3x3")
