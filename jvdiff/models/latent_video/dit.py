"""The latent video transformer: what a noisy clip of latents is made of, given a timestep and a class label.

B batch · T latent frames · H W latent grid · C latent channels · L tokens of one frame · N heads · K head dim ·
D model width.

A DiT (arXiv 2212.09748) whose attention is factorised, as in Latte (arXiv 2401.03048): each block attends among the L
tokens of every frame, then among the T frames at every place, then has a GEGLU feed-forward (arXiv 2002.05202). Shift,
scale and gate of each of the three come from timestep and label (adaLN-Zero). Positions are fixed sines and cosines, so
that no size is the largest. Queries and keys are RMS-normalised in each head.

The matrices of attention and feed-forward work in the dtype that they are given in, or in the one that is asked for.
All else is float32 whatever the parameters' dtype: the residual stream, norms, softmax, the path of timestep and label
with the modulation, the patch embedding and the output head.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from jvdiff import kernels
from jvdiff.errors import UsageError
from jvdiff.models.latent_video import places
from jvdiff.models.latent_video.config import DiTConfig
from jvdiff.models.layers import MLP, Linear, RMSNorm, as_array, gelu, layer_norm, sinusoid
from jvdiff.runtime.target import Target, here
from jvdiff.sharding import Placement, Sizes, Split
from jvdiff.types import Array, Params

_EPS = 1e-6
_FRAMES, _PLACES = 1, 2  # the axes of [B,T,L,...] that attention can be among
_POLICIES = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


def denoise(
    params: Params,
    cfg: DiTConfig,
    latents: Array,
    timestep: Array,
    labels: Array,
    *,
    remat: str | None = None,
    implementation: str | None = None,
    placement: Placement | None = None,
    dtype: Any = None,
) -> Array:
    """The network's prediction (`cfg.prediction`: v, the noise, or the clean latents) at noisy latents. Pure.

    Args:
      params: the tree of `abstract_params(cfg)`; a kernel may be a `models.quantised.Quantised`.
      latents: float32 [B,T,H,W,C]; H and W multiples of the patch size, of any size.
      timestep: float32 [B] in 0..1000.
      labels: int32 [B]; `cfg.null_class` for none. A label beyond that gives NaN.
      remat: what of a block is computed again in the backward pass: None nothing, "full" everything, "dots" everything
        but the linear layers.
      implementation: of both attentions, see `jvdiff.kernels`.
      placement: the devices to work on, `params` on them by `places.DIT`; the rest, and the
        result, is on all of them. None: one device.
      dtype: of the products of attention and feed-forward. None: that of each matrix.

    Returns:
      float32 [B,T,H,W,C].

    Raises:
      UsageError: a shape, dtype, policy or mesh that does not fit.
    """
    _check(cfg, latents, timestep, labels, remat)
    plan = _Plan(latents.shape[2] * latents.shape[3] // cfg.patch_size**2, implementation, dtype=dtype)
    if placement:
        plan = replace(plan, placement=placement, split=placement.split(mesh_sizes(cfg, latents.shape[:4])))
        whole: Any = placement.whole({k: v for k, v in params.items() if k != "blocks"}, places.DIT)
        params = {**whole, "blocks": params["blocks"]}
        latents, timestep, labels = placement.replicate((latents, timestep, labels))
    out: Any = _Transformer(cfg, plan, remat).apply({"params": params}, latents, timestep, labels)
    return out


def mesh_sizes(cfg: DiTConfig, shape: tuple[int, ...]) -> Sizes:
    """What a mesh must divide to run this model on latents of (B,T,H,W): tokens are those of one frame."""
    B, _, H, W = shape
    return Sizes(B, H * W // cfg.patch_size**2, cfg.num_heads, cfg.ffn_dim)


def abstract_params(cfg: DiTConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The parameter tree as ShapeDtypeStructs; linear kernels are [in,out], `blocks` has the layers in axis 0."""
    leaves = jax.eval_shape(partial(init_params, cfg=cfg), jax.random.key(0))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), leaves)


def init_params(key: Array, cfg: DiTConfig) -> dict[str, Any]:
    """Float32 parameters to train from: each block the identity, the prediction zero."""
    return jax.jit(_init, static_argnames="cfg")(key, cfg=cfg)


def _init(key: Array, cfg: DiTConfig) -> dict[str, Any]:
    latents = jnp.zeros((1, 1, cfg.patch_size, cfg.patch_size, cfg.in_channels))
    model = _Transformer(cfg, _Plan(1, implementation="xla"))
    variables: Any = model.init(key, latents, jnp.zeros(1), jnp.zeros(1, jnp.int32))
    return variables["params"]


