"""HunyuanVideo's diffusion transformer: the velocity of flow matching, given latents, a timestep and two texts.

B batch · T latent frames · H W latent grid · C latent channels · L video tokens · S text rows · N heads · K head dim ·
D model width · M modulations of a clip (see `plan`).

The numbers are those of diffusers 0.42 (HunyuanVideoTransformer3DModel) in float32. In bfloat16 they are nearer to the
float32 ones than diffusers' own: the residual streams, all norms, the whole path of timestep, guidance and pooled text
with the modulations, and the rotation stay float32.

Video and text keep their own arrays all the way, and meet in the attention alone. The first blocks have weights of
their own for each ("double"), the later ones share them ("single"). Text goes through a few blocks by itself before
(the refiner), whose timestep embedding is its own.
"""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jvdiff import kernels
from jvdiff.kernels import Dense, Pattern
from jvdiff.models.hunyuan_video import places
from jvdiff.models.hunyuan_video.attention import attend
from jvdiff.models.hunyuan_video.config import DiTConfig
from jvdiff.models.hunyuan_video.plan import Plan, Shared, check, make_plan
from jvdiff.models.layers import MLP, LayerNorm, Linear, RMSNorm, gelu, layer_norm, product, rope_tables, rotate, row
from jvdiff.sharding import Placement
from jvdiff.types import Array, Params

_EPS = 1e-6  # of all norms
_FREQUENCIES = 256  # numbers that a timestep and a guidance become
_ROUNDED_UP = [12, 106]  # rates a hair below the middle of two floats, which the reference's exp rounds the other way
_REFINER_RATIO = 4  # feed-forward columns of the refiner for each of the width, whatever mlp_ratio is


def velocity(
    params: Params,
    cfg: DiTConfig,
    latents: Array,
    timestep: Array,
    states: Array,
    mask: Array,
    pooled: Array,
    guidance: Array | None = None,
    *,
    pattern: Pattern = Dense(),  # noqa: B008 - a frozen value
    remat: bool = False,
    implementation: str | None = None,
    placement: Placement | None = None,
    dtype: Any = None,
) -> Array:
    """d x / d sigma at `latents`: noise minus clean latents, as the network predicts it. Pure and differentiable.

    Args:
      params: the tree of `abstract_params(cfg)`; a kernel may be a `models.quantised.Quantised`.
      latents: float32 [B,T,H,W,in_channels]; T, H, W multiples of the patch size.
      timestep: float32 [B] in 0..1000, a fraction too. Never lower precision.
      states: [B,S,text_embed_dim], the language model's, whatever its padding is.
      mask: bool [B,S]: which rows of `states` count. They come first, and there is at least one.
      pooled: [B,pooled_projection_dim], the other text encoder's vector.
      guidance: float32 [B], times 1000 (6000 stands for 6), where the configuration has guidance_embeds; else None.
      pattern: which video tokens see each other. All see the text, and the text sees them. A gate is not used.
      remat: recompute each block in the backward pass instead of keeping its activations.
      implementation: of the joint attention, see `jvdiff.kernels`.
      placement: the devices to work on, `params` on them by `places.DIT`; the rest, and the result, is on all of them.
        None: one device.
      dtype: of the products of the blocks and the refiner. None: that of each matrix.

    Returns:
      float32 [B,T,H,W,out_channels].

    Raises:
      UsageError: arguments that do not fit the configuration or one another.
    """
    check(cfg, latents, timestep, states, mask, pooled, guidance, pattern)
    plan = make_plan(cfg, latents.shape[:4], pattern, implementation, placement, dtype)
    if placement:
        whole: Any = placement.whole({k: v for k, v in params.items() if k not in _STACKS}, places.DIT)
        params = {**whole, **{name: params[name] for name in _STACKS}}
        arrays = latents, timestep, states, mask, pooled, guidance
        latents, timestep, states, mask, pooled, guidance = placement.replicate(arrays)
    out: Any = Transformer(cfg, plan, remat).apply(
        {"params": params}, latents, timestep, states, mask, pooled, guidance
    )
    return out


