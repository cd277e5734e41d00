"""A transformer compiled for eight H200s, without one: what it sends, and that the GPUs compute meanwhile.

Needs the CUDA compiler (`make kernels`), no GPU.
"""

import functools
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import pytest

from jvdiff import plan
from jvdiff.models import wan
from jvdiff.models.wan.places import DIT
from jvdiff.sharding import Placement, collectives, param_shardings, read_mesh

pytestmark = pytest.mark.skipif(
    not (find_spec("jax_plugins") and find_spec("jax_plugins.xla_cuda13")), reason="the CUDA compiler is not installed"
)
CFG = wan.DiTConfig(num_attention_heads=8, ffn_dim=4096, num_layers=3)
TOKENS, WIDTH = 5 * 16 * 16, 1024


def in_a_block(mesh, batch=1):
    """The collectives of one layer, of a forward pass in bfloat16."""
    shape = read_mesh(mesh)
    placement = Placement(plan.target_mesh("h200", shape), shape.ring)
    abstract = wan.abstract_params(CFG, jnp.bfloat16)
    places = param_shardings(placement.mesh, abstract, DIT)
    struct = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32, sharding=placement.everywhere)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, places)
    how = dict(placement=placement, implementation="xla")
    run = jax.jit(lambda params, x, t, text: wan.velocity(params, CFG, x, t, text, **how))
    traced = run.trace(params, struct((batch, 5, 32, 32, 16)), struct((batch,)), struct((batch, 64, CFG.text_dim)))
    text = traced.lower(lowering_platforms=("cuda",)).compile().as_text()
    return [c for c in collectives.read(text) if c.runs == CFG.num_layers]


def test_divided_tokens_are_four_asynchronous_all_to_alls():
    found = in_a_block("sequence=8")
    assert [c.kind for c in found] == ["all-to-all"] * 4
    assert all(c.asynchronous and c.bytes == TOKENS * WIDTH * 2 // 8 * 7 // 8 for c in found)


def test_a_ring_sends_keys_and_values_while_it_works():
    found = in_a_block("sequence=8,ring=2")
    assert sorted(c.kind for c in found) == ["all-to-all"] * 4 + ["collective-permute"]
    permute = next(c for c in found if c.kind == "collective-permute")
    assert permute.asynchronous and permute.behind >= 1
    assert permute.bytes == 2 * TOKENS * WIDTH * 2 // 8


def test_divided_heads_are_three_all_reduces_of_activations():
    """And two of a number a token, for the norms over all heads."""
    found = in_a_block("tensor=8")
    assert {c.kind for c in found} == {"all-reduce"}
    whole = 2 * TOKENS * WIDTH * 2 * 7 // 8
    assert [c.bytes for c in found].count(whole) == 3
    assert sum(c.bytes for c in found if c.bytes != whole) < 3 * 2 * 4 * TOKENS


def test_divided_weights_are_one_asynchronous_all_gather():
    found = in_a_block("fsdp=8", batch=8)
    assert [(c.kind, c.asynchronous) for c in found] == [("all-gather", True)]
    assert found[0].bytes == (8 * WIDTH**2 + 2 * WIDTH * CFG.ffn_dim) * 2 * 7 // 8
