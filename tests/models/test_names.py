"""The tables name exactly the published tensors, with their shapes, for every published configuration.

The lists in tests/data/tensors are those of the published repositories' files: name, shape, and for a repeated layer
how many there are.
"""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jvdiff.errors import CheckpointError, UnsafeFormat
from jvdiff.models import wan
from jvdiff.models.family import read_config, read_weights
from jvdiff.models.text import umt5
from jvdiff.models.vision import clip
from jvdiff.models.wan.family import IMAGE_ENCODER, TEXT_ENCODER, TEXT_TO_VIDEO, TRANSFORMER, VAE
from jvdiff.weights import naming as rules

LISTS = Path(__file__).parents[1] / "data" / "tensors"
FASTWAN = dataclasses.replace(wan.WAN_2_1_T2V_1_3B, gate_compress=True)
WITH_DEAD_NORM = dataclasses.replace(wan.WAN_2_1_I2V_14B, image_q_norm=True)
SELF_FORCING = dataclasses.replace(wan.WAN_2_1_T2V_1_3B, causal=True)


def published(name):
    tensors = {}
    for line in (LISTS / f"{name}.tsv").read_text().splitlines()[1:]:
        pattern, shape, layers = line.split("\t")
        names = [pattern.format(layer=i) for i in range(int(layers))] or [pattern]
        tensors.update(dict.fromkeys(names, tuple(json.loads(shape))))
    return tensors


@pytest.mark.parametrize(
    "name, part, cfg, count, parameters",
    [
        ("wan2_1_t2v_1_3b", TRANSFORMER, wan.WAN_2_1_T2V_1_3B, 825, 1_418_996_800),
        ("wan2_1_t2v_1_3b", TRANSFORMER, SELF_FORCING, 825, 1_418_996_800),  # the published lists are equal
        ("fastwan2_1_t2v_1_3b", TRANSFORMER, FASTWAN, 885, 1_489_821_760),
        ("wan2_1_t2v_14b", TRANSFORMER, wan.WAN_2_1_T2V_14B, 1095, 14_288_491_584),  # and both of Wan 2.2 T2V-A14B
        ("wan2_1_i2v_14b", TRANSFORMER, WITH_DEAD_NORM, 1343, 16_395_083_584),  # 480P and 720P alike
        ("wan2_1_i2v_image_encoder", IMAGE_ENCODER, clip.VIT_H_14, 520, 632_076_800),
        ("wan2_1_vae", VAE, wan.WAN_2_1_VAE, 194, 126_892_531),
        ("wan2_2_ti2v_5b", TRANSFORMER, wan.WAN_2_2_TI2V_5B, 825, 4_999_787_712),
        ("wan2_2_vae", VAE, wan.WAN_2_2_VAE, 196, 704_688_668),
        ("umt5_xxl", TEXT_ENCODER, umt5.UMT5_XXL, 242, 5_680_910_336),
    ],
)
def test_published_tensors(name, part, cfg, count, parameters):
    abstract = part.abstract(cfg, jnp.bfloat16)
    ours = {tensor: entry.shape for tensor, entry in rules.expected(part.names(cfg), abstract).items()}
    assert ours == published(name)
    assert len(ours) == count
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract)) == parameters


@pytest.mark.parametrize(
    "cfg, more, count, parameters",
    [
        (wan.WAN_2_1_I2V_14B, {}, 1303, 16_394_878_784),
        (wan.WAN_2_1_FLF2V_14B, {"condition_embedder.image_embedder.pos_embed": (1, 514, 1280)}, 1304, 16_395_536_704),
    ],
)
def test_derived_tensors(cfg, more, count, parameters):
    """No list of FLF2V's file is at hand: it is derived from image-to-video's, without the norm that nobody uses."""
    abstract = TRANSFORMER.abstract(cfg, jnp.bfloat16)
    ours = {tensor: entry.shape for tensor, entry in rules.expected(TRANSFORMER.names(cfg), abstract).items()}
    expected = {name: shape for name, shape in published("wan2_1_i2v_14b").items() if "norm_added_q" not in name}
    assert ours == expected | more and len(ours) == count
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract)) == parameters


def test_the_two_experts_for_pictures():
    """Both files of Wan 2.2 I2V-A14B list what Wan 2.1's text-to-video does, with 36 channels in."""
    abstract = TRANSFORMER.abstract(wan.WAN_2_2_I2V_A14B, jnp.bfloat16)
    expected = rules.expected(TRANSFORMER.names(wan.WAN_2_2_I2V_A14B), abstract)
    ours = {tensor: entry.shape for tensor, entry in expected.items()}
    assert ours == published("wan2_1_t2v_14b") | {"patch_embedding.weight": (5120, 36, 1, 2, 2)}
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract)) == 14_288_901_184


