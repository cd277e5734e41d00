"""Wan: names in Diffusers' files <-> jvdiff's parameter trees, of the transformer and of the causal VAE.

Source of the names: `diffusers.WanTransformer3DModel`, `diffusers.AutoencoderKLWan` and the published
Wan2.1-T2V-*-Diffusers repositories. Those of the causal models (wlsaidhi/SFWan2.1-T2V-1.3B-Diffusers) are the same.

Diffusers' `norm2` is the affine norm before cross-attention, which the original Wan files call `norm3`. Files of models
trained with video sparse attention (FastVideo's FastWan2.1-*-Diffusers) have `GATE` besides, those that attend to
pictures `IMAGE_Q_NORM`, which nothing reads. Diffusers numbers the encoder's residual blocks and downsamplers in one
flat list `down_blocks.0, 1, 2, ...` (Wan 2.2's residual VAE has stages); the tree has stages.
"""

from collections.abc import Sequence
from typing import Protocol

from jvdiff.weights.naming import (
    CONV_1X1,
    CONV_1X1X1,
    CONV_2D,
    CONV_3D,
    CONV_TIME,
    GAMMA_IMAGE,
    GAMMA_VIDEO,
    LINEAR,
    MODULATION,
    Rule,
    Transform,
    patch,
)

# ----------------------------------------------------------------------------------------------------- transformer


def _linear(pattern: str, path: str) -> list[Rule]:
    return [Rule(f"{pattern}.weight", f"{path}/kernel", LINEAR), Rule(f"{pattern}.bias", f"{path}/bias")]


def _norm(pattern: str, path: str) -> list[Rule]:
    return [Rule(f"{pattern}.weight", f"{path}/scale"), Rule(f"{pattern}.bias", f"{path}/bias")]


def _attention(pattern: str, path: str) -> list[Rule]:
    return [
        *_linear(f"{pattern}.to_q", f"{path}/q"),
        *_linear(f"{pattern}.to_k", f"{path}/k"),
        *_linear(f"{pattern}.to_v", f"{path}/v"),
        *_linear(f"{pattern}.to_out.0", f"{path}/out"),
        Rule(f"{pattern}.norm_q.weight", f"{path}/q_norm/scale"),
        Rule(f"{pattern}.norm_k.weight", f"{path}/k_norm/scale"),
    ]


GATE = "blocks.{layer}.to_gate_compress"
IMAGE_Q_NORM = "blocks.{layer}.attn2.norm_added_q.weight"
_IMAGE = "condition_embedder.image_embedder"
_TRANSFORMER = [
    Rule("patch_embedding.bias", "patch_embed/bias"),
    *_linear("condition_embedder.time_embedder.linear_1", "time_embed/linear_1"),
    *_linear("condition_embedder.time_embedder.linear_2", "time_embed/linear_2"),
    *_linear("condition_embedder.time_proj", "time_proj"),
    *_linear("condition_embedder.text_embedder.linear_1", "text_embed/linear_1"),
    *_linear("condition_embedder.text_embedder.linear_2", "text_embed/linear_2"),
    Rule(f"{_IMAGE}.pos_embed", "image_embed/places", Transform("1 i d", "i d")),
    *_norm(f"{_IMAGE}.norm1", "image_embed/norm_1"),
    *_linear(f"{_IMAGE}.ff.net.0.proj", "image_embed/linear_1"),
    *_linear(f"{_IMAGE}.ff.net.2", "image_embed/linear_2"),
    *_norm(f"{_IMAGE}.norm2", "image_embed/norm_2"),
    Rule("blocks.{layer}.scale_shift_table", "blocks/modulation", MODULATION),
    *_attention("blocks.{layer}.attn1", "blocks/self_attn"),
    *_attention("blocks.{layer}.attn2", "blocks/cross_attn"),
    *_linear(GATE, "blocks/self_attn/gate"),
    *_linear("blocks.{layer}.attn2.add_k_proj", "blocks/cross_attn/image_k"),
    *_linear("blocks.{layer}.attn2.add_v_proj", "blocks/cross_attn/image_v"),
    Rule("blocks.{layer}.attn2.norm_added_k.weight", "blocks/cross_attn/image_k_norm/scale"),
    Rule(IMAGE_Q_NORM, "blocks/cross_attn/image_q_norm/scale"),
    *_norm("blocks.{layer}.norm2", "blocks/cross_norm"),
    *_linear("blocks.{layer}.ffn.net.0.proj", "blocks/ffn/up"),
    *_linear("blocks.{layer}.ffn.net.2", "blocks/ffn/down"),
    Rule("scale_shift_table", "head/modulation", MODULATION),
    *_linear("proj_out", "head/proj"),
]


