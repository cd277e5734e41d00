"""Meshes as a config names them, and the sentence for one that cannot be."""

import jax
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from jvdiff.errors import UsageError
from jvdiff.sharding import MeshShape, Sizes, check_mesh, make_mesh, nearest, read_mesh, shape_of, spec_on

WAN_1_3B = Sizes(batch=2, tokens=32760, heads=12, ffn_dim=8960)
WAN_14B = Sizes(batch=2, tokens=75600, heads=40, ffn_dim=13824)


@pytest.mark.parametrize(
    "value",
    [
        "sequence=4,tensor=2",
        " sequence=4 tensor=2 ",
        {"sequence": 4, "tensor": 2},
        ConfigDict({"sequence": 4, "tensor": 2}),
        MeshShape(sequence=4, tensor=2),
    ],
)
def test_a_mesh_is_written_in_several_ways(value):
    assert read_mesh(value) == MeshShape(sequence=4, tensor=2)


def test_no_mesh_and_auto_are_meshes_too():
    assert read_mesh(None) is None
    assert read_mesh("auto") == "auto"


@pytest.mark.parametrize("shape", [MeshShape(), MeshShape(data=2, ring=1, sequence=4), MeshShape(fsdp=8, ring=2)])
def test_what_is_printed_reads_back(shape):
    assert read_mesh(str(shape)) == shape


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("sequnce=4", "sequnce"),
        ("sequence", "expected axes and devices"),
        ("", "expected axes and devices"),
        ("tensor=2.5", "expected axes and devices"),
        ("sequence=0", "sequence=0"),
        ({"tensor": True}, "tensor=True"),
        ({"tensor": -1}, "tensor=-1"),
        (8, "mesh is 8; expected axes and devices"),
    ],
)
def test_anything_else_is_refused_with_what_was_found(value, told):
    with pytest.raises(UsageError, match="mesh") as caught:
        read_mesh(value)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "shape", "reason", "near"),
    [
        (WAN_1_3B, MeshShape(tensor=8), "12 attention heads", "sequence=2,tensor=4"),
        (WAN_14B, MeshShape(sequence=16), "it has 16 devices, and there are 8", "sequence=8"),
        (WAN_14B, MeshShape(data=8), "the batch of 2", "data=2,"),
        (Sizes(2, 6, 12, 64), MeshShape(sequence=8), "6 video tokens", "sequence="),
        (Sizes(2, 600, 12, 64, dense=False), MeshShape(sequence=8, ring=2), "dense attention", "sequence=8"),
        (WAN_1_3B, MeshShape(sequence=8, ring=3), "ring=3", "sequence=8"),
        (Sizes(2, 600, 12, 66), MeshShape(tensor=4), "feed-forward width 66", "tensor=2"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_with_the_nearest_that_can(sizes, shape, reason, near):
    with pytest.raises(UsageError) as caught:
        check_mesh(shape, sizes, 8)
    first, second = str(caught.value).split("\n")
    assert reason in first
    assert near in second
    found = read_mesh(second.removeprefix("The nearest mesh that works is ").removesuffix("."))
    check_mesh(found, sizes, 8)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        (WAN_1_3B, "sequence=8"),
        (WAN_14B, "sequence=8"),
        (WAN_14B, "tensor=8"),
        (WAN_1_3B, "fsdp=8"),
        (WAN_14B, "data=2"),
    ],
)
def test_meshes_that_can_be_pass(sizes, text):
    check_mesh(read_mesh(text), sizes, 8)


def test_with_several_processes_every_device_needs_a_place():
    check_mesh(MeshShape(sequence=4), WAN_14B, 8)
    with pytest.raises(UsageError, match="there are 8") as caught:
        check_mesh(MeshShape(sequence=4), WAN_14B, 8, exactly=True)
    near = str(caught.value).split("\n")[1].removeprefix("The nearest mesh that works is ").removesuffix(".")
    assert read_mesh(near).devices == 8


def test_the_nearest_mesh_keeps_the_number_of_devices_where_it_can():
    assert nearest(MeshShape(tensor=8), WAN_1_3B, 8).devices == 8
    assert nearest(MeshShape(data=2), Sizes(1, 1, 1, 1), 8) == MeshShape()


@pytest.mark.parametrize(
    ("sizes", "text", "ring"),
    [
        (WAN_1_3B, "sequence=8", 2),  # 12 heads: 4 devices exchange them
        (WAN_1_3B, "sequence=4", 1),
        (WAN_14B, "sequence=8", 1),
        (WAN_14B, "sequence=8,ring=8", 8),
        (WAN_1_3B, "sequence=8,ring=1", 1),
        (WAN_14B, "sequence=4,tensor=2", 1),
        (WAN_1_3B, "fsdp=8", 2),  # the batch of 2 does not divide, so that fsdp shares the tokens
        (WAN_1_3B, "fsdp=2,sequence=4", 1),
        (Sizes(2, 999, 12, 64, dense=False), "sequence=8", 1),
    ],
)
def test_keys_go_round_as_few_devices_as_the_heads_allow(sizes, text, ring):
    assert sizes.ring(read_mesh(text)) == ring


def test_fsdp_shares_the_batch_where_it_divides_and_the_tokens_where_not():
    assert WAN_14B.token_devices(MeshShape(fsdp=2, sequence=4)) == 4
    assert WAN_14B.token_devices(MeshShape(fsdp=4, sequence=2)) == 8


def test_a_mesh_has_an_axis_for_each_prime_and_the_first_devices():
    mesh = make_mesh(MeshShape(data=4, tensor=2))
    assert dict(mesh.shape) == {"data0": 2, "data1": 2, "tensor0": 2}
    assert list(mesh.devices.flat) == jax.devices()[:8]
    assert shape_of(mesh) == MeshShape(data=4, tensor=2)
    assert spec_on(mesh, P(("data", "fsdp"), "fsdp", None, "tensor")) == P(("data0", "data1"), None, None, ("tensor0",))
    assert shape_of(make_mesh(MeshShape())) == MeshShape() and make_mesh(MeshShape()).size == 1
    with pytest.raises(UsageError, match="there are 8"):
        make_mesh(MeshShape(data=16))
