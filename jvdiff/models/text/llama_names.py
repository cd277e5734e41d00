"""The Llama text encoder: names in transformers' files <-> jvdiff's parameter tree.

Source of the names: `transformers.LlamaModel`, whose files have no prefix.
"""

from jvdiff.models.text.llama import Config
from jvdiff.weights.naming import LINEAR, Rule

_LAYER = "layers.{layer}"

RULES = [
    Rule("embed_tokens.weight", "token_embed/embedding"),
    Rule(f"{_LAYER}.input_layernorm.weight", "layers/attn/norm/scale"),
    Rule(f"{_LAYER}.self_attn.q_proj.weight", "layers/attn/q/kernel", LINEAR),
    Rule(f"{_LAYER}.self_attn.k_proj.weight", "layers/attn/k/kernel", LINEAR),
    Rule(f"{_LAYER}.self_attn.v_proj.weight", "layers/attn/v/kernel", LINEAR),
    Rule(f"{_LAYER}.self_attn.o_proj.weight", "layers/attn/out/kernel", LINEAR),
    Rule(f"{_LAYER}.post_attention_layernorm.weight", "layers/ffn/norm/scale"),
    Rule(f"{_LAYER}.mlp.gate_proj.weight", "layers/ffn/gate/kernel", LINEAR),
    Rule(f"{_LAYER}.mlp.up_proj.weight", "layers/ffn/up/kernel", LINEAR),
    Rule(f"{_LAYER}.mlp.down_proj.weight", "layers/ffn/down/kernel", LINEAR),
]


def ignored(cfg: Config) -> tuple[str, ...]:
    """What is published and not loaded: the last layers and the last norm; and rates, which old releases wrote."""
    last = "|".join(str(layer) for layer in range(cfg.layers, cfg.num_hidden_layers))
    return rf"layers\.({last})\..+", r"norm\.weight", r"layers\.[0-9]+\.self_attn\.rotary_emb\.inv_freq"
