"""Rules: both directions agree, and one error tells everything that is wrong."""

from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest

from jvdiff.errors import CheckpointError, MissingTensor, ShapeMismatch
from jvdiff.weights import naming as rules
from jvdiff.weights.naming import CONV_1X1, CONV_1X1X1, CONV_2D, CONV_3D, CONV_TIME, IDENTITY, LINEAR, MODULATION, Rule

TABLE = [
    Rule("embed.weight", "embed/kernel", LINEAR),
    Rule("other.weight", "embed/kernel", LINEAR),
    Rule("blocks.{layer}.up.weight", "blocks/up/kernel", LINEAR),
    Rule("blocks.{layer}.norm.weight", "blocks/norm/scale"),
    Rule("stages.{stage}.res.{block}.bias", "stage_{stage}/res_{block}/bias"),
]


def array(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


ABSTRACT = {
    "embed": {"kernel": array(3, 2)},
    "blocks": {"up": {"kernel": array(2, 4, 5)}, "norm": {"scale": array(2, 4)}},
    "stage_0": {"res_1": {"bias": array(6)}},
}


def source(tensors):
    return SimpleNamespace(tensors=tensors, read=tensors.__getitem__)


def tensors(dtype=np.float32):
    random = np.random.default_rng(0)
    return {
        name: random.standard_normal(entry.shape, np.float32).astype(dtype)
        for name, entry in rules.expected(TABLE, ABSTRACT).items()
    }


def test_tensor_names_and_shapes_follow_from_the_tree():
    assert {name: entry.shape for name, entry in rules.expected(TABLE, ABSTRACT).items()} == {
        "embed.weight": (2, 3),
        "blocks.0.up.weight": (5, 4),
        "blocks.1.up.weight": (5, 4),
        "blocks.0.norm.weight": (4,),
        "blocks.1.norm.weight": (4,),
        "stages.0.res.1.bias": (6,),
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_there_and_back_is_exact(dtype):
    given = tensors(dtype)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), ABSTRACT)
    tree = rules.assemble(TABLE, abstract, source(given))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), abstract
    )
    np.testing.assert_array_equal(tree["blocks"]["up"]["kernel"][1], given["blocks.1.up.weight"].T)
    back = dict(rules.disassemble(TABLE, tree))
    assert back.keys() == given.keys()
    assert all(back[name].tobytes() == given[name].tobytes() for name in given)


@pytest.mark.parametrize(
    "transform, shape, moved",
    [
        (IDENTITY, (32, 4), (0, 1)),
        (LINEAR, (5, 4), (1, 0)),
        (CONV_3D, (5, 4, 3, 2, 1), (2, 3, 4, 1, 0)),
        (CONV_2D, (5, 4, 3, 2), (2, 3, 1, 0)),
        (CONV_TIME, (5, 4, 3, 1, 1), (2, 3, 4, 1, 0)),
        (CONV_1X1X1, (5, 4, 1, 1, 1), (2, 3, 4, 1, 0)),
        (CONV_1X1, (5, 4, 1, 1), (2, 3, 1, 0)),
        (rules.GAMMA_VIDEO, (5, 1, 1, 1), (0, 1, 2, 3)),
        (rules.GAMMA_IMAGE, (5, 1, 1), (0, 1, 2)),
        (MODULATION, (1, 6, 5), (0, 1, 2)),
        (rules.patch(1, 2, 2), (5, 4, 1, 2, 2), (1, 2, 3, 4, 0)),
    ],
)
def test_transforms_move_axes_and_back(transform, shape, moved):
    given = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    there = transform.forward(given)
    np.testing.assert_array_equal(there.reshape(-1), given.transpose(moved).reshape(-1))
    np.testing.assert_array_equal(transform.inverse(there), given)
    assert transform.source_shape(there.shape) == shape


def test_patch_vectors_are_ordered_channel_frame_row_column():
    weight = np.arange(3 * 2 * 4, dtype=np.float32).reshape(3, 2, 1, 2, 2)
    np.testing.assert_array_equal(rules.patch(1, 2, 2).forward(weight)[:, 0], np.arange(8, dtype=np.float32))


def test_one_error_tells_every_problem():
    given = tensors()
    given["blocks.0.up.weights"] = given.pop("blocks.0.up.weight")
    given["blocks.2.norm.weight"] = given["blocks.1.norm.weight"]
    given["embed.weight"] = given["embed.weight"].T
    del given["stages.0.res.1.bias"]
    with pytest.raises(MissingTensor) as error:
        rules.assemble(TABLE, ABSTRACT, source(given), where="some/folder")
    text = str(error.value)
    assert text.startswith("some/folder: 5 of its tensors")
    assert "missing (2): 'blocks.0.up.weight'; 'stages.0.res.1.bias'" in text
    assert "'blocks.0.up.weights' (near 'blocks.0.up.weight')" in text
    assert "'blocks.2.norm.weight'" in text
    assert "'embed.weight' is [3, 2], expected [2, 3]" in text
    assert len(text.splitlines()) <= 6


def test_a_wrong_shape_alone_is_a_shape_mismatch():
    given = tensors()
    given["embed.weight"] = given["embed.weight"][None]
    with pytest.raises(ShapeMismatch, match=r"'embed.weight' is \[1, 2, 3\], expected \[2, 3\]"):
        rules.assemble(TABLE, ABSTRACT, source(given))


def test_long_lists_are_cut_after_ten_with_the_count():
    abstract = {"blocks": {"norm": {"scale": array(40, 4)}}}
    with pytest.raises(MissingTensor) as error:
        rules.assemble(TABLE, abstract, source({}))
    assert "missing (40):" in str(error.value)
    assert "and 30 more" in str(error.value)
    assert "blocks.10" not in str(error.value)