def abstract_params(cfg: DiTConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The parameter tree as ShapeDtypeStructs; linear kernels are [in,out], `blocks` have the layers in axis 0.

    With a lower `dtype`, the linear layers of all blocks have it, those of their modulations too; the rest stays
    float32.
    """
    leaves: dict[Any, Any] = traverse_util.flatten_dict(jax.eval_shape(lambda: init_params(jax.random.key(0), cfg)))

    def dtype_of(path: tuple[str, ...]) -> Any:
        norm = any(name.startswith("norm") for name in path)
        lower = "blocks" in path and path[-1] in ("kernel", "bias") and not norm
        return dtype if lower else jnp.float32

    return traverse_util.unflatten_dict(
        {path: jax.ShapeDtypeStruct(x.shape, dtype_of(path)) for path, x in leaves.items()}
    )


def init_params(key: Array, cfg: DiTConfig) -> dict[str, Any]:
    """Float32 parameters to train from: Xavier matrices, zero biases and modulations, a zero output head."""
    return jax.jit(_init, static_argnums=1)(key, cfg)


class Transformer(nn.Module):
    """Latents [B,T,H,W,C], timestep [B], states [B,S,E], mask [B,S], pooled [B,P], guidance [B] or None -> velocity."""

    cfg: DiTConfig
    plan: Plan
    remat: bool = False

    @nn.compact
    def __call__(
        self, latents: Array, timestep: Array, states: Array, mask: Array, pooled: Array, guidance: Array | None
    ) -> Array:
        cfg, plan, D = self.cfg, self.plan, self.cfg.width
        lengths = jnp.sum(mask, axis=1, dtype=jnp.int32)  # [B]
        condition, clean = self._conditions(timestep, pooled, guidance)
        each = condition[:, None] if clean is None else jnp.stack([clean, condition], axis=1)  # [B,M,D]
        text = _Refiner(cfg, plan, name="refiner")(timestep, states, mask, lengths)
        x, rope, first = self._tokens(latents)
        x = Linear(D, exact=True, name="patch_embed")(x)
        if placement := plan.placement:
            each, text, lengths = placement.replicate((each, text, lengths))
        shared = Shared(each, lengths, rope, None if clean is None else first)

        chosen = plan.pattern.of_layers(timestep[:, None], cfg.layers, cfg.num_attention_heads)
        early, late = (None, None) if chosen is None else (chosen[: cfg.num_layers], chosen[cfg.num_layers :])
        stack = partial(_Stack, cfg, plan, self.remat)
        x, text = stack(_Double, cfg.num_layers, name="double")(x, text, shared, early)
        x, text = stack(_Single, cfg.num_single_layers, name="single")(x, text, shared, late)
        return self._frames(_Head(cfg, name="head")(x, condition))

    def _conditions(self, timestep: Array, pooled: Array, guidance: Array | None) -> tuple[Array, Array | None]:
        """float32 [B,D], after its SiLU, of the clip; and of a first frame that is clean, where there is one."""
        embed = partial(MLP, self.cfg.width, self.cfg.width, nn.silu, exact=True)
        text, time = embed(name="pooled_embed")(pooled), embed(name="time_embed")
        clean, t = None, time(sinusoid(timestep)) + text
        if self.cfg.image_condition_type == "token_replace":
            clean = nn.silu(time(sinusoid(jnp.zeros_like(timestep))) + text)
        if guidance is not None:
            t = t + embed(name="guidance_embed")(sinusoid(guidance))
        return nn.silu(t), clean

    def _tokens(self, latents: Array) -> tuple[Array, Any, Array]:
        """Patches [B,L,C*pt*ph*pw] in the pattern's order, their rotations, and which are of the first frame."""
        (B, _, _, _, C), grid, plan = latents.shape, self.plan.grid, self.plan
        pt, ph, pw = self.cfg.patch
        x = latents.reshape(B, grid[0], pt, grid[1], ph, grid[2], pw, C)  # [B,t,pt,h,ph,w,pw,C]
        x = x.transpose(0, 1, 3, 5, 7, 2, 4, 6)  # [B,t,h,w,C,pt,ph,pw]
        x = x.reshape(B, -1, C * pt * ph * pw)  # [B,L,C*pt*ph*pw]
        tables = rope_tables(grid, self.cfg.rope_axes_dim, self.cfg.rope_theta)
        first = jnp.arange(math.prod(grid)) < grid[1] * grid[2]  # [L]
        x, *tokens = (plan.pattern.ordered(a, grid) for a in (x, *(a[None] for a in (*tables, first))))
        cos, sin, first = (a[0] for a in tokens)  # [L,K/2], [L,K/2], [L]
        if split := plan.split:
            x = split.along_tokens(jnp.pad(x, ((0, 0), (0, split.padding), (0, 0))))  # L a multiple of the devices
            cos, sin = (
                split.constrain(jnp.pad(a, ((0, split.padding), (0, 0))), split.ring + split.heads) for a in (cos, sin)
            )
            first = jnp.pad(first, (0, split.padding))
        return x, (cos, sin), first

    def _frames(self, x: Array) -> Array:
        """Patches [B,L,C*pt*ph*pw] in the pattern's order -> [B,T,H,W,C]; they leave as they entered, C slowest."""
        grid, plan, (pt, ph, pw) = self.plan.grid, self.plan, self.cfg.patch
        if plan.placement and plan.split:
            x = plan.placement.replicate(x)[:, : plan.split.tokens]
        x = plan.pattern.unordered(x, grid)
        x = x.reshape(x.shape[0], *grid, -1, pt, ph, pw)  # [B,t,h,w,C,pt,ph,pw]
        x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4)  # [B,t,pt,h,ph,w,pw,C]
        return x.reshape(x.shape[0], grid[0] * pt, grid[1] * ph, grid[2] * pw, -1)


