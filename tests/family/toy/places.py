"""Where the weights of the transformer live on a mesh; see `jvdiff.sharding.rules`."""

from jvdiff.sharding.rules import P, Rules

TRANSFORMER: Rules = (
    (r"(embed|time|text|pooled)/kernel", P(None, "tensor")),
    (r"out/kernel", P("tensor")),
)