def test_fastwan_14b_is_derived():
    """No list of it is published: a gate beside each block of Wan 2.1's, as in the list of the 1.3B."""

    def gated(name, layers, width):
        gates = {"weight": (width, width), "bias": (width,)}
        return published(name) | {
            f"blocks.{i}.to_gate_compress.{k}": v for i in range(layers) for k, v in gates.items()
        }

    assert gated("wan2_1_t2v_1_3b", 30, 1536) == published("fastwan2_1_t2v_1_3b")
    cfg = dataclasses.replace(wan.WAN_2_1_T2V_14B, gate_compress=True)
    abstract = TRANSFORMER.abstract(cfg, jnp.bfloat16)
    ours = {tensor: entry.shape for tensor, entry in rules.expected(TRANSFORMER.names(cfg), abstract).items()}
    assert ours == gated("wan2_1_t2v_14b", 40, 5120)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract)) == 15_337_272_384


def test_the_causal_class(tmp_path):
    """The class's name is all in which Self-Forcing's config.json differs from Wan 2.1's."""
    config = wan.WAN_2_1_T2V_1_3B.to_json() | {"_class_name": "CausalWanTransformer3DModel"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path, TRANSFORMER) == SELF_FORCING
    assert SELF_FORCING.to_json() == config
    assert "causal" not in config


def test_a_tower_shows_by_its_tensors(tmp_path):
    """config.json is the same with the projection and without; so are names, with `vision_model.` and without."""
    cfg = clip.Config(8, 16, 4, num_hidden_layers=2, num_attention_heads=2, image_size=6, patch_size=3)
    for projected, prefix in ((True, "vision_model."), (False, "vision_model."), (False, "")):
        made = dataclasses.replace(cfg, projected=projected)
        tree = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), clip.abstract_params(made))
        weights = {
            name if name.startswith("visual") else prefix + name.removeprefix("vision_model."): tensor
            for name, tensor in rules.disassemble(IMAGE_ENCODER.names(made), tree)
        }
        (tmp_path / "config.json").write_text(json.dumps(cfg.to_json()))
        save_file(weights | {f"{prefix}embeddings.position_ids": np.arange(5)}, tmp_path / "model.safetensors")
        assert read_config(tmp_path, IMAGE_ENCODER) == made
        read = read_weights(tmp_path, IMAGE_ENCODER, made, jnp.float32)
        assert jax.tree.map(jnp.shape, read) == jax.tree.map(jnp.shape, tree)


@pytest.mark.parametrize("sharded", [False, True])
def test_the_gate_shows_by_its_tensors(tmp_path, sharded):
    """FastWan's config.json is Wan 2.1's to the letter."""
    cfg = wan.DiTConfig(num_attention_heads=1, attention_head_dim=6, ffn_dim=8, num_layers=1, text_dim=4, freq_dim=2)
    (tmp_path / "config.json").write_text(json.dumps(cfg.to_json()))
    assert read_config(tmp_path, TRANSFORMER) == cfg  # without weights beside it
    gated = dataclasses.replace(cfg, gate_compress=True)
    weights = dict(rules.disassemble(TRANSFORMER.names(gated), wan.init_params(jax.random.key(0), gated)))
    stem = "diffusion_pytorch_model"
    file = f"{stem}-00001-of-00001.safetensors" if sharded else f"{stem}.safetensors"
    if sharded:
        index = {"weight_map": dict.fromkeys(weights, file)}
        (tmp_path / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    save_file(weights, tmp_path / file)
    assert read_config(tmp_path, TRANSFORMER) == gated
    (tmp_path / "config.json").write_text(json.dumps(cfg.to_json() | {"gate_compress": False}))
    assert read_config(tmp_path, TRANSFORMER) == cfg  # what the configuration says holds


def test_other_sizes_have_other_lists():
    cfg = wan.VAEConfig(dim_mult=(1, 2, 2), num_res_blocks=1, temperal_downsample=(True, False))
    names = rules.expected(VAE.names(cfg), VAE.abstract(cfg, jnp.float32))
    assert "encoder.down_blocks.1.time_conv.weight" in names  # stage 0: one residual block, then the downsampler
    assert "encoder.down_blocks.3.resample.1.weight" in names
    assert "encoder.down_blocks.3.time_conv.weight" not in names
    assert "encoder.down_blocks.5.conv1.weight" not in names


@pytest.mark.parametrize(
    "config, error, words",
    [
        (
            {"_class_name": "HunyuanVideoTransformer3DModel"},
            CheckpointError,
            "describes 'HunyuanVideo",
        ),
        ({}, CheckpointError, "'None'"),
        ({"model_type": "umt5", "auto_map": {"AutoModel": "evil.Model"}}, UnsafeFormat, "remote code is not supported"),
        ({"_class_name": "WanTransformer3DModel", "num_layers": 10**9}, CheckpointError, "num_layers"),
        ({"_class_name": "WanTransformer3DModel", "num_layers": "30"}, CheckpointError, "num_layers"),
        ({"model_type": "umt5", "d_model": -1}, CheckpointError, "d_model"),
        ({"_class_name": "AutoencoderKLWan", "base_dim": 1.5}, CheckpointError, "base_dim"),
    ],
)
def test_unusable_configurations(tmp_path, config, error, words):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=words):
        read_config(tmp_path, TEXT_TO_VIDEO.parts)


def test_a_configuration_with_nan_is_not_json(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "WanTransformer3DModel", "eps": NaN}')
    with pytest.raises(CheckpointError, match="NaN is not JSON"):
        read_config(tmp_path, TEXT_TO_VIDEO.parts)
