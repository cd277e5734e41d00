"""CLIP's picture tower (arXiv:2103.00020): pixels in, one vector for each patch out, from the last layer but one.

P pictures · Y X pixel height, width · I vectors of a picture, its class first · N heads · K head dim · D model width

Follows transformers' CLIPVisionModel, whose `hidden_states[-2]` this is: the stream before the last layer, without a
norm behind it. The tree has the last layer, the last norm and the projection too, so that a converted tower can be
written back as it was published; they are not computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jvdiff.config import known_fields
from jvdiff.errors import CheckpointError
from jvdiff.models.layers import as_array, compute_dtype, layer_norm, product, row
from jvdiff.sharding import Placement
from jvdiff.sharding.rules import P, Rules
from jvdiff.types import Array, Params

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
_FIXED = {"model_type": "clip_vision_model", "num_channels": 3}
_PASSED = (
    "architectures", "attention_dropout", "dropout", "dtype", "initializer_factor", "initializer_range", "torch_dtype",
    "transformers_version",
)  # fmt: skip

# Where the weights live; `layers` has the layers in axis 0.
LAYER_PLACES: Rules = (
    (r"layers/attn/(q|k|v)/kernel|layers/mlp/up/kernel", P(None, None, "tensor")),
    (r"layers/attn/(q|k|v)/bias|layers/mlp/up/bias", P(None, "tensor")),
    (r"layers/(attn/out|mlp/down)/kernel", P(None, "tensor")),
    (r"layers/(attn/out|mlp/down)/bias|layers/norm_(1|2)/(scale|bias)", P()),
)
PLACES: Rules = (
    *LAYER_PLACES,
    (r"patch_embed/kernel|(class|place)_embed/embedding|(pre|post)_norm/(scale|bias)|projection/kernel", P()),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes, with transformers' names and defaults, so that a missing key means what it means there.

    projected: its file has the projection to the space that texts share, as a CLIPVisionModelWithProjection's has. A
        field of ours; the names of the tensors tell.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projected: bool = True

    @property
    def tokens(self) -> int:
        """I: vectors of a picture."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @classmethod
    def from_json(cls, mapping: Mapping[str, Any]) -> Config:
        """Reads the content of an image_encoder/config.json.

        Raises:
            CheckpointError: a field is unknown, out of range, of the wrong type, or names another architecture.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        mapping = known_fields("image_encoder config.json", mapping, (*names, *_FIXED, *_PASSED))
        for name, only in _FIXED.items():
            if mapping.get(name, only) != only:
                raise _bad_field(name, mapping[name], repr(only))
        cfg = cls(**{name: mapping[name] for name in names if name in mapping})
        for name in ("hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads"):
            if type(value := getattr(cfg, name)) is not int or not 1 <= value <= 2**16:
                raise _bad_field(name, value, f"a whole number from 1 to {2**16}")
        if cfg.hidden_size % cfg.num_attention_heads:
            raise _bad_field("num_attention_heads", cfg.num_attention_heads, f"a divisor of {cfg.hidden_size}")
        sizes = cfg.patch_size, cfg.image_size
        if not all(type(size) is int for size in sizes) or not 1 <= cfg.patch_size <= cfg.image_size <= 4096:
            raise _bad_field("patch_size", cfg.patch_size, f"a whole number from 1 to image_size ({cfg.image_size})")
        if cfg.hidden_act not in ACTIVATIONS:
            raise _bad_field("hidden_act", cfg.hidden_act, " or ".join(ACTIVATIONS))
        if type(cfg.layer_norm_eps) is not float or not 1e-12 <= cfg.layer_norm_eps <= 0.1:
            raise _bad_field("layer_norm_eps", cfg.layer_norm_eps, "a float from 1e-12 to 0.1")
        if type(cfg.projected) is not bool:
            raise _bad_field("projected", cfg.projected, "true or false")
        return cfg

    def to_json(self) -> dict[str, Any]:
        """The config.json that transformers reads."""
        fields = dataclasses.asdict(self)
        if self.projected:
            del fields["projected"]
        return {"architectures": [class_of(self)], **_FIXED, **fields}


VIT_H_14 = Config(
    hidden_size=1280, intermediate_size=5120, projection_dim=1024, num_hidden_layers=32, num_attention_heads=16,
    patch_size=14, hidden_act="gelu",
)  # fmt: skip


def class_of(cfg: Config) -> str:
    """The class of transformers whose file has these tensors."""
    return "CLIPVisionModelWithProjection" if cfg.projected else "CLIPVisionModel"


def complete(config: Mapping[str, Any], tensors: Collection[str]) -> Mapping[str, Any]:
    """config.json and what only the names of the tensors say: whether the projection is there."""
    if "projected" in config or not tensors:
        return config
    return {**config, "projected": "visual_projection.weight" in tensors}


def _bad_field(name: str, value: object, allowed: str) -> CheckpointError:
    return CheckpointError(
        f"image_encoder config.json: {name} = {value!r:.80} cannot be used by CLIP's picture tower.\n"
        f"Expected: {allowed}.\n"
        "Check that the folder is complete and holds a CLIP vision model."
    )


def abstract_params(cfg: Config, dtype: Any = jnp.float32) -> Params:
    """The parameter tree as ShapeDtypeStructs, every leaf in `dtype`; `layers` are stacked on axis 0."""
    D = cfg.hidden_size

    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    tree = {
        "patch_embed": {"kernel": leaf(cfg.patch_size**2 * 3, D)},
        "class_embed": {"embedding": leaf(D)},
        "place_embed": {"embedding": leaf(cfg.tokens, D)},
        "pre_norm": {"scale": leaf(D), "bias": leaf(D)},
        "layers": abstract_layers(cfg, dtype),
        "post_norm": {"scale": leaf(D), "bias": leaf(D)},
    }
    return tree | ({"projection": {"kernel": leaf(D, cfg.projection_dim)}} if cfg.projected else {})


def abstract_layers(cfg: Any, dtype: Any) -> Params:
    """The layers of CLIP's towers, of pictures and of texts, stacked on axis 0; cfg: of either."""
    D, hidden = cfg.hidden_size, cfg.intermediate_size

    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((cfg.num_hidden_layers, *shape), dtype)

    def linear(rows: int, columns: int) -> Params:
        return {"kernel": leaf(rows, columns), "bias": leaf(columns)}

    return {
        "norm_1": {"scale": leaf(D), "bias": leaf(D)},
        "attn": {name: linear(D, D) for name in ("q", "k", "v", "out")},
        "norm_2": {"scale": leaf(D), "bias": leaf(D)},
        "mlp": {"up": linear(D, hidden), "down": linear(hidden, D)},
    }