def test_published_tensors_that_nobody_uses_are_told_and_not_written_back(caplog):
    given = tensors() | {"head.rotary": np.zeros(3, np.float32), "head.mask": np.zeros(3, np.float32)}
    with pytest.raises(MissingTensor, match=r"not expected \(1\): 'head.mask'"):
        rules.check(TABLE, ABSTRACT, source(given), ignored=["head.rot.*"])
    with caplog.at_level("INFO", logger="jvdiff.weights.naming"):
        entries = rules.check(TABLE, ABSTRACT, source(given), where="a/b", ignored=[r"head\.(rotary|mask)", "embed.*"])
    assert caplog.messages == ["a/b: 2 tensors are not used: 'head.rotary'; 'head.mask'"]
    assert entries.keys() == tensors().keys()  # a pattern takes nothing that the model needs
    tree = rules.unflatten(dict(rules.stream(TABLE, ABSTRACT, source(given), ignored=[r"head\..*"])))
    assert dict(rules.disassemble(TABLE, tree)).keys() == tensors().keys()


def test_nothing_is_read_before_everything_fits():
    given = tensors()
    del given["embed.weight"]
    with pytest.raises(MissingTensor):
        rules.assemble(TABLE, ABSTRACT, SimpleNamespace(tensors=given, read=None))


def test_either_spelling_fills_a_leaf_and_both_are_refused():
    given = tensors()
    other = dict(given)
    other["other.weight"] = other.pop("embed.weight")
    assert rules.assemble(TABLE, ABSTRACT, source(other))["embed"]["kernel"].shape == (3, 2)
    with pytest.raises(MissingTensor, match=r"given twice .1.: 'embed.weight' and 'other.weight'"):
        rules.assemble(TABLE, ABSTRACT, source({**given, **other}))


def test_mistakes_in_a_table_are_found():
    with pytest.raises(LookupError, match="no rule is about the leaf 'new/leaf'"):
        rules.expected(TABLE, {"new": {"leaf": array(1)}})
    clash = [Rule("same", "a/kernel"), Rule("same", "b/kernel")]
    with pytest.raises(ValueError, match="two leaves claim the tensor 'same'"):
        rules.expected(clash, {"a": {"kernel": array(1)}, "b": {"kernel": array(1)}})


def test_numbers_too_large_for_float16_are_named():
    given = tensors()
    given["embed.weight"][0, 0] = 1e6
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.float16), ABSTRACT)
    with pytest.raises(CheckpointError, match=r"'embed.weight' holds values too large for float16"):
        rules.assemble(TABLE, abstract, source(given))


def test_hostile_names_are_escaped_and_cut():
    name = "\x1b[2J\n../../x\0" + "y" * 10_000
    with pytest.raises(MissingTensor) as error:
        rules.assemble(TABLE, ABSTRACT, source({**tensors(), name: np.zeros(1, np.float32)}))
    text = str(error.value)
    assert "\x1b" not in text and "\0" not in text and len(text) < 2000
    assert "(10013 characters)" in text


@pytest.mark.parametrize(
    ("transform", "shape"),
    [
        (IDENTITY, (4, 6)),
        (LINEAR, (4, 6)),
        (CONV_3D, (3, 2, 2, 4, 6)),
        (CONV_TIME, (3, 4, 6)),
        (MODULATION, (6, 4)),
        (rules.patch(1, 2, 2), (12, 8)),
    ],
)
@pytest.mark.parametrize("layers", [None, 3])
def test_a_part_of_a_leaf_is_read_as_a_part_of_its_tensors(transform, shape, layers):
    """Of every axis that tensor and leaf share no more is read; one made of several is read whole."""
    pattern, stacked = ("w.{layer}", (layers, *shape)) if layers else ("w", shape)
    table, leaf = [Rule(pattern, "w", transform)], array(*stacked)
    entries, random = rules.expected(table, {"w": leaf}), np.random.default_rng(0)
    tensors = {name: random.standard_normal(entry.shape, np.float32) for name, entry in entries.items()}
    read = []

    def part(name, index=None):
        read.append(tensors[name][tuple(index or ())])
        return read[-1]

    held = SimpleNamespace(tensors=tensors, read=part)
    whole = rules.fill(stacked, np.float32, entries, held)
    for axis, n in enumerate(stacked):
        for span in (slice(0, n // 2), slice(n // 2, n), slice(None)):
            index = [slice(None)] * len(stacked)
            index[axis] = span
            read.clear()
            found = rules.fill(stacked, np.float32, entries, held, index=index)
            np.testing.assert_array_equal(found, whole[tuple(index)])
            joined = transform.sizes and axis == len(stacked) - 2
            assert sum(r.size for r in read) == (whole.size if joined else found.size)


def test_zeros_that_cannot_be_are_told_from_a_part_that_is_zero():
    table = [Rule("w", "w", rules.Transform("...", "...", all_zero="prompts would have no effect"))]
    values = np.zeros((8, 2), np.float32)
    held = SimpleNamespace(tensors={"w": values}, read=lambda name, index=None: values[tuple(index or ())])
    entries, half = rules.expected(table, {"w": array(8, 2)}), [slice(0, 4), slice(None)]
    with pytest.raises(CheckpointError, match="prompts would have no effect"):
        rules.fill((8, 2), np.float32, entries, held, index=half)
    values[7] = 1
    assert not rules.fill((8, 2), np.float32, entries, held, index=half).any()
