"""Wan 2.1's diffusion transformer: the velocity of flow matching, given latents, a timestep and a text.

B batch · T latent frames · H W latent grid · C latent channels · L video tokens · S text tokens · N heads ·
K head dim · D model width.

The numbers are those of diffusers 0.42 (WanTransformer3DModel); in bfloat16 they are nearer to the float32 ones than
diffusers' own, because what costs next to nothing stays float32: the residual stream, all norms, the whole timestep
path with the modulation tables, the rotation, the patch embedding and the output head. Only the attention and
feed-forward matrices and the text embedding are in the lower precision (see `abstract_params`).

Sparse self-attention works on tiles of tokens, so with such a pattern the tokens are in tile order from the patches to
the output head; nothing else in the network looks at their order.

The forward pass of one chunk of an endless video, which reads what earlier chunks left, is in `causal`: the same
`Transformer`, given a `Layer` of the past for each of its own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from jvdiff import kernels
from jvdiff.errors import UsageError
from jvdiff.kernels import Dense, Pattern, VideoSparse
from jvdiff.kernels.tiles import Grid
from jvdiff.models.layers import MLP, Linear, RMSNorm, gelu, layer_norm, sinusoid
from jvdiff.models.wan import places
from jvdiff.models.wan.config import DiTConfig
from jvdiff.models.wan.layers import LayerNorm, rope_tables, rotate
from jvdiff.sharding import Placement, Sizes, Split, sequence
from jvdiff.types import Array, Params

Attend = Callable[[Array, Array, Array], Array]  # q, k, v [B,L,N,K] -> [B,L,N,K]


def velocity(
    params: Params,
    cfg: DiTConfig,
    latents: Array,
    timestep: Array,
    text: Array,
    *,
    pattern: Pattern = Dense(),  # noqa: B008 - a frozen value
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
      timestep: float32 [B] in 0..1000, or [B,T] with one for each frame, which sparse patterns do not take. Never lower
        precision: bfloat16 turns 937.5 into 936.
      text: [B,S,text_dim], the text encoder's output, zero beyond each prompt's end; or [B,P,S,text_dim], one for each
        of P equal parts of the frames.
      pattern: which tokens the self-attention sees; no choice changes the parameters. `VideoSparse` adds its coarse
        branch where the configuration has its gate (`gate_compress`); the other patterns ignore the gate.
        `BlockCausal` sees no later chunk, and with `teacher_forcing` takes two copies of the frames.
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
    _check(cfg, latents, timestep, text, text_length, pattern)
    timestep = timestep.reshape(len(timestep), -1)  # [B] -> [B,1]; [B,T] stays
    text = text if text.ndim == 4 else text[:, None]  # [B,P,S,D]
    plan = make_plan(cfg, latents.shape[:4], pattern, text.shape[-2], text_length, implementation, placement, dtype)
    _check_texts(text, plan.split)
    frames = pattern.frames(plan.grid[0])
    v, _ = apply(params, cfg, plan, latents, timestep, text, frames=frames, remat=remat)
    return v


@dataclass(frozen=True)
class Plan:
    """What is known of a forward pass when it is compiled.

    grid: (T,H,W) of the tokens.
    extra_text: that many more times the last text row counts.
    implementation: of the self-attention; see `velocity`.
    split: how `placement` divides the activations.
    dtype: of the products in the blocks and the text embedding; None: that of each matrix.
    keep: return every layer's keys and values.
    relative: keys are kept before their rotation, which counts from the oldest frame that is kept.
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


def _check_attend(pattern: Pattern, implementation: str | Attend | None) -> None:
    if callable(implementation) and not isinstance(pattern, Dense):
        raise UsageError(
            f"attention is a function of your own, and the pattern {pattern!r:.80}; expected the pattern Dense(): such "
            "a function is given the tokens in raster order, and decides itself which see each other."
        )


class Layer(NamedTuple):
    """What one layer remembers, or all of them, stacked in axis 0. None: nothing.

    past: keys and values [B,frames,V,N,K] of past frames of V tokens, N padded to the mesh.
    text: keys and values [B,S,N,K] of the text.
    """

    past: tuple[Array, Array] | None
    text: tuple[Array, Array] | None