def encode(
    params: Params, cfg: Config, pixels: Array, *, placement: Placement | None = None, dtype: Any = None
) -> Array:
    """What the tower sees in pictures: float32 [P,I,D].

    Args:
        params: tree of `abstract_params`; a kernel may be a `Quantised`.
        pixels: float32 [P,image_size,image_size,3], normalised (`jvdiff.models.vision.pictures.seen_by_clip`).
        placement: the devices to work on, `params` on them by `PLACES`; every device gets the result.
        dtype: of the products. None: that of the first kernel.

    Raises:
        UsageError: a kernel of integers without a scale.
    """
    dtype = compute_dtype(params["patch_embed"]["kernel"], dtype)
    if placement is not None:
        pixels = placement.replicate(pixels)
        whole: Any = placement.whole({name: leaf for name, leaf in params.items() if name != "layers"}, PLACES)
        params = {**whole, "layers": params["layers"]}
    size, side = cfg.patch_size, cfg.image_size // cfg.patch_size
    x = pixels[:, : side * size, : side * size]  # a border that fills no patch is not seen
    x = x.reshape(-1, side, size, side, size, 3).transpose(0, 1, 3, 2, 4, 5)  # [P,h,w,size,size,3]
    x = product(x.reshape(len(x), side * side, -1), params["patch_embed"]["kernel"], dtype, out=jnp.float32)
    first = params["class_embed"]["embedding"].astype(jnp.float32)[None, None]
    x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, x.shape[2])), x], axis=1)  # [P,I,D]
    x = x + as_array(params["place_embed"]["embedding"], jnp.float32)[None]
    x = norm(params["pre_norm"], cfg, x)

    x = run_layers(params["layers"], cfg, cfg.num_hidden_layers - 1, dtype, x, placement)
    return x if placement is None else placement.replicate(x)


def run_layers(
    stack: Params,
    cfg: Any,
    count: int,
    dtype: Any,
    x: Array,
    placement: Placement | None = None,
    seen: Array | None = None,
) -> Array:
    """The first `count` layers of a tower of pictures or texts: float32 [P,I,D] -> the same.

    seen: bool [1,q,I], which vectors another one sees; None: all
    """

    def step(i: Array, x: Array) -> Array:
        layer: Any = jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, i, keepdims=False), stack)
        return _layer(placement.whole(layer, LAYER_PLACES, stack="layers") if placement else layer, cfg, dtype, x, seen)

    return lax.fori_loop(0, count, step, x)


def _layer(layer: Params, cfg: Any, dtype: Any, x: Array, seen: Array | None) -> Array:
    """x float32 [P,I,D] -> the same."""
    h, attn = norm(layer["norm_1"], cfg, x), layer["attn"]
    q, k, v = (_linear(attn[name], h, dtype) for name in "qkv")
    q, k, v = (a.reshape(*a.shape[:2], cfg.num_attention_heads, -1) for a in (q, k, v))  # [P,I,D] -> [P,I,N,K]
    with jax.named_scope("xla_attention"):  # as plans find it in the compiled program
        scores = jnp.einsum("PqNK,PINK->PNqI", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        if seen is not None:
            scores = jnp.where(seen[:, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(dtype)
        # v first: in the other order XLA for CPUs would copy the scores
        h = jnp.einsum("PINK,PNqI->PqNK", v, weights).reshape(x.shape)  # [P,I,N,K] -> [P,I,D]
    x = x + _linear(attn["out"], h, dtype).astype(jnp.float32)
    h = _linear(layer["mlp"]["up"], norm(layer["norm_2"], cfg, x), dtype).astype(jnp.float32)
    return x + _linear(layer["mlp"]["down"], ACTIVATIONS[cfg.hidden_act](h), dtype).astype(jnp.float32)


def _linear(params: Params, x: Array, dtype: Any) -> Array:
    y = product(x, params["kernel"], dtype)
    return y + row(params["bias"], y)


def norm(params: Params, cfg: Any, x: Array) -> Array:
    """LayerNorm: float32 [...,D] -> the same."""
    return layer_norm(x, cfg.layer_norm_eps) * row(params["scale"], x) + row(params["bias"], x)
