"""Wan 2.1's diffusion transformer: the velocity of flow matching, given latents, a timestep and a text.

B batch · T latent frames · H W latent grid · C latent channels · L video tokens · S text tokens · N heads ·
K head dim · D model width · I tokens of pictures.

The numbers are those of diffusers 0.42 (WanTransformer3DModel); in bfloat16 they are nearer to the float32 ones than
diffusers' own, because what costs next to nothing stays float32: the residual stream, all norms, the whole timestep
path with the modulation tables, the rotation, the patch embedding and the output head. Only the attention and
feed-forward matrices and the embeddings of text and pictures are in the lower precision (see `abstract_params`).

Sparse self-attention works on tiles of tokens, so with such a pattern the tokens are in tile order from the patches to
the output head; nothing else in the network looks at their order.

The forward pass of one chunk of an endless video, which reads what earlier chunks left, is in `causal`: the same
`Transformer`, given a `Layer` of the past for each of its own.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from jvdiff.errors import UsageError
from jvdiff.kernels import Dense, Pattern, VideoSparse
from jvdiff.kernels.tiles import Grid
from jvdiff.models.layers import MLP, LayerNorm, Linear, gelu, layer_norm, sinusoid
from jvdiff.models.wan import places
from jvdiff.models.wan.attention import Attention, attend_text, attend_video
from jvdiff.models.wan.config import DiTConfig
from jvdiff.models.wan.layers import rope_tables
from jvdiff.models.wan.plan import Attend, Layer, Past, Plan, Shared, check, check_image, check_texts, make_plan
from jvdiff.sharding import Placement
from jvdiff.types import Array, Params

_IMAGE_EPS = 1e-5  # of the norms around the embedding of pictures, whatever cfg.eps is


def velocity(
    params: Params,
    cfg: DiTConfig,
    latents: Array,
    timestep: Array,
    text: Array,
    *,
    pattern: Pattern = Dense(),  # noqa: B008 - a frozen value
    image: Array | None = None,
    text_length: int | None = None,
    remat: bool = False,
    implementation: str | Attend | None = None,
    placement: Placement | None = None,
    dtype: Any = None,
) -> Array:
    """d x / d sigma at `latents`: noise minus clean latents, as the network predicts it. Pure and differentiable.

    Args:
      params: the tree of `abstract_params(cfg)`; a kernel may be a `models.quantised.Quantised`.
      latents: float32 [B,T,H,W,C]; T, H, W multiples of the patch size.
      timestep: float32 [B] in 0..1000; or [B,2], of the first frame and of the others; or [B,T], of each frame. Never
        lower precision: bfloat16 turns 937.5 into 936.
      text: [B,S,text_dim], the text encoder's output, zero beyond each prompt's end; or [B,P,S,text_dim], one for each
        of P equal parts of the frames.
      pattern: which tokens the self-attention sees; no choice changes the parameters. `VideoSparse` adds its coarse
        branch where the configuration has its gate (`gate_compress`); the other patterns ignore the gate.
        `BlockCausal` sees no later chunk, and with `teacher_forcing` takes two copies of the frames.
      image: [B,I,image_dim], what an image encoder made of the clip's pictures, where the configuration has image_dim.
      text_length: the last row of `text` stands for all rows up to this many (512 in Wan's pipeline, which attends
        to the zero padding too): exactly the result of repeating it, without the work. None: S.
      remat: recompute each block in the backward pass instead of keeping its activations.
      implementation: of the self-attention, see `jvdiff.kernels`; of the attention to text too where there is a dense
        one of that name, which otherwise takes the best. Or a function (q, k, v [B,L,N,K]) -> [B,L,N,K] of your own
        for the self-attention of the dense pattern, queries and keys rotated and not scaled. On a mesh it is given all
        tokens of some of the heads, the last ones of which may be padding, and never a ring.
      placement: the devices to work on, `params` on them by `places.DIT`; the rest, and the result, is on
        all of them. None: one device.
      dtype: of the products of attention, feed-forward and text embedding. None: that of each matrix.

    Returns:
      float32 [B,T,H,W,out_channels].
    """
    if not isinstance(pattern, Pattern):
        raise UsageError(
            f"velocity: pattern is {pattern!r:.80}; expected Dense() or another pattern of jvdiff.kernels.patterns, "
            "whose `read` makes one of text."
        )
    check(cfg, latents, timestep, text, text_length, pattern)
    check_image(cfg, image, len(latents))
    timestep = timestep.reshape(len(timestep), -1)  # [B] -> [B,1]; [B,2] and [B,T] stay
    text = text if text.ndim == 4 else text[:, None]  # [B,P,S,D]
    plan = make_plan(cfg, latents.shape[:4], pattern, text.shape[-2], text_length, implementation, placement, dtype)
    check_texts(text, plan.split)
    frames = pattern.frames(plan.grid[0])
    v, _ = apply(params, cfg, plan, latents, timestep, text, image=image, frames=frames, remat=remat)
    return v


def window_losses(
    params: Params,
    cfg: DiTConfig,
    latents: Array,
    timestep: Array,
    text: Array,
    *,
    tile: Grid,
    candidates: tuple[Grid, ...],
    image: Array | None = None,
    text_length: int | None = None,
    dtype: Any = None,
) -> tuple[Array, Array]:
    """The dense velocity on one device, and float32 [layers,candidates,N]: how far each window would lead each head.

    Arguments as in `velocity`; of a window the mean squared difference from the head's dense attention.
    """
    check(cfg, latents, timestep, text, text_length, Dense())
    check_image(cfg, image, len(latents))
    plan = make_plan(cfg, latents.shape[:4], Dense(), text.shape[-2], text_length, None, None, dtype)
    plan = replace(plan, measured=(tile, candidates))
    return apply(params, cfg, plan, latents, timestep[:, None], text[:, None], image=image)


def apply(
    params: Params,
    cfg: DiTConfig,
    plan: Plan,
    latents: Array,
    timestep: Array,
    text: Array | None,
    *,
    image: Array | None = None,
    frames: Any = None,
    layers: Layer | None = None,
    past: Past | None = None,
    remat: bool = False,
) -> tuple[Array, Any]:
    """(velocity, keys and values of every layer [layers,B,L,N,K] where `plan.keep`) of latents [B,T,H,W,C].

    timestep [B,1], [B,2] or [B,T]; text [B,P,S,D], or None where `layers` have its keys; image [B,I,image_dim]
    or None; frames: see `rope_tables`.
    """
    if placement := plan.placement:
        whole: Any = placement.whole({k: v for k, v in params.items() if k != "blocks"}, places.DIT)
        params = {**whole, "blocks": params["blocks"]}
        latents, timestep, text, past, image = placement.replicate((latents, timestep, text, past, image))
    model = Transformer(cfg, plan, remat)
    out: Any = model.apply({"params": params}, latents, timestep, text, frames, layers, past, image)
    return out


def abstract_params(cfg: DiTConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The parameter tree as ShapeDtypeStructs; linear kernels are [in,out], `blocks` has the layers in axis 0.

    With a lower `dtype`, the linear layers of the blocks and of what embeds text and pictures have it; the rest stays
    float32.
    """
    leaves: dict[Any, Any] = traverse_util.flatten_dict(jax.eval_shape(lambda: init_params(jax.random.key(0), cfg)))

    def dtype_of(path: tuple[str, ...]) -> Any:
        embed = path[0] in ("text_embed", "image_embed") and path[1].startswith("linear")
        lower = embed or (path[0] == "blocks" and path[-1] in ("kernel", "bias") and path[1] != "cross_norm")
        return dtype if lower else jnp.float32

    return traverse_util.unflatten_dict(
        {path: jax.ShapeDtypeStruct(x.shape, dtype_of(path)) for path, x in leaves.items()}
    )


