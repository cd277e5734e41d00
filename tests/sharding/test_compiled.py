"""A transformer compiled for eight H200s, without one: what it sends, and that the GPUs compute meanwhile.

Needs the CUDA compiler (`make kernels`), no GPU.
"""

import dataclasses
import functools
import re
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import pytest

from jvdiff import plan, sample
from jvdiff.kernels import Dense, SlidingTile, VideoSparse
from jvdiff.models import wan
from jvdiff.models.wan.places import DIT
from jvdiff.runtime import target
from jvdiff.sharding import MeshShape, collectives, param_shardings, read_mesh

pytestmark = pytest.mark.skipif(
    not (find_spec("jax_plugins") and find_spec("jax_plugins.xla_cuda13")), reason="the CUDA compiler is not installed"
)
CFG = wan.DiTConfig(num_attention_heads=8, ffn_dim=4096, num_layers=3)
SOON = {"xla_gpu_enable_triton_gemm": False}  # products by cuBLAS, which compile at once
TOKENS, WIDTH = 5 * 16 * 16, 1024
DENSE, STA, VSA = Dense(), SlidingTile((4, 4, 4), (3, 1, 1)), VideoSparse((4, 4, 4), 0.5)


def compiled(mesh, batch=1, pattern=DENSE, layers=3, gradient=False, options=None, meshless=False):
    """The text of a forward pass in bfloat16, or of the gradient of one; meshless: the model gets no placement."""
    shape, cfg = read_mesh(mesh), dataclasses.replace(CFG, num_layers=layers, gate_compress=pattern.gated)
    placement = plan.target_placement("h200", shape)
    abstract = wan.abstract_params(cfg, jnp.bfloat16)
    places, everywhere = param_shardings(placement.mesh, abstract, DIT), placement.everywhere
    if meshless:
        everywhere = jax.sharding.SingleDeviceSharding(placement.mesh.devices.flat[0])
        places = jax.tree.map(lambda x: everywhere, abstract)
    struct = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32, sharding=everywhere)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, places)

    def velocity(params, x, t, text):
        where = None if meshless else placement
        return wan.velocity(params, cfg, x, t, text, pattern=pattern, placement=where, text_length=80)

    run = jax.jit(jax.grad(lambda *args: jnp.sum(velocity(*args))) if gradient else velocity)
    inputs = struct((batch, 5, 32, 32, 16)), struct((batch,)), struct((batch, 64, cfg.text_dim))
    return plan.compile_for(placement, run, params, *inputs, options=options).as_text() or ""


def in_a_block(mesh, batch=1):
    """The collectives of one layer; attention is cuDNN's, in a ring too, which needs the log-sum-exp."""
    text = compiled(mesh, batch, options=SOON)
    assert plan.attention_in(text) == ("cudnn",)
    return [c for c in collectives.read(text) if c.runs == CFG.num_layers]


@pytest.mark.parametrize(
    ("mesh", "batch", "pattern", "gradient"),
    [
        ("data=1", 1, DENSE, False),
        ("data=2", 2, DENSE, False),
        ("fsdp=2,tensor=2", 2, DENSE, False),
        ("sequence=2", 1, DENSE, True),
        ("sequence=2,ring=2", 1, DENSE, False),
        ("fsdp=2,tensor=2", 2, STA, True),
        ("data=2,sequence=2", 2, VSA, False),
    ],
)
def test_cudnns_attention_compiles_on_every_axis(mesh, batch, pattern, gradient):
    """The attention to text is dense under every pattern. The other axes are in the tests below."""
    text = compiled(mesh, batch, pattern, 1, gradient, SOON)
    assert plan.attention_in(text) == (("cudnn",) if pattern is DENSE else ("cudnn", "mosaic_gpu"))
    assert ("__cudnn$fmhaSoftmaxBackward" in text) == gradient


def test_a_mesh_of_one_costs_nothing(monkeypatch):
    """Its program is that of no mesh, instruction by instruction."""
    monkeypatch.setattr(target, "of", lambda devices: plan.described("h200"))  # the devices at hand
    alone, meshed = (plain(compiled("data=1", layers=1, options=SOON, meshless=x)) for x in (True, False))
    assert alone.count("__cudnn$fmhaSoftmax") == 2 and alone == meshed  # the video's and the text's


def plain(text):
    """The instructions of a program with their names numbered, without where they come from."""
    text = text.partition("\n")[2]
    inner = r"\{[^{}]*\}"
    for _ in range(3):
        inner = rf"\{{(?:[^{{}}]|{inner})*\}}"
    text = re.sub(rf", (metadata|backend_config|frontend_attributes|origin|sharding)={inner}", "", text)
    text = re.sub(r"\n(FileNames|FunctionNames|FileLocations|StackFrames)\n(.*\n)*?(?=\n)", "\n", text)
    names = {}
    return re.sub(r"%[\w.\-]+", lambda name: names.setdefault(name[0], f"%{len(names)}"), text)


def test_every_stage_of_a_clip_compiles_on_a_mesh(tiny_repository):
    config = sample.default_config()
    config.update({"checkpoint": str(tiny_repository), "precision": "bfloat16"})
    context, clip = plan.resolved(config)
    dit = dataclasses.replace(context.models.configs["transformer"], attention_head_dim=16)  # which cuDNN takes
    models = dataclasses.replace(context.models, configs={**context.models.configs, "transformer": dit})
    context = dataclasses.replace(context, models=models)
    found = {each.name: each.attention for each in plan.programs(context, clip, "h200", MeshShape(sequence=2))}
    assert found == {"text": ("xla",), "denoise": ("cudnn",), "decode first": ("xla",), "decode next": ("xla",)}


def test_divided_tokens_are_four_all_to_alls():
    found = in_a_block("sequence=8")
    assert [c.kind for c in found] == ["all-to-all"] * 4
    assert all(c.bytes == TOKENS * WIDTH * 2 // 8 * 7 // 8 for c in found)
    assert [c.asynchronous for c in found].count(True) == 3  # the last one before attention has nothing to hide behind


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
