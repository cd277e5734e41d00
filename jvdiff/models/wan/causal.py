"""Wan chunk by chunk: the forward pass of a few latent frames that read what earlier ones left, and what they leave.

B batch · T latent frames · H W latent grid · C latent channels · V tokens of a frame · S text tokens · N heads ·
M heads, padded to the mesh · K head dim · D model width · F slots, one for each frame that is kept.

A video without end is made `Span.chunk` frames at a time. Of the past each layer keeps keys and values of a fixed
number of frames: the first `sink` frames of the video for ever, and the last `window` - `chunk` in a ring, where a new
frame overwrites the oldest and nothing is moved. Which slots are filled is one number, so that one program serves every
chunk. `chunk_velocity` reads the past, as often as a sampler likes; `extend` alone writes it, once a chunk is clean.

Sources: Self-Forcing (arXiv 2506.08009), whose checkpoints have Wan's own parameters; window and sink as FlashDreams
counts them; rotation relative to the cache as in LongLive and Infinity-RoPE. The result of chunk after chunk is that of
one `velocity(pattern=BlockCausal(...))` over the whole video.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jvdiff.errors import UsageError
from jvdiff.kernels import BlockCausal, SlidingTile
from jvdiff.kernels.block_causal import visible
from jvdiff.models.layers import MLP, Linear, RMSNorm, gelu
from jvdiff.models.wan.config import DiTConfig
from jvdiff.models.wan.dit import apply
from jvdiff.models.wan.layers import rope_tables
from jvdiff.models.wan.plan import Layer, Past, Plan, make_plan, mesh_sizes
from jvdiff.sharding import Placement, Split, sequence
from jvdiff.types import Array, Params


@dataclass(frozen=True)
class Span:
    """How much of a video the frames of a chunk see.

    chunk: frames made at once.
    window: frames of the moving past, the chunk's own included.
    sink: first frames of the video that stay.
    relative: frames are counted from the oldest that is kept, and keys rotated when they are read; otherwise from the
        beginning of the video, and keys are rotated when they are written.
    near: what of it a tile sees, see `BlockCausal`; None: all.
    """

    chunk: int = 3
    window: int = 21
    sink: int = 0
    relative: bool = False
    near: SlidingTile | None = None

    def __post_init__(self):
        if not isinstance(self.window, int):
            raise UsageError(f"{self}: expected a whole number of frames as window; what is kept must end somewhere.")
        _ = self.pattern  # says what else is invalid

    @property
    def pattern(self) -> BlockCausal:
        """The same of a whole video."""
        return BlockCausal(self.chunk, self.window, self.sink, near=self.near)

    @property
    def ring(self) -> int:
        """Slots of the moving past."""
        return self.window - self.chunk

    @property
    def slots(self) -> int:
        """F: frames that are kept."""
        return self.sink + self.ring

    def filled(self, frames: Any) -> Any:
        """How many slots hold a frame, after `frames` of the video (may be traced). They are the first ones."""
        return jnp.minimum(frames, self.slots)

    def held(self, frames: Any) -> Array:
        """int32 [F]: the frame in each slot after `frames` frames of the video; slots not filled yet: later ones."""
        slot = jnp.arange(self.slots, dtype=jnp.int32)
        oldest = frames - self.ring
        turned = oldest + (slot - oldest) % max(self.ring, 1)  # frame f is in slot sink + (f - sink) % ring
        return jnp.where((slot < self.sink) | (frames <= self.slots), slot, turned)

    def places(self, frames: Any) -> Array:
        """int32 [F]: the number of the frame in each slot among those that are kept, the oldest first."""
        return jnp.argsort(jnp.argsort(self.held(frames))).astype(jnp.int32)  # the rank of each, [F]

    def slot(self, frames: Array, end: Any) -> Array:
        """int32 [T]: where the frames of a video that ends before frame `end` go; F and more: they are not kept."""
        ring = self.sink + (frames - self.sink) % max(self.ring, 1)
        moving = jnp.where(frames >= end - self.ring, ring, self.slots + jnp.arange(frames.size, dtype=jnp.int32))
        return jnp.where(frames < self.sink, frames, moving)


@partial(jax.tree_util.register_dataclass, data_fields=("keys", "values", "frames"), meta_fields=())
@dataclass(frozen=True)
class KVCache:
    """What the layers remember of a video.

    keys, values: [layers,B,F,V,M,K] of the frames in each slot.
    frames: int32 [], how many frames of the video there were.
    """

    keys: Array
    values: Array
    frames: Array


TextKeys = tuple[Array, Array]  # [layers,B,S,N,K]


def init_kv_cache(
    cfg: DiTConfig,
    span: Span,
    batch: int,
    grid: tuple[int, int],
    dtype: Any = jnp.float32,
    *,
    placement: Placement | None = None,
) -> KVCache:
    """The cache of a video that has not begun. grid: (H,W) of its latents. dtype: that of the attention matrices."""
    _, ph, pw = cfg.patch_size
    heads, where, everywhere = cfg.num_attention_heads, None, None
    if placement is not None:
        split = _split(cfg, span, batch, grid, placement)
        heads, where, everywhere = sequence.padded_heads(split, heads), _sharding(split), placement.everywhere
    shape = (cfg.num_layers, batch, span.slots, grid[0] // ph * (grid[1] // pw), heads, cfg.attention_head_dim)
    keys, values = jax.jit(lambda: (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)), out_shardings=where)()
    return KVCache(keys, values, jnp.zeros((), jnp.int32, device=everywhere))


def text_keys(
    params: Params, cfg: DiTConfig, text: Array, *, placement: Placement | None = None, dtype: Any = None
) -> TextKeys:
    """Keys and values [layers,B,S,N,K] of the text [B,S,text_dim] for the cross-attention of every layer.

    placement, dtype: as in `velocity`.
    """
    D, linear = cfg.width, Linear(cfg.width, dtype=dtype)
    text = MLP(D, D, gelu, dtype=dtype).apply({"params": params["text_embed"]}, text)  # pyright: ignore[reportAssignmentType]

    def of_layer(layer: Params) -> tuple[Array, Array]:
        k: Any = linear.apply({"params": layer["k"]}, text)
        v: Any = linear.apply({"params": layer["v"]}, text)
        k: Any = RMSNorm(cfg.eps).apply({"params": layer["k_norm"]}, k)
        heads = lambda x: x.reshape(*x.shape[:2], -1, cfg.attention_head_dim)  # noqa: E731 - [B,S,D] -> [B,S,N,K]
        return heads(k.astype(v.dtype)), heads(v)

    keys = jax.lax.map(of_layer, {name: params["blocks"]["cross_attn"][name] for name in ("k", "v", "k_norm")})
    return keys if placement is None else placement.replicate(keys)


def chunk_velocity(
    params: Params,
    cfg: DiTConfig,
    span: Span,
    latents: Array,
    timestep: Array,
    text: TextKeys,
    past: KVCache,
    *,
    text_length: int | None = None,
    implementation: str | None = None,
    placement: Placement | None = None,
    dtype: Any = None,
) -> Array:
    """The velocity at the next chunk of a video, float32 [B,T,H,W,out_channels]; the past is read and stays as it is.

    Args:
      latents: float32 [B,T,H,W,C], T = span.chunk.
      timestep: float32 [B], or [B,T] with one for each frame, in 0..1000.
      text: of `text_keys`.
      text_length, implementation, placement, dtype: as in `velocity`.
    """
    common = (text_length, implementation, placement, dtype)
    v, _ = _chunk(params, cfg, span, latents, timestep, text, past, *common, keep=False)
    return v


def extend(
    params: Params,
    cfg: DiTConfig,
    span: Span,
    latents: Array,
    timestep: Array,
    text: TextKeys,
    past: KVCache,
    *,
    text_length: int | None = None,
    implementation: str | None = None,
    placement: Placement | None = None,
    dtype: Any = None,
) -> KVCache:
    """The past with one more chunk, as the network sees it at `timestep`: 0 where it is clean. Arguments of
    `chunk_velocity`; give `past` to be overwritten (`donate_argnums`), and no byte of it is copied."""
    common = (text_length, implementation, placement, dtype)
    _, memory = _chunk(params, cfg, span, latents, timestep, text, past, *common, keep=True)
    frames = past.frames + jnp.arange(span.chunk, dtype=jnp.int32)
    slot = span.slot(frames, past.frames + span.chunk)

    def written(old: Array, new: Array) -> Array:
        new = new.reshape(*new.shape[:2], span.chunk, -1, *new.shape[3:])  # [layers,B,L,M,K] -> [layers,B,T,V,M,K]
        return old.at[:, :, slot].set(new.astype(old.dtype), mode="drop", unique_indices=True)

    keys, values = written(past.keys, memory[0]), written(past.values, memory[1])
    if placement is not None:
        where = _sharding(_split(cfg, span, len(latents), latents.shape[2:4], placement))
        keys, values = jax.lax.with_sharding_constraint((keys, values), where)
    return KVCache(keys, values, past.frames + span.chunk)


def reencode(
    params: Params,
    cfg: DiTConfig,
    span: Span,
    history: Array,
    timestep: Array,
    text: TextKeys,
    past: KVCache,
    *,
    text_length: int | None = None,
    implementation: str | None = None,
    placement: Placement | None = None,
    dtype: Any = None,
) -> KVCache:
    """The same past under another text: all frames that are kept go through the network once more, together.

    history: float32 [B,F,H,W,C], the frames in each slot, as `extend` saw them. What these frames saw in turn, and is
    not kept, they do not see again (LongLive, arXiv 2509.22622, recaches likewise).
    """
    frames = span.held(past.frames)
    number = jnp.arange(span.slots, dtype=jnp.int32)
    filled = number < span.filled(past.frames)
    seen = visible(frames, frames, span.chunk, span.window, span.sink) & filled[None] & filled[:, None]
    shape = (len(history), *history.shape[1:4])
    plan = _plan(cfg, span, shape, text, text_length, implementation, placement, dtype, keep=True)
    places = span.places(past.frames) if span.relative else frames
    state = Past(length=None, visible=span.pattern.tiles_seen(seen, frames, frames) if span.near else seen)
    layers = Layer(None, text)
    timestep = timestep.reshape(len(timestep), -1)  # [B] -> [B,1]; [B,F] stays
    _, memory = apply(params, cfg, plan, history, timestep, None, frames=places, layers=layers, past=state)
    pairs = zip(memory, (past.keys, past.values), strict=True)
    keys, values = (new.reshape(old.shape).astype(old.dtype) for new, old in pairs)  # [layers,B,F,V,M,K]
    return KVCache(keys, values, past.frames)


def remembered(span: Span, history: Array, latents: Array, frames: Array) -> Array:
    """`history` [B,F,H,W,C] with the frames [B,T,H,W,C] of a chunk that begins at frame `frames`, for `reencode`."""
    slot = span.slot(frames + jnp.arange(span.chunk, dtype=jnp.int32), frames + span.chunk)
    return history.at[:, slot].set(latents, mode="drop", unique_indices=True)


def _chunk(
    params: Params,
    cfg: DiTConfig,
    span: Span,
    latents: Array,
    timestep: Array,
    text: TextKeys,
    past: KVCache,
    text_length: int | None,
    implementation: str | None,
    placement: Placement | None,
    dtype: Any,
    *,
    keep: bool,
) -> tuple[Array, Any]:
    _check(cfg, span, latents, timestep, past)
    plan = _plan(cfg, span, latents.shape[:4], text, text_length, implementation, placement, dtype, keep=keep)
    _, h, w = plan.grid
    filled, rope, frames = span.filled(past.frames), None, past.frames + jnp.arange(span.chunk, dtype=jnp.int32)
    if span.relative:
        rope = rope_tables((span.slots, h, w), cfg.attention_head_dim, span.places(past.frames))
        frames = filled + jnp.arange(span.chunk, dtype=jnp.int32)
    layers, state = Layer((past.keys, past.values), text), Past(filled * (h * w), rope, _near(span, past.frames))
    timestep = timestep.reshape(len(timestep), -1)  # [B] -> [B,1]; [B,T] stays
    return apply(params, cfg, plan, latents, timestep, None, frames=frames, layers=layers, past=state)


def _near(span: Span, frames: Array) -> Array | None:
    """bool [chunk/a,(chunk+F)/a]: which tiles in time those of a chunk see of itself and of the slots behind it, after
    `frames` frames of the video; None: all that there is."""
    if span.near is None:
        return None
    now, held = frames + jnp.arange(span.chunk, dtype=jnp.int32), span.held(frames)
    filled = jnp.arange(span.slots, dtype=jnp.int32) < span.filled(frames)
    there = jnp.concatenate([jnp.ones(span.chunk, bool), filled])  # [chunk+F]
    there = jnp.broadcast_to(there[None], (span.chunk, there.size))
    return span.pattern.tiles_seen(there, now, jnp.concatenate([now, held]))  # frames of both, [chunk+F]


def _check(cfg: DiTConfig, span: Span, latents: Array, timestep: Array, past: KVCache) -> None:
    _, ph, pw = cfg.patch_size
    if latents.ndim != 5 or latents.shape[1] != span.chunk or latents.shape[-1] != cfg.in_channels:
        raise UsageError(f"a chunk is {list(latents.shape)}; expected [B,{span.chunk},H,W,{cfg.in_channels}].")
    B, T, H, W, _ = latents.shape
    expected = (cfg.num_layers, B, span.slots, H // ph * (W // pw))
    if H % ph or W % pw or past.keys.shape[:4] != expected:
        raise UsageError(
            f"a chunk is {list(latents.shape)} and the past {list(past.keys.shape)}; expected H and W in patches of "
            f"{ph}x{pw}, and a past of {list(expected)} keys a head: layers, B, slots, tokens of a frame."
        )
    if timestep.shape not in ((B,), (B, T)) or timestep.dtype != jnp.float32:
        raise UsageError(
            f"timestep of a chunk is {timestep.dtype}{list(timestep.shape)}; expected float32[{B}] or [{B},{T}]."
        )


def _plan(
    cfg: DiTConfig,
    span: Span,
    shape: tuple[int, ...],
    text: TextKeys,
    text_length: int | None,
    implementation: str | None,
    placement: Placement | None,
    dtype: Any,
    *,
    keep: bool,
) -> Plan:
    plan = make_plan(cfg, shape, span.pattern, text[0].shape[2], text_length, implementation, placement, dtype)
    return replace(plan, keep=keep, relative=span.relative)


def _split(cfg: DiTConfig, span: Span, batch: int, grid: Any, placement: Placement) -> Split:
    return placement.split(mesh_sizes(cfg, (span.chunk, *grid), batch, span.pattern))


def _sharding(split: Split) -> NamedSharding:
    """Where keys [layers,B,F,V,M,K] live."""
    batch, _, heads = sequence.by_heads(split)
    return NamedSharding(split.mesh, P(None, batch, None, None, heads))
