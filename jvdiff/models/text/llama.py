"""Llama as a text encoder (https://arxiv.org/abs/2407.21783): token ids in, the stream before the last layers out.

B batch · S text tokens (`q` for the queries where both sides of a score occur) · G key heads · R query heads of each ·
K head dim · D model width.

Follows transformers' LlamaModel, of whose hidden states this is the last but SKIPPED: video models are trained on it,
so the last layers and the last norm are neither loaded nor computed. Pre-norm RMSNorm, causal attention with rotated
pairs (i, i + K/2), gated SiLU, no biases. With bfloat16 parameters the operands of every matrix product are bfloat16;
the residual stream, norms, rotation, scores, softmax and SiLU stay float32. The largest array is [B,G,S,R,S].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jvdiff.config import known_fields
from jvdiff.errors import CheckpointError
from jvdiff.models.layers import compute_dtype, product, row
from jvdiff.sharding import Placement
from jvdiff.sharding.rules import P, Rules
from jvdiff.types import Array, Params

SKIPPED = 2  # last layers that are left out
# What a config.json may say besides sizes, and the only value of it that this encoder computes.
_FIXED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_scaling": None}
# What transformers writes besides: training, generation, bookkeeping. Nothing in an encoder's numbers.
_PASSED = (
    "architectures", "attention_dropout", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id",
    "id2label", "initializer_range", "is_encoder_decoder", "label2id", "max_position_embeddings", "output_attentions",
    "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "return_dict", "tie_word_embeddings",
    "torch_dtype", "transformers_version", "use_cache",
)  # fmt: skip
_REALS = {"rms_norm_eps": (1e-12, 0.1), "rope_theta": (1.0, 1e9)}

# Where the weights live; `layers` has the layers in axis 0.
PLACES: Rules = (
    (r"layers/(attn/(q|k|v)|ffn/(gate|up))/kernel", P(None, None, "tensor")),
    (r"layers/(attn/out|ffn/down)/kernel", P(None, "tensor")),
    (r"layers/(attn|ffn)/norm/scale", P()),
    (r"token_embed/embedding", P(None, "tensor")),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes, with transformers' names. Where its classes' defaults are not what is published, there is none.

    num_hidden_layers: of the file, with those that are left out
    num_key_value_heads, head_dim: None in a file is one for each query head, and the width divided by these
    """

    rms_norm_eps: float
    rope_theta: float
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128

    @property
    def layers(self) -> int:
        """How many are loaded and computed."""
        return self.num_hidden_layers - SKIPPED

    @classmethod
    def from_json(cls, mapping: Mapping[str, Any]) -> Config:
        """Reads the content of a text_encoder/config.json.

        Raises:
            CheckpointError: a field is unknown, missing, out of range, of the wrong type, or of another architecture.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        mapping = known_fields("text_encoder config.json", mapping, (*names, *_FIXED, *_PASSED, "rope_parameters"))
        for name, only in _FIXED.items():
            if mapping.get(name, only) != only:
                raise _bad_field(name, mapping[name], repr(only))
        given = {name: mapping[name] for name in names if mapping.get(name) is not None}
        values: dict[str, Any] = given | _rope(mapping)
        for name in _REALS:
            if name not in values:
                raise _bad_field(name, None, "a number: what transformers would take in its place is another model's")
        heads = values.get("num_attention_heads", cls.num_attention_heads)
        values.setdefault("num_key_value_heads", heads)
        for name, value in values.items():
            low, high = _REALS.get(name, (1, 2**20))
            if type(value) not in ((int, float) if name in _REALS else (int,)) or not low <= value <= high:
                raise _bad_field(name, value, f"a number from {low} to {high}")
        values.setdefault("head_dim", values.get("hidden_size", cls.hidden_size) // heads)
        cfg = cls(**{**values, **{name: float(values[name]) for name in _REALS}})
        if not SKIPPED < cfg.num_hidden_layers <= 1000:
            raise _bad_field("num_hidden_layers", cfg.num_hidden_layers, f"from {SKIPPED + 1} to 1000")
        if cfg.num_attention_heads % cfg.num_key_value_heads:
            raise _bad_field("num_key_value_heads", cfg.num_key_value_heads, f"a divisor of {cfg.num_attention_heads}")
        if cfg.head_dim % 2 or not cfg.head_dim:
            raise _bad_field("head_dim", cfg.head_dim, "an even number")
        return cfg

    def to_json(self) -> dict[str, Any]:
        """The config.json that transformers' LlamaModel.from_pretrained reads."""
        return {"architectures": ["LlamaModel"], **_FIXED, **dataclasses.asdict(self)}


LLAMA_3_8B = Config(
    rms_norm_eps=1e-5, rope_theta=500000.0, vocab_size=128320, intermediate_size=14336, num_key_value_heads=8
)


