"""Video in and out of a rollout, chunk by chunk: encoders and decoders over the causal VAE.

    B batch · T latent frames · H W latent grid · C latent channels · F pixel frames · Y X pixel height, width

Each is a frozen value, part of a rollout's configuration, with pure methods, all of which may be jitted (`self` is
static): an Encoder or a Decoder of `jvdiff.streaming.contracts`. The `cache` that a method returns is all that it
remembers; None means that the rollout begins (chunk 0).

With a temporal ratio of 4 the first latent frame stands for one pixel frame and every later one for four. T latent
frames are 1 + 4 (T - 1) pixel frames in chunk 0, and 4 T afterwards. Names as in NVIDIA's flashdreams.

Each of a placement's devices has a part of the pixels and of what the VAE remembers, and all of the latents. All
arguments lie on the placement's mesh.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jvdiff import models
from jvdiff.errors import UsageError
from jvdiff.precision import DECODING
from jvdiff.sharding import Placement
from jvdiff.streaming.contracts import bind, check_network
from jvdiff.streaming.values import tree
from jvdiff.types import Array, Params

# latent float32 [B,T,H,W,C], normalised, and mask float32 that broadcasts to it or goes with it: 1 where it is given.
Payload = dict[str, Array]


@dataclass(frozen=True)
class _OverVAE:
    """What goes through a causal VAE, chunk by chunk.

    vae: its configuration
    """

    vae: Any
    setup = bind

    def __post_init__(self):
        check_network("vae", self.vae, 1)

    def __str__(self) -> str:
        return tree(self)

    @property
    def part(self) -> str:
        """The VAE's weights."""
        return "vae"

    @property
    def divided(self) -> bool:
        """Whether the devices of a mesh share what is remembered, as they share pictures."""
        return True

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels per latent cell, along height and along width."""
        return self.vae.spatial_factor

    @property
    def temporal_compression_ratio(self) -> int:
        """Pixel frames per latent frame, after the first."""
        return self.vae.temporal_factor

    def initialize_cache(self) -> None:
        """The cache before chunk 0."""
        return None


@dataclass(frozen=True)
class _Encoder(_OverVAE):
    """Pixel frames in, latent frames out."""

    def get_output_temporal_size(self, *, autoregressive_index: int, input_temporal_size: int) -> int:
        """Latent frames that these pixel frames become. UsageError with the nearest number that works."""
        return _latent_frames(self.vae, input_temporal_size, autoregressive_index)

    def get_input_temporal_size(self, *, autoregressive_index: int, output_temporal_size: int) -> int:
        """Pixel frames that become these latent frames in the chunk of this index (from 0)."""
        return _pixel_frames(self.vae, output_temporal_size, autoregressive_index)

    def _picture(self, batch: int, latent_shape: tuple[int, ...], *frames: int) -> jax.ShapeDtypeStruct:
        """Pixels for latents (T,H,W,C), uint8 [B,*frames,Y,X,3]."""
        size = (n * self.spatial_compression_ratio for n in latent_shape[1:3])
        return jax.ShapeDtypeStruct((batch, *frames, *size, 3), jnp.uint8)


@dataclass(frozen=True)
class StreamingVideoDecoder(_OverVAE):
    """Latents of a chunk -> its pixel frames.

    vae: its configuration
    arithmetic: a name of `jvdiff.precision.DECODING`. None: as `load` is told; without it, in the dtype of the weights,
        as JAX multiplies
    """

    arithmetic: Literal["exact", "tf32", "bf16"] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.arithmetic not in (None, *DECODING):
            raise UsageError(
                f"StreamingVideoDecoder: arithmetic is {self.arithmetic!r:.40}, expected one of {', '.join(DECODING)}."
            )

    def get_output_temporal_size(self, *, autoregressive_index: int, input_temporal_size: int) -> int:
        """Pixel frames that these latent frames become in the chunk of this index (from 0)."""
        return _pixel_frames(self.vae, input_temporal_size, autoregressive_index)

    def get_input_temporal_size(self, *, autoregressive_index: int, output_temporal_size: int) -> int:
        """Latent frames that become these pixel frames. UsageError with the nearest number that works."""
        return _latent_frames(self.vae, output_temporal_size, autoregressive_index)

    def decode(
        self, params: Params, latents: Array, cache: Any, *, placement: Placement | None = None
    ) -> tuple[Array, Any]:
        """Decodes the next chunk.

        Args:
          latents: [B,T,H,W,C] as the diffusion model makes them (normalised), T of any size from 1.
          cache: what the chunk before returned.
          placement: the devices that share every frame, `params` a copy on each.

        Returns:
          float32 frames [B,F,Y,X,3] in [-1,1], and the cache for the next chunk.
        """
        channels = self.vae.latent_channels
        if latents.ndim != 5 or latents.shape[-1] != channels or 0 in latents.shape:
            raise UsageError(
                f"latents of a chunk are [B,T,H,W,{channels}], each at least 1, found {list(latents.shape)}."
            )
        network = models.rollout(self.vae)
        latents = network.denormalize_latents(self.vae, latents.astype(jnp.float32))
        step = functools.partial(network.decode_chunk, arithmetic=self.arithmetic)
        return _in_turn(step, params, self.vae, latents, cache, placement)


@dataclass(frozen=True)
class StreamingVideoEncoder(_Encoder):
    """Pixel frames of a chunk -> its latents."""

    @property
    def channels(self) -> int:
        """Those of the latents."""
        return self.vae.latent_channels

    def abstract_input(
        self, batch: int, latent_shape: tuple[int, ...], autoregressive_index: int
    ) -> jax.ShapeDtypeStruct:
        """The input of a chunk: a video, uint8 [B,F,Y,X,3]."""
        index = autoregressive_index
        frames = self.get_input_temporal_size(autoregressive_index=index, output_temporal_size=latent_shape[0])
        return self._picture(batch, latent_shape, frames)

    def encode(
        self,
        params: Params,
        video: Array,
        cache: Any,
        *,
        latent_frames: int | None = None,
        placement: Placement | None = None,
    ) -> tuple[Array, Any]:
        """Encodes the next chunk.

        Args:
          video: [B,F,Y,X,3], uint8 or float32 in [-1,1].
          cache: what the chunk before returned.
          latent_frames: T of the rollout's chunks, which the video must fill; None: what the video fills.

        Returns:
          Normalised latents float32 [B,T,H,W,C] (the posterior's mean), and the cache for the next chunk.
        """
        frames = _pixels(self.vae, video, "video", "[B,F,Y,X,3]")
        index = 0 if cache is None else 1
        if latent_frames is not None:
            count = self.get_input_temporal_size(autoregressive_index=index, output_temporal_size=latent_frames)
            if frames.shape[1] != count:
                raise UsageError(
                    f"{_which(index)} of {latent_frames} latent frames takes {count} pixel frames, "
                    f"found {frames.shape[1]}."
                )
        self.get_output_temporal_size(autoregressive_index=index, input_temporal_size=frames.shape[1])
        latents, cache = _in_turn(models.rollout(self.vae).encode_chunk, params, self.vae, frames, cache, placement)
        return _normalized(self.vae, latents, placement), cache


@dataclass(frozen=True)
class NullEncoder:
    """For what needs no encoding: an array, or a pytree of them, passes to the transformer as it is."""

    setup = bind

    @property
    def part(self) -> None:
        """It has no weights."""
        return None

    @property
    def channels(self) -> None:
        """Not known."""
        return None

    @property
    def spatial_compression_ratio(self) -> int:
        """1: what goes in comes out."""
        return 1

    @property
    def temporal_compression_ratio(self) -> int:
        """1: what goes in comes out."""
        return 1

    def get_output_temporal_size(self, *, autoregressive_index: int, input_temporal_size: int) -> int:
        """The same number."""
        _check_size(input_temporal_size, autoregressive_index)
        return input_temporal_size

    def get_input_temporal_size(self, *, autoregressive_index: int, output_temporal_size: int) -> int:
        """The same number."""
        _check_size(output_temporal_size, autoregressive_index)
        return output_temporal_size

    def initialize_cache(self) -> None:
        """Nothing is remembered."""
        return None

    def abstract_input(
        self, batch: int, latent_shape: tuple[int, ...], autoregressive_index: int
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """{}: anything."""
        return {}

    def encode(
        self,
        params: Any,
        encoded: Any,
        cache: Any,
        *,
        latent_frames: int | None = None,
        placement: Placement | None = None,
    ) -> tuple[Any, Any]:
        """(encoded, cache); UsageError where there is no input."""
        if encoded is None:
            raise UsageError("this rollout has an encoder, so every chunk takes an input, found None.")
        return encoded, cache


@dataclass(frozen=True)
class ImageEncoder(_Encoder):
    """A picture that a rollout begins with -> what tells the diffusion model of it, chunk by chunk.

    The picture is the first frame of a video whose other frames are 0 (grey), which the VAE encodes. The mask is 1 for
    its latent frame.

    vae: configuration of the causal VAE
    mode: how the diffusion model takes them

      stamp: `stamped`, mask [B,T,1,1,1]: that latent frame is put into the sample before every call of the network and
        into its result (Causal-Forcing). Other latent frames are masked, so only the picture is encoded, once; they
        repeat it.
      concat: `concatenated`, mask [B,T,H,W,4]: mask and latents are further channels of the network's input (36 in
        published image-to-video models). The mask has one channel for each pixel frame of a latent frame.
    """

    mode: Literal["stamp", "concat"] = "stamp"

    def __post_init__(self):
        super().__post_init__()
        if self.mode not in ("stamp", "concat"):
            raise UsageError(f"ImageEncoder: mode is {self.mode!r}, expected 'stamp' or 'concat'.")

    @property
    def channels(self) -> int:
        """Those of mask and latents where they are concatenated; otherwise 0."""
        return self.vae.latent_channels + self.vae.temporal_factor if self.mode == "concat" else 0

    @property
    def divided(self) -> bool:
        """Whether the devices of a mesh share what is remembered: the VAE's cache, and not a latent frame."""
        return self.mode == "concat"

    def abstract_input(
        self, batch: int, latent_shape: tuple[int, ...], autoregressive_index: int
    ) -> jax.ShapeDtypeStruct | None:
        """A picture uint8 [B,Y,X,3] for chunk 0; None for the others."""
        return None if autoregressive_index else self._picture(batch, latent_shape)

    def encode(
        self,
        params: Params,
        image: Array | None,
        cache: Any,
        *,
        latent_frames: int,
        placement: Placement | None = None,
    ) -> tuple[Payload, Any]:
        """The payload of the next chunk.

        Args:
          image: [B,Y,X,3], uint8 or float32 in [-1,1], for chunk 0; None for the others.
          cache: what the chunk before returned.
          latent_frames: T.

        Returns:
          dict(latent normalised float32 [B,T,H,W,C], mask float32), and the cache for the next chunk.
        """
        begins = cache is None
        index = 0 if begins else 1
        count = self.get_input_temporal_size(autoregressive_index=index, output_temporal_size=latent_frames)
        if begins and image is None:
            raise UsageError("chunk 0 takes a picture [B,Y,X,3], found None.")
        if not begins and image is not None:
            raise UsageError("only chunk 0 takes a picture; the input of a later chunk is None.")
        frame = None if image is None else _pixels(self.vae, image, "picture", "[B,Y,X,3]")[:, None]  # [B,1,Y,X,3]

        if self.mode == "stamp":
            if frame is not None:
                latent, _ = models.rollout(self.vae).encode_chunk(params, self.vae, frame, None, placement=placement)
                cache = _normalized(self.vae, latent, placement)
            latent = jnp.repeat(cache, latent_frames, axis=1)  # [B,1,H,W,C] -> [B,T,H,W,C]
            shape = (latent.shape[0], latent_frames, 1, 1, 1)
        else:
            shape = models.rollout(self.vae).picture_shape(cache) if frame is None else frame.shape
            batch, _, height, width, _ = shape
            grey = jnp.zeros((batch, count - int(begins), height, width, 3), jnp.float32)
            frames = grey if frame is None else jnp.concatenate([frame, grey], axis=1)  # [B,F,Y,X,3]
            latent, cache = _in_turn(models.rollout(self.vae).encode_chunk, params, self.vae, frames, cache, placement)
            latent = _normalized(self.vae, latent, placement)
            shape = (*latent.shape[:-1], self.vae.temporal_factor)
        mask = jnp.zeros(shape, jnp.float32)
        return {"latent": latent, "mask": mask.at[:, 0].set(1.0) if begins else mask}, cache


