"""The transformer on a mesh: the numbers of one device, forwards and in a gradient, and no needless communication.

Eight fake CPU devices; what is counted is counted in the compiled program.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff import plan
from jvdiff.diffusion import denoise_scan, schedules, solvers
from jvdiff.kernels import BlockCausal, Dense, SlidingTile, VideoSparse
from jvdiff.models import wan
from jvdiff.models.wan.places import DIT
from jvdiff.sharding import Placement, collectives, make_mesh, param_shardings, read_mesh

SIZES = dict(num_attention_heads=8, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16)
CFG = wan.DiTConfig(ffn_dim=64, num_layers=2, gate_compress=True, **SIZES)
WINDOWS = tuple((1, 1 + 2 * (i % 2), 3) for i in range(8))
PATTERNS = {
    "dense": Dense(),
    "windows": SlidingTile((2, 2, 2), WINDOWS),
    "video sparse": VideoSparse((2, 2, 2), 0.6),
}


@functools.cache
def params_of(cfg):
    random = np.random.default_rng(0)

    def leaf(path, x):
        scale = x.shape[-2] ** -0.5 if path[-1].key == "kernel" else 0.3
        return random.standard_normal(x.shape).astype(np.float32) * np.float32(scale) + (path[-1].key == "scale")

    return jax.tree_util.tree_map_with_path(leaf, wan.abstract_params(cfg))


def inputs(batch):
    """Of two clips one or both: latents of 3 x 3 x 5 = 45 tokens, which eight devices do not share evenly."""
    random = np.random.default_rng(1)
    draw = lambda *shape: random.standard_normal(shape).astype(np.float32)  # noqa: E731
    both = draw(2, 3, 6, 10, 4), random.uniform(0, 1000, 2).astype(np.float32), draw(2, 5, 16)
    return tuple(x[:batch] for x in both)


def placed(mesh, params):
    shape = read_mesh(mesh)
    placement = Placement(make_mesh(shape), shape.ring)
    return placement, jax.device_put(params, param_shardings(placement.mesh, params, DIT))


@functools.cache
def on_one_device(pattern):
    """Of two clips, which do not depend on each other."""
    run = jax.jit(lambda *args: wan.velocity(args[0], CFG, *args[1:], pattern=PATTERNS[pattern], text_length=9))
    return np.asarray(run(params_of(CFG), *inputs(2)))


slower = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="more of the same, for make kernels")


@pytest.mark.parametrize(
    ("pattern", "mesh", "batch"),
    [
        ("dense", "sequence=8", 1),
        pytest.param("dense", "sequence=8,ring=2", 1, marks=slower),
        ("dense", "data=2,tensor=2,sequence=2", 2),
        pytest.param("dense", "fsdp=2,tensor=4", 2, marks=slower),
        ("windows", "tensor=2,sequence=4", 1),
        pytest.param("video sparse", "sequence=6", 1, marks=slower),
        ("video sparse", "data=2,fsdp=2,tensor=2", 2),
    ],
)
def test_a_mesh_gives_the_numbers_of_one_device(pattern, mesh, batch):
    placement, params = placed(mesh, params_of(CFG))
    how = dict(pattern=PATTERNS[pattern], text_length=9, placement=placement)
    found = jax.jit(lambda *args: wan.velocity(args[0], CFG, *args[1:], **how))(params, *inputs(batch))
    expected = on_one_device(pattern)[:batch]
    assert found.sharding.is_fully_replicated
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_a_timestep_of_the_first_frame_and_one_of_the_others_on_a_mesh():
    """Tokens in tiles and padding behind them: 45 do not divide among six devices."""
    latents, t, text = inputs(1)
    placement, params = placed("sequence=6", params_of(CFG))
    times, how = np.stack([0 * t, t], axis=1), dict(pattern=PATTERNS["windows"], text_length=9)
    run = jax.jit(
        lambda placement, *args: wan.velocity(args[0], CFG, *args[1:], placement=placement, **how), static_argnums=0
    )
    expected = np.asarray(run(None, params_of(CFG), latents, times, text))
    found = run(placement, params, latents, times, text)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert np.abs(expected - on_one_device("windows")[:1]).max() > 0.1 * np.abs(expected).max()


def test_a_gradient_is_that_of_one_device_and_lies_where_the_weights_lie():
    """Rematerialised and with tokens that do not divide; every kind of mesh is in tests/training/test_meshes.py."""
    x, t, text = inputs(2)
    target = np.random.default_rng(2).standard_normal(x.shape).astype(np.float32)

    def loss(params, placement):
        v = wan.velocity(params, CFG, x, t, text, text_length=9, remat=placement is not None, placement=placement)
        return jnp.mean((v - target) ** 2)

    expected = jax.jit(jax.grad(lambda p: loss(p, None)))(params_of(CFG))
    placement, params = placed("fsdp=2,tensor=2,sequence=2", params_of(CFG))
    places = jax.tree.map(lambda leaf: leaf.sharding, params)
    found = jax.jit(jax.grad(lambda p: loss(p, placement)), out_shardings=places)(params)
    for one, many in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(many, one, atol=1e-5 * max(np.abs(one).max(), 1e-3))


# With few tiles to choose from, so that small steps change no choice.
PUSHED = {**PATTERNS, "video sparse": VideoSparse((3, 3, 3), 0.5), "causal": BlockCausal(1)}


@pytest.mark.parametrize("pattern", ["video sparse", *(pytest.param(p, marks=slower) for p in PUSHED if p[0] != "v")])
def test_a_jvp_through_the_sampler_is_a_difference(pattern):
    """Two steps on a mesh that gathers weights, heads and tokens; the noise and every timestep change."""
    placement, params = placed("fsdp=2,tensor=2,sequence=2", params_of(CFG))
    text, solver = inputs(2)[2], solvers.euler(schedules.make(2, shift=3.0))
    noise, dot = np.random.default_rng(4).standard_normal((2, *inputs(2)[0].shape)).astype(np.float32)

    def clip(params, noise, later):
        how = dict(pattern=PUSHED[pattern], text_length=9, placement=placement)
        velocity = lambda x, t: wan.velocity(params, CFG, x, t + later, text, **how)  # noqa: E731
        return denoise_scan(velocity, solver, solver.init(noise)).x

    along = jax.jit(lambda params, *x: jax.jvp(functools.partial(clip, params), x, (dot, np.float32(10))))
    zero, step = np.float32(0), np.float32(3e-3)
    (_, found), (above, _), (below, _) = (along(params, noise + s * dot, 10 * s) for s in (zero, step, -step))
    np.testing.assert_allclose(found, (above - below) / (2 * step), atol=2e-3 * np.abs(found).max())


# --------------------------------------------------------------------------------------------- what is communicated

WIDE = wan.DiTConfig(
    num_attention_heads=8,
    attention_head_dim=64,
    in_channels=16,
    out_channels=16,
    text_dim=256,
    ffn_dim=1024,
    num_layers=3,
)
TOKENS, WIDTH = 5 * 16 * 16, 512


@functools.cache
def compiled(mesh, batch=1, pattern=Dense(), cfg=WIDE):  # noqa: B008 - a frozen value
    """The forward pass on 1,280 tokens, compiled from shapes alone."""
    shape = read_mesh(mesh)
    placement = Placement(make_mesh(shape), shape.ring)
    abstract = wan.abstract_params(cfg)
    places = param_shardings(placement.mesh, abstract, DIT)
    struct = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32, sharding=placement.everywhere)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, places)
    run = jax.jit(lambda *args: wan.velocity(args[0], cfg, *args[1:], pattern=pattern, placement=placement))
    return run.lower(params, struct((batch, 5, 32, 32, 16)), struct((batch,)), struct((batch, 64, 256))).compile()


def in_the_blocks(program):
    """The collectives of one layer, and those outside the layers' loop."""
    found = collectives.read(program.as_text())
    return [c for c in found if c.runs == WIDE.num_layers], [c for c in found if c.runs == 1]


