"""The Wan transformer with sparse self-attention: what it must equal, its gate, and how often it reorders tokens."""

import dataclasses
import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff.kernels import Dense, SlidingTile, VideoSparse
from jvdiff.models import wan

CFG = wan.DiTConfig(num_attention_heads=2, attention_head_dim=12, ffn_dim=40, num_layers=2, text_dim=12, freq_dim=8)
GATED = dataclasses.replace(CFG, gate_compress=True)
# Of the tokens' grid (2,4,6), which (1,2,3) divides and (2,3,4) does not.
WINDOWS, BEST = SlidingTile((1, 2, 3), (1, 1, 1)), VideoSparse((2, 3, 4), 0.5)
velocity = jax.jit(wan.velocity, static_argnums=1, static_argnames=("pattern", "remat", "implementation"))


@pytest.fixture(scope="module")
def params():
    """Of which none is at its trivial start."""
    rng = np.random.default_rng(0)

    def leaf(path, x):
        values = rng.standard_normal(x.shape, np.float32)
        name = path[-1].key
        return values * x.shape[-2] ** -0.5 if name == "kernel" else 0.2 * values + np.float32(name == "scale")

    return jax.tree_util.tree_map_with_path(leaf, wan.abstract_params(GATED))


def without_gate(params):
    attention = {name: leaf for name, leaf in params["blocks"]["self_attn"].items() if name != "gate"}
    return params | {"blocks": params["blocks"] | {"self_attn": attention}}


def inputs(B=2):
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((B, 2, 8, 12, CFG.in_channels), np.float32)
    text = rng.standard_normal((B, 5, CFG.text_dim), np.float32)
    return latents, np.linspace(937.5, 20, B, dtype=np.float32), text


def error(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize(
    "pattern",
    [
        SlidingTile((2, 3, 4), (5, 5, 5)),
        VideoSparse((2, 3, 4), 0.0),
        VideoSparse((2, 4, 6), 1.0),  # a single tile
    ],
    ids=repr,
)
def test_everything_in_sight_is_dense(params, pattern):
    params, args = without_gate(params), inputs()
    want = velocity(params, CFG, *args)
    assert error(velocity(params, CFG, *args, pattern=pattern), want) < 1e-5


@pytest.mark.parametrize("pattern", [WINDOWS, BEST], ids=repr)
def test_sparsity_changes_the_result_the_order_of_tokens_does_not(params, pattern):
    """Nor do implementations or the rest of the batch."""
    args = inputs()
    got = velocity(params, GATED, *args, pattern=pattern)
    assert error(got, velocity(params, GATED, *args)) > 1e-3
    assert error(got, velocity(params, GATED, *args, pattern=pattern, implementation="reference")) < 1e-5
    for i in range(2):
        twice = velocity(params, GATED, *(x[[i, i]] for x in args), pattern=pattern)
        assert error(twice, got[np.array([i, i])]) < 1e-5


def test_a_timestep_for_each_frame_in_any_order_of_tokens(params):
    """Of the first frame and the others, in raster order and in tiles; or of each."""
    params, (latents, _, text), pattern = without_gate(params), inputs(1), VideoSparse((2, 3, 4), 0.0)
    latents = np.concatenate([latents, latents[:, :1]], axis=1)
    for t in (np.array([[0.0, 700.0, 700.0]], np.float32), np.array([[0.0, 700.0, 300.0]], np.float32)):
        want = velocity(params, CFG, latents, t, text)
        assert error(velocity(params, CFG, latents, t, text, pattern=pattern), want) < 1e-5
        for other in (pattern, Dense()):
            found = error(velocity(params, CFG, latents, t[:, :2], text, pattern=other), want)
            assert found < 1e-5 if t[0, 2] == 700 else found > 1e-2


def test_tiles_are_neighbourhoods(params):
    """With windows of one tile, one layer carries nothing from one tile to another."""
    cfg = dataclasses.replace(CFG, num_layers=1)
    params = without_gate(params)
    params = params | {"blocks": jax.tree.map(lambda x: x[:1], params["blocks"])}
    latents, t, text = inputs(1)
    pattern = SlidingTile((2, 2, 3), (1, 1, 1))
    before = velocity(params, cfg, latents, t, text, pattern=pattern)
    latents[0, 1, 2, 7] += 1.0  # token (1,1,3), in the tile of the tokens (:, 0:2, 3:6)
    moved = np.abs(velocity(params, cfg, latents, t, text, pattern=pattern) - before).max(axis=(0, -1)) > 0
    assert moved[:, 0:4, 6:12].all() and moved.sum() == 2 * 4 * 6


def test_the_gate_belongs_to_video_sparse_attention(params):
    args, pattern = inputs(), BEST
    bare = without_gate(params)
    for other in (Dense(), WINDOWS):
        got, want = velocity(params, GATED, *args, pattern=other), velocity(bare, CFG, *args, pattern=other)
        np.testing.assert_array_equal(got, want)
    fine = velocity(bare, CFG, *args, pattern=pattern)
    assert error(velocity(params, GATED, *args, pattern=pattern), fine) > 1e-3
    dense = velocity(bare, CFG, *args, pattern=Dense())
    # FastVideo's default sparsity: no tile is left out, and the gate's branch is still added.
    assert error(velocity(params, GATED, *args, pattern=VideoSparse((2, 3, 4), 0.0)), dense) > 0.05
    start = wan.init_params(jax.random.key(0), GATED)["blocks"]["self_attn"]["gate"]
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(start))
    attention = params["blocks"]["self_attn"] | {"gate": start}
    closed = params | {"blocks": params["blocks"] | {"self_attn": attention}}
    assert error(velocity(closed, GATED, *args, pattern=pattern), fine) < 1e-6