class Past(NamedTuple):
    """What all layers need to know of the past.

    length: int32 [], how many of its tokens there are; None: there is no past to read.
    rope: the rotation [S,K/2] of each of them, where their keys are not rotated yet.
    visible: bool [T,T], which frames see which, where there is no past to read.
    """

    length: Array | None
    rope: tuple[Array, Array] | None = None
    visible: Array | None = None


def apply(
    params: Params,
    cfg: DiTConfig,
    plan: Plan,
    latents: Array,
    timestep: Array,
    text: Array | None,
    *,
    frames: Any = None,
    layers: Layer | None = None,
    past: Past | None = None,
    remat: bool = False,
) -> tuple[Array, Any]:
    """(velocity, keys and values of every layer [layers,B,L,N,K] where `plan.keep`) of latents [B,T,H,W,C].

    timestep [B,1] or [B,T]; text [B,P,S,D], or None where `layers` have its keys; frames: see `rope_tables`.
    """
    if placement := plan.placement:
        whole: Any = placement.whole({k: v for k, v in params.items() if k != "blocks"}, places.DIT)
        params = {**whole, "blocks": params["blocks"]}
        latents, timestep, text, past = placement.replicate((latents, timestep, text, past))
    model = Transformer(cfg, plan, remat)
    out: Any = model.apply({"params": params}, latents, timestep, text, frames, layers, past)
    return out


def abstract_params(cfg: DiTConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The parameter tree as ShapeDtypeStructs; linear kernels are [in,out], `blocks` has the layers in axis 0.

    With a lower `dtype`, the text embedding and the linear layers of the blocks have it; the rest stays float32.
    """
    leaves: dict[Any, Any] = traverse_util.flatten_dict(jax.eval_shape(lambda: _init(jax.random.key(0), cfg)))

    def dtype_of(path: tuple[str, ...]) -> Any:
        lower = path[0] in ("blocks", "text_embed") and path[-1] in ("kernel", "bias") and path[1] != "cross_norm"
        return dtype if lower else jnp.float32

    return traverse_util.unflatten_dict(
        {path: jax.ShapeDtypeStruct(x.shape, dtype_of(path)) for path, x in leaves.items()}
    )


def init_params(key: Array, cfg: DiTConfig) -> dict[str, Any]:
    """Float32 parameters to train from, as Wan's training starts: Xavier matrices, zero biases, a zero output head."""
    return jax.jit(_init, static_argnums=1)(key, cfg)


def attention_choice(
    cfg: DiTConfig,
    grid: Grid,
    *,
    pattern: Pattern = Dense(),  # noqa: B008 - a frozen value
    batch: int = 1,
    text_rows: int = 512,
    dtype: Any = jnp.float32,
    implementation: str | Attend | None = None,
    ring: bool = False,
) -> dict[str, str]:
    """Which implementation self- and cross-attention get for latents of (T,H,W): for the record of a run.

    ring: keys go round several devices, which needs an implementation that gives the log-sum-exp.
    """
    t, h, w = (n // p for n, p in zip(grid, cfg.patch_size, strict=True))
    shape = lambda n: jax.ShapeDtypeStruct(  # noqa: E731
        (batch, n, cfg.num_attention_heads, cfg.attention_head_dim), dtype
    )
    q, k = shape(t * h * w), shape(text_rows)
    if callable(implementation):
        video = f"{implementation.__module__}.{implementation.__qualname__}"
    else:
        video = pattern.choose(q, (t, h, w), lse=ring, implementation=implementation)
    return {"self": video, "cross": kernels.choose(q, k, k, implementation=_dense(implementation))}


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


def _dense(implementation: str | Attend | None) -> str | None:
    """The implementation of the attention to text, which is dense: the named one where there is such a dense one."""
    return implementation if isinstance(implementation, str) and implementation in kernels.IMPLEMENTATIONS else None


class _Shared(NamedTuple):
    """What all blocks have in common.

    modulation: float32 [B,1 or T,6,D].
    text: [B,P,S,D]; None: the layers remember its keys.
    rope: cosines and sines, float32 [L,K/2].
    """

    modulation: Array
    text: Array | None
    rope: tuple[Array, Array]
    past: Past | None


class Transformer(nn.Module):
    """Latents [B,T,H,W,C], timestep [B,1 or T], text [B,P,S,D] -> velocity [B,T,H,W,C], and what `plan.keep` keeps."""

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
    ) -> tuple[Array, Any]:
        cfg, plan, D = self.cfg, self.plan, self.cfg.width
        B, T, H, W, C = latents.shape
        pt, ph, pw = cfg.patch_size
        grid, pattern = plan.grid, plan.pattern

        # Patches enter in the order (c, pt, ph, pw) and leave as (pt, ph, pw, c).
        x = latents.reshape(B, grid[0], pt, grid[1], ph, grid[2], pw, C)
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

        t = MLP(D, D, nn.silu, exact=True, name="time_embed")(sinusoid(timestep, cfg.freq_dim))
        modulation = Linear(6 * D, exact=True, name="time_proj")(nn.silu(t))
        modulation = modulation.reshape(*timestep.shape, 6, D)  # [B,1 or T,6,D]
        if text is not None:
            text = MLP(D, D, gelu, dtype=plan.dtype, name="text_embed")(text)
        if placement := plan.placement:
            t, modulation, text = placement.replicate((t, modulation, text))

        block = _Block
        if placement and placement.mesh.shape["fsdp"] > 1:
            block = nn.map_variables(block, "params", partial(_gathered, placement), init=self.is_initializing())
        block = nn.remat(block, prevent_cse=False) if self.remat else block
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),  # pyright: ignore[reportArgumentType] - documented, and wrongly annotated
            length=cfg.num_layers,
        )(cfg, plan, name="blocks")
        x, memory = blocks(x, _Shared(modulation, text, rope, past), layers or Layer(None, None))

        x = _Head(cfg, plan, name="head")(x, t)
        if placement and split:
            x = placement.replicate(x)[:, : split.tokens]
        x = pattern.unordered(x, grid)
        x = x.reshape(B, *grid, pt, ph, pw, cfg.out_channels)
        x = x.transpose(0, 1, 4, 2, 5, 3, 6, 7)  # [B,t,pt,h,ph,w,pw,C]
        return x.reshape(B, T, H, W, cfg.out_channels), memory


