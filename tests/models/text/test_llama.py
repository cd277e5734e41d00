"""The Llama encoder by itself; the comparison with transformers is in tests/parity/test_llama.py."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jvdiff.errors import CheckpointError, JvdiffError
from jvdiff.models.quantised import quantise
from jvdiff.models.text import llama, llama_names
from jvdiff.sharding import Placement, make_mesh, param_shardings, read_mesh, rules
from jvdiff.weights import naming, restore

CFG = llama.Config(
    rms_norm_eps=1e-5, rope_theta=500000.0, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8,
)  # fmt: skip
DATA = Path(__file__).parents[2] / "data"
PUBLISHED = json.loads((DATA / "text_configs" / "hunyuan_video_llama.json").read_text())
encode = jax.jit(llama.encode, static_argnums=1)


def error(a, b):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_the_published_encoder_is_read_without_its_last_layers():
    """Snapshot: the 290 tensors of hunyuanvideo-community/HunyuanVideo's text_encoder, of which 271 are used."""
    cfg = llama.Config.from_json(PUBLISHED)
    assert cfg == llama.LLAMA_3_8B and cfg.layers == 30
    published = {}
    for line in (DATA / "tensors" / "hunyuan_video_llama.tsv").read_text().splitlines()[1:]:
        name, shape, layers = line.split("\t")
        names = [name.format(layer=i) for i in range(int(layers))] if layers != "0" else [name]
        published.update(dict.fromkeys(names, tuple(json.loads(shape))))
    abstract, ignored = llama.abstract_params(cfg, jnp.bfloat16), llama_names.ignored(cfg)
    ours = {name: entry.shape for name, entry in naming.expected(llama_names.RULES, abstract).items()}
    assert ours == {name: shape for name, shape in published.items() if not naming.is_ignored(name, ignored)}
    assert len(published) == 290 and len(ours) == 271
    assert published.keys() - ours.keys() == {"norm.weight"} | {
        name for name in published if name.startswith(("layers.30.", "layers.31."))
    }
    leaves = jax.tree.leaves(abstract)
    assert sum(math.prod(leaf.shape) for leaf in leaves) == 7_505_186_816 - 2 * 218_112_000 - 4096  # of the whole
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}


@pytest.fixture(scope="module")
def params(random_params):
    return random_params(llama.abstract_params(CFG))


@pytest.fixture(scope="module")
def prompts():
    ids = np.random.default_rng(0).integers(0, CFG.vocab_size, (2, 16), dtype=np.int32)
    return ids, np.arange(16)[None, :] < np.asarray([[16], [9]])


