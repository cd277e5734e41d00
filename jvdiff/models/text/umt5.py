"""UMT5 text encoder (https://arxiv.org/abs/2304.09151): token ids in, one vector per token out.

B batch · S text tokens (`q` for the queries where both sides of a score occur) · N heads · K head dim ·
D model width.

Follows transformers' UMT5EncoderModel: pre-norm RMSNorm, scores that are not scaled by K**-0.5, a position
bias of its own in every layer, gated tanh-GELU, no biases, no dropout. With bfloat16 parameters the operands
of every matrix product are bfloat16; the residual stream, norms, scores, position bias, softmax and GELU stay
float32. The largest array is [B,N,S,S].
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jvdiff.config import known_fields
from jvdiff.errors import CheckpointError
from jvdiff.models.layers import Linear, as_array, compute_dtype
from jvdiff.sharding import Placement
from jvdiff.sharding.rules import P, Rules
from jvdiff.types import Array, Params

# What a config.json may say besides sizes, and the only value of it that this encoder computes.
_FIXED = {"model_type": "umt5", "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new"}
# What transformers writes besides: the decoder, training, generation, bookkeeping. Nothing in an encoder's numbers.
_PASSED = (
    "add_cross_attention", "architectures", "bad_words_ids", "begin_suppress_tokens", "bos_token_id",
    "chunk_size_feed_forward", "classifier_dropout", "cross_attention_hidden_size", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "dropout_rate", "dtype", "early_stopping", "encoder_no_repeat_ngram_size",
    "eos_token_id", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "id2label", "initializer_factor", "is_decoder", "is_encoder_decoder", "is_gated_act",
    "label2id", "length_penalty", "max_length", "min_length", "n_positions", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_decoder_layers", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_past", "output_scores", "pad_token_id", "prefix", "problem_type",
    "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate", "scalable_attention",
    "scale_decoder_outputs", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature",
    "tf_legacy_loss", "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class", "top_k", "top_p",
    "torch_dtype", "torchscript", "transformers_version", "typical_p", "use_bfloat16", "use_cache",
)  # fmt: skip
_HIGHEST = {"num_layers": 1000, "vocab_size": 2**24}

# Where the weights live; `layers` has the layers in axis 0.
PLACES: Rules = (
    (r"layers/attn/(q|k|v)/kernel", P(None, None, "tensor")),
    (r"layers/attn/out/kernel", P(None, "tensor")),
    (r"layers/attn/relative_bias/embedding", P(None, None, "tensor")),
    (r"layers/ffn/(gate|up)/kernel", P(None, None, "tensor")),
    (r"layers/ffn/down/kernel", P(None, "tensor")),
    (r"layers/(attn|ffn)/norm/scale|final_norm/scale", P()),
    (r"token_embed/embedding", P(None, "tensor")),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes, with transformers' names and defaults, so that a missing key means what it means there."""

    vocab_size: int = 250112
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 1024
    num_layers: int = 8
    num_heads: int = 6
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    @classmethod
    def from_json(cls, mapping: Mapping[str, Any]) -> "Config":
        """Reads the content of a text_encoder/config.json.

        Keys that change nothing in the encoder (decoder, dropout, bookkeeping) are passed over.

        Raises:
            CheckpointError: a field is unknown, out of range, of the wrong type, or names another architecture.
        """
        sizes = [f.name for f in dataclasses.fields(cls)]
        mapping = known_fields("text_encoder config.json", mapping, (*sizes, *_FIXED, *_PASSED, "pruned_heads"))
        if mapping.get("pruned_heads"):
            raise _bad_field("pruned_heads", mapping["pruned_heads"], "none")
        for name, only in _FIXED.items():
            if mapping.get(name, only) != only:
                raise _bad_field(name, mapping[name], repr(only))
        sizes = {f.name: mapping[f.name] for f in dataclasses.fields(cls) if f.name in mapping}
        for name, value in sizes.items():
            number, low, high = int, 1, _HIGHEST.get(name, 2**20)
            if name == "layer_norm_epsilon":
                number, low, high = float, 1e-12, 0.1
            if type(value) is not number or not low <= value <= high:
                raise _bad_field(name, value, f"{number.__name__} from {low} to {high}")
        cfg = cls(**sizes)
        if (buckets := cfg.relative_attention_num_buckets) < 4 or buckets % 4:
            raise _bad_field("relative_attention_num_buckets", buckets, "a positive multiple of 4")
        if (farthest := cfg.relative_attention_max_distance) <= buckets // 4:
            raise _bad_field("relative_attention_max_distance", farthest, f"more than {buckets // 4}")
        return cfg

    def to_json(self) -> dict[str, Any]:
        """The config.json that transformers' UMT5EncoderModel.from_pretrained reads."""
        return {"architectures": ["UMT5EncoderModel"], **_FIXED, **dataclasses.asdict(self)}


