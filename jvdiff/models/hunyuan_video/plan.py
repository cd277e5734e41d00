"""What is known of a forward pass of the transformer when it is compiled, what its layers share, and the checks.

B batch · T latent frames · H W latent grid · C latent channels · L video tokens · S text rows · N heads · K head dim ·
D model width · M modulations of a clip: one, or that of the first frame and that of the others.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from jvdiff.errors import UsageError
from jvdiff.kernels import Pattern
from jvdiff.kernels.tiles import Grid
from jvdiff.models.hunyuan_video.config import DiTConfig
from jvdiff.runtime.target import Target, here
from jvdiff.sharding import Placement, Sizes, Split
from jvdiff.types import Array


@dataclass(frozen=True)
class Plan:
    """What is known of a forward pass when it is compiled.

    grid: (T,H,W) of the tokens.
    pattern: which video tokens see each other; text sees, and is seen by, all.
    implementation: of the joint attention; None takes the best.
    placement: mesh and where activations live on it; None: one device.
    split: how `placement` divides the activations of the video.
    dtype: of the products in the blocks; None: that of each matrix.
    """

    grid: Grid
    pattern: Pattern
    implementation: str | None = None
    placement: Placement | None = None
    split: Split | None = None
    dtype: Any = None

    @property
    def target(self) -> Target:
        """What the program is made for."""
        return self.placement.target if self.placement else here()


class Shared(NamedTuple):
    """What all blocks have in common.

    condition: float32 [B,M,D], of timestep, guidance and pooled text, after its SiLU.
    lengths: int32 [B], how many rows of each text count.
    rope: cosines and sines, float32 [L,K/2].
    first: bool [L], the tokens of the first frame, where M is 2.
    """

    condition: Array
    lengths: Array
    rope: tuple[Array, Array]
    first: Array | None = None


def make_plan(
    cfg: DiTConfig,
    shape: tuple[int, ...],
    pattern: Pattern,
    implementation: str | None,
    placement: Placement | None,
    dtype: Any,
) -> Plan:
    """How latents of (B,T,H,W) go through the network."""
    B, *sizes = shape
    t, h, w = (n // p for n, p in zip(sizes, cfg.patch, strict=True))
    if callable(implementation):
        raise UsageError(
            f"attention is {implementation!r:.80}, a function of your own; this model's attention is of video and text "
            "together, part of which is padding. Expected None or a name of jvdiff.kernels."
        )
    split = None if placement is None else placement.split(mesh_sizes(cfg, tuple(sizes), B, pattern))
    return Plan((t, h, w), pattern, implementation, placement, split, dtype)


def mesh_sizes(cfg: DiTConfig, grid: tuple[int, ...], batch: int, pattern: Pattern) -> Sizes:
    """What a mesh must divide to run this model on `batch` latents of (T,H,W)."""
    tokens = math.prod(n // p for n, p in zip(grid, cfg.patch, strict=True))
    return Sizes(batch, tokens, cfg.num_attention_heads, cfg.ffn_dim, pattern.ring)


def check(
    cfg: DiTConfig,
    latents: Array,
    timestep: Array,
    states: Array,
    mask: Array,
    pooled: Array,
    guidance: Array | None,
    pattern: Pattern,
) -> None:
    """Raises UsageError unless the arguments of `velocity` fit the configuration and one another."""
    if not isinstance(pattern, Pattern):
        raise UsageError(
            f"velocity: pattern is {pattern!r:.80}; expected Dense() or another pattern of jvdiff.kernels.patterns, "
            "whose `read` makes one of text."
        )
    if latents.ndim != 5 or latents.shape[-1] != cfg.in_channels:
        raise UsageError(f"velocity: latents are {list(latents.shape)}; expected [B,T,H,W,{cfg.in_channels}]")
    B, *grid, _ = latents.shape
    for name, n, p in zip("THW", grid, cfg.patch, strict=True):
        if n % p or not n:
            raise UsageError(f"velocity: latent {name} is {n}; expected a multiple of the patch size {p}")
    for name, x in (("timestep", timestep), ("guidance", guidance)):
        if x is not None and (x.shape != (B,) or x.dtype != jnp.float32):
            raise UsageError(f"velocity: {name} is {x.dtype}{list(x.shape)}; expected float32[{B}]")
    if (guidance is not None) != cfg.guidance_embeds:
        found = "not given" if guidance is None else "given"
        raise UsageError(f"velocity: guidance is {found}, and guidance_embeds of this model is {cfg.guidance_embeds}")
    S = states.shape[1] if states.ndim == 3 else 0
    if states.shape != (B, S, cfg.text_embed_dim) or not S:
        raise UsageError(
            f"velocity: states are {list(states.shape)}; expected [{B},S,{cfg.text_embed_dim}], S at least 1"
        )
    if mask.shape != (B, S) or mask.dtype != jnp.bool_:
        raise UsageError(f"velocity: mask is {mask.dtype}{list(mask.shape)}; expected bool[{B},{S}], as states")
    if pooled.shape != (B, cfg.pooled_projection_dim):
        raise UsageError(
            f"velocity: pooled is {list(pooled.shape)}; expected [{B},{cfg.pooled_projection_dim}], one vector a clip"
        )