def init_params(key: Array, cfg: DiTConfig) -> dict[str, Any]:
    """Float32 parameters to train from, as Wan's training starts: Xavier matrices, zero biases, a zero output head."""
    return jax.jit(_init, static_argnums=1)(key, cfg)


class Transformer(nn.Module):
    """Latents [B,T,H,W,C], timestep [B,1, 2 or T], text [B,P,S,D] -> velocity [B,T,H,W,C], and what `keep` keeps."""

    cfg: DiTConfig
    plan: Plan
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        latents: Array,
        timestep: Array,
        text: Array | None,
        frames: Any = None,
        layers: Layer | None = None,
        past: Past | None = None,
        image: Array | None = None,
    ) -> tuple[Array, Any]:
        cfg, plan, D = self.cfg, self.plan, self.cfg.width
        B, T, H, W, C = latents.shape
        pt, ph, pw = cfg.patch_size
        grid, pattern = plan.grid, plan.pattern

        # Patches enter in the order (c, pt, ph, pw) and leave as (pt, ph, pw, c).
        x = latents.reshape(B, grid[0], pt, grid[1], ph, grid[2], pw, C)  # [B,t,pt,h,ph,w,pw,C]
        x = x.transpose(0, 1, 3, 5, 7, 2, 4, 6)  # [B,t,h,w,C,pt,ph,pw]
        x = x.reshape(B, -1, C * pt * ph * pw)  # [B,L,C*pt*ph*pw]
        rope: Any = rope_tables(grid, cfg.attention_head_dim, frames)
        if not pattern.raster:
            x = pattern.ordered(x, grid)
            rope = tuple(pattern.ordered(table[None], grid)[0] for table in rope)  # [L,K/2] each
        if split := plan.split:
            x = split.along_tokens(jnp.pad(x, ((0, 0), (0, split.padding), (0, 0))))  # L a multiple of the devices
            if not plan.relative:
                padded = (jnp.pad(table, ((0, split.padding), (0, 0))) for table in rope)
                rope = tuple(split.constrain(table, split.ring + split.heads) for table in padded)
        x = Linear(D, exact=True, name="patch_embed")(x)
        each = timestep.shape[1] == 1 or (timestep.shape[1] == T and pattern.raster)
        token_frames = None if each else _frames_of_tokens(plan, x.shape[1])

        t = MLP(D, D, nn.silu, exact=True, name="time_embed")(sinusoid(timestep, cfg.freq_dim))
        modulation = Linear(6 * D, exact=True, name="time_proj")(nn.silu(t))
        modulation = modulation.reshape(*timestep.shape, 6, D)  # [B,1, 2 or T,6,D]
        if text is not None:
            text = MLP(D, D, gelu, dtype=plan.dtype, name="text_embed")(text)
        if image is not None:
            image = _ImageEmbed(cfg, plan.dtype, name="image_embed")(image)
        if placement := plan.placement:
            t, modulation, text, image = placement.replicate((t, modulation, text, image))

        block = _Block
        if placement and placement.shape.fsdp > 1:
            block = nn.map_variables(block, "params", partial(_gathered, placement), init=self.is_initializing())
        block = nn.remat(block, prevent_cse=False) if self.remat else block
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),  # pyright: ignore[reportArgumentType] - documented, and wrongly annotated
            length=cfg.num_layers,
        )(cfg, plan, name="blocks")
        chosen = pattern.of_layers(timestep[:, -1:], cfg.num_layers, cfg.num_attention_heads)
        layers = (layers or Layer())._replace(chosen=chosen)
        x, memory = blocks(x, Shared(modulation, text, rope, past, token_frames, image), layers)

        x = _Head(cfg, plan, name="head")(x, t, token_frames)
        if placement and split:
            x = placement.replicate(x)[:, : split.tokens]
        x = pattern.unordered(x, grid)
        x = x.reshape(B, *grid, pt, ph, pw, cfg.out_channels)  # [B,t,h,w,pt,ph,pw,C]
        x = x.transpose(0, 1, 4, 2, 5, 3, 6, 7)  # [B,t,pt,h,ph,w,pw,C]
        return x.reshape(B, T, H, W, cfg.out_channels), memory  # [B,T,H,W,C]


