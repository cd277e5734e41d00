"""The layers of the causal video VAE, encoder and decoder; see `vae`.

B batch · T latent frames · H W latent grid · C channels · F pixel frames · Y X pixel height, width
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from jax import lax

from jvdiff import kernels
from jvdiff.models.layers import as_array, as_tf32, product, row
from jvdiff.models.wan.config import VAEConfig
from jvdiff.runtime.target import Target
from jvdiff.sharding import Picture
from jvdiff.types import Array, Params

Cache = Mapping[str, Any] | None


def _newest_tap(key, shape, dtype=jnp.float32):
    """LeCun normal in the newest temporal tap, zero in the older ones: a causal layer starts as a per-frame one."""
    tap = nn.initializers.lecun_normal()(key, shape[1:], dtype)
    return jnp.concatenate([jnp.zeros((shape[0] - 1, *shape[1:]), dtype), tap[None]])  # [3,3,3,I,O], newest last


def _newest_frame(key, shape, dtype=jnp.float32):
    """Passes the newest of three frames on, to each group of outputs: frames repeat until the layer learns to move."""
    _, features, outputs = shape
    tap = jnp.tile(jnp.eye(features, dtype=dtype), (1, outputs // features))  # [I,O], the identity once a group
    return jnp.concatenate([jnp.zeros((2, features, outputs), dtype), tap[None]])  # [3,I,O]


def _conv2d(x: Array, kernel: Array, tf32: bool = False, *, stride: int = 1, padding=((1, 1), (1, 1))) -> Array:
    """Per-frame convolution. x [B,T,H,W,C], kernel [h,w,C,O]."""
    x, kernel = (as_tf32(x), as_tf32(kernel)) if tf32 else (x, kernel)
    frames = rearrange(x, "B T H W C -> (B T) H W C")
    y = lax.conv_general_dilated(frames, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return rearrange(y, "(B T) H W C -> B T H W C", T=x.shape[1])


def pointwise(x: Array, dense: Params, tf32: bool = False) -> Array:
    y = product(x, dense["kernel"], x.dtype, out=jnp.float32, tf32=tf32)
    return (y + row(dense["bias"], y)).astype(x.dtype)


def _with_context(x: Array, cache: Array | None) -> Array:
    """x [B,T,H,W,C] behind the two frames that came before it; zeros where the clip begins."""
    return jnp.concatenate([_past(x) if cache is None else cache, x], axis=1)  # [B,2+T,H,W,C]


def _past(x: Array) -> Array:
    """The two frames before a clip."""
    return jnp.zeros((x.shape[0], 2, *x.shape[2:]), x.dtype)


def _windows(x: Array, cache: Array | None) -> list[Array]:
    """For each of three taps, the oldest first, the frames [B,T,H,W,C] that it sees.

    Cut out of cache and x, not out of both joined, which XLA for GPUs would write and read again.
    """
    cache = _past(x) if cache is None else cache
    before = (jnp.concatenate([cache[:, tap:], x], axis=1)[:, : x.shape[1]] for tap in (0, 1))
    return [*before, x]


def _last_two(x: Array, cache: Array | None) -> Array:
    """What the next chunk will look back on, [B,2,H,W,C]."""
    return x[:, -2:] if x.shape[1] > 1 else _with_context(x, cache)[:, -2:]


class _Dense(nn.Module):
    """[...,C] -> [...,features] in the dtype of x."""

    features: int
    tf32: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return pointwise(x, {"kernel": kernel, "bias": bias}, self.tf32)


class _CausalConv(nn.Module):
    """3x3x3 convolution, zero-padded in space, causal in time.

    Written as a sum over the three temporal taps of 2-D convolutions: about twice as fast as one 3-D convolution on
    XLA:CPU, and a clip's first frame, whose past is zero, needs only one of them. Narrow layers stack the three frames
    in channels and convolve once instead: XLA:CPU takes as long for 8 input channels as for 24. So does bfloat16, to
    round once and not three times.
    """

    features: int
    tf32: bool

    @nn.compact
    def __call__(self, x: Array, cache: Array | None) -> tuple[Array, Array]:
        kernel = as_array(self.param("kernel", _newest_tap, (3, 3, 3, x.shape[-1], self.features)), x.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        if cache is None and x.shape[1] == 1:
            inputs, weights = [x], [kernel[2]]
        elif x.shape[-1] < 32 or x.dtype != jnp.float32:
            inputs = [jnp.concatenate(_windows(x, cache), axis=-1)]  # [B,T,H,W,3C]
            weights = [rearrange(kernel, "tap h w I O -> h w (tap I) O")]
        else:
            inputs, weights = _windows(x, cache), kernel
        # What is remembered comes after all that looks back, so that it may take the memory of what was: without the
        # order XLA copies every cache that is donated.
        *inputs, x = lax.optimization_barrier((*inputs, x))
        y = sum(_conv2d(frames, part, self.tf32) for frames, part in zip(inputs, weights, strict=True))
        return y + row(bias, x), _last_two(x, cache)


class _Norm(nn.Module):
    """RMS normalisation over channels (Wan's `RMS_norm`: L2-normalise, times sqrt(C), times gamma); float32 out."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        energy = jnp.sum(wide * wide, axis=-1, keepdims=True)
        wide = wide * (x.shape[-1] ** 0.5 * lax.rsqrt(jnp.maximum(energy, 1e-24)))
        return wide * row(scale, wide)


class _ResBlock(nn.Module):
    """x [B,T,H,W,C] -> [B,T,H,W,features], and the cache of its two convolutions."""

    features: int
    tf32: bool

    @nn.compact
    def __call__(self, x: Array, cache: Cache) -> tuple[Array, Cache]:
        cache, new = cache or {}, {}
        shortcut = x if x.shape[-1] == self.features else _Dense(self.features, self.tf32, name="shortcut")(x)
        for i in (1, 2):
            x = nn.silu(_Norm(name=f"norm_{i}")(x)).astype(x.dtype)
            conv = _CausalConv(self.features, self.tf32, name=f"conv_{i}")
            x, new[f"conv_{i}"] = conv(x, cache.get(f"conv_{i}"))
        return x + shortcut, new


class _SpatialAttention(nn.Module):
    """Single-head attention among the cells of each frame; it remembers nothing."""

    picture: Picture | None
    tf32: bool

    @nn.compact
    def __call__(self, x: Array, cache: None) -> tuple[Array, None]:
        qkv = _Dense(3 * x.shape[-1], self.tf32, name="qkv")(_Norm(name="norm")(x).astype(x.dtype))
        qkv = as_tf32(qkv) if self.tf32 else qkv  # where that is emulated, attention's weights are not rounded
        attend: Any = partial(_attend_cells, gather=())
        if picture := self.picture:
            attend = partial(_attend_cells, gather=((2, picture.height), (3, picture.width)), target=picture.target)
            spec = picture.spec
            attend = jax.shard_map(attend, mesh=picture.mesh, in_specs=spec, out_specs=spec, check_vma=False)
        return x + _Dense(x.shape[-1], self.tf32, name="out")(attend(qkv)), None


def _attend_cells(
    qkv: Array, *, gather: tuple[tuple[int, tuple[str, ...]], ...], target: Target | None = None
) -> Array:
    """qkv [B,T,H,W,3C] -> [B,T,H,W,C]: this device's cells look at all cells, gathered along these axes of the mesh."""
    channels = qkv.shape[-1] // 3
    q, kv = jnp.split(qkv, (channels,), axis=-1)  # [B,T,H,W,C], [B,T,H,W,2C]
    for axis, names in gather:
        kv = lax.all_gather(kv, names, axis=axis, tiled=True) if names else kv  # [B,T,H,W,2C], whole along `axis`
    q, kv = (rearrange(x, "B T H W C -> (B T) (H W) 1 C") for x in (q, kv))
    # q and out [B*T,H*W,1,C], of these cells; k and v, of all
    out = kernels.attention(q, *jnp.split(kv, 2, axis=-1), target=target)
    return rearrange(out, "(B T) (H W) 1 C -> B T H W C", T=qkv.shape[1], H=qkv.shape[2])


class _Mid(nn.Module):
    """Attention between two residual blocks: x [B,T,H,W,C] -> the same, and its cache."""

    picture: Picture | None
    tf32: bool

    @nn.compact
    def __call__(self, x: Array, cache: Cache) -> tuple[Array, Cache]:
        res = [_ResBlock(x.shape[-1], self.tf32, name=f"res_{i}") for i in (0, 1)]
        return _chain(x, cache, [res[0], _SpatialAttention(self.picture, self.tf32, name="attn"), res[1]])


class _SpatialConv(nn.Module):
    """3x3 per-frame convolution that halves (stride 2, padded right and below) or doubles the grid."""

    features: int
    up: bool
    tf32: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (3, 3, x.shape[-1], self.features)
        kernel = as_array(self.param("kernel", nn.initializers.lecun_normal(), shape), x.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        if self.up:
            y = _upsampled_conv(x, kernel, self.tf32)
        else:
            y = _conv2d(x, kernel, self.tf32, stride=2, padding=((0, 1), (0, 1)))
        return y + row(bias, y)


def _upsampled_conv(x: Array, kernel: Array, tf32: bool = False) -> Array:
    """Nearest-neighbour 2x upsampling, then a 3x3 convolution, without ever holding the upsampled input.

    Of the nine taps over doubled pixels, those that fall on the same source cell add up: each of the four output
    phases is a 2x2 convolution of the small grid, 16 instead of 36 multiplications for each source cell.
    x [B,T,H,W,C], kernel [3,3,C,O] -> [B,T,2H,2W,O].
    """
    kernel = as_tf32(kernel) if tf32 else kernel
    fold = jnp.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], kernel.dtype)  # [phase, tap of 2, tap of 3]
    small = jnp.einsum("aip,bjq,pqcd->abijcd", fold, fold, kernel)  # [phase,phase,2,2,C,O]
    phase = [[_conv2d(x, small[a, b], tf32, padding=((1 - a, a), (1 - b, b))) for b in (0, 1)] for a in (0, 1)]
    y = jnp.stack([jnp.stack(pair, axis=4) for pair in phase], axis=3)  # [B,T,H,a,W,b,O]
    return rearrange(y, "B T H a W b C -> B T (H a) (W b) C")


