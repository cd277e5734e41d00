"""CLIP's picture tower: names in transformers' files <-> jvdiff's parameter tree.

Files of a CLIPVisionModelWithProjection, and of a CLIPVisionModel before transformers 5, have `vision_model.` in front
of every name; those that transformers 5 writes of a CLIPVisionModel have not. `pre_layrnorm` is spelt so.
"""

from collections.abc import Sequence

from jvdiff.models.vision.clip import Config
from jvdiff.weights.naming import IDENTITY, LINEAR, Rule, Transform

IGNORED = (r"(vision_model\.)?embeddings\.position_ids",)  # 0, 1, 2, ..., which older releases wrote
_LAYER = "encoder.layers.{layer}"


def norm(pattern: str, path: str) -> list[tuple[str, str, Transform]]:
    """The two tensors of a LayerNorm."""
    return [(f"{pattern}.weight", f"{path}/scale", IDENTITY), (f"{pattern}.bias", f"{path}/bias", IDENTITY)]


def _linear(pattern: str, path: str) -> list[tuple[str, str, Transform]]:
    return [(f"{pattern}.weight", f"{path}/kernel", LINEAR), (f"{pattern}.bias", f"{path}/bias", IDENTITY)]


LAYERS = [  # of both towers, that of pictures and that of texts
    *norm(f"{_LAYER}.layer_norm1", "layers/norm_1"),
    *_linear(f"{_LAYER}.self_attn.q_proj", "layers/attn/q"),
    *_linear(f"{_LAYER}.self_attn.k_proj", "layers/attn/k"),
    *_linear(f"{_LAYER}.self_attn.v_proj", "layers/attn/v"),
    *_linear(f"{_LAYER}.self_attn.out_proj", "layers/attn/out"),
    *norm(f"{_LAYER}.layer_norm2", "layers/norm_2"),
    *_linear(f"{_LAYER}.mlp.fc1", "layers/mlp/up"),
    *_linear(f"{_LAYER}.mlp.fc2", "layers/mlp/down"),
]


def rules(cfg: Config) -> Sequence[Rule]:
    """The table of one tower; both spellings of each name, that of its class first."""
    size = cfg.patch_size
    patch = Transform("d c h w", "(h w c) d", (("h", size), ("w", size)))
    table = [
        ("embeddings.class_embedding", "class_embed/embedding", IDENTITY),
        ("embeddings.patch_embedding.weight", "patch_embed/kernel", patch),
        ("embeddings.position_embedding.weight", "place_embed/embedding", IDENTITY),
        *norm("pre_layrnorm", "pre_norm"),
        *LAYERS,
        *norm("post_layernorm", "post_norm"),
    ]
    spellings = ("vision_model.", "") if cfg.projected else ("", "vision_model.")
    both = [Rule(prefix + pattern, path, how) for prefix in spellings for pattern, path, how in table]
    return [*both, Rule("visual_projection.weight", "projection/kernel", LINEAR)]
