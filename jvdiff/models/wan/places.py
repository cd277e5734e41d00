"""Where the weights of the transformer live; see `jvdiff.sharding.rules`. `blocks` has the layers in axis 0."""

from jvdiff.sharding.rules import P, Rules

DIT: Rules = (
    (r"blocks/(self|cross)_attn/(q|k|v|gate|image_k|image_v)/kernel", P(None, None, "tensor")),
    (r"blocks/(self|cross)_attn/(q|k|v|gate|image_k|image_v)/bias", P(None, "tensor")),
    (r"blocks/(self|cross)_attn/(q|k|image_q|image_k)_norm/scale", P(None, "tensor")),
    (r"blocks/(self|cross)_attn/out/kernel", P(None, "tensor")),
    (r"blocks/ffn/up/kernel", P(None, None, "tensor")),
    (r"blocks/ffn/up/bias", P(None, "tensor")),
    (r"blocks/ffn/down/kernel", P(None, "tensor")),
    (r"blocks/((self|cross)_attn/out|ffn/down)/bias", P()),
    (r"blocks/(cross_norm/(scale|bias)|modulation)", P()),
    (r"(time|text|image)_embed/linear_1/kernel", P(None, "tensor")),
    (r"(time|text|image)_embed/linear_1/bias", P("tensor")),
    (r"(time|text|image)_embed/linear_2/kernel", P("tensor")),
    (r"(time|text|image)_embed/linear_2/bias", P()),
    (r"image_embed/(places|norm_(1|2)/(scale|bias))", P()),
    (r"time_proj/kernel", P(None, "tensor")),
    (r"time_proj/bias", P("tensor")),
    (r"patch_embed/(kernel|bias)|head/(modulation|proj/(kernel|bias))", P()),
)
