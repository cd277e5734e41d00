"""Chunk after chunk over a cache, against one forward pass of the whole video under the block-causal mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff.models import wan

CFG = wan.DiTConfig(
    num_attention_heads=3, attention_head_dim=12, num_layers=2, ffn_dim=40, in_channels=4, out_channels=4, text_dim=20
)
GRID = (4, 6)
ROWS = 7


def random_params(cfg, seed=0):
    leaves, tree = jax.tree.flatten(wan.abstract_params(cfg))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(tree, [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


def inputs(frames, batch=2, seed=1):
    one, two, three = jax.random.split(jax.random.key(seed), 3)
    latents = jax.random.normal(one, (batch, frames, *GRID, CFG.in_channels))
    timestep = jax.random.uniform(two, (batch, frames), minval=0.0, maxval=1000.0)
    return latents, timestep, jax.random.normal(three, (batch, 5, CFG.text_dim))


def rollout(params, span, latents, timestep, text, placement=None, dtype=jnp.float32):
    """Velocities [B,T,...] chunk by chunk, every chunk kept at its own timestep; and the cache after each."""
    keys = wan.text_keys(params, CFG, text, placement=placement)
    cache = wan.init_kv_cache(CFG, span, len(latents), GRID, dtype, placement=placement)
    common = dict(text_length=ROWS, placement=placement)
    read = jax.jit(lambda *a: wan.chunk_velocity(params, CFG, span, *a, **common))
    write = jax.jit(lambda *a: wan.extend(params, CFG, span, *a, **common), donate_argnums=3)
    out, caches = [], [cache]
    for start in range(0, latents.shape[1], span.chunk):
        part = slice(start, start + span.chunk)
        out.append(read(latents[:, part], timestep[:, part], keys, cache))
        cache = write(latents[:, part], timestep[:, part], keys, jax.tree.map(jnp.copy, cache))
        caches.append(cache)
    assert read._cache_size() == write._cache_size() == 1  # one program for every chunk
    return jnp.concatenate(out, axis=1), caches


SPANS = [
    wan.Span(chunk, window, sink)
    for chunk in (1, 3)
    for window, sink in ((chunk, 0), (6, 0), (30, 0), (4, 1), (7, 5), (6, 1), (chunk, 1), (4, 5))
]


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_chunk_by_chunk_is_the_whole_video_under_the_mask(span):
    params, (latents, timestep, text) = random_params(CFG), inputs(15)
    got, _ = rollout(params, span, latents, timestep, text)
    whole = wan.velocity(params, CFG, latents, timestep, text, pattern=span.pattern, text_length=ROWS)
    np.testing.assert_allclose(got, whole, rtol=1e-5, atol=1e-5 * np.abs(whole).max())