@dataclass(frozen=True)
class _Plan:
    """What is known of a forward pass when it is compiled.

    tokens: L, without padding.
    implementation: of both attentions; see `denoise`.
    placement: mesh and where activations live on it; None: one device.
    split: how `placement` divides the activations.
    dtype: of the products of attention and feed-forward; None: that of each matrix.
    """

    tokens: int
    implementation: str | None = None
    placement: Placement | None = None
    split: Split | None = None
    dtype: Any = None

    @property
    def target(self) -> Target:
        """What the program is made for."""
        return self.placement.target if self.placement else here()

    def along_tokens(self, x: Array) -> Array:
        """Activations [B,T,L,...], clips and tokens divided; L padded."""
        split = self.split
        return split.constrain(x, split.batch, None, split.ring + split.heads) if split else x


class _Transformer(nn.Module):
    """Latents [B,T,H,W,C], timestep [B], labels int32 [B] -> the prediction, as the latents."""

    cfg: DiTConfig
    plan: _Plan
    remat: str | None = None

    @nn.compact
    def __call__(self, latents: Array, timestep: Array, labels: Array) -> Array:
        cfg, plan, D, p = self.cfg, self.plan, self.cfg.hidden_size, self.cfg.patch_size
        B, T, H, W, C = latents.shape
        h, w, padding = H // p, W // p, plan.split.padding if plan.split else 0

        x = latents.reshape(B, T, h, p, w, p, C).transpose(0, 1, 2, 4, 3, 5, 6)  # [B,T,h,w,p,p,C]
        x = x.reshape(B, T, h * w, p * p * C)  # [B,T,L,p*p*C]
        positions = _positions(T, h, w, D)[None]
        x, positions = (jnp.pad(a, ((0, 0), (0, 0), (0, padding), (0, 0))) for a in (x, positions))  # L padded
        x = Linear(D, exact=True, name="patch_embed")(plan.along_tokens(x)) + positions

        condition = MLP(D, D, nn.silu, exact=True, name="time_embed")(sinusoid(timestep, cfg.freq_dim))
        # About as large as what comes of the timestep: a small one (DiT has 0.02) is heard late.
        table = nn.Embed(cfg.num_classes + 1, D, embedding_init=nn.initializers.normal(0.5), name="label_embed")
        rows = jnp.take(as_array(table.embedding), labels, axis=0)  # [B] of [classes+1,D] -> [B,D]
        condition = nn.silu(condition + rows.astype(jnp.float32))
        if plan.placement:
            condition = plan.placement.replicate(condition)

        block = _Block
        if plan.placement and plan.placement.shape.fsdp > 1:
            block = nn.map_variables(block, "params", partial(_gathered, plan.placement), init=self.is_initializing())
        if self.remat:
            block = nn.remat(block, prevent_cse=False, policy=_POLICIES[self.remat])
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType] - documented, and wrongly annotated
            length=cfg.depth,
        )(cfg, plan, name="blocks")
        x, _ = blocks(x, condition)

        shift, scale = _modulation(2, D, condition, "head_modulation")
        x = layer_norm(x, _EPS) * (1 + scale) + shift
        x = Linear(p * p * C, nn.initializers.zeros, exact=True, name="head")(x)
        if plan.placement:
            x = plan.placement.replicate(x)[:, :, : plan.tokens]
        x = x.reshape(B, T, h, w, p, p, C).transpose(0, 1, 2, 4, 3, 5, 6)  # [B,T,h,p,w,p,C]
        return x.reshape(latents.shape)  # [B,T,H,W,C]


class _Block(nn.Module):
    """x float32 [B,T,L,D] and the condition float32 [B,D] -> x."""

    cfg: DiTConfig
    plan: _Plan

    @nn.compact
    def __call__(self, x: Array, condition: Array) -> tuple[Array, None]:
        cfg, plan, D = self.cfg, self.plan, self.cfg.hidden_size
        x = plan.along_tokens(x)
        vectors = _modulation(9, D, condition, "modulation", plan.placement)
        layers = (
            _Attention(cfg, plan, _PLACES, name="spatial_attn"),
            _Attention(cfg, plan, _FRAMES, name="temporal_attn"),
            _FeedForward(cfg, plan.dtype, name="ffn"),
        )
        for i, layer in enumerate(layers):
            shift, scale, gate = vectors[3 * i : 3 * i + 3]
            x = x + gate * layer(layer_norm(x, _EPS) * (1 + scale) + shift).astype(jnp.float32)
        return x, None


def _modulation(count: int, width: int, condition: Array, name: str, placement: Placement | None = None) -> list[Array]:
    """`count` vectors [B,1,1,D] of the condition [B,D], float32, zero at first."""
    vectors = Linear(count * width, nn.initializers.zeros, exact=True, name=name)(condition)
    if placement:
        vectors = placement.replicate(vectors)
    return jnp.split(vectors[:, None, None], count, axis=-1)  # [B,count*D] -> count of [B,1,1,D]


