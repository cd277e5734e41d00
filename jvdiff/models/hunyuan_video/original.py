"""The transformer's tensors in the layout of the model's authors, by the names that Diffusers' files have.

There queries, keys and values are one tensor, in single blocks with the feed-forward behind them: pieces of it are rows
that lie behind one another, so that nothing is read to part them. In the modulation of the head the shift comes before
the scale; it keeps its name, for which `names` has a rule of its own. Files of other programs put a prefix before all.
"""

import re
from collections.abc import Mapping
from typing import Any

from jvdiff.models.hunyuan_video.config import DiTConfig

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")
_FIRST = "img_in.proj.weight"  # by which the layout is known
_REFINER = "context_embedder.token_refiner.refiner_blocks"
_WORDS = (  # name there, in front of a word's border -> name here, the first that fits
    (r"img_in", "x_embedder"),
    (r"txt_in\.input_embedder", "context_embedder.proj_in"),
    (r"txt_in\.t_embedder\.mlp\.0", "context_embedder.time_text_embed.timestep_embedder.linear_1"),
    (r"txt_in\.t_embedder\.mlp\.2", "context_embedder.time_text_embed.timestep_embedder.linear_2"),
    (r"txt_in\.c_embedder", "context_embedder.time_text_embed.text_embedder"),
    (r"txt_in\.individual_token_refiner\.blocks\.(\d+)\.self_attn_proj", _REFINER + r".\1.attn.to_out.0"),
    (r"txt_in\.individual_token_refiner\.blocks\.(\d+)\.mlp\.fc1", _REFINER + r".\1.ff.net.0.proj"),
    (r"txt_in\.individual_token_refiner\.blocks\.(\d+)\.mlp\.fc2", _REFINER + r".\1.ff.net.2"),
    (r"txt_in\.individual_token_refiner\.blocks\.(\d+)\.adaLN_modulation\.1", _REFINER + r".\1.norm_out.linear"),
    (r"txt_in\.individual_token_refiner\.blocks", _REFINER),
    (r"time_in\.mlp\.0", "time_text_embed.timestep_embedder.linear_1"),
    (r"time_in\.mlp\.2", "time_text_embed.timestep_embedder.linear_2"),
    (r"guidance_in\.mlp\.0", "time_text_embed.guidance_embedder.linear_1"),
    (r"guidance_in\.mlp\.2", "time_text_embed.guidance_embedder.linear_2"),
    (r"vector_in\.in_layer", "time_text_embed.text_embedder.linear_1"),
    (r"vector_in\.out_layer", "time_text_embed.text_embedder.linear_2"),
    (r"double_blocks\.(\d+)\.img_mod\.linear", r"transformer_blocks.\1.norm1.linear"),
    (r"double_blocks\.(\d+)\.txt_mod\.linear", r"transformer_blocks.\1.norm1_context.linear"),
    (r"double_blocks\.(\d+)\.img_attn_([qk])_norm", r"transformer_blocks.\1.attn.norm_\2"),
    (r"double_blocks\.(\d+)\.txt_attn_([qk])_norm", r"transformer_blocks.\1.attn.norm_added_\2"),
    (r"double_blocks\.(\d+)\.img_attn_proj", r"transformer_blocks.\1.attn.to_out.0"),
    (r"double_blocks\.(\d+)\.txt_attn_proj", r"transformer_blocks.\1.attn.to_add_out"),
    (r"double_blocks\.(\d+)\.img_mlp\.fc1", r"transformer_blocks.\1.ff.net.0.proj"),
    (r"double_blocks\.(\d+)\.img_mlp\.fc2", r"transformer_blocks.\1.ff.net.2"),
    (r"double_blocks\.(\d+)\.txt_mlp\.fc1", r"transformer_blocks.\1.ff_context.net.0.proj"),
    (r"double_blocks\.(\d+)\.txt_mlp\.fc2", r"transformer_blocks.\1.ff_context.net.2"),
    (r"single_blocks\.(\d+)\.linear2", r"single_transformer_blocks.\1.proj_out"),
    (r"single_blocks\.(\d+)\.([qk])_norm", r"single_transformer_blocks.\1.attn.norm_\2"),
    (r"single_blocks\.(\d+)\.modulation\.linear", r"single_transformer_blocks.\1.norm.linear"),
    (r"final_layer\.linear", "proj_out"),
)
_SINGLE = r"single_transformer_blocks.\1"
_FUSED = (  # name there -> names of its rows here, in their order
    (
        r"txt_in\.individual_token_refiner\.blocks\.(\d+)\.self_attn_qkv",
        tuple(_REFINER + rf".\1.attn.to_{x}" for x in "qkv"),
    ),
    (r"double_blocks\.(\d+)\.img_attn_qkv", tuple(rf"transformer_blocks.\1.attn.to_{x}" for x in "qkv")),
    (r"double_blocks\.(\d+)\.txt_attn_qkv", tuple(rf"transformer_blocks.\1.attn.add_{x}_proj" for x in "qkv")),
    (r"single_blocks\.(\d+)\.linear1", (*(f"{_SINGLE}.attn.to_{x}" for x in "qkv"), f"{_SINGLE}.proj_mlp")),
)


def renamed(cfg: DiTConfig, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tensors (`weights.safetensors.Tensor`) of a file in either layout, by the names of Diffusers.

    What the table does not know, or what has other sizes than the configuration says, keeps its name.
    """
    prefix = next((p for p in ("", *_PREFIXES) if p + _FIRST in tensors), None)
    if prefix is None:
        return tensors
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        found.update(_pieces(cfg, name.removeprefix(prefix), tensor))
    return found


def _pieces(cfg: DiTConfig, name: str, tensor: Any) -> Mapping[str, Any]:
    stem, _, kind = name.rpartition(".")
    for pattern, parts in _FUSED:
        sizes = [cfg.width] * 3 + [cfg.ffn_dim] * (len(parts) - 3)
        if (match := re.fullmatch(pattern, stem)) and tensor.shape[:1] == (sum(sizes),):
            starts = [sum(sizes[:i]) for i in range(len(sizes))]
            rows = zip(parts, starts, sizes, strict=True)
            return {f"{match.expand(part)}.{kind}": tensor.rows(start, start + size) for part, start, size in rows}
    for pattern, here in _WORDS:
        if match := re.match(rf"{pattern}(?=\.|$)", stem):
            return {f"{match.expand(here)}{stem[match.end() :]}.{kind}": tensor}
    return {name: tensor}