def elements(collective):
    return sum(int(np.prod([int(n) for n in part.split("[")[1].rstrip("]").split(",")])) for part in shapes(collective))


def shapes(collective):
    return collective.result.split(", ")


@pytest.mark.parametrize(
    ("pattern", "cfg"),
    [
        (Dense(), WIDE),
        (SlidingTile((5, 4, 4), (1, 3, 3)), WIDE),
        (VideoSparse((5, 4, 4), 0.5), wan.DiTConfig(**{**WIDE.__dict__, "gate_compress": True})),
    ],
)
def test_divided_tokens_cost_four_all_to_alls_a_block_and_gather_no_activations(pattern, cfg):
    block, outside = in_the_blocks(compiled("sequence=8", pattern=pattern, cfg=cfg))
    assert [c.kind for c in block] == ["all-to-all"] * 4
    # Once a pass, the patches of the result are brought together: 64 numbers a token instead of the width of 512.
    assert [(c.kind, elements(c)) for c in outside] == [("all-gather", TOKENS * 64)]


def test_a_ring_passes_keys_and_values_on_and_gathers_nothing():
    block, _ = in_the_blocks(compiled("sequence=8,ring=4"))
    kinds = [c.kind for c in block]
    assert set(kinds) == {"all-to-all", "collective-permute"}
    assert kinds.count("all-to-all") == 4
    assert sum(c.bytes for c in block if c.kind == "collective-permute") == 3 * 2 * 4 * TOKENS * WIDTH // 8