class _Block(nn.Module):
    """x float32 [B,L,D] -> the same, and what `plan.keep` keeps of this layer."""

    cfg: DiTConfig
    plan: Plan

    @nn.compact
    def __call__(self, x: Array, shared: _Shared, layer: Layer) -> tuple[Array, Any]:
        cfg, plan, text = self.cfg, self.plan, shared.text
        if split := plan.split:
            x = split.along_tokens(x)
            text = None if text is None else split.constrain(text, split.batch)
        table = self.param("modulation", _modulation_init, (6, cfg.width), jnp.float32)
        each = jnp.moveaxis(shared.modulation + table[None, None], 2, 0)  # [6,B,1 or T,D]
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (_per_token(m, plan, x.shape[1]) for m in each)

        h = layer_norm(x, cfg.eps) * (1 + scale_1) + shift_1
        gated = cfg.gate_compress and plan.pattern.gated
        attend = partial(_attend_video, plan, shared, layer.past)
        rope = None if plan.relative else shared.rope
        h, memory = _Attention(cfg, gated, plan.dtype, name="self_attn")(h, h, rope, attend)
        x = x + gate_1 * h

        h = LayerNorm(cfg.eps, name="cross_norm")(x)
        parts = 1 if text is None else text.shape[1]
        text = None if text is None else text.reshape(text.shape[0], -1, text.shape[3])  # [B,P*S,D]
        attend = partial(_attend_text, plan, parts)
        h, _ = _Attention(cfg, dtype=plan.dtype, name="cross_attn")(h, text, None, attend, layer.text)
        x = x + h

        h = layer_norm(x, cfg.eps) * (1 + scale_2) + shift_2
        h = MLP(cfg.ffn_dim, cfg.width, gelu, names=("up", "down"), dtype=plan.dtype, name="ffn")(h)
        x = x + gate_2 * h.astype(jnp.float32)
        return x, memory