class _Stack(nn.Module):
    """Blocks of one kind behind each other: video [B,L,D] and text [B,S,D], both float32 -> the same.

    Weights are in `blocks`, with the layers in axis 0; `chosen` [layers,B,N] is what the pattern gives each layer.
    """

    cfg: DiTConfig
    plan: Plan
    remat: bool
    block: Any
    length: int

    @nn.compact
    def __call__(self, x: Array, text: Array, shared: Shared, chosen: Array | None) -> tuple[Array, Array]:
        block, placement = self.block, self.plan.placement
        if placement and placement.shape.fsdp > 1:
            block = nn.map_variables(block, "params", partial(_gathered, placement), init=self.is_initializing())
        block = nn.remat(block, prevent_cse=False) if self.remat else block
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),  # pyright: ignore[reportArgumentType] - documented, and wrongly annotated
            length=self.length,
        )(self.cfg, self.plan, name="blocks")
        (x, text), _ = blocks((x, text), shared, chosen)
        return x, text


class _Double(nn.Module):
    """A block with weights of their own for video and text."""

    cfg: DiTConfig
    plan: Plan

    @nn.compact
    def __call__(
        self, streams: tuple[Array, Array], shared: Shared, chosen: Array | None
    ) -> tuple[tuple[Array, Array], None]:
        cfg, plan, D = self.cfg, self.plan, self.cfg.width
        streams = _divided(plan, *streams)
        parts = dict(zip(("video", "text"), streams, strict=True))
        condition = {"video": shared.condition, "text": shared.condition[:, -1:]}
        m = {name: _modulation(cfg, 6, f"{name}_modulation", condition[name]) for name in parts}
        each = {name: [_per_token(a, plan, shared.first) for a in m[name]] for name in parts}
        heads = {}
        for name, x in parts.items():
            shift, scale, *_ = each[name]
            h = layer_norm(x, _EPS) * (1 + scale) + shift
            heads[name] = _heads(cfg, plan.dtype, f"{name}_")(h, shared.rope if name == "video" else None)
        seen = dict(zip(parts, attend(plan, shared.lengths, chosen, heads["video"], heads["text"]), strict=True))
        for name, x in parts.items():
            _, _, gate_1, shift, scale, gate_2 = each[name]
            h = seen[name].reshape(x.shape)  # [B,L or S,N,K] -> [B,L or S,D]
            x = x + gate_1 * Linear(D, dtype=plan.dtype, name=f"{name}_out")(h).astype(jnp.float32)
            h = layer_norm(x, _EPS) * (1 + scale) + shift
            activation, names = partial(gelu, target=plan.target), ("up", "down")
            h = MLP(cfg.ffn_dim, D, activation, names=names, dtype=plan.dtype, name=f"{name}_ffn")(h)
            parts[name] = x + gate_2 * h.astype(jnp.float32)
        return (parts["video"], parts["text"]), None