def test_a_mesh_cut_across_its_axes_is_still_divided():
    """fsdp by sequence, 2 by 4, becomes a ring of 4 by 2 that exchange heads."""
    block, _ = in_the_blocks(compiled("fsdp=2,sequence=4,ring=4"))
    kinds = [c.kind for c in block]
    assert kinds.count("all-gather") == 1  # the weights
    assert kinds.count("all-to-all") == 4
    assert sum(c.bytes for c in block if c.kind == "collective-permute") == 3 * 2 * 4 * TOKENS * WIDTH // 8


def test_divided_heads_cost_one_all_reduce_for_each_attention_and_the_feed_forward():
    """And one each for the statistics of the attentions' norms: two numbers a token, as they are of all heads."""
    block, _ = in_the_blocks(compiled("tensor=8"))
    assert {c.kind for c in block} == {"all-reduce"}
    large = [c for c in block if elements(c) >= TOKENS * WIDTH]
    assert [elements(c) for c in large] == [TOKENS * WIDTH] * 3
    assert [c.source.split("/")[-3] for c in large] == ["self_attn", "cross_attn", "ffn"]
    small = [elements(c) for c in block if c not in large]
    assert sorted(small) == [TOKENS + 64, 2 * TOKENS]


def test_divided_weights_are_gathered_once_a_layer_inside_the_loop():
    block, outside = in_the_blocks(compiled("fsdp=8", batch=8))
    matrices = 8 * WIDTH * WIDTH + 2 * WIDTH * WIDE.ffn_dim
    assert [(c.kind, elements(c)) for c in block] == [("all-gather", matrices)]
    assert all(elements(c) < 2 * matrices for c in outside)
    # All layers at once are nowhere: neither as a result nor among what the program holds meanwhile.
    stacked = WIDE.num_layers * matrices
    assert plan.largest_array(compiled("fsdp=8", batch=8).as_text())[1] < stacked


@pytest.mark.parametrize("mesh", ["sequence=8", "sequence=8,ring=4", "tensor=8"])
def test_no_array_has_the_square_of_the_tokens(mesh):
    assert plan.largest_array(compiled(mesh).as_text())[1] < TOKENS**2


@pytest.mark.parametrize(("mesh", "batch"), [("tensor=8", 1), ("fsdp=8", 8)])
def test_a_device_is_given_its_share_of_the_weights(mesh, batch):
    weights = sum(x.size * 4 for x in jax.tree.leaves(wan.abstract_params(WIDE)))
    rest = batch * (5 * 32 * 32 * 16 + 1 + 64 * 256) * 4
    held = compiled(mesh, batch=batch).memory_analysis().argument_size_in_bytes - rest
    assert held < 1.1 * weights / 8