def _per_token(m: Array, plan: Plan, length: int) -> Array:
    """A modulation [B,1 or T,D] for tokens [B,length,D] of T frames, padding behind them."""
    if m.shape[1] == 1:
        return m
    m = jnp.repeat(m, math.prod(plan.grid) // m.shape[1], axis=1)  # [B,T,D] -> [B,T*h*w,D]
    m = jnp.pad(m, ((0, 0), (0, length - m.shape[1]), (0, 0)))  # [B,length,D]
    return plan.split.along_tokens(m) if plan.split else m


class _Attention(nn.Module):
    """x [B,L,D], context [B,S,D] -> float32 [B,L,D], and what `attend` keeps.

    Queries and keys are normalised over all heads together, before the rotation.

    gated: `attend` gets a gate for each token and channel.
    dtype: of the products.
    """

    cfg: DiTConfig
    gated: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: Array,
        context: Any,
        rope: tuple[Array, Array] | None,
        attend: Callable[[Array, Array, Array, Array | None], tuple[Array, Any]],
        keys: tuple[Array, Array] | None = None,
    ) -> tuple[Array, Any]:
        """keys: those of the context with their values, [B,S,N,K], worked out before."""
        cfg, D = self.cfg, self.cfg.width
        linear = partial(Linear, D, dtype=self.dtype)
        heads = lambda a: a.reshape(*a.shape[:2], -1, cfg.attention_head_dim)  # noqa: E731 - [B,L,D] -> [B,L,N,K]
        q = linear(name="q")(x)
        dtype = q.dtype
        q = heads(RMSNorm(cfg.eps, name="q_norm")(q))
        if keys is None:
            k, v = linear(name="k")(context), heads(linear(name="v")(context))
            k = heads(RMSNorm(cfg.eps, name="k_norm")(k))
        else:
            k, v = keys
        gate = heads(linear(kernel_init=nn.initializers.zeros, name="gate")(x)) if self.gated else None
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        out, memory = attend(q.astype(dtype), k.astype(dtype), v, gate)
        out = out.reshape(x.shape)  # [B,L,N,K] -> [B,L,D]
        return linear(name="out")(out).astype(jnp.float32), memory


def _attend_video(
    plan: Plan, shared: _Shared, past: tuple[Array, Array] | None, q: Array, k: Array, v: Array, gate: Array | None
) -> tuple[Array, Any]:
    """Self-attention of video tokens [B,L,N,K], in tile order where the pattern has tiles; and what is to be kept."""
    split, implementation = plan.split, plan.implementation
    if shared.past is not None:
        attend = partial(_attend_past, plan)
        common: Any = shared.past, shared.rope if plan.relative else None
        if split is None:
            return attend(q, k, v, past, common), (k, v) if plan.keep else None
        out, memory = sequence.cached_attention(attend, split, q, k, v, past, common)
        return out, memory if plan.keep else None

    def local(q: Array, k: Array, v: Array, gate: Array | None, first_head: Any = None) -> Array:
        if callable(implementation):
            return _attend_by(implementation, q, k, v)
        common: Any = dict(grid=plan.grid, first_head=first_head, implementation=implementation)
        return plan.pattern.attend(q, k, v, gate, **common)

    if split is None:
        return local(q, k, v, gate), None
    return sequence.self_attention(local, split, q, k, v, gate, _dense(implementation)), None


def _attend_by(attend: Attend, q: Array, k: Array, v: Array) -> Array:
    """Attention [B,L,N,K] by a function of the user's own."""
    out = attend(q, k, v)
    if jnp.shape(out) != q.shape:
        name = getattr(attend, "__qualname__", repr(attend))
        raise UsageError(
            f"attention: {name} returned {list(jnp.shape(out))}; expected {list(q.shape)}, the shape of q."
        )
    return out.astype(q.dtype)