class _Single(nn.Module):
    """A block whose weights video and text share, with attention and feed-forward side by side."""

    cfg: DiTConfig
    plan: Plan

    @nn.compact
    def __call__(
        self, streams: tuple[Array, Array], shared: Shared, chosen: Array | None
    ) -> tuple[tuple[Array, Array], None]:
        cfg, plan, D = self.cfg, self.plan, self.cfg.width
        streams = _divided(plan, *streams)
        m = _modulation(cfg, 3, "modulation", shared.condition)
        of_video = [_per_token(a, plan, shared.first) for a in m]
        each = of_video, [a[:, -1:] for a in m]
        h = [layer_norm(x, _EPS) * (1 + scale) + shift for x, (shift, scale, _) in zip(streams, each, strict=True)]
        heads = _heads(cfg, plan.dtype, "")
        seen = attend(plan, shared.lengths, chosen, heads(h[0], shared.rope), heads(h[1], None))
        up = Linear(cfg.ffn_dim, dtype=plan.dtype, name="up")
        hidden = [gelu(up(a), plan.target) for a in h]
        out = _Joined(D, plan.dtype, name="out")
        video, text = (
            x + gate * out(a.reshape(x.shape), b)
            for x, (_, _, gate), a, b in zip(streams, each, seen, hidden, strict=True)
        )
        return (video, text), None


class _Joined(nn.Module):
    """What [a | b] @ kernel + bias is, without the copy: a [B,L,D], b [B,L,F] -> float32 [B,L,features]."""

    features: int
    dtype: Any = None

    @nn.compact
    def __call__(self, a: Array, b: Array) -> Array:
        rows = a.shape[-1] + b.shape[-1]
        kernel = self.param("kernel", nn.initializers.xavier_uniform(), (rows, self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)

        def of(x: Array, part: slice) -> Array:
            own = jax.tree.map(lambda leaf: leaf[part] if leaf.shape[0] == rows else leaf, kernel)  # a scale is for all
            return product(x, own, self.dtype, out=jnp.float32)

        y = of(a, slice(a.shape[-1])) + of(b, slice(a.shape[-1], rows))
        return y + row(bias, y)


class _Refiner(nn.Module):
    """What the blocks are given of a text: timestep [B], states [B,S,E], mask [B,S], lengths [B] -> float32 [B,S,D]."""

    cfg: DiTConfig
    plan: Plan

    @nn.compact
    def __call__(self, timestep: Array, states: Array, mask: Array, lengths: Array) -> Array:
        cfg, D = self.cfg, self.cfg.width
        valid = mask[..., None].astype(jnp.float32)  # [B,S,1]
        mean = jnp.sum(states.astype(jnp.float32) * valid, axis=1) / jnp.sum(valid, axis=1)  # [B,E]
        embed = partial(MLP, D, D, nn.silu, exact=True)
        condition = embed(name="time_embed")(sinusoid(timestep)) + embed(name="text_embed")(mean)
        x = Linear(D, dtype=self.plan.dtype, name="proj_in")(states).astype(jnp.float32)
        blocks = nn.scan(
            _RefinerBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType] - documented, and wrongly annotated
            length=cfg.num_refiner_layers,
        )(cfg, self.plan, name="blocks")
        return blocks(x, (nn.silu(condition), lengths))[0]


class _RefinerBlock(nn.Module):
    """Text [B,S,D] float32 -> the same. Rows beyond `lengths` are seen by none, and nothing uses what they become."""

    cfg: DiTConfig
    plan: Plan

    @nn.compact
    def __call__(self, x: Array, shared: tuple[Array, Array]) -> tuple[Array, None]:
        cfg, D, dtype, (condition, lengths) = self.cfg, self.cfg.width, self.plan.dtype, shared
        gate_1, gate_2 = _modulation(cfg, 2, "gates", condition[:, None])
        h = LayerNorm(_EPS, name="norm_1")(x)
        linear = partial(Linear, D, dtype=dtype)
        q, k, v = (
            a.reshape(*a.shape[:2], -1, cfg.attention_head_dim) for a in (linear(name=name)(h) for name in "qkv")
        )
        # So little that plain XLA, which a mesh can divide, does it.
        h = kernels.attention(q, k, v, kv_length=lengths, implementation="xla", target=self.plan.target)
        x = x + gate_1 * linear(name="out")(h.reshape(x.shape)).astype(jnp.float32)
        h = LayerNorm(_EPS, name="norm_2")(x)
        h = MLP(_REFINER_RATIO * D, D, nn.silu, names=("up", "down"), dtype=dtype, name="ffn")(h)
        return x + gate_2 * h.astype(jnp.float32), None


