"""The layers of the causal video VAE, encoder and decoder; see `vae`.

B batch · T frames, of latents or on the way to pixels · H W rows and columns · C channels

On several devices all of this runs on each one's part of every picture (`jax.shard_map`): what a layer needs of the
others is told here, by `_edges`, `_mean` and `_attend_cells`. The partitioner is not asked, since a picture with its
borders repeated is a concatenation, for which it would gather all of it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from jvdiff import kernels
from jvdiff.models.hunyuan_video.vae_config import VAEConfig
from jvdiff.models.layers import as_array, as_tf32, product, row
from jvdiff.runtime.target import Target, here
from jvdiff.sharding import Picture
from jvdiff.types import Array, Params

_EPS = 1e-6
_LARGEST = 2**30  # numbers that a convolution reads at once: cuDNN counts up to 2^31
_SIDES = ((2, "height"), (3, "width"))  # the axes of [B,T,H,W,C] that devices divide, and their names in `Picture`


@dataclass(frozen=True)
class How:
    """How layers compute.

    picture: how the devices share one; None: there is one device.
    tf32: whether float32 operands are rounded as `as_tf32` does.
    """

    picture: Picture | None = None
    tf32: bool = False

    @property
    def target(self) -> Target:
        """What will run them."""
        return self.picture.target if self.picture else here()

    def rounded(self, x: Array) -> Array:
        return as_tf32(x) if self.tf32 else x

    def devices(self, side: str) -> tuple[tuple[str, ...], int]:
        """Axes of the mesh that divide "height" or "width", and how many parts there are."""
        names = () if self.picture is None else getattr(self.picture, side)
        return names, math.prod(self.picture.mesh.shape[axis] for axis in names) if self.picture else 1


def _edges(x: Array, how: How) -> Array:
    """[B,T,H,W,C] -> [B,T,H+2,W+2,C]: a line more on each side, the neighbour's, or a repeated one at the border."""
    for axis, side in _SIDES:
        first, last = (lax.slice_in_dim(x, at, at + 1, axis=axis) for at in (0, x.shape[axis] - 1))
        names, parts = how.devices(side)
        if parts > 1:
            after, before = ([(i, i + step) for i in range(parts) if 0 <= i + step < parts] for step in (-1, 1))
            at = lax.axis_index(names)
            first, last = (
                jnp.where(at == 0, first, lax.ppermute(last, names, before)),
                jnp.where(at == parts - 1, last, lax.ppermute(first, names, after)),
            )
        x = jnp.concatenate([first, x, last], axis=axis)
    return x


def _mean(x: Array, how: How) -> Array:
    """[B,T,H,W,C] -> [B,C], over whole pictures; line by line first, so that float32 can hold the sum."""
    mean = jnp.mean(jnp.mean(x, axis=3), axis=(1, 2))
    names = [name for _, side in _SIDES for name in how.devices(side)[0]]
    return lax.pmean(mean, names) if names else mean


def pointwise(x: Array, dense: Params, how: How) -> Array:
    """x [...,C] times a kernel, plus a bias, rounded once to the dtype of x."""
    y = product(x, dense["kernel"], x.dtype, out=jnp.float32, tf32=how.tf32)
    return (y + row(dense["bias"], y)).astype(x.dtype)


class _Dense(nn.Module):
    """[...,C] -> [...,features] in the dtype of x."""

    features: int
    how: How

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return pointwise(x, {"kernel": kernel, "bias": bias}, self.how)


def _conv2d(x: Array, kernel: Array, how: How, stride: int = 1) -> Array:
    """Per-frame convolution without padding. x [B,T,H,W,C], kernel [h,w,C,O], which is rounded to the dtype of x.

    Where nothing at all is padded XLA for CPUs takes up to fifteen times as long; so there one column is, and cut off.
    """
    frames, kernel = rearrange(x, "B T H W C -> (B T) H W C"), kernel.astype(x.dtype)
    layout, cut = ("NHWC", "HWIO", "NHWC"), int(how.target.platform == "cpu")
    padding = ((0, 0), (cut * stride, 0))
    y = lax.conv_general_dilated(
        how.rounded(frames), how.rounded(kernel), (stride, stride), padding, dimension_numbers=layout
    )
    return rearrange(y[:, :, cut:], "(B T) H W C -> B T H W C", T=x.shape[1])


def _over_time(x: Array, kernel: Array, conv: Callable[[Array, Array], Array], stride: int = 1) -> Array:
    """Sum over three temporal taps of convolutions frame by frame; the first frame stands for those before the clip.

    x [B,T,...,C], kernel [3,h,w,C,O], the newest tap last; conv: (x, kernel [h,w,C,O]) -> y of as many frames.
    About twice as fast as one 3-D convolution on XLA:CPU. Narrow layers, and those in bfloat16, which is to be rounded
    once, stack the three frames in channels and convolve once instead, and so do the largest.
    """
    frames = x.shape[1]
    if frames == 1:
        return conv(x, kernel.sum(0))
    if x.shape[-1] < 32 or x.dtype != jnp.float32 or _too_large(x, 3):
        return _stacked(x, (2, 1, 0), range(0, frames, stride), rearrange(kernel, "tap h w I O -> h w (tap I) O"), conv)
    if stride == 1:  # what repeats is convolved once
        taps = [_delayed(conv(x[:, : max(frames - 2 + i, 1)], tap), frames) for i, tap in enumerate(kernel)]
    else:
        taps = [conv(_before(x, 2 - i)[:, ::stride], tap) for i, tap in enumerate(kernel)]
    return taps[0] + taps[1] + taps[2]