@pytest.mark.parametrize("pattern", [WINDOWS, BEST], ids=repr)
def test_gradients(params, pattern):
    """Against the reference's, by reverse mode through its dense masks; the same with and without rematerialisation."""
    args = inputs()

    @partial(jax.jit, static_argnums=(1, 2))
    @jax.grad
    def grad(params, implementation, remat):
        out = wan.velocity(params, GATED, *args, pattern=pattern, implementation=implementation, remat=remat)
        return jnp.mean(out**2)

    want, got = grad(params, "reference", False), grad(params, "xla", False)
    remat = grad(params, "xla", True) if pattern == BEST else got
    for a, b, c in zip(*(map(np.asarray, jax.tree.leaves(tree)) for tree in (want, got, remat)), strict=True):
        assert np.abs(a - b).max() < 2e-5 * max(np.abs(a).max(), 1e-3)
        assert np.abs(b - c).max() < 1e-5 * max(np.abs(b).max(), 1e-3)
    moved = [np.abs(x).max() > 0 for x in jax.tree.leaves(got["blocks"]["self_attn"]["gate"])]
    assert moved == [isinstance(pattern, VideoSparse)] * 2


def moves(jaxpr, times=1):
    """How often a program runs each operation that can change the order of an array, bodies of loops as often as they
    run: {(operation, shape of the result): times}. A transposition that moves only axes of one entry changes none."""
    total = Counter()
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        shape = equation.outvars[0].aval.shape if equation.outvars else ()
        if name == "transpose":
            order = [axis for axis, size in zip(params["permutation"], shape, strict=True) if size > 1]
            total[name, shape] += times * (order != sorted(order))
        elif name in ("gather", "scatter", "scatter-add", "sort", "rev", "dynamic_slice", "concatenate"):
            total[name, shape] += times
        for value in params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total.update(moves(inner, times * params["length"] if name == "scan" else times))
    return total


@pytest.mark.parametrize("kind", [SlidingTile, VideoSparse])
@pytest.mark.parametrize(("tile", "raster"), [((1, 2, 3), (1, 1, 6)), ((1, 6, 3), (1, 3, 6))], ids=["whole", "ragged"])
def test_tokens_are_reordered_twice_at_any_depth(kind, tile, raster):
    """What a program does more than another whose tiles are equal in number and size, but lie in raster order.

    All other work that moves tokens (heads to the front, padding of ragged tiles, the kernel's own gathers) is the same
    in both. What is left: the tokens, once each way, as patches of 64 numbers before the first and after the last
    matrix; and the two tables of the rotation, once. It is counted as traced, where loops say how often they run, and
    the compiled program must have these four instructions more, and no other.
    """

    def traced(tile, layers):
        cfg = dataclasses.replace(GATED, num_layers=layers)
        pattern = kind(tile, (1, 1, 1) if kind is SlidingTile else 0.5)
        return velocity.trace(wan.abstract_params(cfg), cfg, *inputs(1), pattern=pattern)

    operation = "transpose" if tile == (1, 2, 3) else "gather"
    for layers in (2, 4):
        tiled, straight = (moves(traced(x, layers).jaxpr.jaxpr) for x in (tile, raster))
        assert not straight - tiled
        more = [(name, int(np.prod(shape))) for name, shape in (tiled - straight).elements()]
        assert sorted(more) == 2 * [(operation, 48 * 6)] + 2 * [(operation, 48 * 64)]
    if kind is VideoSparse:
        texts = [traced(x, 2).lower().compile().as_text() for x in (tile, raster)]
        tiled, straight = (Counter(re.findall(r" (transpose|gather|scatter|sort)\(", text)) for text in texts)
        assert tiled - straight == {operation: 4} and not straight - tiled


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("dense", "pattern is 'dense'; expected Dense"),
        (SlidingTile((1, 2, 3), (1, 1)), "window must be three whole numbers"),
        (SlidingTile((1, 2, 3), ((1, 1, 1),) * 3), "each of the 2 heads"),
        (SlidingTile((0, 2, 3), (1, 1, 1)), "tile must be three whole numbers"),
        (VideoSparse((1, 2, 3), 1.5), "sparsity must be a number in 0..1"),
        (VideoSparse((1, 2, 3), float("nan")), "sparsity must be a number in 0..1"),
    ],
)
def test_wrong_patterns_are_named(params, pattern, message):
    with pytest.raises(ValueError, match=message):
        velocity(params, GATED, *inputs(), pattern=pattern)


def test_attention_choice_names_what_runs():
    choice = partial(wan.attention_choice, wan.WAN_2_1_T2V_1_3B, (21, 60, 104), pattern=VideoSparse())
    assert choice() == {"self": "xla", "cross": "xla"}
    assert choice(implementation="reference") == {"self": "reference", "cross": "reference"}
    assert choice(implementation="triton", dtype=jnp.bfloat16) == {"self": "triton", "cross": "xla"}
    with pytest.raises(ValueError, match="no block-sparse attention implementation 'cudnn'"):
        choice(implementation="cudnn")
