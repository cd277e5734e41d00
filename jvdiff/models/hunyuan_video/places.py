"""Where the weights of the transformer live; see `jvdiff.sharding.rules`. `blocks` have the layers in axis 0.

The matrix that takes attention and feed-forward side by side (`single/blocks/out`) is whole on `tensor`: its rows are
of both, so that no equal cut gives each device the rows of what it has. Each multiplies with its own part of them.
"""

from jvdiff.sharding.rules import P, Rules

DIT: Rules = (
    (r"blocks/((video|text)_)?(q|k|v)/kernel", P(None, None, "tensor")),
    (r"blocks/((video|text)_)?(q|k|v)/bias", P(None, "tensor")),
    (r"blocks/((video|text)_)?(q|k)_norm/scale", P()),
    (r"refiner/blocks/out/kernel|blocks/(video|text)_out/kernel", P(None, "tensor")),
    (r"blocks/(out/kernel|((video|text)_)?out/bias)", P()),
    (r"blocks/((video_|text_)?ffn/)?up/kernel", P(None, None, "tensor")),
    (r"blocks/((video_|text_)?ffn/)?up/bias", P(None, "tensor")),
    (r"blocks/(video_|text_)?ffn/down/kernel", P(None, "tensor")),
    (r"blocks/(video_|text_)?ffn/down/bias", P()),
    (r"blocks/((video|text)_)?(modulation|gates)/(kernel|bias)", P()),
    (r"refiner/blocks/norm_(1|2)/(scale|bias)", P()),
    (r"(time|text|pooled|guidance)_embed/linear_1/kernel", P(None, "tensor")),
    (r"(time|text|pooled|guidance)_embed/linear_1/bias", P("tensor")),
    (r"(time|text|pooled|guidance)_embed/linear_2/kernel", P("tensor")),
    (r"(time|text|pooled|guidance)_embed/linear_2/bias", P()),
    (r"(patch_embed|refiner/proj_in|head/(modulation|proj))/(kernel|bias)", P()),
)
