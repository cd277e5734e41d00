"""The Wan VAE on several devices that share every frame: the same numbers, and little sent between them.

B batch · T latent frames · H W latent grid · C channels · F pixel frames · Y X pixel height, width.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff.models import wan
from jvdiff.models.vae_tiles import Tiles
from jvdiff.sharding import MeshShape, Placement, make_mesh

CFG = wan.VAEConfig(
    base_dim=6,
    dim_mult=(1, 2),
    num_res_blocks=1,
    temperal_downsample=(True,),
    z_dim=4,
    latents_mean=(0.5,) * 4,
    latents_std=(2.0,) * 4,
)
encode = jax.jit(wan.encode, static_argnums=1, static_argnames="placement")
BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1}


@pytest.fixture(scope="module")
def params():
    """Parameters that are all away from their trivial start."""
    random = np.random.default_rng(0)

    def fill(path, leaf):
        values = random.standard_normal(leaf.shape, np.float32) * np.float32(max(math.prod(leaf.shape[:-1]), 4) ** -0.5)
        return values + np.float32("scale" in jax.tree_util.keystr(path))

    return jax.tree_util.tree_map_with_path(fill, wan.abstract_params(CFG))


def video(F, Y, X):
    return np.random.default_rng(0).uniform(-1, 1, (2, F, Y, X, 3)).astype(np.float32)


def latents(T, H, W):
    return np.random.default_rng(0).standard_normal((2, T, H, W, CFG.z_dim), np.float32)


def error(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.fixture(scope="module")
def placement():
    return Placement(make_mesh(MeshShape(sequence=4, tensor=2)))


@pytest.mark.parametrize(
    ("devices", "grid", "cut"),
    [
        (8, (60, 104), (1, 8)),  # 480x832: strips
        (8, (90, 160), (1, 8)),  # 720x1280
        (4, (60, 104), (1, 4)),  # the shorter seam
        (4, (104, 60), (4, 1)),
        (8, (4, 6), (4, 2)),  # no strips, but tiles
        (8, (6, 10), (2, 2)),  # every part twice
        (8, (3, 5), (1, 1)),
        (8, (4, 2), (4, 1)),  # and not a cell for each, which XLA computes wrongly
        (6, (60, 104), (6, 1)),
        (1, (60, 104), (1, 1)),
    ],
)
def test_as_many_devices_as_divide_the_grid(devices, grid, cut):
    every = make_mesh(MeshShape(data=devices))
    picture = Placement(every).spread(*grid)
    shape = picture.mesh.shape
    assert tuple(math.prod(shape[axis] for axis in axes) for axes in (picture.height, picture.width)) == cut
    assert list(picture.mesh.devices.flat) == list(every.devices.flat)


def test_parts_lie_where_they_should_however_the_mesh_is_cut(params, placement):
    """4 by 2 devices for weights and 2 by 4 for pictures are meshes that XLA does not bring together by itself."""
    given, z = jax.device_put((params, latents(T=1, H=4, W=4)), placement.everywhere)
    run = jax.jit(wan.decode_chunk, static_argnums=1, static_argnames="placement")
    _, cache = run(given, CFG, z, None, placement=placement)
    for leaf in jax.tree.leaves(cache):
        shard = leaf.addressable_shards[0].data
        assert shard.size * 8 == leaf.size


def test_encoding_is_that_of_one_device(params, placement):
    """Two clips at once in several chunks, of a size that only four of the devices divide."""
    x = video(F=5, Y=12, X=20)
    assert error(encode(params, CFG, x, placement=placement), encode(params, CFG, x)) <= 1e-5


def test_decoding_is_that_of_one_device_and_compiles_two_programs(params, placement):
    """One for the first frame and one for all later chunks: the cache comes out where it goes in."""
    z = latents(T=4, H=4, W=6)
    run = jax.jit(wan.decode_chunk, static_argnums=1, static_argnames="placement", donate_argnums=3)
    given, at = jax.device_put((params, z), placement.everywhere)
    piece, cache = run(given, CFG, at[:, :1], None, placement=placement)
    pieces = [piece]
    for t in range(1, 4):
        before = jax.tree.map(lambda leaf: leaf.sharding, cache)
        piece, cache = run(given, CFG, at[:, t : t + 1], cache, placement=placement)
        assert jax.tree.map(lambda leaf: leaf.sharding, cache) == before
        pieces.append(piece)
    assert run._cache_size() == 2
    assert all(leaf.addressable_shards[0].data.size == leaf.size // 8 for leaf in jax.tree.leaves(cache))
    assert error(np.concatenate(pieces, axis=1), jax.jit(wan.decode, static_argnums=1)(params, CFG, z)) <= 1e-5


def test_tiles_are_those_of_one_device(params, placement):
    """Eight devices share each tile, of which the last is too narrow for so many."""
    run, z = jax.jit(wan.decode, static_argnums=1, static_argnames=("placement", "tiles")), latents(T=1, H=4, W=6)
    tiles = Tiles((8, 8), (8, 4))
    found = run(params, CFG, z, placement=placement, tiles=tiles)
    assert found.shape == (2, 1, 8, 12, 3)
    assert error(found, run(params, CFG, z, tiles=tiles)) <= 1e-5


def test_gradients_are_those_of_one_device(params, placement):
    """Through a later chunk, to the weights, the latents and what is remembered of the frames before."""
    z = latents(T=1, H=3, W=8)
    random = np.random.default_rng(1)
    cache = jax.tree.map(
        lambda x: random.standard_normal(x.shape, np.float32), wan.init_cache(CFG, "decode", *z.shape[:1], 3, 8)
    )

    def loss(params, z, cache, placement):
        frames, _ = wan.decode_chunk(params, CFG, z, cache, clip=False, placement=placement)
        return jnp.mean(jnp.square(frames))

    run = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)
    got, want = run(params, z, cache, placement), run(params, z, cache, None)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(b).max(), 1e-3))


@pytest.mark.parametrize("which", ["encode", "decode"])
def test_nothing_large_is_gathered_and_nothing_computed_twice(placement, which):
    H, W = 16, 24
    step, x = {
        "encode": (wan.encode_chunk, jax.ShapeDtypeStruct((1, 2, 2 * H, 2 * W, 3), jnp.float32)),
        "decode": (wan.decode_chunk, jax.ShapeDtypeStruct((1, 1, H, W, CFG.z_dim), jnp.float32)),
    }[which]
    given = wan.abstract_params(CFG), x, wan.init_cache(CFG, which, 1, H, W)

    def compiled(placement):
        program = jax.jit(lambda params, x, cache: step(params, CFG, x, cache, placement=placement))
        return program.lower(*given).compile()

    program = compiled(placement)
    sent = {}
    for kinds, name in re.findall(r" = (.*?) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", program.as_text()):
        for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", kinds):
            size = BYTES[kind] * math.prod(int(n) for n in shape.split(",") if n)
            sent[name] = max(sent.get(name, 0), size)
    width = CFG.base_dim * CFG.dim_mult[-1]
    assert sent.keys() == {"all-gather", "collective-permute"}
    assert sent["all-gather"] <= 4 * H * W * 2 * width  # keys and values of the cells of one frame
    assert sent["collective-permute"] <= 4 * 4 * 2 * (H + 2) * 3 * width  # one seam of a chunk's frames
    assert 8 * program.cost_analysis()["flops"] <= 1.1 * compiled(None).cost_analysis()["flops"]
