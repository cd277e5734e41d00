"""Collectives of compiled programs: kinds, bytes, groups and how often they run, of programs whose counts are known."""

from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jvdiff.sharding import collectives

N, LAYERS = 64, 5  # a local array is float32 [N,N]
BYTES = 4 * N * N


def mesh(devices=None):
    devices = np.array(jax.devices()[:8] if devices is None else devices).reshape(2, 4)
    return Mesh(devices, ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def compiled(body, inputs, mesh, out_spec=None):
    """The text of `body`, on each device, on float32 arrays [shape] divided by [spec]."""
    run = jax.jit(
        jax.shard_map(
            body,
            mesh=mesh,
            in_specs=tuple(s for _, s in inputs),
            out_specs=P() if out_spec is None else out_spec,
            check_vma=False,
        )
    )
    args = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, s)) for shape, s in inputs]
    cuda = mesh.devices.flat[0].platform != "cpu"
    return run.trace(*args).lower(**({"lowering_platforms": ("cuda",)} if cuda else {})).compile().as_text() or ""


def every_kind(x, w):
    """x [N,N] over a; w [LAYERS,N,N] over b: two collectives in a loop, one in a loop of a loop, two outside."""

    def layer(x, w):
        return lax.psum(x @ lax.all_gather(w, "b", axis=0, tiled=True), "b"), None

    x, _ = lax.scan(layer, x, w)

    def turn(_, x):
        return lax.fori_loop(0, 3, lambda _, x: jnp.tanh(lax.ppermute(x, "a", [(0, 1), (1, 0)])), x * 2)

    x = lax.fori_loop(0, 2, turn, x)
    x = lax.all_to_all(x, "b", 1, 0, tiled=True)
    return lax.psum_scatter(x, ("a", "b"), scatter_dimension=0, tiled=True)


