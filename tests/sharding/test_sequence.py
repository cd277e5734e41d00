"""Sequence-parallel attention equals the local function on whole sequences, forwards and in gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff import kernels, plan
from jvdiff.sharding import MeshShape, Placement, Sizes, make_mesh, read_mesh, sequence

GRID, TILE = (3, 4, 5), (2, 2, 2)
L = 60


def operands(heads, seed=0, gate=False):
    random = np.random.default_rng(seed)
    return [random.standard_normal((2, L, heads, 8), np.float32) for _ in range(3 + gate)] + [None] * (not gate)


def dense(q, k, v, gate, first_head):
    return kernels.attention(q, k, v)


def sliding(windows):
    def local(q, k, v, gate, first_head):
        common = dict(grid=GRID, tile=TILE, window=windows, tiled=True)
        return kernels.sliding_tile_attention(q, k, v, first_head=first_head, **common)

    return local


def video_sparse(q, k, v, gate, first_head):
    return kernels.video_sparse_attention(q, k, v, gate, grid=GRID, tile=TILE, sparsity=0.6, tiled=True)


PER_HEAD = tuple((1, 1 + 2 * (i % 2), 1 + i % 3) for i in range(6))
LOCALS = {"dense": dense, "sliding": sliding((1, 1, 3)), "windows": sliding(PER_HEAD), "video sparse": video_sparse}


def spread(local, mesh, heads, is_dense):
    """`local` on a mesh, for whole arrays: pads, divides, and takes the padding off."""
    shape = read_mesh(mesh)
    split = Placement(make_mesh(shape), shape.ring).split(Sizes(2, L, heads, 8 * shape.tensor, is_dense))

    def run(q, k, v, gate):
        pad = lambda x: jnp.pad(x, ((0, 0), (0, split.padding), (0, 0), (0, 0)))  # noqa: E731
        padded = jax.tree.map(pad, (q, k, v, gate))
        return sequence.self_attention(local, split, *padded)[:, :L]

    return run


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        *((name, mesh) for name in LOCALS for mesh in ("sequence=8", "data=2,sequence=3")),
        *((name, "tensor=2,sequence=4") for name in ("dense", "windows", "video sparse")),
        ("dense", "fsdp=4"),
    ],
)
def test_each_pattern_is_the_same_over_devices(name, mesh):
    q, k, v, gate = operands(6, gate=name == "video sparse")
    expected = LOCALS[name](q, k, v, gate, None if name == "windows" else 0)
    found = jax.jit(spread(LOCALS[name], mesh, 6, name == "dense"))(q, k, v, gate)
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize(
    ("heads", "mesh"),
    [
        (4, "sequence=8,ring=8"),
        (3, "sequence=8,ring=4"),
        (4, "sequence=8"),
        (3, "sequence=7"),
        (3, "sequence=8,ring=1"),
    ],
)
def test_a_ring_and_exchanged_heads_and_both_are_dense_attention(heads, mesh):
    q, k, v, _ = operands(heads, seed=1)
    q, k = 3 * q, 3 * k  # sharp, so that a wrong weight of a part shows
    found = jax.jit(spread(dense, mesh, heads, True))(q, k, v, None)
    np.testing.assert_allclose(found, kernels.attention(q, k, v), atol=2e-5)


def test_a_ring_counts_no_padding_even_where_a_device_has_nothing_else():
    """10 tokens on 8 devices: two each, and the last three have none at all."""
    random = np.random.default_rng(2)
    q, k, v = (random.standard_normal((1, 16, 1, 8)).astype(np.float32) for _ in range(3))
    split = Placement(make_mesh(MeshShape(sequence=8)), 8).split(Sizes(1, 10, 1, 8))
    assert split.padding == 6
    found = jax.jit(lambda *x: sequence.self_attention(dense, split, *x, None))(q, k, v)[:, :10]
    np.testing.assert_allclose(found, kernels.attention(q[:, :10], k[:, :10], v[:, :10]), atol=2e-6)


def test_each_gpu_has_a_multiple_of_eight_tokens():
    """XLA pads the rows of a product of 16 bits to that, with a copy before and behind each."""
    gpu, sizes = plan.described("h200"), Sizes(1, 32760, 12, 8)
    for mesh, padding in (("sequence=2", 8), ("sequence=8", 8), ("sequence=2,ring=2", 8), ("data=1", 0)):
        shape = read_mesh(mesh)
        placement = Placement(make_mesh(shape), shape.ring)
        assert placement.split(sizes).padding == 0
        assert dataclasses.replace(placement.split(sizes), target=gpu).padding == padding


@pytest.mark.parametrize(
    ("name", "mesh"), [("dense", "sequence=8"), ("dense", "sequence=4,tensor=2"), ("video sparse", "sequence=4")]
)
def test_gradients_are_those_of_one_device(name, mesh):
    q, k, v, gate = operands(6, seed=3, gate=name == "video sparse")
    weights = np.random.default_rng(4).standard_normal(q.shape).astype(np.float32)
    run = spread(LOCALS[name], mesh, 6, name == "dense")
    args = (q, k, v) if gate is None else (q, k, v, gate)

    def loss(attend, *args):
        return jnp.sum(weights * attend(*args, *[None] * (4 - len(args))))

    which = tuple(range(len(args)))
    expected = jax.jit(jax.grad(lambda *a: loss(lambda *o: LOCALS[name](*o, 0), *a), which))(*args)
    for found, wanted in zip(jax.jit(jax.grad(lambda *a: loss(run, *a), which))(*args), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_keys_that_all_devices_have_need_no_exchange():
    random = np.random.default_rng(5)
    q = random.standard_normal((2, 64, 6, 8)).astype(np.float32)
    k, v = (random.standard_normal((2, 5, 6, 8)).astype(np.float32) for _ in range(2))
    split = Placement(make_mesh(MeshShape(data=2, sequence=2, tensor=2))).split(Sizes(2, 64, 6, 8))
    run = jax.jit(lambda *x: sequence.cross_attention(lambda q, k, v: kernels.attention(q, k, v), split, *x))
    np.testing.assert_allclose(run(q, k, v), kernels.attention(q, k, v), atol=2e-6)
