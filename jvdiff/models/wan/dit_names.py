"""The Wan 2.1 text-to-video transformer: names in Diffusers' files <-> jvdiff's parameter tree.

Source of the names: `diffusers.WanTransformer3DModel` and the published Wan2.1-T2V-*-Diffusers repositories. Those of
the causal models (wlsaidhi/SFWan2.1-T2V-1.3B-Diffusers) are the same.
Diffusers' `norm2` is the affine norm before cross-attention, which the original Wan files call `norm3`. Files of models
trained with video sparse attention (FastVideo's FastWan2.1-*-Diffusers) have `GATE` besides.
"""

from typing import Protocol

from jvdiff.weights.naming import LINEAR, MODULATION, Rule, patch


def _linear(pattern: str, path: str) -> list[Rule]:
    return [Rule(f"{pattern}.weight", f"{path}/kernel", LINEAR), Rule(f"{pattern}.bias", f"{path}/bias")]


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
_REST = [
    Rule("patch_embedding.bias", "patch_embed/bias"),
    *_linear("condition_embedder.time_embedder.linear_1", "time_embed/linear_1"),
    *_linear("condition_embedder.time_embedder.linear_2", "time_embed/linear_2"),
    *_linear("condition_embedder.time_proj", "time_proj"),
    *_linear("condition_embedder.text_embedder.linear_1", "text_embed/linear_1"),
    *_linear("condition_embedder.text_embedder.linear_2", "text_embed/linear_2"),
    Rule("blocks.{layer}.scale_shift_table", "blocks/modulation", MODULATION),
    *_attention("blocks.{layer}.attn1", "blocks/self_attn"),
    *_attention("blocks.{layer}.attn2", "blocks/cross_attn"),
    *_linear(GATE, "blocks/self_attn/gate"),
    Rule("blocks.{layer}.norm2.weight", "blocks/cross_norm/scale"),
    Rule("blocks.{layer}.norm2.bias", "blocks/cross_norm/bias"),
    *_linear("blocks.{layer}.ffn.net.0.proj", "blocks/ffn/up"),
    *_linear("blocks.{layer}.ffn.net.2", "blocks/ffn/down"),
    Rule("scale_shift_table", "head/modulation", MODULATION),
    *_linear("proj_out", "head/proj"),
]


class Patched(Protocol):
    """What the table needs to know of a transformer's configuration."""

    @property
    def patch_size(self) -> tuple[int, int, int]: ...


def rules(cfg: Patched) -> list[Rule]:
    """The table of one transformer; `cfg` gives the size of a patch in frames, rows and columns."""
    return [Rule("patch_embedding.weight", "patch_embed/kernel", patch(*cfg.patch_size)), *_REST]