class _ImageEmbed(nn.Module):
    """What an image encoder made of pictures, [B,I,image_dim] -> [B,I,D] in the dtype of the products."""

    cfg: DiTConfig
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg, x = self.cfg, x.astype(jnp.float32)
        if cfg.pos_embed_seq_len:
            places = self.param("places", nn.initializers.zeros, (cfg.pos_embed_seq_len, x.shape[-1]), jnp.float32)
            x = x + places[None]
        x = LayerNorm(_IMAGE_EPS, name="norm_1")(x)
        x = Linear(x.shape[-1], dtype=self.dtype, name="linear_1")(x)
        x = Linear(cfg.width, dtype=self.dtype, name="linear_2")(nn.gelu(x.astype(jnp.float32), approximate=False))
        return LayerNorm(_IMAGE_EPS, name="norm_2")(x.astype(jnp.float32)).astype(x.dtype)


class _Block(nn.Module):
    """x float32 [B,L,D] -> the same, and what `plan.keep` keeps of this layer."""

    cfg: DiTConfig
    plan: Plan

    @nn.compact
    def __call__(self, x: Array, shared: Shared, layer: Layer) -> tuple[Array, Any]:
        cfg, plan, text, image = self.cfg, self.plan, shared.text, shared.image
        if split := plan.split:
            x = split.along_tokens(x)
            text = None if text is None else split.constrain(text, split.batch)
            image = None if image is None else split.constrain(image, split.batch)
        table = self.param("modulation", _modulation_init, (6, cfg.width), jnp.float32)
        each = jnp.moveaxis(shared.modulation + table[None, None], 2, 0)  # [6,B,1, 2 or T,D]
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (
            _per_token(m, plan, shared.frames, x.shape[1]) for m in each
        )

        h = layer_norm(x, cfg.eps) * (1 + scale_1) + shift_1
        gated = cfg.gate_compress and plan.pattern.gated
        attend = partial(attend_video, plan, shared, layer)
        rope = None if plan.relative else shared.rope
        h, memory = Attention(cfg, gated, plan.dtype, name="self_attn")(h, h, rope, attend)
        x = x + gate_1 * h

        h = LayerNorm(cfg.eps, name="cross_norm")(x)
        parts = 1 if text is None else text.shape[1]
        text = None if text is None else text.reshape(text.shape[0], -1, text.shape[3])  # [B,P*S,D]
        attend = partial(attend_text, plan, parts, plan.extra_text)
        second = None if image is None else (image, partial(attend_text, plan, 1, 0))
        h, _ = Attention(cfg, dtype=plan.dtype, name="cross_attn")(h, text, None, attend, layer.text, second)
        x = x + h

        h = layer_norm(x, cfg.eps) * (1 + scale_2) + shift_2
        activation = partial(gelu, target=plan.target)
        h = MLP(cfg.ffn_dim, cfg.width, activation, names=("up", "down"), dtype=plan.dtype, name="ffn")(h)
        x = x + gate_2 * h.astype(jnp.float32)
        return x, memory


