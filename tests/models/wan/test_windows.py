"""The Wan transformer with a window for each timestep, layer and head: one program, and what every layer is given."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff.kernels import SlidingTile, patterns
from jvdiff.models import wan
from jvdiff.models.wan.places import DIT
from jvdiff.sharding import Placement, make_mesh, param_shardings, read_mesh

CFG = wan.DiTConfig(num_attention_heads=2, attention_head_dim=12, ffn_dim=40, num_layers=2, text_dim=12, freq_dim=8)
TILE, CHOICES = (1, 2, 3), ((1, 1, 1), (2, 1, 2), (1, 2, 2))
ROWS = [[[0, 1], [2, 0]], [[2, 2], [1, 0]]]  # of the timesteps 900 and 100
slower = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="more of the same, for make kernels")


@pytest.fixture(scope="module")
def pattern(tmp_path_factory):
    file = tmp_path_factory.mktemp("windows") / "windows.json"
    values = {"tile": TILE, "canvas": [2, 4, 5], "choices": CHOICES, "table": ROWS, "timesteps": [900, 100]}
    file.write_text(json.dumps({"version": 1, "recorded": {}, **values}))
    return patterns.read(f"windows:{file}", 2, 2)


@pytest.fixture(scope="module")
def args(random_params):
    random = np.random.default_rng(0)
    latents, text = (
        random.standard_normal((2, 2, 8, 10, 16), np.float32),
        random.standard_normal((2, 5, 12), np.float32),
    )
    return random_params(wan.abstract_params(CFG)), latents, np.float32([890, 110]), text


@pytest.mark.parametrize(("clip", "layer"), [(0, 1), pytest.param(1, 0, marks=slower)])
def test_a_layer_has_the_windows_of_its_row(pattern, args, clip, layer):
    """A layer whose attention leads nowhere has no windows that count: then the other's are those of all layers."""
    params, latents, t, text = args
    blocks = params["blocks"]
    out = jax.tree.map(lambda leaf: jnp.asarray(leaf).at[1 - layer].set(0), blocks["self_attn"]["out"])
    changed = params | {"blocks": blocks | {"self_attn": blocks["self_attn"] | {"out": out}}}
    run = jax.jit(wan.velocity, static_argnums=1, static_argnames="pattern")
    of_row = SlidingTile(TILE, tuple(CHOICES[c] for c in ROWS[clip][layer]))
    want = run(changed, CFG, latents, t, text, pattern=of_row)[clip]
    found = run(changed, CFG, latents, t, text, pattern=pattern)[clip]
    np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())
    other = run(changed, CFG, latents, t[::-1], text, pattern=pattern)[clip]
    assert np.abs(other - found).max() > 1e-3 * np.abs(want).max()


@slower
def test_gradients_are_those_of_the_dense_mask(pattern, args):
    params, latents, t, text = args

    def grad(implementation):
        def loss(params):
            v = wan.velocity(params, CFG, latents, t, text, pattern=pattern, implementation=implementation)
            return jnp.mean(v**2)

        return jax.jit(jax.grad(loss))(params)

    for one, two in zip(*(jax.tree.leaves(grad(name)) for name in ("reference", "xla")), strict=True):
        assert np.abs(one - two).max() < 2e-5 * max(np.abs(one).max(), 1e-3)


@slower
def test_a_mesh_gives_the_numbers_of_one_device(pattern, args):
    """Two devices divide the heads, and three pad the one that is left to each."""
    params, *rest = args
    shape = read_mesh("tensor=2,sequence=3")
    placement = Placement(make_mesh(shape), shape.ring)
    there = jax.device_put(params, param_shardings(placement.mesh, params, DIT))
    run = lambda placement: jax.jit(lambda p: wan.velocity(p, CFG, *rest, pattern=pattern, placement=placement))  # noqa: E731
    want, found = np.asarray(run(None)(params)), run(placement)(there)
    np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())


def test_one_program_serves_every_timestep(pattern, args):
    """What is compiled has the timestep as its argument, and no choice of a program by it."""
    params, latents, t, text = args
    text_of = jax.jit(wan.velocity, static_argnums=1, static_argnames="pattern").lower(
        params, CFG, latents, t, text, pattern=pattern
    )
    assert "stablehlo.case" not in (hlo := text_of.as_text()) and "stablehlo.if" not in hlo