def stamped(payload: Any, x: Array) -> Array:
    """x [B,T,H,W,C] with the payload's latent where its mask is 1; x itself without a payload.

    Raises:
        UsageError: the payload is not a mask and a latent of x's shape.
    """
    if payload is None:
        return x
    given = _latent(payload, x)
    if given["latent"].shape != x.shape:
        raise UsageError(f"the encoder gives latents {_shape(given['latent'])}; chunks here are {_shape(x)}.")
    if "mask" not in given:
        raise UsageError("the encoder gives no mask; this network takes a latent only where a mask says so.")
    mask, latent = (given[name].astype(x.dtype) for name in ("mask", "latent"))
    return (1 - mask) * x + mask * latent


def concatenated(payload: Any, x: Array) -> Array:
    """The network's input x | mask | latent (x | latent without a mask), along channels; x itself without a payload.

    payload: latents, or those and a mask by name.

    Raises:
        UsageError: the payload's frames are not those of x.
    """
    if payload is None:
        return x
    given = _latent(payload, x)
    parts = [given[name].astype(x.dtype) for name in ("mask", "latent") if name in given]
    if wrong := [part for part in parts if part.shape[:-1] != x.shape[:-1]]:
        raise UsageError(f"the encoder gives {_shape(wrong[0])}; chunks here are {_shape(x)}, their channels apart.")
    return jnp.concatenate([x, *parts], axis=-1)  # [B,T,H,W,more channels]


