"""The UMT5 text encoder: names in transformers' files <-> jvdiff's parameter tree.

Source of the names: `transformers.UMT5EncoderModel` and the repositories that publish its weights. The embedding is
tied: files hold it once, as `shared.weight`; `encoder.embed_tokens.weight` is its other name.
"""

from jvdiff.weights.naming import LINEAR, Rule, Transform

# Early releases of transformers 5 did not tie the two names, and saved an empty embedding under the second
# (huggingface/transformers#43880): such a file loads without a word and every prompt gives the same clip.
_EMBEDDING = Transform(
    "...",
    "...",
    all_zero="every number of the token embedding is 0, so prompts would have no effect.\n"
    "Such files come from releases of transformers 5 that did not tie `shared.weight` and\n"
    "`encoder.embed_tokens.weight`. Take the text encoder from the published repository.",
)
_ATTENTION = "encoder.block.{layer}.layer.0"
_FFN = "encoder.block.{layer}.layer.1"

RULES = [
    Rule("shared.weight", "token_embed/embedding", _EMBEDDING),
    Rule("encoder.embed_tokens.weight", "token_embed/embedding", _EMBEDDING),
    Rule(f"{_ATTENTION}.layer_norm.weight", "layers/attn/norm/scale"),
    Rule(f"{_ATTENTION}.SelfAttention.q.weight", "layers/attn/q/kernel", LINEAR),
    Rule(f"{_ATTENTION}.SelfAttention.k.weight", "layers/attn/k/kernel", LINEAR),
    Rule(f"{_ATTENTION}.SelfAttention.v.weight", "layers/attn/v/kernel", LINEAR),
    Rule(f"{_ATTENTION}.SelfAttention.o.weight", "layers/attn/out/kernel", LINEAR),
    Rule(f"{_ATTENTION}.SelfAttention.relative_attention_bias.weight", "layers/attn/relative_bias/embedding"),
    Rule(f"{_FFN}.layer_norm.weight", "layers/ffn/norm/scale"),
    Rule(f"{_FFN}.DenseReluDense.wi_0.weight", "layers/ffn/gate/kernel", LINEAR),
    Rule(f"{_FFN}.DenseReluDense.wi_1.weight", "layers/ffn/up/kernel", LINEAR),
    Rule(f"{_FFN}.DenseReluDense.wo.weight", "layers/ffn/down/kernel", LINEAR),
    Rule("encoder.final_layer_norm.weight", "final_norm/scale"),
]
