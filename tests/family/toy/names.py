"""Published tensors of the toy and the leaves that they fill."""

from jvdiff.weights.naming import LINEAR, Rule

TRANSFORMER = [
    Rule("x_embedder.weight", "embed/kernel", LINEAR),
    Rule("time_embedder.weight", "time/kernel", LINEAR),
    Rule("text_embedder.weight", "text/kernel", LINEAR),
    Rule("pooled_embedder.weight", "pooled/kernel", LINEAR),
    Rule("proj_out.weight", "out/kernel", LINEAR),
]
VAE = [Rule("encoder.weight", "encode/kernel", LINEAR), Rule("decoder.weight", "decode/kernel", LINEAR)]
TEXT = [Rule("shared.weight", "words/embedding")]
TEXT_IGNORED = (r"logit_scale", r"text_projection\..*")  # of the contrastive training; a generator has no use for them
PICTURE = [Rule("visual.weight", "embed/kernel", LINEAR)]
