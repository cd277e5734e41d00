"""The video VAE: clips to latents with 192 times fewer values, and back.

    B batch · F pixel frames · Y X pixel height, width · T latent frames · H W latent grid · C latent channels

Encoder and decoder are residual blocks of 3-D convolutions on four levels, the steps between which halve or double the
grid three times and the frames twice. Nothing is causal: every frame sees its neighbours on both sides, a clip is
encoded as a whole, and F is a multiple of four. The stream between blocks has the parameters' dtype, norms are float32.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jvdiff.errors import UsageError
from jvdiff.models.latent_video.config import VAEConfig
from jvdiff.models.layers import Linear, as_array, as_tf32, compute_dtype, computing, row
from jvdiff.types import Array, Params


def encode(
    params: Params, cfg: VAEConfig, video: Array, *, remat: bool = False, dtype: Any = None
) -> tuple[Array, Array]:
    """The posterior of a clip's latents, a normal distribution in every value.

    Args:
      params: the tree of `abstract_params(cfg)`; a kernel may be a `models.quantised.Quantised`.
      video: float [B,F,Y,X,3] in -1..1; F a multiple of 4, Y and X multiples of 8.
      remat: compute each residual block again in the backward pass, instead of keeping its activations.
      dtype: of the products and the stream between blocks. None: that of the parameters.

    Returns:
      Mean and logarithm of the variance, the latter from -30 to 20, float32 [B,F/4,Y/8,X/8,C] each, not normalised.

    Raises:
      UsageError: a clip that does not fit; the sentence names the nearest size that does.
    """
    _check_video(cfg, video)
    moments: Any = _Encoder(cfg, remat).apply({"params": params["encoder"]}, _compute(params["encoder"], video, dtype))
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)  # [B,T,H,W,2C] -> [B,T,H,W,C] each
    return mean, jnp.clip(logvar, -30.0, 20.0)


def decode(
    params: Params, cfg: VAEConfig, latents: Array, *, remat: bool = False, arithmetic: str | None = None
) -> Array:
    """Latents float32 [B,T,H,W,C], not normalised -> video float32 [B,4T,8H,8W,3] in -1..1.

    Args:
      params, remat: as in `encode`.
      arithmetic: a name of `jvdiff.precision.DECODING`. None: in the dtype of the parameters, as JAX multiplies.

    Raises:
      UsageError: latents of another shape or number of channels.
    """
    if latents.ndim != 5 or latents.shape[-1] != cfg.latent_channels:
        raise UsageError(f"decode: latents are {list(latents.shape)}; expected [B,T,H,W,{cfg.latent_channels}]")
    dtype, tf32, products = computing(arithmetic)
    latents = _compute(params["decoder"], latents, dtype)
    with products:
        video: Any = _Decoder(cfg, remat, tf32).apply({"params": params["decoder"]}, latents)
    return jnp.tanh(video.astype(jnp.float32))


def _check_video(cfg: VAEConfig, video: Array) -> None:
    if video.ndim != 5 or video.shape[-1] != 3 or not jnp.issubdtype(video.dtype, jnp.floating):
        raise UsageError(f"encode: video is {video.dtype}{list(video.shape)}; expected float32[B,F,Y,X,3] in -1..1")
    factors = cfg.temporal_factor, cfg.spatial_factor, cfg.spatial_factor
    if any(n % factor or n == 0 for n, factor in zip(video.shape[1:4], factors, strict=True)):
        near = [max(round(n / factor), 1) * factor for n, factor in zip(video.shape[1:4], factors, strict=True)]
        raise UsageError(
            "encode: the clip has {} frames of {}x{} pixels; expected multiples of {} frames and {}x{} pixels.\n"
            "The nearest size that fits is {} frames of {}x{}.".format(*video.shape[1:4], *factors, *near)
        )


def _compute(params: Params, x: Array, dtype: Any) -> Array:
    """What goes into the encoder or the decoder: the stream has its dtype."""
    return x.astype(compute_dtype(params["conv_in"]["kernel"], dtype))


def normalize_latents(cfg: VAEConfig, latents: Array) -> Array:
    """Latents as the VAE makes them -> as the transformer sees them: zero mean, unit variance in every channel."""
    return (latents - _statistic(cfg.latents_mean, latents)) / _statistic(cfg.latents_std, latents)


def denormalize_latents(cfg: VAEConfig, latents: Array) -> Array:
    """The inverse of `normalize_latents`."""
    return latents * _statistic(cfg.latents_std, latents) + _statistic(cfg.latents_mean, latents)


def _statistic(values: tuple[float, ...], latents: Array) -> Array:
    return row(jnp.asarray(values), latents)


def abstract_params(cfg: VAEConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The parameter tree as ShapeDtypeStructs."""
    leaves = jax.eval_shape(partial(init_params, cfg=cfg), jax.random.key(0))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), leaves)


def init_params(key: Array, cfg: VAEConfig) -> dict[str, Any]:
    """Random float32 parameters to train from, of kernels that preserve variance."""
    return jax.jit(_init, static_argnames="cfg")(key, cfg=cfg)