class Patched(Protocol):
    """What the table needs to know of a transformer's configuration."""

    @property
    def patch_size(self) -> tuple[int, int, int]: ...


def transformer(cfg: Patched) -> list[Rule]:
    """The table of one transformer; `cfg` gives the size of a patch in frames, rows and columns."""
    return [Rule("patch_embedding.weight", "patch_embed/kernel", patch(*cfg.patch_size)), *_TRANSFORMER]


# ------------------------------------------------------------------------------------------------------------- VAE


class Stages(Protocol):
    """What the table needs to know of a VAE's configuration."""

    @property
    def dim_mult(self) -> Sequence[int]: ...

    @property
    def num_res_blocks(self) -> int: ...

    @property
    def is_residual(self) -> bool: ...


def _conv(pattern: str, path: str, kernel: Transform) -> list[Rule]:
    return [Rule(f"{pattern}.weight", f"{path}/kernel", kernel), Rule(f"{pattern}.bias", f"{path}/bias")]


def _residual(pattern: str, path: str) -> list[Rule]:
    return [
        Rule(f"{pattern}.norm1.gamma", f"{path}/norm_1/scale", GAMMA_VIDEO),
        *_conv(f"{pattern}.conv1", f"{path}/conv_1", CONV_3D),
        Rule(f"{pattern}.norm2.gamma", f"{path}/norm_2/scale", GAMMA_VIDEO),
        *_conv(f"{pattern}.conv2", f"{path}/conv_2", CONV_3D),
        *_conv(f"{pattern}.conv_shortcut", f"{path}/shortcut", CONV_1X1X1),
    ]


def _resample(pattern: str, path: str) -> list[Rule]:
    return [
        *_conv(f"{pattern}.resample.1", f"{path}/conv", CONV_2D),
        *_conv(f"{pattern}.time_conv", f"{path}/time_conv", CONV_TIME),
    ]


def _side(side: str) -> list[Rule]:
    """What encoder and decoder have in common."""
    return [
        *_conv(f"{side}.conv_in", f"{side}/conv_in", CONV_3D),
        *_residual(f"{side}.mid_block.resnets.{{block}}", f"{side}/mid/res_{{block}}"),
        Rule(f"{side}.mid_block.attentions.0.norm.gamma", f"{side}/mid/attn/norm/scale", GAMMA_IMAGE),
        *_conv(f"{side}.mid_block.attentions.0.to_qkv", f"{side}/mid/attn/qkv", CONV_1X1),
        *_conv(f"{side}.mid_block.attentions.0.proj", f"{side}/mid/attn/out", CONV_1X1),
        Rule(f"{side}.norm_out.gamma", f"{side}/norm_out/scale", GAMMA_VIDEO),
        *_conv(f"{side}.conv_out", f"{side}/conv_out", CONV_3D),
    ]


def vae(cfg: Stages) -> list[Rule]:
    """The table of one VAE; `cfg` gives the number of stages and of residual blocks in each."""
    return [
        *_side("encoder"),
        *(_stages_down() if cfg.is_residual else _flat_list_down(cfg)),
        *_conv("quant_conv", "quant_conv", CONV_1X1X1),
        *_conv("post_quant_conv", "post_quant_conv", CONV_1X1X1),
        *_side("decoder"),
        *_residual("decoder.up_blocks.{stage}.resnets.{block}", "decoder/up_{stage}/res_{block}"),
        *_resample(
            "decoder.up_blocks.{stage}." + ("upsampler" if cfg.is_residual else "upsamplers.0"),
            "decoder/up_{stage}/upsample",
        ),
    ]


def _flat_list_down(cfg: Stages) -> list[Rule]:
    """The encoder of Wan 2.1, whose published names count through all stages."""
    down = []
    for stage in range(len(cfg.dim_mult)):
        first = stage * (cfg.num_res_blocks + 1)
        for block in range(cfg.num_res_blocks):
            down += _residual(f"encoder.down_blocks.{first + block}", f"encoder/down_{stage}/res_{block}")
        down += _resample(f"encoder.down_blocks.{first + cfg.num_res_blocks}", f"encoder/down_{stage}/downsample")
    return down


def _stages_down() -> list[Rule]:
    """The encoder of Wan 2.2."""
    return [
        *_residual("encoder.down_blocks.{stage}.resnets.{block}", "encoder/down_{stage}/res_{block}"),
        *_resample("encoder.down_blocks.{stage}.downsampler", "encoder/down_{stage}/downsample"),
    ]