def _stacked(x: Array, backs: Sequence[int], at: range, kernel: Array, conv: Callable[[Array, Array], Array]) -> Array:
    """conv of several frames in channels: those that stand so far `backs` from each frame that is `at`."""
    if not _too_large(x, len(backs)):
        return conv(jnp.concatenate([_before(x, back)[:, at.start :: at.step] for back in backs], axis=-1), kernel)

    def one(t: Array) -> Array:
        frames = [lax.dynamic_index_in_dim(x, jnp.maximum(t - back, 0), axis=1) for back in backs]
        return conv(jnp.concatenate(frames, axis=-1), kernel)[:, 0]

    return jnp.moveaxis(lax.map(one, jnp.array(at, jnp.int32)), 0, 1)


def _too_large(x: Array, copies: int) -> bool:
    """Whether a convolution of so many copies of x should be one of each frame instead."""
    return x.size * copies > _LARGEST


def _before(x: Array, back: int) -> Array:
    """x [B,T,...] -> for each frame the one so far before it, or the first."""
    return _delayed(x[:, : max(x.shape[1] - back, 1)], x.shape[1])


def _delayed(x: Array, frames: int) -> Array:
    """x [B,T,...] behind as many copies of its first frame as make it [B,frames,...]."""
    return jnp.concatenate([x[:, :1]] * (frames - x.shape[1]) + [x], axis=1)


class _Conv(nn.Module):
    """3x3x3 convolution, causal in time, borders repeated: x [B,T,H,W,C] -> [B,T,H,W,features].

    down: the step to the next level follows, None, or in space alone (False) or in time too (True): of a clip's frames
        the first, third, ... remain.
    up: likewise what comes before it: every pixel becomes four, and every frame but the first two.
    """

    features: int
    how: How
    down: bool | None = None
    up: bool | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        y = self._convolved(_edges(x, self.how), as_array(kernel, jnp.float32))
        return y + row(bias, y)

    def _convolved(self, x: Array, kernel: Array) -> Array:
        if self.up is None:
            in_space = 1 if self.down is None else 2
            conv = partial(_conv2d, how=self.how, stride=in_space)
            return _over_time(x, kernel, conv, 2 if self.down else 1)
        conv = partial(_upsampled_conv, how=self.how)
        return _doubled(x, kernel, conv) if self.up else _over_time(x, kernel, conv)


def _upsampled_conv(x: Array, kernel: Array, how: How) -> Array:
    """Nearest-neighbour 2x upsampling, then a 3x3 convolution, without ever holding the upsampled input.

    Of the nine taps over doubled pixels, those that fall on the same source cell add up: each of the four output
    phases is a 2x2 convolution of the small grid. A repeated border is one in either grid.
    x [B,T,H+2,W+2,C] with its `_edges`, kernel float32 [3,3,C,O] -> y [B,T,2H,2W,O].
    """

    def folded(kernel: Array, phase: int) -> Array:  # three taps -> two
        first = kernel[:1] if phase == 0 else kernel[0:1] + kernel[1:2]
        return jnp.concatenate([first, kernel[2:] if phase else kernel[1:2] + kernel[2:]])

    height, width = x.shape[2] - 1, x.shape[3] - 1
    rows = []
    for a in (0, 1):
        across = jnp.moveaxis(folded(kernel, a), 1, 0)  # [3,2,C,O]
        small = [jnp.moveaxis(folded(across, b), 0, 1) for b in (0, 1)]  # [2,2,C,O]
        parts = [_conv2d(x[:, :, a : a + height, b : b + width], small[b], how) for b in (0, 1)]
        rows.append(jnp.stack(parts, axis=4))
    return rearrange(jnp.stack(rows, axis=3), "B T H a W b O -> B T (H a) (W b) O")


def _doubled(x: Array, kernel: Array, conv: Callable[[Array, Array], Array]) -> Array:
    """Every frame but the first twice, then the temporal part of a causal convolution, as in `_over_time`.

    Of three taps over doubled frames two fall on the same one: the older ones for its first copy, the newer ones for
    its second. Both copies are made of a frame and the one before it, in one convolution.
    x [B,T,...,C], kernel [3,h,w,C,O] -> y [B,2T-1,...,O].
    """
    first = conv(x[:, :1], kernel.sum(0))
    if x.shape[1] == 1:
        return first
    old, middle, new = kernel
    before, now = (jnp.concatenate(pair, axis=-1) for pair in ((old + middle, old), (new, middle + new)))
    both = _stacked(x, (1, 0), range(1, x.shape[1]), jnp.concatenate([before, now], axis=-2), conv)
    later = rearrange(both, "B T H W (two O) -> B (T two) H W O", two=2)
    return jnp.concatenate([first, later], axis=1)