def _latent(payload: Any, x: Array) -> Payload:
    """A payload by name; an array is the latent."""
    given = payload if isinstance(payload, Mapping) else {"latent": payload}
    if not hasattr(given.get("latent"), "astype"):
        raise UsageError(f"the encoder gives no latent; chunks of these rollouts are {_shape(x)}.")
    return dict(given)


def _shape(x: Array) -> str:
    return str(list(x.shape))


def _in_turn(
    step: Any, params: Params, vae: Any, x: Array, cache: Any, placement: Placement | None
) -> tuple[Array, Any]:
    """A chunk through `encode_chunk` or `decode_chunk`; a clip's first frame goes apart."""
    if cache is not None:
        return step(params, vae, x, cache, placement=placement)
    first, cache = step(params, vae, x[:, :1], None, placement=placement)
    if x.shape[1] == 1:
        return first, cache
    rest, cache = step(params, vae, x[:, 1:], cache, placement=placement)
    return jnp.concatenate([first, rest], axis=1), cache  # [B,T,...] or [B,F,...]


def _normalized(vae: Any, latents: Array, placement: Placement | None) -> Array:
    """Latents as the diffusion model sees them, on every device."""
    latents = models.rollout(vae).normalize_latents(vae, latents)
    return latents if placement is None else placement.replicate(latents)