def _init(key: Array, cfg: VAEConfig) -> dict[str, Any]:
    keys, cell = jax.random.split(key), cfg.spatial_factor
    encoder: Any = _Encoder(cfg).init(keys[0], jnp.zeros((1, cfg.temporal_factor, cell, cell, 3)))
    decoder: Any = _Decoder(cfg).init(keys[1], jnp.zeros((1, 1, 1, 1, cfg.latent_channels)))
    return {"encoder": encoder["params"], "decoder": decoder["params"]}


class _Encoder(nn.Module):
    """Pixels [B,F,Y,X,3] -> mean and log-variance [B,T,H,W,2C]."""

    cfg: VAEConfig
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg, block = self.cfg, nn.remat(_ResBlock) if self.remat else _ResBlock
        x = _Conv(cfg.widths[0], name="conv_in")(x)
        for level, width in enumerate(cfg.widths):
            if level:
                x = _Conv(width, cfg.strides[level - 1], name=f"down_{level}")(x)
            for i in range(cfg.blocks):
                x = block(width, cfg.groups, name=f"level_{level}_block_{i}")(x)
        return _Conv(2 * cfg.latent_channels, name="conv_out")(_Activation(cfg.groups, name="norm_out")(x))


class _Decoder(nn.Module):
    """Latents [B,T,H,W,C] -> pixels [B,F,Y,X,3], before the tanh."""

    cfg: VAEConfig
    remat: bool = False
    tf32: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg, block = self.cfg, nn.remat(_ResBlock) if self.remat else _ResBlock
        x = _Conv(cfg.widths[-1], tf32=self.tf32, name="conv_in")(x)
        for level in reversed(range(4)):
            for i in range(cfg.blocks):
                x = block(cfg.widths[level], cfg.groups, self.tf32, name=f"level_{level}_block_{i}")(x)
            if level:
                for axis, times in enumerate(cfg.strides[level - 1], start=1):
                    x = jnp.repeat(x, times, axis=axis)  # T, H or W times 1 or 2
                x = _Conv(cfg.widths[level - 1], tf32=self.tf32, name=f"up_{level}")(x)
        x = _Activation(cfg.groups, name="norm_out")(x)
        return _Conv(3, tf32=self.tf32, name="conv_out")(x)


class _ResBlock(nn.Module):
    """[B,T,H,W,C] -> [B,T,H,W,features]."""

    features: int
    groups: int
    tf32: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shortcut = x
        if x.shape[-1] != self.features:
            shortcut = Linear(self.features, dtype=x.dtype, tf32=self.tf32, name="shortcut")(x)
        for i in (1, 2):
            x = _Activation(self.groups, name=f"norm_{i}")(x)
            x = _Conv(self.features, tf32=self.tf32, name=f"conv_{i}")(x)
        return x + shortcut


class _Activation(nn.Module):
    """GroupNorm over all frames and cells in float32, then SiLU: [B,T,H,W,C] -> the same, in the same dtype."""

    groups: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y - self._mean(y)
        y = y * lax.rsqrt(self._mean(y * y) + 1e-6)
        return nn.silu(y * row(scale, y) + row(bias, y)).astype(x.dtype)

    def _mean(self, y: Array) -> Array:
        """[B,T,H,W,C] -> the mean of each channel's group [B,1,1,1,C].

        Channels come last, as in memory, until the grid is summed: with the groups as an axis XLA:CPU takes up to four
        times as long.
        """
        channels = jnp.mean(jnp.mean(y, axis=(2, 3)), axis=1)  # [B,C]
        groups = jnp.mean(channels.reshape(-1, self.groups, y.shape[-1] // self.groups), axis=2)  # [B,groups]
        return jnp.repeat(groups, y.shape[-1] // self.groups, axis=1)[:, None, None, None]  # [B,1,1,1,C]


class _Conv(nn.Module):
    """3x3x3 convolution with zeros all around, in the dtype of x.

    Written as a sum over the three temporal taps of 2-D convolutions: XLA:CPU runs these 1.3 to 2.7 times as fast as
    one 3-D convolution, and forwards and backwards together 2 to 7 times (32 to 256 channels, docs/latent_video.md).
    """

    features: int
    stride: tuple[int, int, int] = (1, 1, 1)
    tf32: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (3, 3, 3, x.shape[-1], self.features)
        kernel = as_array(self.param("kernel", nn.initializers.lecun_normal(), shape), x.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel = (as_tf32(x), as_tf32(kernel)) if self.tf32 else (x, kernel)
        B, F = x.shape[:2]
        frames = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))  # [B,F+2,Y,X,C]

        def tap(i: int) -> Array:
            seen = frames[:, i : i + F : self.stride[0]]
            y = lax.conv_general_dilated(
                seen.reshape(-1, *x.shape[2:]),  # [B,F,Y,X,C] -> [B*F,Y,X,C]
                kernel[i],
                self.stride[1:],
                ((1, 1), (1, 1)),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            return y.reshape(B, -1, *y.shape[1:]).astype(jnp.float32)  # [B,F,Y,X,C]

        y = tap(0) + tap(1) + tap(2)
        return (y + row(bias, y)).astype(kernel.dtype)
