"""A transform on the way from the file to the devices: whole arrays, whatever the mesh and the layout."""

import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from jvdiff.errors import CheckpointError, UsageError
from jvdiff.weights import restore, save, transformed
from jvdiff.weights.naming import LINEAR, Rule, disassemble

TABLE = [
    Rule("embed.weight", "embed/kernel", LINEAR),
    Rule("blocks.{layer}.up.weight", "blocks/up/kernel", LINEAR),
    Rule("blocks.{layer}.up.bias", "blocks/up/bias"),
]
SHAPES = {"embed": {"kernel": (6, 4)}, "blocks": {"up": {"kernel": (2, 4, 8), "bias": (2, 8)}}}


def tree(make):
    return jax.tree.map(make, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def abstract(dtype):
    return tree(lambda shape: jax.ShapeDtypeStruct(shape, dtype))


@pytest.fixture(scope="module", params=["published", "orbax"])
def folder(request, tmp_path_factory):
    path, random = tmp_path_factory.mktemp(request.param) / "part", np.random.default_rng(0)
    params = tree(lambda shape: random.standard_normal(shape, np.float32))
    if request.param == "orbax":
        save(path, params)
    else:
        path.mkdir()
        save_file(dict(disassemble(TABLE, params)), path / "diffusion_pytorch_model.safetensors")
    return path


class Quantised(NamedTuple):
    values: Any
    scale: Any


@dataclass(frozen=True)
class Identity:
    digest: str = "identity"

    def abstract(self, path, struct):
        return struct

    def apply(self, path, array):
        return array


@dataclass(frozen=True)
class Int8:
    """Kernels as int8 [...,I,O] with a float32 scale [...,1,O] for each output channel, over all of I."""

    digest: str = "int8"

    def abstract(self, path, struct):
        if not path.endswith("kernel"):
            return struct
        *stack, _, out = struct.shape
        return Quantised(
            jax.ShapeDtypeStruct(struct.shape, np.int8), jax.ShapeDtypeStruct((*stack, 1, out), np.float32)
        )

    def apply(self, path, array):
        if not path.endswith("kernel"):
            return array
        scale = np.abs(array).max(axis=-2, keepdims=True) / np.float32(127)
        return Quantised(np.rint(array / scale).astype(np.int8), scale)


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def fsdp(size):
    return jax.make_mesh((size,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:size])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_the_identity_gives_the_bits_of_none(folder, dtype):
    plain = restore(folder, abstract(dtype), TABLE)
    same(restore(folder, abstract(dtype), TABLE, transform=Identity()), plain)
    assert transformed(abstract(dtype), Identity()) == transformed(abstract(dtype), None) == abstract(dtype)


@pytest.mark.parametrize("split", ["inputs", "outputs"])
def test_a_scale_for_each_channel_does_not_depend_on_the_mesh(folder, split):
    """Where inputs are divided no device holds a whole channel, and still its scale is that of the whole."""
    given, mesh = abstract(np.float32), fsdp(2)
    axis = {"inputs": -2, "outputs": -1}[split]

    def place(leaf):
        divided = leaf.ndim >= 2 and leaf.shape[axis] % 2 == 0
        spec = ["fsdp" if divided and axis + leaf.ndim == i else None for i in range(leaf.ndim)]
        return NamedSharding(mesh, PartitionSpec(*spec))

    shardings = jax.tree.map(place, transformed(given, Int8()))
    alone = restore(folder, given, TABLE, transform=Int8())
    apart = restore(folder, given, TABLE, shardings, transform=Int8())
    same(apart, alone)
    assert jax.tree.map(lambda leaf: leaf.sharding, apart) == shardings
    assert not apart["blocks"]["up"]["kernel"].values.is_fully_replicated
    exact = restore(folder, given, TABLE)["blocks"]["up"]["kernel"]
    values, scale = alone["blocks"]["up"]["kernel"]
    assert jnp.all(jnp.abs(values.astype(jnp.float32) * scale - exact) <= scale / 2 * (1 + 1e-5))
    everywhere = NamedSharding(mesh, PartitionSpec())
    same(restore(folder, given, TABLE, everywhere, transform=Int8()), alone)


@dataclass(frozen=True)
class Wrong(Int8):
    change: Any = None

    def apply(self, path, array):
        made = super().apply(path, array)
        return self.change(made) if path == "blocks/up/kernel" else made


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda made: Quantised(made.values, made.scale[:, 0]), "float32[2, 8]"),
        (lambda made: Quantised(made.values, made.scale.astype(np.float16)), "float16[2, 1, 8]"),
        (lambda made: made.values, "int8[2, 4, 8]"),
    ],
)
def test_what_differs_from_its_abstract_is_refused_by_name(folder, change, words):
    with pytest.raises(UsageError) as error:
        restore(folder, abstract(np.float32), TABLE, transform=Wrong(change=change))
    text = str(error.value)
    assert "the transform int8 gives for blocks/up/kernel: " in text and words in text
    assert "float32[2, 1, 8]" in text and len(text.splitlines()) <= 6


def test_one_whole_leaf_is_in_host_memory_at_a_time_and_one_that_is_hashed(folder, monkeypatch):
    from jvdiff.weights import orbax

    seen = []

    @dataclass(frozen=True)
    class Watched(Int8):
        def apply(self, path, array):
            assert [x() for x in seen[:-1]] == [None] * len(seen[:-1])
            seen.append(weakref.ref(array))
            return jax.tree.map(np.copy, super().apply(path, array))

    monkeypatch.setattr(orbax, "_GROUP", 0)  # small arrays are read one by one, as large ones are
    restore(folder, abstract(np.float32), TABLE, transform=Watched())
    assert len(seen) == len(jax.tree.leaves(abstract(np.float32)))


def test_a_published_tensor_that_nobody_uses_may_be_of_any_dtype(tmp_path):
    tensors = {"a": np.ones(3, np.float32), "position_ids": np.arange(3)}
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    wanted, table = {"a": jax.ShapeDtypeStruct((3,), np.float32)}, [Rule("a", "a")]
    assert restore(tmp_path, wanted, table, ignored=["position_ids"])["a"].sum() == 3
    with pytest.raises(CheckpointError, match="'position_ids' is I64"):
        restore(tmp_path, wanted, table)
