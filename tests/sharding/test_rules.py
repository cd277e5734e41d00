"""Every weight of every published model has its place, and an eighth of the large ones is what a device holds."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jvdiff.models import latent_video, wan
from jvdiff.models.latent_video import places
from jvdiff.models.text import umt5
from jvdiff.models.wan import places as wan_places
from jvdiff.sharding import MeshShape, bytes_per_device, make_mesh, param_shardings, rules, specs

ONE = {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}
MODELS = {
    "1.3B": (wan.WAN_2_1_T2V_1_3B, wan_places.DIT),
    "14B": (wan.WAN_2_1_T2V_14B, wan_places.DIT),
    "gated": (wan.DiTConfig(num_attention_heads=12, ffn_dim=8960, num_layers=2, gate_compress=True), wan_places.DIT),
    "UMT5-XXL": (umt5.UMT5_XXL, umt5.PLACES),
    "latent video XL": (latent_video.XL, places.DIT),
    "VAE": (wan.WAN_2_1_VAE, rules.REPLICATED),
}


def tree_of(cfg):
    if isinstance(cfg, umt5.Config):
        return umt5.abstract_params(cfg, jnp.bfloat16)
    model = latent_video if isinstance(cfg, latent_video.DiTConfig) else wan
    return model.abstract_params(cfg, jnp.bfloat16)


def leaves_of(found):
    return jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, P))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("axes", [{}, {"tensor": 4}, {"fsdp": 8}, {"fsdp": 2, "tensor": 4}])
def test_every_leaf_of_the_published_models_is_divided_evenly(name, axes):
    cfg, table = MODELS[name]
    tree, axes = tree_of(cfg), ONE | axes
    for leaf, spec in zip(jax.tree.leaves(tree), leaves_of(specs(table, tree, axes)), strict=True):
        assert len(spec) <= leaf.ndim
        for size, axis in zip(leaf.shape, spec, strict=False):
            assert axis is None or size % axes[axis] == 0


@pytest.mark.parametrize("name", ["1.3B", "14B", "latent video XL", "UMT5-XXL"])
@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"tensor": 4}, {"fsdp": 2, "tensor": 4}])
def test_a_device_holds_its_share_of_a_large_model(name, axes):
    cfg, table = MODELS[name]
    tree, axes = tree_of(cfg), ONE | axes
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    found = leaves_of(specs(table, tree, axes))
    held = sum(bytes_per_device(axes, s, x) for x, s in zip(jax.tree.leaves(tree), found, strict=True))
    assert held <= 1.03 * whole / math.prod(axes.values())


def test_a_row_parallel_layer_takes_what_a_column_parallel_one_gives():
    found = specs(wan_places.DIT, tree_of(wan.WAN_2_1_T2V_1_3B), ONE | {"tensor": 2})["blocks"]
    for attention in ("self_attn", "cross_attn"):
        for name in ("q", "k", "v"):
            assert found[attention][name]["kernel"] == P(None, None, "tensor")
        assert found[attention]["out"]["kernel"] == P(None, "tensor")
    assert found["ffn"]["up"]["kernel"] == P(None, None, "tensor")
    assert found["ffn"]["down"]["kernel"] == P(None, "tensor")


def test_fsdp_takes_the_largest_free_axis_and_leaves_small_leaves_whole():
    found = specs(wan_places.DIT, tree_of(wan.WAN_2_1_T2V_14B), ONE | {"fsdp": 8, "tensor": 2})["blocks"]
    assert found["self_attn"]["q"]["kernel"] == P(None, "fsdp", "tensor")
    assert found["ffn"]["down"]["kernel"] == P(None, "tensor", "fsdp")
    assert found["self_attn"]["q"]["bias"] == P(None, "tensor")
    assert found["modulation"] == P()


def test_a_leaf_that_no_rule_is_about_is_an_error():
    tree = {"blocks": {"ffn": {"sideways": {"kernel": jnp.zeros((2, 4, 4))}}}}
    with pytest.raises(LookupError, match=r"blocks/ffn/sideways/kernel.*\[2, 4, 4\]"):
        specs(wan_places.DIT, tree, ONE)


def test_the_optimisers_state_lives_where_its_weights_live():
    cfg = wan.DiTConfig(num_attention_heads=4, attention_head_dim=64, ffn_dim=512, num_layers=2, text_dim=64)
    params = wan.abstract_params(cfg)
    state = jax.eval_shape(optax.adamw(1e-3).init, {"transformer": params})
    mesh = make_mesh(MeshShape(fsdp=4, tensor=2))
    found, own = param_shardings(mesh, state, wan_places.DIT), param_shardings(mesh, params, wan_places.DIT)
    assert found[0].mu["transformer"] == own == found[0].nu["transformer"]
    assert found[0].count.spec == P()


def test_arrays_can_be_put_where_the_rules_say():
    cfg = wan.DiTConfig(num_attention_heads=4, attention_head_dim=64, ffn_dim=512, num_layers=2, text_dim=64)
    tree = wan.abstract_params(cfg)
    mesh = make_mesh(MeshShape(fsdp=4, tensor=2))
    put = jax.tree.map(
        lambda x, s: jax.device_put(np.zeros(x.shape, x.dtype), s), tree, param_shardings(mesh, tree, wan_places.DIT)
    )
    kernel = put["blocks"]["ffn"]["up"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 64, 256)}