def plain(params, ids):
    """One text without padding, written out: each query head by itself, float64."""
    tree = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x, K, length = tree["token_embed"]["embedding"][ids], CFG.head_dim, len(ids)

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * scale

    def turned(head):  # pairs (i, i + K/2), a token's place times theta^(-2i/K)
        out = np.empty_like(head)
        for i in range(K // 2):
            angle = np.arange(length) * 500000.0 ** (-2 * i / K)
            a, b = head[:, i], head[:, i + K // 2]
            out[:, i], out[:, i + K // 2] = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
        return out

    for layer in range(2):  # of the four that the configuration names
        attn, ffn = (jax.tree.map(lambda w: w[layer], tree["layers"][part]) for part in ("attn", "ffn"))  # noqa: B023
        h = norm(x, attn["norm"]["scale"])
        heads = []
        for n in range(4):
            q = turned(h @ attn["q"]["kernel"][:, n * K : (n + 1) * K])
            own = slice(n // 2 * K, (n // 2 + 1) * K)  # two query heads share a key head
            k, v = turned(h @ attn["k"]["kernel"][:, own]), h @ attn["v"]["kernel"][:, own]
            weights = np.tril(np.exp(q @ k.T / np.sqrt(K)))
            heads.append(weights / weights.sum(axis=1, keepdims=True) @ v)
        x = x + np.concatenate(heads, axis=1) @ attn["out"]["kernel"]
        h = norm(x, ffn["norm"]["scale"])
        gate = h @ ffn["gate"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ ffn["up"]["kernel"])) @ ffn["down"]["kernel"]
    return x


def test_the_encoder_written_out(params, prompts):
    ids, mask = prompts
    ours = np.asarray(encode(params, CFG, ids, mask))
    for row, length in ((0, 16), (1, 9)):
        assert error(ours[row, :length], plain(params, ids[row, :length])) < 1e-6


def test_a_token_sees_what_is_in_front_of_it(params, prompts):
    """Padding does not count, nor what comes later; what came earlier does."""
    ids, mask = prompts
    want = np.asarray(encode(params, CFG, ids, mask))
    later = np.asarray(encode(params, CFG, np.where(np.arange(16) < 9, ids, 5), mask))
    np.testing.assert_array_equal(later[:, :9], want[:, :9])
    assert error(later[0, 9:], want[0, 9:]) > 0.1
    first = np.asarray(encode(params, CFG, np.where(np.arange(16) < 1, (ids + 1) % CFG.vocab_size, ids), mask))
    assert min(error(first[0, i], want[0, i]) for i in range(16)) > 1e-3


def in_eight_bits(params):
    layers = jax.tree_util.tree_map_with_path(
        lambda path, leaf: quantise(leaf) if path[-1].key == "kernel" else leaf, params["layers"]
    )
    return {**params, "layers": layers}


def test_eight_bits_on_one_device_and_on_a_mesh(params, prompts, monkeypatch):
    """As near as rounding explains, and a mesh gives the numbers of one device, also of weights that it divides."""
    monkeypatch.setattr(rules, "SMALL", 1)
    small, mask = in_eight_bits(params), prompts[1]
    ours = encode(small, CFG, *prompts)
    assert 1e-4 < error(np.asarray(ours)[mask], np.asarray(encode(params, CFG, *prompts))[mask]) < 0.03
    placement = Placement(make_mesh(read_mesh("fsdp=2,tensor=2")))
    placed = jax.device_put(small, param_shardings(placement.mesh, small, llama.PLACES))
    assert not placed["layers"]["attn"]["k"]["kernel"].values.sharding.is_fully_replicated
    found = jax.jit(lambda p: llama.encode(p, CFG, *prompts, placement=placement))(placed)
    assert found.sharding.is_fully_replicated and error(found, ours) < 1e-6


def test_the_last_layers_are_neither_read_nor_written(params, tmp_path):
    """Of a folder as it is published, in float16: they may hold anything."""
    expected = llama.abstract_params(CFG, jnp.bfloat16)
    tensors = {name: x.astype(np.float16) for name, x in naming.disassemble(llama_names.RULES, params)}
    assert not any(name.startswith(("norm", "layers.2", "layers.3")) for name in tensors)
    for layer in range(2, 4):
        first = {name: x for name, x in tensors.items() if name.startswith("layers.0.")}
        tensors |= {name.replace("layers.0.", f"layers.{layer}."): np.zeros((1,), np.int32) for name in first}
    save_file({**tensors, "norm.weight": np.full(32, np.nan, np.float16)}, tmp_path / "model.safetensors")
    with pytest.raises(JvdiffError, match="I32"):
        restore(tmp_path, expected, llama_names.RULES, stem="model")
    read = restore(tmp_path, expected, llama_names.RULES, stem="model", ignored=llama_names.ignored(CFG))
    want = jax.tree.map(lambda x: x.astype(np.float16).astype(jnp.bfloat16), params)
    jax.tree.map(np.testing.assert_array_equal, read, want)


def test_what_a_config_may_say():
    five = {name: value for name, value in PUBLISHED.items() if not name.startswith("rope_")}
    five["rope_parameters"] = {"rope_theta": 500000.0, "rope_type": "default"}  # as transformers 5 writes it
    assert llama.Config.from_json(five) == llama.LLAMA_3_8B == llama.Config.from_json(llama.LLAMA_3_8B.to_json())
    short = {"rms_norm_eps": 1e-5, "rope_theta": 500000, "hidden_size": 96, "num_attention_heads": 6}
    cfg = llama.Config.from_json({**short, "num_key_value_heads": None, "head_dim": None})
    assert (cfg.num_key_value_heads, cfg.head_dim) == (6, 16) and type(cfg.rope_theta) is float


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_theta", None),
        ("rms_norm_eps", None),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_parameters", {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0}),
        ("rope_parameters", {"rope_theta": 10000.0, "rope_type": "default"}),
        ("rope_parameters", {"rope_type": "default"}),
        ("rope_parameters", [500000.0]),
        ("rms_norm_eps", 1),
        ("rms_norm_eps", math.nan),
        ("rope_theta", "500000.0"),
        ("num_attention_heads", 32.0),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("model_type", "llava"),
        ("num_hidden_layers", 2),
        ("num_hidden_layers", 10**6),
        ("num_key_value_heads", 5),
        ("num_attention_heads", 0),
        ("head_dim", 127),
        ("vocab_size", "128320"),
    ],
)
def test_a_bad_config_field_is_named(field, value):
    with pytest.raises(CheckpointError) as caught:
        llama.Config.from_json({**PUBLISHED, field: value})
    message = str(caught.value)
    assert field in message and "Expected" in message and message.count("\n") < 6
