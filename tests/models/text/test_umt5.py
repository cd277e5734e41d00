"""The UMT5 encoder by itself; the comparison with transformers is in tests/parity/test_umt5.py."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff.errors import CheckpointError, MissingTensor
from jvdiff.models.text import umt5
from jvdiff.models.text.umt5_names import RULES
from jvdiff.sharding import Placement, make_mesh, param_shardings, read_mesh
from jvdiff.weights import naming as rules

CFG = umt5.Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=3)
XXL_TENSORS = Path(__file__).parents[2] / "data" / "tensors" / "umt5_xxl.tsv"
encode = jax.jit(umt5.encode, static_argnums=1)


@pytest.fixture(scope="module")
def params():
    return umt5.init_params(jax.random.key(0), CFG)


def prompts(length, lengths=(9, 4)):
    ids = np.random.default_rng(0).integers(2, CFG.vocab_size, (2, max(lengths)), dtype=np.int32)
    ids = np.pad(ids, ((0, 0), (0, length - max(lengths))))
    return ids, np.arange(length)[None, :] < np.asarray(lengths)[:, None]


def error(a, b):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_xxl_is_the_published_tensor_list():
    """Snapshot: the 242 names and shapes of the text encoder in Wan-AI/Wan2.1-T2V-*-Diffusers."""
    published = {}
    for line in XXL_TENSORS.read_text().splitlines()[1:]:
        name, shape, layers = line.split("\t")
        shape = tuple(map(int, shape.strip("[]").split(",")))
        names = [name.format(layer=i) for i in range(int(layers))] if layers != "0" else [name]
        published.update(dict.fromkeys(names, shape))
    abstract = umt5.abstract_params(umt5.UMT5_XXL, jnp.bfloat16)
    ours = {name: entry.shape for name, entry in rules.expected(RULES, abstract).items()}
    assert ours == published
    assert len(ours) == 242
    leaves = jax.tree.leaves(abstract)
    assert sum(math.prod(leaf.shape) for leaf in leaves) == 5_680_910_336
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}


def test_parameter_tree(params):
    names = {path: leaf.shape for path, leaf in rules.flatten(params).items()}
    assert names == {
        "token_embed/embedding": (50, 32),
        "layers/attn/norm/scale": (2, 32),
        "layers/attn/q/kernel": (2, 32, 24),
        "layers/attn/k/kernel": (2, 32, 24),
        "layers/attn/v/kernel": (2, 32, 24),
        "layers/attn/out/kernel": (2, 24, 32),
        "layers/attn/relative_bias/embedding": (2, 32, 3),
        "layers/ffn/norm/scale": (2, 32),
        "layers/ffn/gate/kernel": (2, 32, 48),
        "layers/ffn/up/kernel": (2, 32, 48),
        "layers/ffn/down/kernel": (2, 48, 32),
        "final_norm/scale": (32,),
    }
    abstract = umt5.abstract_params(CFG)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)


def test_initial_scales(params):
    """T5's: scores of unit size without a 1/sqrt(K), and no two layers alike."""
    attn, K, D = params["layers"]["attn"], CFG.d_kv, CFG.d_model
    assert np.std(attn["q"]["kernel"]) == pytest.approx((D * K) ** -0.5, rel=0.1)
    assert np.std(attn["k"]["kernel"]) == pytest.approx(D**-0.5, rel=0.1)
    assert np.std(params["layers"]["ffn"]["down"]["kernel"]) == pytest.approx(CFG.d_ff**-0.5, rel=0.1)
    assert np.std(params["token_embed"]["embedding"]) == pytest.approx(1, rel=0.1)
    assert not np.array_equal(attn["q"]["kernel"][0], attn["q"]["kernel"][1])


def test_real_positions_do_not_depend_on_padding(params):
    ids, mask = prompts(9)
    want = np.asarray(encode(params, CFG, ids, mask))[mask]
    longer, longer_mask = prompts(31)
    got = np.asarray(encode(params, CFG, np.where(longer_mask, longer, 17), longer_mask))[longer_mask]
    assert error(got, want) < 1e-6
    alone = encode(params, CFG, ids[1:, :4], mask[1:, :4])
    assert error(alone[0], np.asarray(encode(params, CFG, ids, mask))[1, :4]) < 1e-6


def test_bfloat16_stays_near_float32(params):
    ids, mask = prompts(13)
    rounded = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), params)
    exact = encode(jax.tree.map(lambda x: np.asarray(x, np.float32), rounded), CFG, ids, mask)
    got = encode(rounded, CFG, ids, mask)
    assert got.dtype == jnp.bfloat16
    assert error(np.asarray(got)[mask], np.asarray(exact)[mask]) < 0.01