def _frames_of_tokens(plan: Plan, length: int) -> Array:
    """int32 [length]: the frame of each token in the pattern's order, 0 for the padding behind them."""
    frames, *cells = plan.grid
    every = jnp.repeat(jnp.arange(frames, dtype=jnp.int32), math.prod(cells))  # [L]
    return jnp.pad(plan.pattern.ordered(every[None], plan.grid)[0], (0, length - every.size))


def _per_token(m: Array, plan: Plan, frames: Array | None, length: int) -> Array:
    """A modulation [B,1, 2 or T,D] for tokens [B,length,D], whose frames are [length], or None where they are in raster
    order and each has a modulation."""
    if m.shape[1] == 1:
        return m
    if frames is None:
        m = jnp.repeat(m, math.prod(plan.grid) // m.shape[1], axis=1)  # [B,T,D] -> [B,T*h*w,D]
        m = jnp.pad(m, ((0, 0), (0, length - m.shape[1]), (0, 0)))  # [B,length,D]
    elif m.shape[1] == 2:  # a choice between two takes no memory
        m = jnp.where((frames == 0)[None, :, None], m[:, :1], m[:, 1:])
    else:
        m = m[:, frames]
    return plan.split.along_tokens(m) if plan.split else m


class _Head(nn.Module):
    """x [B,L,D] and the timestep's embedding [B,1, 2 or T,D], before its SiLU -> patches [B,L,pt*ph*pw*C]."""

    cfg: DiTConfig
    plan: Plan

    @nn.compact
    def __call__(self, x: Array, t: Array, frames: Array | None = None) -> Array:
        cfg = self.cfg
        table = self.param("modulation", _modulation_init, (2, cfg.width), jnp.float32)
        each = jnp.moveaxis(t[:, :, None] + table[None, None], 2, 0)  # [2,B,1, 2 or T,D]
        shift, scale = (_per_token(m, self.plan, frames, x.shape[1]) for m in each)
        x = layer_norm(x, cfg.eps) * (1 + scale) + shift
        features = cfg.out_channels * math.prod(cfg.patch_size)
        return Linear(features, nn.initializers.zeros, exact=True, name="proj")(x)


def _gathered(placement: Placement, layer: Params) -> Params:
    """The weights of one layer, whole but for `tensor`: inside the scan, so that one layer at a time is gathered."""
    return {"params": placement.whole(layer["params"], places.DIT, stack="blocks")}


def _modulation_init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return jax.random.normal(key, shape, dtype) * shape[-1] ** -0.5


def _init(key: Array, cfg: DiTConfig) -> dict[str, Any]:
    pattern = VideoSparse((1, 1, 1), 0.0) if cfg.gate_compress else Dense()  # one that uses every parameter
    model = Transformer(cfg, Plan((1, 1, 1), pattern, implementation="xla"))
    latents = jnp.zeros((1, *cfg.patch_size, cfg.in_channels))
    image = cfg.image_dim and jnp.zeros((1, cfg.pos_embed_seq_len or 1, cfg.image_dim))
    text = jnp.zeros((1, 1, 1, cfg.text_dim))
    variables: Any = model.init(key, latents, jnp.zeros((1, 1)), text, image=image)
    return variables["params"]