class _TimeConv(nn.Module):
    """Temporal convolution over three frames, no padding of its own: [B,T+2,...] -> [B,T,...], or every second one."""

    features: int
    tf32: bool
    stride: int = 1

    @nn.compact
    def __call__(self, frames: Array) -> Array:
        kernel = as_array(self.param("kernel", _newest_frame, (3, frames.shape[-1], self.features)), frames.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        last = frames.shape[1] - 2
        windows = (frames[:, tap : tap + last : self.stride] for tap in range(3))
        taps: Any = sum(product(x, kernel[tap], out=jnp.float32, tf32=self.tf32) for tap, x in enumerate(windows))
        return (taps + row(bias, taps)).astype(frames.dtype)


class _Downsample(nn.Module):
    """x [B,T,H,W,C] -> half the grid and, if `temporal`, half the frames; remembers the last frame."""

    temporal: bool
    tf32: bool

    @nn.compact
    def __call__(self, x: Array, cache: Array | None) -> tuple[Array, Array | None]:
        x = _SpatialConv(x.shape[-1], False, self.tf32, name="conv")(x)
        if not self.temporal:
            return x, None
        time_conv = _TimeConv(x.shape[-1], self.tf32, stride=2, name="time_conv")
        if cache is None:  # the first frame passes untouched (called all the same while initialising)
            if self.is_initializing():
                time_conv(_with_context(x, None))
            return x, x
        return time_conv(jnp.concatenate([cache, x], axis=1)), x[:, -1:]  # [B,1+T,H,W,C] -> [B,T/2,H,W,C], [B,1,H,W,C]


class _Upsample(nn.Module):
    """x [B,T,H,W,C] -> [B,T,2H,2W,features] and, if `temporal`, twice the frames; remembers two frames."""

    features: int
    temporal: bool
    tf32: bool

    @nn.compact
    def __call__(self, x: Array, cache: Array | None) -> tuple[Array, Array | None]:
        spatial = _SpatialConv(self.features, True, self.tf32, name="conv")
        if not self.temporal:
            return spatial(x), None
        time_conv = _TimeConv(2 * x.shape[-1], self.tf32, name="time_conv")
        if cache is None:  # the first frame is neither doubled nor remembered
            if self.is_initializing():
                time_conv(_with_context(x, None))
            return spatial(x), jnp.zeros((x.shape[0], 2, *x.shape[2:]), x.dtype)
        frames = _with_context(x, cache)
        x = rearrange(time_conv(frames), "B T H W (two C) -> B (T two) H W C", two=2)
        return spatial(x), frames[:, -2:]


class _DownStage(nn.Module):
    """A level of the encoder: residual blocks, then the step to the next.

    downsample: temporal too, in space only, or (None) not at all.
    shortcut: means of what comes in are added to what goes out.
    """

    features: int
    blocks: int
    downsample: bool | None
    shortcut: bool
    tf32: bool

    @nn.compact
    def __call__(self, x: Array, cache: Cache) -> tuple[Array, Cache]:
        layers: list[nn.Module] = [_ResBlock(self.features, self.tf32, name=f"res_{i}") for i in range(self.blocks)]
        if self.downsample is not None:
            layers.append(_Downsample(self.downsample, self.tf32, name="downsample"))
        y, new = _chain(x, cache, layers)
        return (y + _means(x, self.features, self.downsample) if self.shortcut else y), new


class _UpStage(nn.Module):
    """A level of the decoder: residual blocks, then the step to the next; `upsample` as in `_DownStage`.

    shortcut: copies of what comes in are added to what goes out, and the step keeps the width, which it else halves.
    """

    features: int
    blocks: int
    upsample: bool | None
    shortcut: bool
    tf32: bool

    @nn.compact
    def __call__(self, x: Array, cache: Cache) -> tuple[Array, Cache]:
        layers: list[nn.Module] = [_ResBlock(self.features, self.tf32, name=f"res_{i}") for i in range(self.blocks)]
        if self.upsample is not None:
            width = self.features if self.shortcut else self.features // 2
            layers.append(_Upsample(width, self.upsample, self.tf32, name="upsample"))
        y, new = _chain(x, cache, layers)
        if self.upsample is None or not self.shortcut:
            return y, new
        return y + _copies(x, self.features, self.upsample, cache is None), new


def _means(x: Array, features: int, temporal: bool | None) -> Array:
    """[B,T,H,W,C] -> means [B,T/t,H/s,W/s,features], s and t as the step of a level has them (see `_DownStage`).

    The cells of t frames, s rows and s columns become channels, the width slowest, and of each few in a row the mean is
    taken. The first frame of a clip comes alone, and what precedes it is zero.
    """
    t, s = (2 if temporal else 1), (1 if temporal is None else 2)
    if x.shape[1] % t:
        x = jnp.pad(x, ((0, 0), (t - 1, 0), (0, 0), (0, 0), (0, 0)))  # [B,t,H,W,C]
    cells = rearrange(x, "B (T t) (H h) (W w) C -> B T H W (C t h w)", t=t, h=s, w=s)
    return reduce(cells, "B T H W (features group) -> B T H W features", "mean", features=features)


def _copies(x: Array, features: int, temporal: bool, first: bool) -> Array:
    """The opposite way: [B,T,H,W,C] -> copies [B,T*t,2H,2W,features]; the first frame of a clip gives one."""
    t = 2 if temporal else 1
    cells = jnp.repeat(x, features * t * 4 // x.shape[-1], axis=-1)
    frames = rearrange(cells, "B T H W (C t h w) -> B (T t) (H h) (W w) C", t=t, h=2, w=2)
    return frames[:, t - 1 :] if first else frames


def _chain(x: Array, cache: Cache, layers) -> tuple[Array, dict[str, Any]]:
    """Runs layers in turn, each with its own entry of the cache."""
    cache, new = cache or {}, {}
    for layer in layers:
        x, new[layer.name] = layer(x, cache.get(layer.name))
    return x, new


class Encoder(nn.Module):
    """Pixels [B,1 or 4n,Y,X,3], patches of them as channels -> mean and log-variance [B,1 or n,H,W,2C]."""

    cfg: VAEConfig
    picture: Picture | None = None
    tf32: bool = False

    @nn.compact
    def __call__(self, x: Array, cache: Cache) -> tuple[Array, Cache]:
        cfg = self.cfg
        layers: list[nn.Module] = [_CausalConv(cfg.base_dim, self.tf32, name="conv_in")]
        for i, (mult, temporal) in enumerate(zip(cfg.dim_mult, (*cfg.temperal_downsample, None), strict=True)):
            how = cfg.num_res_blocks, temporal, cfg.is_residual, self.tf32
            layers.append(_DownStage(cfg.base_dim * mult, *how, name=f"down_{i}"))
        x, new = _chain(x, cache, [*layers, _Mid(self.picture, self.tf32, name="mid")])
        return _head(x, cache, new, 2 * cfg.z_dim, self.tf32)


class Decoder(nn.Module):
    """Latents [B,1 or n,H,W,C] -> pixels [B,1 or 4n,Y,X,3], patches of them as channels, not yet clamped."""

    cfg: VAEConfig
    picture: Picture | None = None
    tf32: bool = False

    @nn.compact
    def __call__(self, x: Array, cache: Cache) -> tuple[Array, Cache]:
        cfg = self.cfg
        layers: list[nn.Module] = [
            _CausalConv(cfg.decoder_width * cfg.dim_mult[-1], self.tf32, name="conv_in"),
            _Mid(self.picture, self.tf32, name="mid"),
        ]
        for i, (mult, temporal) in enumerate(
            zip(reversed(cfg.dim_mult), (*reversed(cfg.temperal_downsample), None), strict=True)
        ):
            how = cfg.num_res_blocks + 1, temporal, cfg.is_residual, self.tf32
            layers.append(_UpStage(cfg.decoder_width * mult, *how, name=f"up_{i}"))
        x, new = _chain(x, cache, layers)
        return _head(x, cache, new, cfg.pixel_channels, self.tf32)


def _head(x: Array, cache: Cache, new: dict, features: int, tf32: bool) -> tuple[Array, Cache]:
    x = nn.silu(_Norm(name="norm_out")(x)).astype(x.dtype)
    x, new["conv_out"] = _CausalConv(features, tf32, name="conv_out")(x, (cache or {}).get("conv_out"))
    return x, new
