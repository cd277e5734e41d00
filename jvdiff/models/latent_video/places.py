"""Where the weights of the transformer live; see `jvdiff.sharding.rules`. `blocks` has the layers in axis 0."""

from jvdiff.sharding.rules import P, Rules

DIT: Rules = (
    (r"blocks/(spatial|temporal)_attn/(q|k|v)/kernel", P(None, None, "tensor")),
    (r"blocks/(spatial|temporal)_attn/(q|k|v)/bias", P(None, "tensor")),
    (r"blocks/(spatial|temporal)_attn/out/kernel", P(None, "tensor")),
    (r"blocks/ffn/(gate|up)/kernel", P(None, None, "tensor")),
    (r"blocks/ffn/(gate|up)/bias", P(None, "tensor")),
    (r"blocks/ffn/down/kernel", P(None, "tensor")),
    (r"blocks/modulation/kernel", P(None, None, "tensor")),
    (r"blocks/modulation/bias", P(None, "tensor")),
    (r"blocks/((spatial|temporal)_attn/(out/bias|(q|k)_norm/scale)|ffn/down/bias)", P()),
    (r"time_embed/linear_1/kernel", P(None, "tensor")),
    (r"time_embed/linear_1/bias", P("tensor")),
    (r"time_embed/linear_2/kernel", P("tensor")),
    (r"time_embed/linear_2/bias", P()),
    (r"label_embed/embedding|(patch_embed|head_modulation|head)/(kernel|bias)", P()),
)
