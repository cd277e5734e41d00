"""The toy's networks: a configuration, parameter trees, and pure functions over them.

B batch · T latent frames · H W latent grid · C latent channels · S text tokens · D model width · Y X pixels
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jvdiff.errors import CheckpointError
from jvdiff.models.layers import product
from jvdiff.sharding import Placement, Sizes
from jvdiff.types import Array, Params
from jvdiff.weights.naming import unflatten

TRANSFORMER, VAE, TEXT, PICTURE = "ToyTransformer", "ToyVAE", "ToyTextEncoder", "ToyPictureEncoder"


@dataclass(frozen=True)
class Config:
    """Of any of the networks.

    kind: which one, `_class_name` in config.json
    channels: C of the latents
    width: D
    words: that the text encoder knows
    """

    kind: str
    channels: int = 4
    width: int = 8
    words: int = 16

    @classmethod
    def from_json(cls, mapping: Mapping[str, Any]) -> Config:
        """The configuration in a config.json; CheckpointError for a size out of range."""
        sizes = {name: mapping.get(name, getattr(cls, name)) for name in ("channels", "width", "words")}
        for name, value in sizes.items():
            if type(value) is not int or not 1 <= value <= 1024:
                raise CheckpointError(f"config.json: {name} is {value!r:.40}; expected a whole number from 1 to 1024.")
        return cls(mapping["_class_name"], **sizes)

    def to_json(self) -> dict[str, Any]:
        """The content of config.json."""
        fields = dataclasses.asdict(self)
        return {"_class_name": fields.pop("kind"), **fields}


def abstract_params(cfg: Config, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The parameter tree of a network as ShapeDtypeStructs."""
    C, D = cfg.channels, cfg.width
    shapes = {
        TRANSFORMER: {
            "embed/kernel": (C, D),
            "time/kernel": (3, D),
            "text/kernel": (D, D),
            "pooled/kernel": (D, D),
            "out/kernel": (D, C),
        },
        VAE: {"encode/kernel": (12, C), "decode/kernel": (C, 12)},
        TEXT: {"words/embedding": (cfg.words, D)},
        PICTURE: {"embed/kernel": (3, D)},
    }[cfg.kind]
    return unflatten({path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in shapes.items()})


def mesh_sizes(cfg: Config, grid: tuple[int, int, int], batch: int) -> Sizes:
    """What a mesh must divide."""
    return Sizes(batch=batch, tokens=grid[0] * grid[1] * grid[2], heads=cfg.width, ffn_dim=cfg.width)


def velocity(
    params: Params, cfg: Config, x: Array, t: Array, condition: Mapping[str, Array], placement: Placement | None = None
) -> Array:
    """x float32 [B,T,H,W,C], t float32 [B] in 0..1000 -> velocity float32 [B,T,H,W,C].

    condition: text [B,S,D], pooled [B,D], guidance [B]; with a picture, first [B,1,H,W,C] and perhaps look [B,D].
    """
    if placement is not None:
        split = placement.split(mesh_sizes(cfg, x.shape[1:4], len(x)))
        x = split.constrain(x, split.batch)
    told = jnp.stack([jnp.sin(t / 200), jnp.cos(t / 200), condition["guidance"] / 10], axis=-1)  # [B] -> [B,3]
    shift = product(told, params["time"]["kernel"], jnp.float32)
    shift += product(condition["pooled"], params["pooled"]["kernel"], jnp.float32) + condition.get("look", 0)
    shift += product(condition["text"].mean(axis=1), params["text"]["kernel"], jnp.float32)  # [B,S,D] -> [B,D]
    seen = jnp.concatenate([condition["first"], x[:, 1:]], axis=1) if "first" in condition else x
    h = jnp.tanh(
        product(seen, params["embed"]["kernel"], jnp.float32) + shift[:, None, None, None]
    )  # [B,D] -> [B,1..D]
    h += h.mean(axis=(1, 2, 3), keepdims=True)  # every token sees every token: [B,1,1,1,D]
    out = product(h, params["out"]["kernel"], jnp.float32)
    return out if placement is None else placement.replicate(out)


def encode_text(params: Params, ids: Array, mask: Array) -> Array:
    """ids int32 [B,S], mask bool [B,S] -> rows [B,S,D], zero where the mask is false."""
    rows = params["words"]["embedding"][ids]  # [V,D] at [B,S] -> [B,S,D]
    return jnp.where(mask[..., None], rows, 0)


def encode(params: Params, picture: Array) -> Array:
    """uint8 [B,Y,X,3] -> latents float32 [B,1,H,W,C]."""
    B, Y, X, _ = picture.shape
    pixels = (picture.astype(jnp.float32) / 127.5 - 1).reshape(B, Y // 2, 2, X // 2, 2, 3)  # [B,Y,X,3] -> [B,H,2,W,2,3]
    cells = pixels.transpose(0, 1, 3, 2, 4, 5).reshape(B, 1, Y // 2, X // 2, 12)  # -> [B,1,H,W,12]
    return product(cells, params["encode"]["kernel"], jnp.float32)


def decode(params: Params, latents: Array) -> Array:
    """latents float32 [B,T,H,W,C] -> frames float32 [B,T,Y,X,3] in -1..1."""
    B, T, H, W, _ = latents.shape
    cells = product(latents, params["decode"]["kernel"], jnp.float32).reshape(B, T, H, W, 2, 2, 3)
    return cells.transpose(0, 1, 2, 4, 3, 5, 6).reshape(B, T, 2 * H, 2 * W, 3)  # -> [B,T,Y,X,3]