UMT5_XXL = Config(vocab_size=256384, d_model=4096, d_ff=10240, num_layers=24, num_heads=64)


def _bad_field(name: str, value: object, allowed: str) -> CheckpointError:
    return CheckpointError(
        f"text_encoder config.json: {name} = {value!r:.80} cannot be used by the UMT5 encoder.\n"
        f"Expected: {allowed}.\n"
        "Check that the folder is complete and holds a UMT5 text encoder."
    )


def _buckets(cfg: Config, length: int) -> np.ndarray:
    """Bucket of every (query, key) pair, int32 [S,S]; the log part in float32, as in torch."""
    relative = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = cfg.relative_attention_num_buckets // 2  # the first for keys at or before the query
    exact = half // 2
    distance = np.abs(relative)
    # Where the logarithm is a whole number, float64 could truncate to the neighbouring bucket.
    log = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    log = log / np.float32(math.log(cfg.relative_attention_max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + log.astype(np.int64), half - 1)
    return ((relative > 0) * half + np.where(distance < exact, distance, far)).astype(np.int32)


class _Norm(nn.Module):
    """RMSNorm without mean or bias; float32 in and out."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],)).astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon) * scale[None, None]


def _dense(features: int, variance: float, dtype: jnp.dtype, name: str) -> Linear:
    return Linear(features, nn.initializers.normal(variance**0.5), dtype=dtype, bias=False, name=name)


class _Attention(nn.Module):
    """x float32 [B,S,D], mask bool [B,S], buckets int32 [S,S] -> float32 [B,S,D]."""

    cfg: Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, mask: Array, buckets: Array) -> Array:
        cfg, N, K, D = self.cfg, self.cfg.num_heads, self.cfg.d_kv, self.cfg.d_model
        h = _Norm(cfg.layer_norm_epsilon, name="norm")(x)
        # The missing 1/sqrt(K) of the scores is in q's initial scale, as in T5.
        variance = {"q": 1 / (D * K), "k": 1 / D, "v": 1 / D}
        q, k, v = (_dense(N * K, scale, self.dtype, name)(h) for name, scale in variance.items())
        q, k, v = (x.reshape(*h.shape[:2], N, K) for x in (q, k, v))  # [B,S,N*K] -> [B,S,N,K]
        rows, init = cfg.relative_attention_num_buckets, nn.initializers.normal(D**-0.5)
        table = as_array(nn.Embed(rows, N, embedding_init=init, name="relative_bias").embedding, jnp.float32)
        with jax.named_scope("xla_attention"):  # as plans find it in the compiled program
            scores = jnp.einsum("BqNK,BSNK->BNqS", q, k, preferred_element_type=jnp.float32)  # [B,N,S,S]
            scores = scores + table.T[:, buckets][None]  # [N,buckets] at [S,S] -> [1,N,S,S]
            scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
            weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
            out = jnp.einsum("BNqS,BSNK->BqNK", weights, v).reshape(*h.shape[:2], N * K)  # [B,S,N*K]
        return _dense(D, 1 / (N * K), self.dtype, "out")(out).astype(jnp.float32)


class _FeedForward(nn.Module):
    """x float32 [B,S,D] -> the same."""

    cfg: Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg, D = self.cfg, self.cfg.d_model
        h = _Norm(cfg.layer_norm_epsilon, name="norm")(x)
        gate = _dense(cfg.d_ff, 1 / D, self.dtype, "gate")(h).astype(jnp.float32)
        up = _dense(cfg.d_ff, 1 / D, self.dtype, "up")(h).astype(jnp.float32)
        h = nn.gelu(gate, approximate=True) * up
        return _dense(D, 1 / cfg.d_ff, self.dtype, "down")(h).astype(jnp.float32)


class _Layer(nn.Module):
    """x float32 [B,S,D], mask bool [B,S], buckets int32 [S,S] -> x."""

    cfg: Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, mask: Array, buckets: Array) -> tuple[Array, None]:
        x = x + _Attention(self.cfg, self.dtype, name="attn")(x, mask, buckets)
        return x + _FeedForward(self.cfg, self.dtype, name="ffn")(x), None


class _Encoder(nn.Module):
    """ids int32 [B,S], mask bool [B,S] -> [B,S,D] in `dtype`."""

    cfg: Config
    dtype: jnp.dtype
    placement: Placement | None = None

    @nn.compact
    def __call__(self, ids: Array, mask: Array) -> Array:
        cfg = self.cfg
        init = nn.initializers.normal(1.0)
        x = nn.Embed(cfg.vocab_size, cfg.d_model, self.dtype, embedding_init=init, name="token_embed")(ids)
        layer = _Layer
        if placement := self.placement:
            x, mask = placement.replicate((x, mask))
            layer = nn.map_variables(layer, "params", partial(_gathered, placement))
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": nn.broadcast}
        stack = nn.scan(layer, length=cfg.num_layers, **axes)
        buckets = jnp.asarray(_buckets(cfg, ids.shape[1]))
        x, _ = stack(cfg, self.dtype, name="layers")(x.astype(jnp.float32), mask, buckets)
        return _Norm(cfg.layer_norm_epsilon, name="final_norm")(x).astype(self.dtype)


def _gathered(placement: Placement, layer: Params) -> Params:
    """The weights of one layer, whole but for `tensor`."""
    return {"params": placement.whole(layer["params"], PLACES, stack="layers")}


def init_params(key: Array, cfg: Config) -> Params:
    """Float32 parameters to train from, at T5's own scales (transformers' UMT5 `_init_weights`)."""
    return jax.jit(_init, static_argnames="cfg")(key, cfg=cfg)


def _init(key: Array, cfg: Config) -> Params:
    ids, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
    variables: Any = _Encoder(cfg, jnp.dtype(jnp.float32)).init(key, ids, mask)
    return variables["params"]


def abstract_params(cfg: Config, dtype: jax.typing.DTypeLike = jnp.float32) -> Params:
    """The parameter tree as ShapeDtypeStructs, every leaf in `dtype`; `layers` are stacked on axis 0."""
    tree = jax.eval_shape(lambda key: init_params(key, cfg), jax.random.key(0))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree)


def encode(
    params: Params,
    cfg: Config,
    ids: Array,
    mask: Array,
    *,
    placement: Placement | None = None,
    dtype: Any = None,
) -> Array:
    """Last hidden state [B,S,D] in `dtype`, which is also that of the matrix products.

    Args:
        params: tree of `abstract_params`; a kernel may be a `Quantised`.
        ids: int32 [B,S], each below `cfg.vocab_size` (a larger one gives NaN: check the tokenizer first).
        mask: bool [B,S], true at real tokens. These do not depend on the other rows, which mean nothing.
        placement: the devices to work on, `params` on them by `PLACES`; every device gets the result.
        dtype: a float dtype; None: that of the token embedding.

    Raises:
        UsageError: a kernel of integers without a scale.
    """
    dtype = compute_dtype(params["token_embed"]["embedding"], dtype)
    states: Any = _Encoder(cfg, dtype, placement).apply({"params": params}, ids, mask)
    return states if placement is None else placement.replicate(states)
