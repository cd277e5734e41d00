"""The causal video VAE of Wan 2.1, encoder and decoder, one chunk of frames at a time.

    B batch · T latent frames · H W latent grid · C channels · F pixel frames · Y X pixel height, width

A clip is 1 + 4k frames and becomes 1 + k latent frames: the first frame stands alone, every later latent frame holds
four. All temporal convolutions are causal and look two frames back, so the whole state of a half-done clip is the last
two input frames of each of them: the `cache`, a nested dict named like the modules. `cache=None` means that the clip
begins. Encoding or decoding a whole clip is a scan over chunks, so its memory does not depend on the clip's length.

On several devices each has a part of every frame and of every frame that the cache remembers: XLA divides the
convolutions and lets neighbours exchange the rows or columns that these look at beyond their part.

Parity: diffusers' AutoencoderKLWan (0.42), whose chunks and first-frame rule these are: the temporal convolutions of
the resamplers never see the first frame when decoding and pass it untouched when encoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from jvdiff import kernels
from jvdiff.errors import CheckpointError, UsageError
from jvdiff.models.layers import as_array, compute_dtype, product, row
from jvdiff.sharding import Picture, Placement
from jvdiff.types import Array, Params

Cache = Mapping[str, Any] | None


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the VAE; the names are those of diffusers' `config.json` (its spelling of "temperal" included)."""

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )  # fmt: skip
    latents_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916,
    )  # fmt: skip

    def __post_init__(self):
        def check(field: str, ok: bool, expected: str):
            if not ok:
                raise CheckpointError(f"VAE configuration: {field} is {getattr(self, field)!r}, expected {expected}.")

        for field in ("dim_mult", "temperal_downsample", "latents_mean", "latents_std"):
            check(field, isinstance(getattr(self, field), tuple), "a list")
        for field, most in (("base_dim", 4096), ("z_dim", 1024), ("num_res_blocks", 64)):
            value = getattr(self, field)
            check(field, type(value) is int and 0 < value <= most, f"a whole number from 1 to {most}")
        whole = all(type(m) is int and 0 < m <= 64 for m in self.dim_mult)
        check("dim_mult", whole and 1 < len(self.dim_mult) <= 8, "2 to 8 whole numbers from 1 to 64")
        stages = len(self.dim_mult) - 1
        flags = all(type(t) is bool for t in self.temperal_downsample)
        check("temperal_downsample", flags and len(self.temperal_downsample) == stages, f"{stages} booleans")
        for field in ("latents_mean", "latents_std"):
            numbers = all(isinstance(v, int | float) and abs(v) < 1e6 for v in getattr(self, field))
            check(
                field,
                numbers and len(getattr(self, field)) == self.z_dim,
                f"{self.z_dim} finite numbers (z_dim)",
            )
        check("latents_std", all(v > 0 for v in self.latents_std), "positive numbers")

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent cell, along height and along width."""
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def temporal_factor(self) -> int:
        """Pixel frames per latent frame, after the first."""
        return 2 ** sum(self.temperal_downsample)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> VAEConfig:
        """From diffusers' `vae/config.json`; absent keys take the class's defaults.

        Raises:
          CheckpointError: a value out of range, or a variant (Wan 2.2's residual VAE) that this class is not.
        """
        supported = {"is_residual": False, "attn_scales": [], "in_channels": 3, "out_channels": 3, "patch_size": None}
        for key, value in supported.items():
            if fields.get(key, value) not in (value, None):
                raise CheckpointError(
                    f"VAE configuration: {key} is {fields[key]!r}, but only {value!r} (the Wan 2.1 VAE) is supported."
                )
        names = cls.__dataclass_fields__
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items() if k in names}
        return cls(**known)

    def to_json(self) -> dict[str, Any]:
        """The `config.json` that diffusers' AutoencoderKLWan loads."""
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        scales = {"scale_factor_temporal": self.temporal_factor, "scale_factor_spatial": self.spatial_factor}
        return {"_class_name": "AutoencoderKLWan", **fields, "attn_scales": [], "dropout": 0.0, **scales}


WAN_2_1_VAE = VAEConfig()


# -------------------------------------------------------------------------------------------------- layers


def _newest_tap(key, shape, dtype=jnp.float32):
    """LeCun normal in the newest temporal tap, zero in the older ones: a causal layer starts as a per-frame one."""
    tap = nn.initializers.lecun_normal()(key, shape[1:], dtype)
    return jnp.concatenate([jnp.zeros((shape[0] - 1, *shape[1:]), dtype), tap[None]])


def _newest_frame(key, shape, dtype=jnp.float32):
    """Passes the newest of three frames on, to each group of outputs: frames repeat until the layer learns to move."""
    _, features, outputs = shape
    tap = jnp.tile(jnp.eye(features, dtype=dtype), (1, outputs // features))
    return jnp.concatenate([jnp.zeros((2, features, outputs), dtype), tap[None]])


def _conv2d(x: Array, kernel: Array, *, stride: int = 1, padding=((1, 1), (1, 1))) -> Array:
    """Per-frame convolution. x [B,T,H,W,C], kernel [h,w,C,O]."""
    frames = rearrange(x, "B T H W C -> (B T) H W C")
    y = lax.conv_general_dilated(frames, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return rearrange(y, "(B T) H W C -> B T H W C", T=x.shape[1])


def _pointwise(x: Array, dense: Params) -> Array:
    y = product(x, dense["kernel"], x.dtype, out=jnp.float32)
    return (y + row(dense["bias"], y)).astype(x.dtype)


def _with_context(x: Array, cache: Array | None, frames: int = 2) -> Array:
    """x [B,T,H,W,C] behind the frames that came before it; zeros where the clip begins."""
    if cache is None:
        cache = jnp.zeros((x.shape[0], frames, *x.shape[2:]), x.dtype)
    return jnp.concatenate([cache, x], axis=1)


class _Dense(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        return _pointwise(x, {"kernel": kernel, "bias": self.param("bias", nn.initializers.zeros, (self.features,))})


class _CausalConv(nn.Module):
    """3x3x3 convolution, zero-padded in space, causal in time.

    Written as a sum over the three temporal taps of 2-D convolutions: about twice as fast as one 3-D convolution on
    XLA:CPU, and a clip's first frame, whose past is zero, needs only one of them. Narrow layers stack the three frames
    in channels and convolve once instead: XLA:CPU takes as long for 8 input channels as for 24. So does bfloat16, to
    round once and not three times.
    """

    features: int

    @nn.compact
    def __call__(self, x: Array, cache: Array | None) -> tuple[Array, Array]:
        kernel = as_array(self.param("kernel", _newest_tap, (3, 3, 3, x.shape[-1], self.features)), x.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        frames = _with_context(x, cache)
        length = x.shape[1]
        if cache is None and length == 1:
            y = _conv2d(x, kernel[2])
        elif x.shape[-1] < 32 or x.dtype != jnp.float32:
            stacked = jnp.concatenate([frames[:, tap : tap + length] for tap in range(3)], axis=-1)
            y = _conv2d(stacked, rearrange(kernel, "tap h w I O -> h w (tap I) O"))
        else:
            y = sum(_conv2d(frames[:, tap : tap + length], kernel[tap]) for tap in range(3))
        return y + row(bias, x), frames[:, -2:]


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
    features: int

    @nn.compact
    def __call__(self, x: Array, cache: Cache) -> tuple[Array, Cache]:
        cache, new = cache or {}, {}
        shortcut = x if x.shape[-1] == self.features else _Dense(self.features, name="shortcut")(x)
        for i in (1, 2):
            x = nn.silu(_Norm(name=f"norm_{i}")(x)).astype(x.dtype)
            x, new[f"conv_{i}"] = _CausalConv(self.features, name=f"conv_{i}")(x, cache.get(f"conv_{i}"))
        return x + shortcut, new


class _SpatialAttention(nn.Module):
    """Single-head attention among the cells of each frame; it remembers nothing."""

    picture: Picture | None

    @nn.compact
    def __call__(self, x: Array, cache: None) -> tuple[Array, None]:
        qkv = _Dense(3 * x.shape[-1], name="qkv")(_Norm(name="norm")(x).astype(x.dtype))
        attend: Any = partial(_attend_cells, gather=())
        if picture := self.picture:
            attend = partial(_attend_cells, gather=((2, picture.height), (3, picture.width)))
            spec = picture.spec
            attend = jax.shard_map(attend, mesh=picture.mesh, in_specs=spec, out_specs=spec, check_vma=False)
        return x + _Dense(x.shape[-1], name="out")(attend(qkv)), None


def _attend_cells(qkv: Array, *, gather: tuple[tuple[int, tuple[str, ...]], ...]) -> Array:
    """qkv [B,T,H,W,3C] -> [B,T,H,W,C]: this device's cells look at all cells, gathered along these axes of the mesh."""
    channels = qkv.shape[-1] // 3
    q, kv = jnp.split(qkv, (channels,), axis=-1)
    for axis, names in gather:
        kv = lax.all_gather(kv, names, axis=axis, tiled=True) if names else kv
    q, kv = (rearrange(x, "B T H W C -> (B T) (H W) 1 C") for x in (q, kv))
    out = kernels.attention(q, *jnp.split(kv, 2, axis=-1))
    return rearrange(out, "(B T) (H W) 1 C -> B T H W C", T=qkv.shape[1], H=qkv.shape[2])


class _Mid(nn.Module):
    picture: Picture | None

    @nn.compact
    def __call__(self, x: Array, cache: Cache) -> tuple[Array, Cache]:
        res = [_ResBlock(x.shape[-1], name=f"res_{i}") for i in (0, 1)]
        return _chain(x, cache, [res[0], _SpatialAttention(self.picture, name="attn"), res[1]])


class _SpatialConv(nn.Module):
    """3x3 per-frame convolution that halves (stride 2, padded right and below) or doubles the grid."""

    features: int
    up: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (3, 3, x.shape[-1], self.features)
        kernel = as_array(self.param("kernel", nn.initializers.lecun_normal(), shape), x.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        y = _upsampled_conv(x, kernel) if self.up else _conv2d(x, kernel, stride=2, padding=((0, 1), (0, 1)))
        return y + row(bias, y)


def _upsampled_conv(x: Array, kernel: Array) -> Array:
    """Nearest-neighbour 2x upsampling, then a 3x3 convolution, without ever holding the upsampled input.

    Of the nine taps over doubled pixels, those that fall on the same source cell add up: each of the four output
    phases is a 2x2 convolution of the small grid, 16 instead of 36 multiplications for each source cell.
    x [B,T,H,W,C], kernel [3,3,C,O] -> [B,T,2H,2W,O].
    """
    fold = jnp.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], kernel.dtype)  # [phase, tap of 2, tap of 3]
    small = jnp.einsum("aip,bjq,pqcd->abijcd", fold, fold, kernel)
    phase = [[_conv2d(x, small[a, b], padding=((1 - a, a), (1 - b, b))) for b in (0, 1)] for a in (0, 1)]
    y = jnp.stack([jnp.stack(pair, axis=4) for pair in phase], axis=3)
    return rearrange(y, "B T H a W b C -> B T (H a) (W b) C")


class _TimeConv(nn.Module):
    """Temporal convolution over three frames, no padding of its own: [B,T+2,...] -> [B,T,...], or every second one."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, frames: Array) -> Array:
        kernel = as_array(self.param("kernel", _newest_frame, (3, frames.shape[-1], self.features)), frames.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        last = frames.shape[1] - 2
        windows = (frames[:, tap : tap + last : self.stride] for tap in range(3))
        taps: Any = sum(product(x, kernel[tap], out=jnp.float32) for tap, x in enumerate(windows))
        return (taps + row(bias, taps)).astype(frames.dtype)


class _Downsample(nn.Module):
    temporal: bool

    @nn.compact
    def __call__(self, x: Array, cache: Array | None) -> tuple[Array, Array | None]:
        x = _SpatialConv(x.shape[-1], up=False, name="conv")(x)
        if not self.temporal:
            return x, None
        time_conv = _TimeConv(x.shape[-1], stride=2, name="time_conv")
        if cache is None:  # the first frame passes untouched (called all the same while initialising)
            if self.is_initializing():
                time_conv(_with_context(x, None))
            return x, x
        return time_conv(jnp.concatenate([cache, x], axis=1)), x[:, -1:]


class _Upsample(nn.Module):
    temporal: bool

    @nn.compact
    def __call__(self, x: Array, cache: Array | None) -> tuple[Array, Array | None]:
        spatial = _SpatialConv(x.shape[-1] // 2, up=True, name="conv")
        if not self.temporal:
            return spatial(x), None
        time_conv = _TimeConv(2 * x.shape[-1], name="time_conv")
        if cache is None:  # the first frame is neither doubled nor remembered
            if self.is_initializing():
                time_conv(_with_context(x, None))
            return spatial(x), jnp.zeros((x.shape[0], 2, *x.shape[2:]), x.dtype)
        frames = _with_context(x, cache)
        x = rearrange(time_conv(frames), "B T H W (two C) -> B (T two) H W C", two=2)
        return spatial(x), frames[:, -2:]


class _DownStage(nn.Module):
    features: int
    blocks: int
    downsample: bool | None  # temporal too, in space only, or not at all

    @nn.compact
    def __call__(self, x: Array, cache: Cache) -> tuple[Array, Cache]:
        layers: list[nn.Module] = [_ResBlock(self.features, name=f"res_{i}") for i in range(self.blocks)]
        if self.downsample is not None:
            layers.append(_Downsample(self.downsample, name="downsample"))
        return _chain(x, cache, layers)


class _UpStage(nn.Module):
    features: int
    blocks: int
    upsample: bool | None

    @nn.compact
    def __call__(self, x: Array, cache: Cache) -> tuple[Array, Cache]:
        layers: list[nn.Module] = [_ResBlock(self.features, name=f"res_{i}") for i in range(self.blocks)]
        if self.upsample is not None:
            layers.append(_Upsample(self.upsample, name="upsample"))
        return _chain(x, cache, layers)


def _chain(x: Array, cache: Cache, layers) -> tuple[Array, dict[str, Any]]:
    """Runs layers in turn, each with its own entry of the cache."""
    cache, new = cache or {}, {}
    for layer in layers:
        x, new[layer.name] = layer(x, cache.get(layer.name))
    return x, new


class _Encoder(nn.Module):
    """Pixels [B,1 or 4n,Y,X,3] -> mean and log-variance [B,1 or n,H,W,2C]."""

    cfg: VAEConfig
    picture: Picture | None = None

    @nn.compact
    def __call__(self, x: Array, cache: Cache) -> tuple[Array, Cache]:
        cfg = self.cfg
        layers: list[nn.Module] = [_CausalConv(cfg.base_dim, name="conv_in")]
        for i, (mult, temporal) in enumerate(zip(cfg.dim_mult, (*cfg.temperal_downsample, None), strict=True)):
            layers.append(_DownStage(cfg.base_dim * mult, cfg.num_res_blocks, temporal, name=f"down_{i}"))
        x, new = _chain(x, cache, [*layers, _Mid(self.picture, name="mid")])
        return _head(x, cache, new, 2 * cfg.z_dim)


class _Decoder(nn.Module):
    """Latents [B,1 or n,H,W,C] -> pixels [B,1 or 4n,Y,X,3], not yet clamped."""

    cfg: VAEConfig
    picture: Picture | None = None

    @nn.compact
    def __call__(self, x: Array, cache: Cache) -> tuple[Array, Cache]:
        cfg = self.cfg
        layers: list[nn.Module] = [
            _CausalConv(cfg.base_dim * cfg.dim_mult[-1], name="conv_in"),
            _Mid(self.picture, name="mid"),
        ]
        for i, (mult, temporal) in enumerate(
            zip(reversed(cfg.dim_mult), (*reversed(cfg.temperal_downsample), None), strict=True)
        ):
            layers.append(_UpStage(cfg.base_dim * mult, cfg.num_res_blocks + 1, temporal, name=f"up_{i}"))
        x, new = _chain(x, cache, layers)
        return _head(x, cache, new, 3)


def _head(x: Array, cache: Cache, new: dict, features: int) -> tuple[Array, Cache]:
    x = nn.silu(_Norm(name="norm_out")(x)).astype(x.dtype)
    x, new["conv_out"] = _CausalConv(features, name="conv_out")(x, (cache or {}).get("conv_out"))
    return x, new


# -------------------------------------------------------------------------------------------------- functions


DECODER = ("post_quant_conv", "decoder")  # the parts of the parameters that decoding needs, and no latent depends on


def abstract_params(cfg: VAEConfig, dtype=jnp.float32) -> Params:
    """The parameter tree as ShapeDtypeStructs: what initialisation, conversion, restore and sharding all read."""
    return jax.eval_shape(partial(init_params, cfg=cfg, dtype=dtype), jax.random.key(0))


def init_params(key: Array, cfg: VAEConfig, dtype=jnp.float32) -> Params:
    """Random parameters to train from. Variance-preserving kernels, each temporal one a per-frame one at first."""
    encoder_key, decoder_key, quant_key, post_key = jax.random.split(key, 4)
    cell = cfg.spatial_factor
    normal = nn.initializers.lecun_normal()

    def dense(key, width):
        return {"kernel": normal(key, (width, width)), "bias": jnp.zeros(width)}

    params = {
        "encoder": _Encoder(cfg).init(encoder_key, jnp.zeros((1, 1, cell, cell, 3)), None)["params"],
        "quant_conv": dense(quant_key, 2 * cfg.z_dim),
        "post_quant_conv": dense(post_key, cfg.z_dim),
        "decoder": _Decoder(cfg).init(decoder_key, jnp.zeros((1, 1, 1, 1, cfg.z_dim)), None)["params"],
    }
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def encode_chunk(
    params: Params,
    cfg: VAEConfig,
    frames: Array,
    cache: Cache,
    *,
    placement: Placement | None = None,
    dtype: Any = None,
) -> tuple[Array, Cache]:
    """Encodes the next frames of a clip.

    Args:
      frames: [B,1,Y,X,3] in [-1,1] where the clip begins (cache None), then [B,4n,Y,X,3].
      cache: what the call before returned; None at first.
      placement: the devices that share every frame, `params` a copy on each; the results stay divided among them.
      dtype: of the products, the stream between them and the cache. None: that of the parameters.

    Returns:
      The posterior's mean [B,1 or n,H,W,C], not normalised, and the cache for the next call.
    """
    _check_chunk(frames, cache, cfg.temporal_factor, "pixel frames")
    divide, picture = _divided(placement, frames, cfg.spatial_factor)
    frames, cache = divide((_compute(params, frames, dtype), cache))
    moments, cache = _Encoder(cfg, picture).apply({"params": params["encoder"]}, frames, cache)
    mean = _pointwise(moments, params["quant_conv"])[..., : cfg.z_dim].astype(jnp.float32)
    return divide((mean, cache))


def decode_chunk(
    params: Params,
    cfg: VAEConfig,
    latents: Array,
    cache: Cache,
    *,
    clip: bool = True,
    placement: Placement | None = None,
    dtype: Any = None,
) -> tuple[Array, Cache]:
    """Decodes the next latent frames of a clip.

    Args:
      latents: [B,1,H,W,C] where the clip begins (cache None), then [B,n,H,W,C]; not normalised.
      cache: what the call before returned; None at first.
      clip: False leaves values beyond [-1,1] as they are, so that they have gradients in training.
      placement: the devices that share every frame, `params` a copy on each; the results stay divided among them.
      dtype: of the products, the stream between them and the cache. None: that of the parameters.

    Returns:
      float32 frames [B,1 or 4n,Y,X,3] in [-1,1], and the cache for the next call.
    """
    _check_chunk(latents, cache, 1, "latent frames")
    divide, picture = _divided(placement, latents, 1)
    latents, cache = divide((_compute(params, latents, dtype), cache))
    latents = _pointwise(latents, params["post_quant_conv"])
    frames, cache = _Decoder(cfg, picture).apply({"params": params["decoder"]}, latents, cache)
    frames = frames.astype(jnp.float32)
    return divide((jnp.clip(frames, -1.0, 1.0) if clip else frames, cache))


def encode(
    params: Params,
    cfg: VAEConfig,
    video: Array,
    *,
    chunk: int = 1,
    placement: Placement | None = None,
    dtype: Any = None,
) -> Array:
    """video [B,1+4k,Y,X,3] in [-1,1] -> posterior mean [B,1+k,H,W,C] float32, not normalised.

    `chunk` latent frames are made at a time (it must divide k): memory grows with it, never with the clip.
    placement, dtype: see `encode_chunk`.
    """
    if (video.shape[1] - 1) % cfg.temporal_factor:
        below = video.shape[1] - 1 - (video.shape[1] - 1) % cfg.temporal_factor + 1
        raise UsageError(
            f"The VAE takes 1 + {cfg.temporal_factor}k frames, found {video.shape[1]}; "
            f"use {below} or {below + cfg.temporal_factor}."
        )
    for axis, name in ((2, "height"), (3, "width")):
        if video.shape[axis] % cfg.spatial_factor:
            raise UsageError(f"The VAE takes a {name} divisible by {cfg.spatial_factor}, found {video.shape[axis]}.")
    step = partial(encode_chunk, params, cfg, placement=placement, dtype=dtype)
    return _scan_chunks(step, video, chunk * cfg.temporal_factor)


def decode(
    params: Params,
    cfg: VAEConfig,
    latents: Array,
    *,
    chunk: int = 1,
    clip: bool = True,
    placement: Placement | None = None,
    dtype: Any = None,
) -> Array:
    """latents [B,T,H,W,C], not normalised -> float32 video [B,1+4(T-1),Y,X,3] in [-1,1].

    `chunk` latent frames are decoded at a time (it must divide T - 1): memory grows with it, never with the clip.
    placement, dtype: see `decode_chunk`.
    """
    step = partial(decode_chunk, params, cfg, clip=clip, placement=placement, dtype=dtype)
    return _scan_chunks(step, latents, chunk)


def init_cache(cfg: VAEConfig, which: str, batch: int, height: int, width: int, dtype=jnp.float32) -> Cache:
    """Shapes of the cache of "encode" or "decode" after the first frame, as ShapeDtypeStructs.

    height, width: of the latent grid.
    """
    params = abstract_params(cfg, dtype)
    scale, channels, step = (cfg.spatial_factor, 3, encode_chunk) if which == "encode" else (1, cfg.z_dim, decode_chunk)
    first = jax.ShapeDtypeStruct((batch, 1, height * scale, width * scale, channels), dtype)
    return jax.eval_shape(lambda p, x: step(p, cfg, x, None)[1], params, first)


def normalize_latents(cfg: VAEConfig, latents: Array) -> Array:
    """Latents as the VAE makes them -> as the DiT sees them: zero mean, unit variance in every channel."""
    mean, std = (jnp.asarray(v, latents.dtype).reshape(1, 1, 1, 1, -1) for v in (cfg.latents_mean, cfg.latents_std))
    return (latents - mean) / std


def denormalize_latents(cfg: VAEConfig, latents: Array) -> Array:
    """The inverse of `normalize_latents`."""
    mean, std = (jnp.asarray(v, latents.dtype).reshape(1, 1, 1, 1, -1) for v in (cfg.latents_mean, cfg.latents_std))
    return latents * std + mean


def _compute(params: Params, x: Array, dtype: Any) -> Array:
    return x.astype(compute_dtype(params["quant_conv"]["kernel"], dtype))


def _divided(placement: Placement | None, x: Array, factor: int) -> tuple[Any, Picture | None]:
    """(what divides a tree of pictures among the devices, how), for x [B,T,H*factor,W*factor,C]."""
    if placement is None:
        return lambda tree: tree, None
    picture = placement.spread(x.shape[2] // factor, x.shape[3] // factor)
    return picture.divide, picture


def _check_chunk(x: Array, cache: Cache, multiple: int, what: str) -> None:
    frames = x.shape[1]
    if cache is None and frames != 1:
        raise UsageError(f"A clip begins with exactly 1 of its {what} (cache None), found {frames}.")
    if cache is not None and (frames == 0 or frames % multiple):
        raise UsageError(f"A later chunk holds a multiple of {multiple} {what}, found {frames}.")


def _scan_chunks(step, x: Array, size: int) -> Array:
    """The first frame, then a scan over chunks of `size` frames, their outputs joined along time."""
    rest = x[:, 1:]
    if rest.shape[1] % size:
        raise UsageError(f"Chunks of {size} frames do not divide the {rest.shape[1]} frames after the first.")
    first, cache = step(x[:, :1], None)
    if rest.shape[1] == 0:
        return first
    if rest.shape[1] == size:
        return jnp.concatenate([first, step(rest, cache)[0]], axis=1)
    chunks = rearrange(rest, "B (n f) H W C -> n B f H W C", f=size)
    _, later = lax.scan(lambda cache, piece: step(piece, cache)[::-1], cache, chunks)
    return jnp.concatenate([first, rearrange(later, "n B f H W C -> B (n f) H W C")], axis=1)