def _attend_past(plan: Plan, q: Array, k: Array, v: Array, past: tuple[Array, Array] | None, common: Any) -> Array:
    """Attention of a chunk's tokens [B,L,N,K] to themselves and to the past; or among themselves, as a matrix says."""
    (state, rope), implementation = common, plan.implementation
    assert not callable(implementation)  # `make_plan` has looked
    turned = lambda x, rope: rotate(x.astype(jnp.float32), *rope).astype(x.dtype)  # noqa: E731
    if rope is not None:
        q, k = turned(q, rope), turned(k, rope)
    if past is None:
        return kernels.block_causal_attention(q, k, v, state.visible, implementation=implementation)
    old_k, old_v = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in past)  # [B,frames,V,N,K] -> [B,S,N,K]
    if state.rope is not None:
        old_k = turned(old_k, state.rope)
    # The past behind the chunk: of its slots the first are filled, so that one length says which count.
    k, v = jnp.concatenate([k, old_k], axis=1), jnp.concatenate([v, old_v], axis=1)  # [B,L+S,N,K]
    length = q.shape[1] + state.length
    return kernels.attention(q, k, v, kv_length=length, implementation=_dense(implementation))


def _attend_text(plan: Plan, parts: int, q: Array, k: Array, v: Array, gate: Array | None) -> tuple[Array, None]:
    """Attention to text [B,P*S,N,K], of each of P parts of the tokens to its own part; the last row counts often."""

    def local(q: Array, k: Array, v: Array) -> Array:
        pieces = [q, k, v]
        if parts > 1:  # [B,P*S,N,K] -> [B*P,S,N,K]
            pieces = [x.reshape(x.shape[0] * parts, -1, *x.shape[2:]) for x in pieces]
        rows: Any = pieces
        return _attend_rows(*rows, plan.extra_text, _dense(plan.implementation)).reshape(q.shape)

    return local(q, k, v) if plan.split is None else sequence.cross_attention(local, plan.split, q, k, v), None


def _attend_rows(q: Array, k: Array, v: Array, extra: int, implementation: str | None) -> Array:
    """Attention of q [B,L,N,K] to the rows k, v [B,S,N,K] of a text, the last of which counts `extra` times more."""
    if extra == 0:
        return kernels.attention(q, k, v, implementation=implementation)
    if kernels.choose(q, k, v, implementation=implementation) == "cudnn":  # gives no float32 log-sum-exp
        pad = ((0, 0), (0, extra), (0, 0), (0, 0))
        k, v = jnp.pad(k, pad, "edge"), jnp.pad(v, pad, "edge")  # [B,S+extra,N,K]
        return kernels.attention(q, k, v, implementation=implementation)
    out, lse = kernels.attention(q, k, v, return_lse=True, implementation=implementation)
    last = jnp.einsum("blnk,bnk->bnl", q, k[:, -1], preferred_element_type=jnp.float32)  # its logits [B,N,L]
    lse_last = last * q.shape[-1] ** -0.5 + math.log(extra)
    return kernels.merge(out, lse, jnp.broadcast_to(v[:, -1:], out.shape), lse_last)[0]


class _Head(nn.Module):
    """x [B,L,D] and the timestep's embedding [B,1 or T,D], before its SiLU -> patches [B,L,pt*ph*pw*C]."""

    cfg: DiTConfig
    plan: Plan

    @nn.compact
    def __call__(self, x: Array, t: Array) -> Array:
        cfg = self.cfg
        table = self.param("modulation", _modulation_init, (2, cfg.width), jnp.float32)
        each = jnp.moveaxis(t[:, :, None] + table[None, None], 2, 0)  # [2,B,1 or T,D]
        shift, scale = (_per_token(m, self.plan, x.shape[1]) for m in each)
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
    variables: Any = model.init(key, latents, jnp.zeros((1, 1)), jnp.zeros((1, 1, 1, cfg.text_dim)))
    return variables["params"]


def _check_texts(text: Array, split: Split | None) -> None:
    """Raises UsageError where tokens with texts of their own, [B,P,S,D], would be shared among devices."""
    if split and text.shape[1] > 1 and split.devices(split.ring + split.heads) > 1:
        raise UsageError(
            f"velocity: {text.shape[1]} texts a clip cannot be shared along its tokens; use mesh data=... only"
        )


def _check(
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
    if timestep.shape not in ((B,), (B, grid[0])) or timestep.dtype != jnp.float32:
        raise UsageError(
            f"velocity: timestep is {timestep.dtype}{list(timestep.shape)}; expected float32[{B}], or "
            f"[{B},{grid[0]}] with one for each frame"
        )
    if timestep.ndim == 2 and not pattern.raster:
        raise UsageError("velocity: a timestep for each frame goes with Dense() and BlockCausal(...) only")
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
