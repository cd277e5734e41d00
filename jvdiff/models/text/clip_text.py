"""CLIP's text tower (arXiv:2103.00020): token ids in, one vector for each text out.

B batch · S text tokens · D model width.

Follows transformers' CLIPTextModel, whose `pooler_output` this is: the row of the end token behind all layers and the
last norm, not projected. Attention is causal, which is all that hides padding. The layers are those of the picture
tower.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvdiff.config import known_fields
from jvdiff.errors import CheckpointError, UsageError
from jvdiff.models.layers import as_array, compute_dtype
from jvdiff.models.vision.clip import ACTIVATIONS, LAYER_PLACES, abstract_layers, norm, run_layers
from jvdiff.sharding import Placement
from jvdiff.sharding.rules import P, Rules
from jvdiff.types import Array, Params

_FIXED = {"model_type": "clip_text_model"}
_PASSED = (
    "architectures", "attention_dropout", "bos_token_id", "chunk_size_feed_forward", "dropout", "dtype", "id2label",
    "initializer_factor", "initializer_range", "is_encoder_decoder", "label2id", "output_attentions",
    "output_hidden_states", "pad_token_id", "problem_type", "projection_dim", "return_dict", "torch_dtype",
    "transformers_version",
)  # fmt: skip
_HIGHEST = 2  # eos_token_id of old files, which no text of theirs holds: the highest id ends a text

# Where the weights live; `layers` has the layers in axis 0.
PLACES: Rules = (
    *LAYER_PLACES,
    (r"token_embed/embedding", P(None, "tensor")),
    (r"place_embed/embedding|final_norm/(scale|bias)", P()),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes, with transformers' names and defaults, so that a missing key means what it means there.

    max_position_embeddings: the longest text
    eos_token_id: what ends a text; 2 is the highest id of each
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    eos_token_id: int = 49407
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @classmethod
    def from_json(cls, mapping: Mapping[str, Any]) -> Config:
        """Reads the content of a text_encoder_2/config.json.

        Raises:
            CheckpointError: a field is unknown, out of range, of the wrong type, or names another architecture.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        mapping = known_fields("text_encoder_2 config.json", mapping, (*names, *_FIXED, *_PASSED))
        for name, only in _FIXED.items():
            if mapping.get(name, only) != only:
                raise _bad_field(name, mapping[name], repr(only))
        cfg = cls(**{name: mapping[name] for name in names if name in mapping})
        for name in names[:7]:
            low = 0 if name == "eos_token_id" else 1
            if type(value := getattr(cfg, name)) is not int or not low <= value <= 2**20:
                raise _bad_field(name, value, f"a whole number from {low} to {2**20}")
        if cfg.hidden_size % cfg.num_attention_heads:
            raise _bad_field("num_attention_heads", cfg.num_attention_heads, f"a divisor of {cfg.hidden_size}")
        if cfg.hidden_act not in ACTIVATIONS:
            raise _bad_field("hidden_act", cfg.hidden_act, " or ".join(ACTIVATIONS))
        if type(cfg.layer_norm_eps) is not float or not 1e-12 <= cfg.layer_norm_eps <= 0.1:
            raise _bad_field("layer_norm_eps", cfg.layer_norm_eps, "a float from 1e-12 to 0.1")
        return cfg

    def to_json(self) -> dict[str, Any]:
        """The config.json that transformers' CLIPTextModel.from_pretrained reads."""
        return {"architectures": ["CLIPTextModel"], **_FIXED, **dataclasses.asdict(self)}


CLIP_L = Config(
    hidden_size=768, intermediate_size=3072, num_attention_heads=12, eos_token_id=_HIGHEST
)  # of ViT-L/14, as it is published


def _bad_field(name: str, value: object, allowed: str) -> CheckpointError:
    return CheckpointError(
        f"text_encoder_2 config.json: {name} = {value!r:.80} cannot be used by CLIP's text tower.\n"
        f"Expected: {allowed}.\n"
        "Check that the folder is complete and holds a CLIP text model."
    )


def abstract_params(cfg: Config, dtype: Any = jnp.float32) -> Params:
    """The parameter tree as ShapeDtypeStructs, every leaf in `dtype`; `layers` are stacked on axis 0."""
    D = cfg.hidden_size

    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    return {
        "token_embed": {"embedding": leaf(cfg.vocab_size, D)},
        "place_embed": {"embedding": leaf(cfg.max_position_embeddings, D)},
        "layers": abstract_layers(cfg, dtype),
        "final_norm": {"scale": leaf(D), "bias": leaf(D)},
    }


def encode(params: Params, cfg: Config, ids: Array, *, placement: Placement | None = None, dtype: Any = None) -> Array:
    """One vector for each text: [B,D] in `dtype`, which is also that of the matrix products.

    Args:
        params: tree of `abstract_params`; a kernel may be a `Quantised`.
        ids: int32 [B,S], S up to `cfg.max_position_embeddings`, each below `cfg.vocab_size` (a larger one gives NaN:
            check the tokenizer first). Each text has an end token; what is behind the first one means nothing.
        placement: the devices to work on, `params` on them by `PLACES`; every device gets the result.
        dtype: a float dtype; None: that of the token embedding.

    Raises:
        UsageError: a kernel of integers without a scale, or texts that are too long.
    """
    table, length = params["token_embed"]["embedding"], ids.shape[1]
    if length > cfg.max_position_embeddings:
        raise UsageError(
            f"a text has {length} tokens; this tower has places for {cfg.max_position_embeddings} (its config.json's "
            "max_position_embeddings)."
        )
    dtype = compute_dtype(table, dtype)
    x = jnp.take(table, ids, axis=0).astype(jnp.float32)  # [B,S,D]
    x = x + as_array(params["place_embed"]["embedding"], jnp.float32)[None, :length]
    if placement is not None:
        x = placement.replicate(x)
    seen = jnp.asarray(np.tri(length, dtype=bool))[None]  # [1,q,S]
    x = run_layers(params["layers"], cfg, cfg.num_hidden_layers, dtype, x, placement, seen)
    ends = ids if cfg.eos_token_id == _HIGHEST else ids == cfg.eos_token_id
    x = jnp.take_along_axis(x, jnp.argmax(ends, axis=1)[:, None, None], axis=1)[:, 0]  # the first; [B,S,D] -> [B,D]
    x = norm(params["final_norm"], cfg, x).astype(dtype)
    return x if placement is None else placement.replicate(x)