class _Attention(nn.Module):
    """[B,T,L,D] -> the same, along `axis`."""

    cfg: DiTConfig
    plan: _Plan
    axis: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        D, plan = self.cfg.hidden_size, self.plan
        linear = partial(Linear, D, dtype=plan.dtype)
        q, k, v = (linear(name=n)(x) for n in ("q", "k", "v"))
        q, k, v = (a.reshape(*x.shape[:3], self.cfg.num_heads, -1) for a in (q, k, v))  # [B,T,L,D] -> [B,T,L,N,K]
        q, k = (RMSNorm(_EPS, name=f"{n}_norm")(a).astype(v.dtype) for n, a in (("q", q), ("k", k)))
        attend: Any = partial(_attend, plan, self.axis)
        if split := plan.split:
            spec = P(split.batch, None, split.ring + split.heads, split.tensor)
            attend = jax.shard_map(attend, mesh=split.mesh, in_specs=spec, out_specs=spec, check_vma=False)
        return linear(name="out")(attend(q, k, v).reshape(x.shape))  # [B,T,L,N,K] -> [B,T,L,D]


def _attend(plan: _Plan, axis: int, q: Array, k: Array, v: Array) -> Array:
    """Attention along one axis of [B,T,L,N,K], of this device's tokens to those of all."""
    if axis == _PLACES and plan.split and (devices := plan.split.ring + plan.split.heads):
        k, v = (lax.all_gather(a, devices, axis=axis, tiled=True) for a in (k, v))  # all tokens, padding too
        k, v = k[:, :, : plan.tokens], v[:, :, : plan.tokens]

    def sequences(a: Array) -> Array:
        a = jnp.moveaxis(a, axis, 2)  # [B,L,T,N,K] or [B,T,L,N,K]: what is attended along comes third
        return a.reshape(-1, *a.shape[2:])  # [B*L,T,N,K] or [B*T,L,N,K]

    how: Any = dict(implementation=plan.implementation, target=plan.target)
    out = kernels.attention(sequences(q), sequences(k), sequences(v), **how)
    out = out.reshape(jnp.moveaxis(q, axis, 2).shape)  # [B,L,T,N,K] or [B,T,L,N,K]
    return jnp.moveaxis(out, 2, axis)  # [B,T,L,N,K]


class _FeedForward(nn.Module):
    """GEGLU: D -> twice 4D, one half the other's gate -> D. Two matrices, so that columns can be divided."""

    cfg: DiTConfig
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        gate, up = (Linear(self.cfg.ffn_dim, dtype=self.dtype, name=n)(x) for n in ("gate", "up"))
        return Linear(self.cfg.hidden_size, dtype=self.dtype, name="down")(gelu(gate) * up)


def _positions(T: int, h: int, w: int, width: int) -> Array:
    """float32 [T,L,D]: rows and columns in a half of the channels each, added to the frames in all of them."""
    across = jnp.broadcast_to(_waves(h, width // 2)[:, None], (h, w, width // 2))
    along = jnp.broadcast_to(_waves(w, width // 2)[None], (h, w, width // 2))
    space = jnp.concatenate([across, along], axis=-1).reshape(1, h * w, width)  # [h,w,D] -> [1,L,D]
    return _waves(T, width)[:, None] + space


def _waves(count: int, size: int) -> Array:
    """float32 [count,size]: sines, then cosines, of i * 10000^(-2j/size); angles in float64."""
    angles = np.arange(count)[:, None] * 10000.0 ** (-np.arange(0, size, 2) / size)
    return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=-1), jnp.float32)  # [count,size]


def _gathered(placement: Placement, layer: Params) -> Params:
    """The weights of one layer, whole but for `tensor`: inside the scan, so that one layer at a time is gathered."""
    return {"params": placement.whole(layer["params"], places.DIT, stack="blocks")}


def _check(cfg: DiTConfig, latents: Array, timestep: Array, labels: Array, remat: str | None) -> None:
    if latents.ndim != 5 or latents.shape[-1] != cfg.in_channels or latents.dtype != jnp.float32:
        raise UsageError(
            f"denoise: latents are {latents.dtype}{list(latents.shape)}; expected float32[B,T,H,W,{cfg.in_channels}]"
        )
    for name, n in zip("HW", latents.shape[2:4], strict=True):
        if n % cfg.patch_size:
            near = max(round(n / cfg.patch_size), 1) * cfg.patch_size
            raise UsageError(
                f"denoise: latent {name} is {n}; expected a multiple of the patch size {cfg.patch_size}, such as {near}"
            )
    for name, x, dtype in (("timestep", timestep, jnp.float32), ("labels", labels, jnp.int32)):
        if x.shape != latents.shape[:1] or x.dtype != dtype:
            raise UsageError(
                f"denoise: {name} is {x.dtype}{list(x.shape)}; expected {jnp.dtype(dtype)}[{latents.shape[0]}]"
            )
    if remat is not None and remat not in _POLICIES:
        raise UsageError(f"denoise: remat is {remat!r}; expected None, {' or '.join(map(repr, _POLICIES))}")
