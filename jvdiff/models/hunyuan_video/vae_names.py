"""HunyuanVideo's VAE: names in Diffusers' files <-> jvdiff's parameter tree.

Source of the names: `diffusers.AutoencoderKLHunyuanVideo` and the published repositories.
"""

from jvdiff.models.hunyuan_video.vae_config import VAEConfig
from jvdiff.weights.naming import CONV_1X1X1, CONV_3D, IDENTITY, LINEAR, Rule, Transform


def _layer(pattern: str, path: str, kernel: Transform) -> list[Rule]:
    return [Rule(f"{pattern}.weight", f"{path}/kernel", kernel), Rule(f"{pattern}.bias", f"{path}/bias")]


def _norm(pattern: str, path: str) -> list[Rule]:
    return [Rule(f"{pattern}.weight", f"{path}/scale", IDENTITY), Rule(f"{pattern}.bias", f"{path}/bias")]


def _residual(pattern: str, path: str) -> list[Rule]:
    return [
        *_norm(f"{pattern}.norm1", f"{path}/norm_1"),
        *_layer(f"{pattern}.conv1.conv", f"{path}/conv_1", CONV_3D),
        *_norm(f"{pattern}.norm2", f"{path}/norm_2"),
        *_layer(f"{pattern}.conv2.conv", f"{path}/conv_2", CONV_3D),
        *_layer(f"{pattern}.conv_shortcut.conv", f"{path}/shortcut", CONV_1X1X1),
    ]


def _side(side: str, way: str) -> list[Rule]:
    """One of both networks, whose levels go a way, up or down."""
    attention = f"{side}.mid_block.attentions.0", f"{side}/mid/attn"
    return [
        *_layer(f"{side}.conv_in.conv", f"{side}/conv_in", CONV_3D),
        *_residual(f"{side}.{way}_blocks.{{level}}.resnets.{{block}}", f"{side}/{way}_{{level}}/res_{{block}}"),
        *_layer(
            f"{side}.{way}_blocks.{{level}}.{way}samplers.0.conv.conv", f"{side}/{way}_{{level}}/{way}sample", CONV_3D
        ),
        *_residual(f"{side}.mid_block.resnets.{{block}}", f"{side}/mid/res_{{block}}"),
        *_norm(f"{attention[0]}.group_norm", f"{attention[1]}/norm"),
        *_layer(f"{attention[0]}.to_q", f"{attention[1]}/q", LINEAR),
        *_layer(f"{attention[0]}.to_k", f"{attention[1]}/k", LINEAR),
        *_layer(f"{attention[0]}.to_v", f"{attention[1]}/v", LINEAR),
        *_layer(f"{attention[0]}.to_out.0", f"{attention[1]}/out", LINEAR),
        *_norm(f"{side}.conv_norm_out", f"{side}/norm_out"),
        *_layer(f"{side}.conv_out.conv", f"{side}/conv_out", CONV_3D),
    ]


def vae(cfg: VAEConfig) -> list[Rule]:
    """The table of the VAE, the same for every configuration."""
    return [
        *_side("encoder", "down"),
        *_layer("quant_conv", "quant_conv", CONV_1X1X1),
        *_layer("post_quant_conv", "post_quant_conv", CONV_1X1X1),
        *_side("decoder", "up"),
    ]
