"""What is known of a forward pass of the transformer when it is compiled, what its layers share, and the checks.

B batch · T latent frames · H W latent grid · C latent channels · L video tokens · S text tokens · N heads ·
K head dim · D model width · P texts of a clip · V tokens of a frame · I tokens of pictures.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from jvdiff.errors import UsageError
from jvdiff.kernels import Dense, Pattern
from jvdiff.kernels.tiles import Grid
from jvdiff.models.wan.config import DiTConfig
from jvdiff.runtime.target import Target, here
from jvdiff.sharding import Placement, Sizes, Split
from jvdiff.types import Array

Attend = Callable[[Array, Array, Array], Array]  # q, k, v [B,L,N,K] -> [B,L,N,K]


@dataclass(frozen=True)
class Plan:
    """What is known of a forward pass when it is compiled.

    grid: (T,H,W) of the tokens.
    pattern: which tokens the self-attention sees.
    extra_text: how many more times the last text row counts.
    implementation: of the self-attention; see `velocity`.
    placement: mesh and where activations live on it; None: one device.
    split: how `placement` divides the activations.
    dtype: of the products in the blocks and the text embedding; None: that of each matrix.
    keep: return every layer's keys and values.
    relative: keys are kept before their rotation, which counts from the oldest frame that is kept.
    measured: tile and windows whose distance from dense attention every layer keeps, float32 [windows,N].
    """

    grid: Grid
    pattern: Pattern
    extra_text: int = 0
    implementation: str | Attend | None = None
    placement: Placement | None = None
    split: Split | None = None
    dtype: Any = None
    keep: bool = False
    relative: bool = False
    measured: tuple[Grid, tuple[Grid, ...]] | None = None

    @property
    def target(self) -> Target:
        """What the program is made for."""
        return self.placement.target if self.placement else here()


def make_plan(
    cfg: DiTConfig,
    shape: tuple[int, ...],
    pattern: Pattern,
    rows: int,
    text_length: int | None,
    implementation: str | Attend | None,
    placement: Placement | None,
    dtype: Any,
) -> Plan:
    """How latents of (B,T,H,W), and `rows` of text, go through the network."""
    B, *sizes = shape
    t, h, w = (n // p for n, p in zip(sizes, cfg.patch_size, strict=True))
    _check_attend(pattern, implementation)
    split = None if placement is None else placement.split(mesh_sizes(cfg, tuple(sizes), B, pattern, implementation))
    extra = 0 if text_length is None else text_length - rows
    return Plan((t, h, w), pattern, extra, implementation, placement, split, dtype)


class Layer(NamedTuple):
    """What one layer remembers, or all of them, stacked in axis 0. None: nothing.

    past: keys and values [B,frames,V,N,K] of past frames of V tokens, N padded to the mesh.
    text: keys and values [B,S,N,K] of the text.
    chosen: what the pattern gives the layer (`Pattern.of_layers`).
    """

    past: tuple[Array, Array] | None = None
    text: tuple[Array, Array] | None = None
    chosen: Array | None = None


class Past(NamedTuple):
    """What all layers need to know of the past.

    length: int32 [], how many of its tokens there are; None: there is no past to read.
    rope: the rotation [S,K/2] of each of them, where their keys are not rotated yet.
    visible: bool [T,T], which frames see which, where there is no past to read; for a pattern with tiles, with a past
      or without, which of these in time (`BlockCausal.tiles_seen`).
    """

    length: Array | None
    rope: tuple[Array, Array] | None = None
    visible: Array | None = None


class Shared(NamedTuple):
    """What all blocks have in common.

    modulation: float32 [B,1, 2 or T,6,D].
    text: [B,P,S,D]; None: the layers remember its keys.
    rope: cosines and sines, float32 [L,K/2].
    past: what all layers need to know of it; None: no stream.
    frames: int32 [L], of each token, where its modulation does not follow from its place in raster order.
    image: float32 [B,I,D], tokens of pictures; None: the model attends to none.
    """

    modulation: Array
    text: Array | None
    rope: tuple[Array, Array]
    past: Past | None
    frames: Array | None = None
    image: Array | None = None


def mesh_sizes(
    cfg: DiTConfig,
    grid: tuple[int, ...],
    batch: int,
    pattern: Pattern,
    implementation: str | Attend | None = None,
) -> Sizes:
    """What a mesh must divide to run this model on `batch` latents of (T,H,W)."""
    tokens = math.prod(n // p for n, p in zip(grid, cfg.patch_size, strict=True))
    ring = pattern.ring and not callable(implementation)
    return Sizes(batch, tokens, cfg.num_attention_heads, cfg.ffn_dim, ring)


def _check_attend(pattern: Pattern, implementation: str | Attend | None) -> None:
    if callable(implementation) and not isinstance(pattern, Dense):
        raise UsageError(
            f"attention is a function of your own, and the pattern {pattern!r:.80}; expected the pattern Dense(): such "
            "a function is given the tokens in raster order, and decides itself which see each other."
        )


def check_image(cfg: DiTConfig, image: Array | None, batch: int) -> None:
    """Raises UsageError unless picture tokens [B,I,width of their encoder] are there if and only if the model has use
    for them."""
    if cfg.image_dim is None and image is None:
        return
    if cfg.image_dim is None or image is None:
        found = "none are given" if image is None else f"{list(image.shape)} are given"
        raise UsageError(f"velocity: picture tokens: {found}; this model's image_dim is {cfg.image_dim}")
    places = cfg.pos_embed_seq_len or (image.shape[1] if image.ndim == 3 else 0)
    if places == 0 or image.shape != (batch, places, cfg.image_dim):
        expected = f"[{batch},{cfg.pos_embed_seq_len or 'I'},{cfg.image_dim}]"
        raise UsageError(f"velocity: picture tokens are {list(image.shape)}; expected {expected}")


def check_texts(text: Array, split: Split | None) -> None:
    """Raises UsageError where tokens with texts of their own, [B,P,S,D], would be shared among devices."""
    if split and text.shape[1] > 1 and split.devices(split.ring + split.heads) > 1:
        raise UsageError(
            f"velocity: {text.shape[1]} texts a clip cannot be shared along its tokens; use mesh data=... only"
        )


def check(
    cfg: DiTConfig,
    latents: Array,
    timestep: Array,
    text: Array,
    text_length: int | None,
    pattern: Pattern,
) -> None:
    if latents.ndim != 5 or latents.shape[-1] != cfg.in_channels:
        raise UsageError(f"velocity: latents are {latents.shape}; expected [B,T,H,W,{cfg.in_channels}]")
    B, *grid, _ = latents.shape
    for name, n, p in zip("THW", grid, cfg.patch_size, strict=True):
        if n % p or not 1 <= n // p <= cfg.rope_max_seq_len:
            raise UsageError(
                f"velocity: latent {name} is {n}; expected a multiple of the patch size {p}, "
                f"at most {p * cfg.rope_max_seq_len} (rope_max_seq_len {cfg.rope_max_seq_len})"
            )
    if timestep.shape not in ((B,), (B, 2), (B, grid[0])) or timestep.dtype != jnp.float32:
        raise UsageError(
            f"velocity: timestep is {timestep.dtype}{list(timestep.shape)}; expected float32[{B}], [{B},2] with that "
            f"of the first frame and that of the others, or [{B},{grid[0]}] with one for each frame"
        )
    if text.ndim not in (3, 4) or text.shape[0] != B or text.shape[-1] != cfg.text_dim or text.shape[-2] == 0:
        raise UsageError(
            f"velocity: text is {text.shape}; expected [{B},S,{cfg.text_dim}] with S at least 1, or "
            f"[{B},P,S,{cfg.text_dim}]"
        )
    if text.ndim == 4 and (text.shape[1] == 0 or grid[0] % text.shape[1] or not pattern.raster):
        raise UsageError(
            f"velocity: there are {text.shape[1]} texts a clip of {grid[0]} frames; expected a number that divides the "
            "frames, and a pattern without tiles"
        )
    if text_length is not None and text_length < text.shape[-2]:
        raise UsageError(f"velocity: text_length is {text_length}, and text has {text.shape[-2]} rows; give fewer rows")