class _Norm(nn.Module):
    """Group normalisation over a group's channels, all frames and all pixels; float32 out."""

    groups: int
    how: How

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x - self._grouped(x)
        factor = lax.rsqrt(self._grouped(x * x) + _EPS) * row(scale, x)
        return x * factor + row(bias, x)

    def _grouped(self, x: Array) -> Array:
        """The mean of each channel's group [B,1,1,1,C]."""
        groups = rearrange(_mean(x, self.how), "B (G c) -> B G c", G=self.groups).mean(-1)
        return jnp.repeat(groups, x.shape[-1] // self.groups, axis=-1)[:, None, None, None]


class _ResBlock(nn.Module):
    """x [B,T,H,W,C] -> [B,T,H,W,features]."""

    features: int
    groups: int
    how: How

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shortcut = x if x.shape[-1] == self.features else _Dense(self.features, self.how, name="shortcut")(x)
        for i in (1, 2):
            x = nn.silu(_Norm(self.groups, self.how, name=f"norm_{i}")(x)).astype(x.dtype)
            x = _Conv(self.features, self.how, name=f"conv_{i}")(x)
        return x + shortcut


class _Attention(nn.Module):
    """Single-head attention of each cell among all cells of its frame and of those before."""

    groups: int
    how: How

    @nn.compact
    def __call__(self, x: Array) -> Array:
        normed = _Norm(self.groups, self.how, name="norm")(x).astype(x.dtype)
        # Where TF32 is emulated, attention's weights are not rounded.
        q, k, v = (self.how.rounded(_Dense(x.shape[-1], self.how, name=name)(normed)) for name in ("q", "k", "v"))
        return x + _Dense(x.shape[-1], self.how, name="out")(_attend_cells(q, k, v, self.how))


def _attend_cells(q: Array, k: Array, v: Array, how: How) -> Array:
    """[B,T,H,W,C] each: one frame after another, so that there is no matrix of all cells, and nothing masked."""
    for axis, side in _SIDES:
        if names := how.devices(side)[0]:
            k, v = (lax.all_gather(x, names, axis=axis, tiled=True) for x in (k, v))  # whole along `axis`
    outs = []
    for t in range(q.shape[1]):
        seen = (q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1])
        cells = (rearrange(x, "B T H W C -> B (T H W) 1 C") for x in seen)
        outs.append(kernels.attention(*cells, target=how.target).reshape(q[:, t : t + 1].shape))
    return jnp.concatenate(outs, axis=1)


class _Mid(nn.Module):
    """Attention between two residual blocks: x [B,T,H,W,C] -> the same."""

    groups: int
    how: How

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = _ResBlock(x.shape[-1], self.groups, self.how, name="res_0")(x)
        x = _Attention(self.groups, self.how, name="attn")(x)
        return _ResBlock(x.shape[-1], self.groups, self.how, name="res_1")(x)


class _Level(nn.Module):
    """Residual blocks, then the step to the next level, if any (see `_Conv`): as it is called, "down" or "up"."""

    features: int
    blocks: int
    groups: int
    how: How
    way: str
    step: bool | None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(self.blocks):
            x = _ResBlock(self.features, self.groups, self.how, name=f"res_{i}")(x)
        if self.step is None:
            return x
        steps: Any = {self.way: self.step}
        return _Conv(self.features, self.how, **steps, name=f"{self.way}sample")(x)


class Encoder(nn.Module):
    """Pixels [B,1+4k,Y,X,3] -> mean and log-variance [B,1+k,H,W,2C]."""

    cfg: VAEConfig
    how: How = How()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg, groups = self.cfg, self.cfg.norm_num_groups
        x = _Conv(cfg.block_out_channels[0], self.how, name="conv_in")(x)
        for i, (width, step) in enumerate(zip(cfg.block_out_channels, (*cfg.steps, None), strict=True)):
            x = _Level(width, cfg.layers_per_block, groups, self.how, "down", step, name=f"down_{i}")(x)
        x = _Mid(groups, self.how, name="mid")(x)
        return _head(x, groups, 2 * cfg.latent_channels, self.how)


class Decoder(nn.Module):
    """Latents [B,T,H,W,C] -> frames [B,1+4(T-1),Y,X,3], not clamped."""

    cfg: VAEConfig
    how: How = How()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg, groups = self.cfg, self.cfg.norm_num_groups
        x = _Conv(cfg.block_out_channels[-1], self.how, name="conv_in")(x)
        x = _Mid(groups, self.how, name="mid")(x)
        for i, (width, step) in enumerate(zip(reversed(cfg.block_out_channels), (*cfg.steps, None), strict=True)):
            x = _Level(width, cfg.layers_per_block + 1, groups, self.how, "up", step, name=f"up_{i}")(x)
        return _head(x, groups, 3, self.how)


def _head(x: Array, groups: int, features: int, how: How) -> Array:
    x = nn.silu(_Norm(groups, how, name="norm_out")(x)).astype(x.dtype)
    return _Conv(features, how, name="conv_out")(x)