EVERY_KIND = {
    "all-gather": (LAYERS, LAYERS * BYTES * 3 // 4),
    "all-reduce": (LAYERS, LAYERS * 2 * BYTES * 3 // 4),
    "all-to-all": (1, BYTES * 3 // 4),
    "collective-permute": (6, 6 * BYTES),
    "reduce-scatter": (1, BYTES * 7 // 8),
}


def test_every_kind_in_and_outside_loops():
    text = compiled(every_kind, [((2 * N, N), P("a")), ((LAYERS, N, N), P(None, "b"))], mesh(), P(None, "b"))
    found = collectives.read(text)
    assert collectives.by_kind(found) == EVERY_KIND
    group = {each.kind: each.group for each in found}
    wanted = {"all-gather": 4, "all-reduce": 4, "all-to-all": 4, "collective-permute": 2, "reduce-scatter": 8}
    assert group == wanted
    assert not any(each.asynchronous for each in found)  # XLA:CPU has none
    source = {each.kind: each.source for each in found}
    assert "while/body" in source["all-gather"] and "all_to_all" in source["all-to-all"]
    assert next(each.result for each in found if each.kind == "all-reduce") == f"f32[{N},{N}]"


def test_what_the_partitioner_adds_is_counted_too():
    """A product over a divided axis is summed up once; a divided weight in a scan is gathered once a layer."""
    on = partial(NamedSharding, mesh())
    struct = lambda shape, spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=on(spec))  # noqa: E731
    product = jax.jit(jnp.matmul, out_shardings=on(P()))
    text = product.lower(struct((N, 8 * N), P(None, "b")), struct((8 * N, N), P("b"))).compile().as_text() or ""
    assert collectives.by_kind(collectives.read(text)) == {"all-reduce": (1, 2 * BYTES * 3 // 4)}

    def layers(x, weights):
        whole = lambda w: lax.with_sharding_constraint(w, on(P()))  # noqa: E731
        return lax.scan(lambda x, w: (jnp.tanh(x @ whole(w)), None), x, weights)[0]

    text = (
        jax.jit(layers).lower(struct((N, N), P("a")), struct((LAYERS, N, N), P(None, None, "b"))).compile().as_text()
        or ""
    )
    assert collectives.by_kind(collectives.read(text)) == {"all-gather": (LAYERS, LAYERS * BYTES * 3 // 4)}


def test_of_branches_the_one_that_sends_most_counts():
    def body(x):
        once = lambda x: lax.psum(x, "b")  # noqa: E731
        return lax.cond(x[0, 0] > 0, lambda x: once(once(x) * 2), once, x)

    assert collectives.by_kind(collectives.read(compiled(body, [((N, N), P())], mesh()))) == {
        "all-reduce": (2, 2 * 2 * BYTES * 3 // 4)
    }


def test_nothing_is_found_where_nothing_is_sent():
    assert collectives.read(compiled(jnp.tanh, [((N, N), P("a", "b"))], mesh(), P("a", "b"))) == []
    still = compiled(lambda x: lax.ppermute(x, "b", [(i, i) for i in range(4)]), [((N, N), P())], mesh())
    assert sum(each.bytes for each in collectives.read(still)) == 0


TEXT = """HloModule jit_f, is_scheduled=true, num_partitions=8

%wrapped (p: f32[16]) -> f32[128] {
  %p = f32[16]{0} parameter(0)
  ROOT %inner = f32[128]{0} all-gather(%p), channel_id=4, replica_groups=[1,8]<=[8], dimensions={0}
}

%condition (c: (s32[], f32[128])) -> pred[] {
  %c = (s32[], f32[128]{0}) parameter(0)
  %seven = s32[] constant(7)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%i, %seven), direction=LT
}

%body (b: (s32[], f32[128])) -> (s32[], f32[128]) {
  %b = (s32[], f32[128]{0}) parameter(0)
  %x = f32[128]{0} get-tuple-element(%b), index=1
  %GROUPS = f32[128]{0} all-reduce(%x), channel_id=1, replica_groups=HERE, to_apply=%add
  ROOT %t = (s32[], f32[128]{0}) tuple(%x, %GROUPS)
}

ENTRY %main (x: f32[128], s: f32[16]) -> f32[128] {
  %x = f32[128]{0:S(1)} parameter(0)
  %s = f32[16]{0} parameter(1)
  %w = (s32[], /*index=1*/f32[128]{0}) while(%x), condition=%condition, body=%body, metadata={op_name="loop"}
  %start = ((f32[16]{0}), f32[128]{0}, s32[]) async-start(%s), calls=%wrapped
  %between = f32[2,64]{1,0} fusion(%x), kind=kLoop, calls=%nothing
  %done = f32[128]{0} async-done(%start)
  %pair = (f32[16]{0}, f32[128]{0}) all-gather-start(%s), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %end = f32[128]{0} all-gather-done(%pair)
  %r-start = ((f32[64]{0}), f32[16]{0}) reduce-scatter-start(%x), replica_groups={{0,1},{2,3},{4,5},{6,7}}
  %r-done = f32[16]{0} reduce-scatter-done(%r-start)
  %two = (f32[16]{0}, bf16[3,5]{1,0}) all-to-all(%s, %s), replica_groups={}
  ROOT %ragged = f32[128]{0} ragged-all-to-all(%x, %x, %x), replica_groups={{0,1,2,3},{4,5,6,7}}
}

%nothing (n: f32[128]) -> f32[2,64] {
  %n = f32[128]{0} parameter(0)
  ROOT %m = f32[2,64]{1,0} bitcast(%n)
}
"""


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("[1,8]<=[8]", 8),
        ("mesh['a'=2,'b'=4] {'b'}", 4),
        ("mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("mesh['a'=2,'b'=4] {'b':(1)2}", 2),
        ("mesh['a'=1,'b'=8], device_ids=([2,4]T(1,0)) {'a','b':(2)4}", 4),
        ("{}", 8),
    ],
)
def test_devices_of_a_group_in_every_form(groups, size):
    found = collectives.read(TEXT.replace("GROUPS", "sum").replace("HERE", groups))[0]
    assert (found.kind, found.group, found.bytes, found.runs) == ("all-reduce", size, 2 * 512 * (size - 1) // size, 7)


def test_asynchronous_forms():
    found = collectives.read(TEXT.replace("HERE", "{{0,1}}"))[1:]
    kinds = [(x.kind, x.bytes, x.group, x.asynchronous, x.behind) for x in found]
    assert kinds == [
        ("all-gather", 512 * 7 // 8, 8, True, 1),
        ("all-gather", 512 * 7 // 8, 8, True, 0),
        ("reduce-scatter", 64, 2, True, 0),
        ("all-to-all", (64 + 30) * 7 // 8, 8, False, 0),
        ("ragged-all-to-all", 512, 4, False, 0),
    ]
    assert found[3].result == "f32[16], bf16[3,5]"


@pytest.mark.parametrize(
    ("kinds", "size"), [("f32[]", 4), ("(bf16[3,4]{1,0}, pred[5], u4[3])", 31), ("f8e4m3fn[7]", 7), ("s64[0,4]", 0)]
)
def test_bytes_of_a_type(kinds, size):
    assert collectives.size(kinds) == size


@pytest.mark.skipif(
    not (find_spec("jax_plugins") and find_spec("jax_plugins.xla_cuda13")), reason="the CUDA compiler is not installed"
)
def test_a_program_for_eight_gpus_has_the_same_collectives():
    from jvdiff import plan
    from jvdiff.sharding import MeshShape

    gpus = mesh(plan.target_mesh("h200", MeshShape(sequence=8)).devices)
    text = compiled(every_kind, [((2 * N, N), P("a")), ((LAYERS, N, N), P(None, "b"))], gpus, P(None, "b"))
    found = collectives.read(text)
    assert collectives.by_kind(found) == EVERY_KIND
    assert any(each.asynchronous for each in found)
