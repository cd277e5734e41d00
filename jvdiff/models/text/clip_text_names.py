"""CLIP's text tower: names in transformers' files <-> jvdiff's parameter tree.

Published files have `text_model.` in front of every name; those that transformers 5 writes have not.
"""

from jvdiff.models.vision.clip_names import LAYERS, norm
from jvdiff.weights.naming import IDENTITY, Rule

IGNORED = (r"(text_model\.)?embeddings\.position_ids",)  # 0, 1, 2, ..., which older releases wrote

_TABLE = [
    ("embeddings.token_embedding.weight", "token_embed/embedding", IDENTITY),
    ("embeddings.position_embedding.weight", "place_embed/embedding", IDENTITY),
    *LAYERS,
    *norm("final_layer_norm", "final_norm"),
]
RULES = [Rule(prefix + pattern, path, how) for prefix in ("text_model.", "") for pattern, path, how in _TABLE]