class _Head(nn.Module):
    """Video [B,L,D] and its condition [B,D] -> patches [B,L,C*pt*ph*pw]."""

    cfg: DiTConfig

    @nn.compact
    def __call__(self, x: Array, condition: Array) -> Array:
        cfg = self.cfg
        scale, shift = _modulation(cfg, 2, "modulation", condition[:, None])  # in this order, unlike in the blocks
        x = layer_norm(x, _EPS) * (1 + scale) + shift
        features = cfg.out_channels * math.prod(cfg.patch)
        return Linear(features, nn.initializers.zeros, exact=True, name="proj")(x)


def sinusoid(t: Array) -> Array:
    """float32 [B] -> [B,256]: the cosines, then the sines, of t times 128 rates.

    Rates and angles are rounded to float32 at every step, as in the reference: at 6000 (guidance) an angle in higher
    precision is another number, and the network has learned this one.
    """
    half = _FREQUENCIES // 2
    exponents = np.float32(-math.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    rates = np.exp(exponents.astype(np.float64)).astype(np.float32)  # numpy's own for float32 is rounded less well
    rates[_ROUNDED_UP] = np.nextafter(rates[_ROUNDED_UP], np.float32(1))
    angles = t[:, None] * jnp.asarray(rates)[None]  # [B,128]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _heads(cfg: DiTConfig, dtype: Any, prefix: str) -> Any:
    """A function from x [B,L,D] and a rotation, or None, to queries, keys and values [B,L,N,K] of the products' dtype.

    Queries and keys are normalised head by head, before the rotation. Called twice it uses the same weights twice.
    """
    q, k, v = (Linear(cfg.width, dtype=dtype, name=f"{prefix}{name}") for name in "qkv")
    q_norm, k_norm = (RMSNorm(_EPS, rotated=True, name=f"{prefix}{name}_norm") for name in "qk")

    def heads(x: Array, rope: tuple[Array, Array] | None) -> tuple[Array, Array, Array]:
        split = lambda a: a.reshape(*a.shape[:2], -1, cfg.attention_head_dim)  # noqa: E731 - [B,L,D] -> [B,L,N,K]
        turned = lambda a: a if rope is None else rotate(a, *rope)  # noqa: E731
        normal = lambda linear, norm: turned(norm(split(linear(x))))  # noqa: E731 - float32
        values = split(v(x))
        return normal(q, q_norm).astype(values.dtype), normal(k, k_norm).astype(values.dtype), values

    return heads


def _modulation(cfg: DiTConfig, count: int, name: str, condition: Array) -> list[Array]:
    """`count` arrays [B,M,D] that a linear layer of that name makes of a condition [B,M,D], after its SiLU."""
    m = Linear(count * cfg.width, nn.initializers.zeros, exact=True, name=name)(condition)
    return jnp.split(m, count, axis=-1)


def _per_token(m: Array, plan: Plan, first: Array | None) -> Array:
    """A modulation [B,M,D] for tokens: [B,1,D], or [B,L,D] where those of the first frame have their own."""
    if m.shape[1] == 1:
        return m
    assert first is not None
    m = jnp.where(first[None, :, None], m[:, :1], m[:, 1:])
    return plan.split.along_tokens(m) if plan.split else m


def _divided(plan: Plan, x: Array, text: Array) -> tuple[Array, Array]:
    """Video [B,L,D] and text [B,S,D] where they belong: tokens on all devices of a clip, a text on each of them."""
    if split := plan.split:
        return split.along_tokens(x), split.constrain(text, split.batch)
    return x, text


def _gathered(placement: Placement, layer: Params) -> Params:
    """The weights of one layer, whole but for `tensor`: inside the scan, so that one layer at a time is gathered."""
    return {"params": placement.whole(layer["params"], places.DIT, stack="blocks")}


_STACKS = ("double", "single")


def _init(key: Array, cfg: DiTConfig) -> dict[str, Any]:
    model = Transformer(cfg, Plan((1, 1, 1), Dense(), "xla"))
    one = jnp.zeros(1)
    latents, states = jnp.zeros((1, *cfg.patch, cfg.in_channels)), jnp.zeros((1, 1, cfg.text_embed_dim))
    text = states, jnp.ones((1, 1), bool), jnp.zeros((1, cfg.pooled_projection_dim))
    variables: Any = model.init(key, latents, one, *text, one if cfg.guidance_embeds else None)
    return variables["params"]