@pytest.mark.parametrize("mesh", ["fsdp=2,tensor=2,sequence=2", "data=3"])
def test_a_mesh_gives_the_numbers_of_one_device(mesh):
    cfg = umt5.Config(vocab_size=4096, d_model=64, d_kv=16, d_ff=768, num_layers=3, num_heads=4)
    weights = umt5.init_params(jax.random.key(1), cfg)
    placement = Placement(make_mesh(read_mesh(mesh)))
    placed = jax.device_put(weights, param_shardings(placement.mesh, weights, umt5.PLACES))
    divided = [x for x in jax.tree.leaves(placed) if not x.sharding.is_fully_replicated]
    assert bool(divided) == (mesh != "data=3")
    ids, mask = prompts(16)
    found = jax.jit(lambda p: umt5.encode(p, cfg, ids, mask, placement=placement))(placed)
    assert found.sharding.is_fully_replicated
    assert error(found, encode(weights, cfg, ids, mask)) < 1e-6


def test_nothing_is_larger_than_the_scores():
    """No float array beyond [B,N,S,S] in the whole program, at a length where an S x S x anything would show."""
    cfg = dataclasses.replace(CFG, d_ff=16)
    ids = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    mask = jax.ShapeDtypeStruct((2, 128), bool)
    jaxpr = jax.make_jaxpr(umt5.encode, static_argnums=1)(umt5.abstract_params(cfg), cfg, ids, mask)

    def sizes(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (math.prod(var.aval.shape) for var in eqn.outvars)
            for value in eqn.params.values():
                if (inner := getattr(value, "jaxpr", None)) is not None:
                    yield from sizes(inner)

    assert max(sizes(jaxpr.jaxpr)) == 2 * cfg.num_heads * 128 * 128


def test_every_layer_is_differentiated(params):
    ids, mask = prompts(9)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(umt5.encode(p, CFG, ids, mask)[:, 0] ** 3)))(params)
    for path, grad in rules.flatten(grads).items():
        assert np.isfinite(grad).all() and np.abs(grad).max() > 0, path


@pytest.mark.parametrize("name", ["shared.weight", "encoder.embed_tokens.weight"])
def test_both_names_of_the_embedding_convert(params, name):
    tensors = dict(rules.disassemble(RULES, params))
    tensors[name] = tensors.pop("shared.weight")
    got = rules.assemble(RULES, umt5.abstract_params(CFG), source(tensors))
    jax.tree.map(np.testing.assert_array_equal, got, jax.tree.map(np.asarray, params))


def test_an_empty_or_absent_embedding_is_refused(params):
    tensors = dict(rules.disassemble(RULES, params))
    empty = {**tensors, "shared.weight": np.zeros_like(tensors["shared.weight"])}
    with pytest.raises(CheckpointError, match="embedding is 0"):
        rules.assemble(RULES, umt5.abstract_params(CFG), source(empty))
    del tensors["shared.weight"]
    with pytest.raises(MissingTensor, match=r"shared\.weight"):
        rules.assemble(RULES, umt5.abstract_params(CFG), source(tensors))


def source(tensors):
    return SimpleNamespace(tensors=tensors, read=tensors.__getitem__)


def test_config_from_json():
    published = {
        "architectures": ["UMT5EncoderModel"],
        "d_ff": 10240,
        "d_kv": 64,
        "d_model": 4096,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.1,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-06,
        "model_type": "umt5",
        "num_heads": 64,
        "num_layers": 24,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32,
        "tie_word_embeddings": False,
        "vocab_size": 256384,
    }
    assert umt5.Config.from_json(published) == umt5.UMT5_XXL
    assert umt5.Config.from_json(CFG.to_json()) == CFG


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 10**9),
        ("num_layers", 0),
        ("num_heads", "64"),
        ("d_model", 4096.0),
        ("d_ff", True),
        ("vocab_size", None),
        ("layer_norm_epsilon", math.nan),
        ("layer_norm_epsilon", 0.0),
        ("relative_attention_num_buckets", 30),
        ("relative_attention_max_distance", 8),
        ("model_type", "llama"),
        ("feed_forward_proj", "relu"),
        ("dense_act_fn", "silu"),
    ],
)
def test_a_bad_config_field_is_named(field, value):
    with pytest.raises(CheckpointError) as caught:
        umt5.Config.from_json({field: value})
    message = str(caught.value)
    assert field in message and repr(value) in message and "Expected" in message
    assert message.count("\n") < 6
