"""HunyuanVideo: names in Diffusers' files <-> jvdiff's parameter tree of the transformer.

Source of the names: `diffusers.HunyuanVideoTransformer3DModel` and the published repository. In the head's modulation
the scale comes before the shift, as in Diffusers' files. In the original ones, whose other tensors `original` renames,
it is the other way round: both names have a rule.
"""

from dataclasses import replace
from typing import Protocol

from jvdiff.weights.naming import IDENTITY, LINEAR, Rule, patch


def _linear(pattern: str, path: str) -> list[Rule]:
    return [Rule(f"{pattern}.weight", f"{path}/kernel", LINEAR), Rule(f"{pattern}.bias", f"{path}/bias")]


def _norm(pattern: str, path: str) -> list[Rule]:
    return [Rule(f"{pattern}.weight", f"{path}/scale"), Rule(f"{pattern}.bias", f"{path}/bias")]


def _embed(pattern: str, path: str) -> list[Rule]:
    return [rule for n in (1, 2) for rule in _linear(f"{pattern}.linear_{n}", f"{path}/linear_{n}")]


def _ffn(pattern: str, path: str) -> list[Rule]:
    return [*_linear(f"{pattern}.net.0.proj", f"{path}/up"), *_linear(f"{pattern}.net.2", f"{path}/down")]


def _attention(pattern: str, names: tuple[str, str, str], norms: tuple[str, str] | None, path: str) -> list[Rule]:
    """Queries, keys and values; and the norms of the first two."""
    rules = [r for theirs, ours in zip(names, "qkv", strict=True) for r in _linear(f"{pattern}.{theirs}", path + ours)]
    norms_of = zip(norms or (), "qk", strict=False)
    return rules + [Rule(f"{pattern}.{theirs}.weight", f"{path}{ours}_norm/scale") for theirs, ours in norms_of]


_VIDEO = ("to_q", "to_k", "to_v"), ("norm_q", "norm_k")
_TEXT = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")
_REFINER = "context_embedder.token_refiner.refiner_blocks.{layer}"
_DOUBLE, _SINGLE = "transformer_blocks.{layer}", "single_transformer_blocks.{layer}"
_TRANSFORMER = [
    Rule("x_embedder.proj.bias", "patch_embed/bias"),
    *_embed("time_text_embed.timestep_embedder", "time_embed"),
    *_embed("time_text_embed.guidance_embedder", "guidance_embed"),
    *_embed("time_text_embed.text_embedder", "pooled_embed"),
    *_embed("context_embedder.time_text_embed.timestep_embedder", "refiner/time_embed"),
    *_embed("context_embedder.time_text_embed.text_embedder", "refiner/text_embed"),
    *_linear("context_embedder.proj_in", "refiner/proj_in"),
    *_norm(f"{_REFINER}.norm1", "refiner/blocks/norm_1"),
    *_attention(f"{_REFINER}.attn", _VIDEO[0], None, "refiner/blocks/"),
    *_linear(f"{_REFINER}.attn.to_out.0", "refiner/blocks/out"),
    *_norm(f"{_REFINER}.norm2", "refiner/blocks/norm_2"),
    *_ffn(f"{_REFINER}.ff", "refiner/blocks/ffn"),
    *_linear(f"{_REFINER}.norm_out.linear", "refiner/blocks/gates"),
    *_linear(f"{_DOUBLE}.norm1.linear", "double/blocks/video_modulation"),
    *_linear(f"{_DOUBLE}.norm1_context.linear", "double/blocks/text_modulation"),
    *_attention(f"{_DOUBLE}.attn", *_VIDEO, "double/blocks/video_"),
    *_attention(f"{_DOUBLE}.attn", *_TEXT, "double/blocks/text_"),
    *_linear(f"{_DOUBLE}.attn.to_out.0", "double/blocks/video_out"),
    *_linear(f"{_DOUBLE}.attn.to_add_out", "double/blocks/text_out"),
    *_ffn(f"{_DOUBLE}.ff", "double/blocks/video_ffn"),
    *_ffn(f"{_DOUBLE}.ff_context", "double/blocks/text_ffn"),
    *_linear(f"{_SINGLE}.norm.linear", "single/blocks/modulation"),
    *_attention(f"{_SINGLE}.attn", *_VIDEO, "single/blocks/"),
    *_linear(f"{_SINGLE}.proj_mlp", "single/blocks/up"),
    *_linear(f"{_SINGLE}.proj_out", "single/blocks/out"),
    *_linear("norm_out.linear", "head/modulation"),
    Rule("final_layer.adaLN_modulation.1.weight", "head/modulation/kernel", replace(LINEAR, swapped=True)),
    Rule("final_layer.adaLN_modulation.1.bias", "head/modulation/bias", replace(IDENTITY, swapped=True)),
    *_linear("proj_out", "head/proj"),
]


class Patched(Protocol):
    """What the table needs to know of a transformer's configuration."""

    @property
    def patch(self) -> tuple[int, int, int]: ...


def transformer(cfg: Patched) -> list[Rule]:
    """The table of the transformer; `cfg` gives the size of a patch in frames, rows and columns."""
    return [Rule("x_embedder.proj.weight", "patch_embed/kernel", patch(*cfg.patch)), *_TRANSFORMER]