def _pixels(vae: Any, x: Array | None, what: str, axes: str) -> Array:
    """float32 pixels in [-1,1], of a size that the VAE takes."""
    if x is None:
        raise UsageError(f"this chunk takes a {what} {axes}, found None.")
    if x.ndim != axes.count(",") + 1 or x.shape[-1] != 3 or x.dtype not in (jnp.uint8, jnp.float32) or 0 in x.shape:
        raise UsageError(
            f"a {what} is {axes}, uint8 or float32 in -1..1, each axis at least 1, found {x.dtype} {list(x.shape)}."
        )
    ratio = vae.spatial_factor
    size = x.shape[-3:-1]
    nearest = [max(1, (2 * n + ratio) // (2 * ratio)) * ratio for n in size]
    if list(size) != nearest:
        raise UsageError(
            f"a {what} has a height and width divisible by {ratio}, found {size[0]}x{size[1]}; "
            f"the nearest is {nearest[0]}x{nearest[1]}."
        )
    x = jnp.asarray(x)
    return x.astype(jnp.float32) / 127.5 - 1.0 if x.dtype == jnp.uint8 else x


def _pixel_frames(vae: Any, latent_frames: int, index: int) -> int:
    _check_size(latent_frames, index)
    return latent_frames * vae.temporal_factor - (vae.temporal_factor - 1 if index == 0 else 0)


def _latent_frames(vae: Any, pixel_frames: int, index: int) -> int:
    if not isinstance(pixel_frames, int) or not isinstance(index, int) or index < 0:
        _check_size(pixel_frames, index)
    ratio, missing = vae.temporal_factor, vae.temporal_factor - 1 if index == 0 else 0
    total = pixel_frames + missing
    nearest = max(1, (2 * total + ratio) // (2 * ratio))
    if total != nearest * ratio:
        form = f"1 + {ratio}k" if index == 0 else f"{ratio}k, k at least 1,"
        fits = nearest * ratio - missing
        raise UsageError(f"{_which(index)} has {form} pixel frames, found {pixel_frames}; the nearest is {fits}.")
    return nearest


def _check_size(frames: int, index: int) -> None:
    if not isinstance(index, int) or index < 0:
        raise UsageError(f"chunks are counted from 0, found {index!r:.60}.")
    if not isinstance(frames, int):
        raise UsageError(f"{_which(index)} has a whole number of frames, found {frames!r:.60}.")
    if frames < 1:
        raise UsageError(f"{_which(index)} has at least 1 frame, found {frames}; the nearest is 1.")


def _which(index: int) -> str:
    return "chunk 0" if index == 0 else "a later chunk"
