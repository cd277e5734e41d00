"""CLIP's text tower by itself; the comparison with transformers is in tests/parity/test_clip_text.py."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff.errors import CheckpointError, UsageError
from jvdiff.models.quantised import quantise
from jvdiff.models.text import clip_text, clip_text_names
from jvdiff.sharding import Placement, make_mesh, param_shardings, read_mesh, rules
from jvdiff.weights import naming

CFG = clip_text.Config(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=12, eos_token_id=2,
)  # fmt: skip
DATA = Path(__file__).parents[2] / "data"
PUBLISHED = json.loads((DATA / "text_configs" / "hunyuan_video_clip.json").read_text())
encode = jax.jit(clip_text.encode, static_argnums=1)


def error(a, b):
    return np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b))


def test_the_published_tower_is_the_list_of_its_tensors():
    """Snapshot: the 196 tensors of hunyuanvideo-community/HunyuanVideo's text_encoder_2."""
    cfg = clip_text.Config.from_json(PUBLISHED)
    assert cfg == clip_text.CLIP_L == clip_text.Config.from_json(cfg.to_json())
    published = {}
    for line in (DATA / "tensors" / "hunyuan_video_clip.tsv").read_text().splitlines()[1:]:
        name, shape, layers = line.split("\t")
        names = [name.format(layer=i) for i in range(int(layers))] if layers != "0" else [name]
        published.update(dict.fromkeys(names, tuple(json.loads(shape))))
    abstract = clip_text.abstract_params(cfg, jnp.bfloat16)
    ours = {name: entry.shape for name, entry in naming.expected(clip_text_names.RULES, abstract).items()}
    assert ours == published and len(ours) == 196
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract)) == 123_060_480


@pytest.fixture(scope="module")
def params(random_params):
    return random_params(clip_text.abstract_params(CFG))


def test_the_end_token_sees_what_is_in_front_of_it(params):
    """Nothing behind the first end token counts, and everything in front of it does."""
    ids = np.array([[48, 5, 6, 7, 49, 49, 49, 49, 49, 49, 49, 49]], np.int32)
    want = np.asarray(encode(params, CFG, ids))
    behind = np.where(np.arange(12) > 4, np.int32(3), ids)
    np.testing.assert_array_equal(encode(params, CFG, behind), want)
    for i in range(4):
        other = np.where(np.arange(12) == i, np.int32(9), ids)
        assert error(encode(params, CFG, other), want) > 1e-2


def test_eight_bits_on_one_device_and_on_a_mesh(params, monkeypatch):
    """As near as rounding explains, and a mesh gives the numbers of one device, also of weights that it divides."""
    monkeypatch.setattr(rules, "SMALL", 1)
    ids = np.array([[48, 5, 6, 7, 49, 49], [48, 9, 9, 9, 9, 49]], np.int32)
    layers = jax.tree_util.tree_map_with_path(
        lambda path, leaf: quantise(leaf) if path[-1].key == "kernel" else leaf, params["layers"]
    )
    small = {**params, "layers": layers}
    ours = encode(small, CFG, ids)
    assert 1e-4 < error(ours, encode(params, CFG, ids)) < 0.03
    placement = Placement(make_mesh(read_mesh("fsdp=2,tensor=2")))
    placed = jax.device_put(small, param_shardings(placement.mesh, small, clip_text.PLACES))
    assert not placed["layers"]["attn"]["k"]["kernel"].values.sharding.is_fully_replicated
    found = jax.jit(lambda p: clip_text.encode(p, CFG, ids, placement=placement))(placed)
    assert found.sharding.is_fully_replicated and error(found, ours) < 1e-6


def test_a_text_that_is_too_long(params):
    with pytest.raises(UsageError, match="a text has 13 tokens; this tower has places for 12"):
        clip_text.encode(params, CFG, np.ones((1, 13), np.int32))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "clip_vision_model"),
        ("hidden_act", "relu"),
        ("layer_norm_eps", 0),
        ("num_attention_heads", 5),
        ("num_hidden_layers", 0),
        ("eos_token_id", [2]),
        ("eos_token_id", None),
        ("max_position_embeddings", True),
        ("hidden_size", "768"),
    ],
)
def test_a_bad_config_field_is_named(field, value):
    with pytest.raises(CheckpointError) as caught:
        clip_text.Config.from_json({**PUBLISHED, field: value})
    message = str(caught.value)
    assert field in message and "Expected" in message and message.count("\n") < 6