def _rope(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta as transformers 5 writes it, {} where that is not there."""
    given = mapping.get("rope_parameters")
    if given is None:
        return {}
    theta = given.get("rope_theta") if isinstance(given, Mapping) else None
    plain = {"rope_type": "default", "rope_theta": mapping.get("rope_theta", theta)}
    if theta is None or plain != {"rope_type": "default", **given}:
        raise _bad_field("rope_parameters", given, f"{plain}, without any scaling")
    return {"rope_theta": theta}


def _bad_field(name: str, value: object, allowed: str) -> CheckpointError:
    return CheckpointError(
        f"text_encoder config.json: {name} = {value!r:.80} cannot be used by the Llama encoder.\n"
        f"Expected: {allowed}.\n"
        "Check that the folder is complete and holds a Llama text encoder."
    )


def abstract_params(cfg: Config, dtype: Any = jnp.float32) -> Params:
    """The parameter tree as ShapeDtypeStructs, every leaf in `dtype`; the layers that are computed are stacked on axis
    0."""
    D, hidden = cfg.hidden_size, cfg.intermediate_size
    queries, keys = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim

    def stacked(**shapes: tuple[int, int]) -> Params:
        kernels = {
            name: {"kernel": jax.ShapeDtypeStruct((cfg.layers, *shape), dtype)} for name, shape in shapes.items()
        }
        return {"norm": {"scale": jax.ShapeDtypeStruct((cfg.layers, D), dtype)}, **kernels}

    return {
        "token_embed": {"embedding": jax.ShapeDtypeStruct((cfg.vocab_size, D), dtype)},
        "layers": {
            "attn": stacked(q=(D, queries), k=(D, keys), v=(D, keys), out=(queries, D)),
            "ffn": stacked(gate=(D, hidden), up=(D, hidden), down=(hidden, D)),
        },
    }


def encode(
    params: Params,
    cfg: Config,
    ids: Array,
    mask: Array,
    *,
    placement: Placement | None = None,
    dtype: Any = None,
) -> Array:
    """The stream [B,S,D] behind `cfg.layers` layers, in `dtype`, which is also that of the matrix products.

    Args:
        params: tree of `abstract_params`; a kernel may be a `Quantised`.
        ids: int32 [B,S], each below `cfg.vocab_size` (a larger one gives NaN: check the tokenizer first).
        mask: bool [B,S], true at real tokens, with padding on the right. Real tokens do not depend on it, and what is
            given for padding means nothing.
        placement: the devices to work on, `params` on them by `PLACES`; every device gets the result.
        dtype: a float dtype; None: that of the token embedding.

    Raises:
        UsageError: a kernel of integers without a scale.
    """
    table, stack, length = params["token_embed"]["embedding"], params["layers"], ids.shape[1]
    dtype = compute_dtype(table, dtype)
    x = jnp.take(table, ids, axis=0).astype(jnp.float32)  # [B,S,D]
    if placement is not None:
        x, mask = placement.replicate((x, mask))
    seen = jnp.asarray(np.tri(length, dtype=bool))[None] & mask[:, None]  # [B,q,S]: itself and what is in front of it
    angles = np.arange(length, dtype=np.float32)[:, None] * _rates(cfg)[None]
    turn = jnp.asarray(np.cos(angles))[None, :, None], jnp.asarray(np.sin(angles))[None, :, None]  # [1,S,1,K/2]

    def step(i: Array, x: Array) -> Array:
        layer: Any = jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, i, keepdims=False), stack)
        return _layer(placement.whole(layer, PLACES, stack="layers") if placement else layer, cfg, dtype, turn, seen, x)

    x = lax.fori_loop(0, cfg.layers, step, x).astype(dtype)
    return x if placement is None else placement.replicate(x)


def _rates(cfg: Config) -> np.ndarray:
    """What a pair turns by from token to token, float32 [K/2], rounded at every step as in torch. Its powers are right
    to the last bit, and numpy's own in float32 are not."""
    exponents = np.arange(0, cfg.head_dim, 2, dtype=np.float32) / np.float32(cfg.head_dim)
    return np.float32(1) / (cfg.rope_theta ** exponents.astype(np.float64)).astype(np.float32)


def _layer(layer: Params, cfg: Config, dtype: Any, turn: tuple[Array, Array], seen: Array, x: Array) -> Array:
    """x float32 [B,S,D] -> the same."""
    attn, ffn, G = layer["attn"], layer["ffn"], cfg.num_key_value_heads
    h = _norm(attn["norm"], cfg, x)
    q, k, v = (product(h, attn[name]["kernel"], dtype) for name in "qkv")
    q, k, v = (a.reshape(*a.shape[:2], -1, cfg.head_dim) for a in (q, k, v))  # [B,S,..*K] -> [B,S,..,K]
    q, k = _turned(q, turn).reshape(*q.shape[:2], G, -1, cfg.head_dim), _turned(k, turn)  # q [B,S,G,R,K]
    with jax.named_scope("xla_attention"):  # as plans find it in the compiled program
        scores = jnp.einsum("BqGRK,BSGK->BGqRS", q, k, preferred_element_type=jnp.float32) * cfg.head_dim**-0.5
        scores = jnp.where(seen[:, None, :, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(dtype)
        # v first: in the other order XLA for CPUs would copy the scores
        h = jnp.einsum("BSGK,BGqRS->BqGRK", v, weights).reshape(*x.shape[:2], -1)
    x = x + product(h, attn["out"]["kernel"], dtype, out=jnp.float32)
    h = _norm(ffn["norm"], cfg, x)
    gate, up = (product(h, ffn[name]["kernel"], dtype, out=jnp.float32) for name in ("gate", "up"))
    return x + product(jax.nn.silu(gate) * up, ffn["down"]["kernel"], dtype, out=jnp.float32)


def _turned(x: Array, turn: tuple[Array, Array]) -> Array:
    """[B,S,N,K] -> the same dtype, each pair (i, i + K/2) turned in float32."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = turn
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _norm(params: Params, cfg: Config, x: Array) -> Array:
    """RMSNorm: float32 [B,S,D] -> the same."""
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + cfg.rms_norm_eps) * row(params["scale"], x)
