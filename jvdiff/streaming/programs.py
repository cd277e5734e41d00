"""The compiled functions of a streaming pipeline: each a pure function of weights, cache and input.

B rollouts · T latent frames of a chunk · H W latent grid · C latent channels
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jvdiff import models
from jvdiff.diffusion import Solver, add_noise, denoise_scan
from jvdiff.models.family import Rollout
from jvdiff.models.pixels import nonfinite_share, to_pixels
from jvdiff.runtime import draws
from jvdiff.sharding import Placement
from jvdiff.streaming.codec import Encoder, StreamingVideoDecoder, StreamingVideoEncoder, concatenated, stamped
from jvdiff.streaming.config import DiffusionModelConfig, TransformerConfig
from jvdiff.types import Array, Params


class Programs(NamedTuple):
    """The jitted functions of a configuration, each of weights and of what a rollout remembers.

    One program of each serves all chunks of a rollout; the VAE's first chunk has one more.

    text_keys: (network, rows) -> its keys and values
    encode: (vae, input, cache) -> (payload, cache)
    diffuse: (network, text, past, key, index, payload) -> (latents, non-finite share)
    decode: (vae, latents, non-finite share, cache) -> (uint8 frames, non-finite share, cache)
    finalize: (network, text, past, history, key, index, latents, payload) -> (past, history), both in place
    reencode: (network, text, past, history) -> past, in place
    """

    text_keys: Any
    encode: Any
    diffuse: Any
    decode: Any
    finalize: Any
    reencode: Any


@functools.lru_cache(maxsize=8)
def programs(
    model: DiffusionModelConfig,
    encoder: Encoder | None,
    decoder: StreamingVideoDecoder | None,
    placement: Placement | None,
) -> Programs:
    """The compiled functions of a configuration on a mesh (None: one device)."""
    functions = _Functions(model, encoder, decoder, placement, model.scheduler.solver())
    return Programs(
        text_keys=jax.jit(functions.text_keys),
        encode=jax.jit(functions.encode),
        diffuse=jax.jit(functions.diffuse),
        decode=jax.jit(functions.decode),
        finalize=jax.jit(functions.finalize, donate_argnums=(2, 3)),
        reencode=jax.jit(functions.reencode, donate_argnums=2),
    )


@dataclass(frozen=True, eq=False)
class _Functions:
    """What `Programs` compiles.

    model: network, sampler, and how much of a video a chunk sees
    encoder, decoder: of inputs and of frames, where there are any
    placement: mesh and where activations live on it; None is one device
    solver: of the sampler's steps
    """

    model: DiffusionModelConfig
    encoder: Encoder | None
    decoder: StreamingVideoDecoder | None
    placement: Placement | None
    solver: Solver

    def text_keys(self, params: Params, rows: Array) -> Any:
        return self._net.text_keys(params, self._cfg.network, rows, placement=self.placement)

    def encode(self, params: Params, input: Any, cache: Any) -> tuple[Any, Any]:
        assert self.encoder is not None
        frames, placement = self._cfg.span.chunk, self.placement
        payload, cache = self.encoder.encode(params, input, cache, latent_frames=frames, placement=placement)
        if isinstance(self.encoder, StreamingVideoEncoder):
            payload = {"latent": payload}
        return self._replicated(payload), cache

    def diffuse(
        self, params: Params, text: Any, past: Any, key: Array, index: Array, payload: Any
    ) -> tuple[Array, Array]:
        cfg = self._cfg
        key = jax.random.fold_in(draws.key_of(key), index)
        batch = past.keys.shape[1] // (2 if cfg.guided else 1)
        shape = (cfg.span.chunk, cfg.height, cfg.width, cfg.network.out_channels)
        keys = _rollout_keys(key, batch)  # [B,2]
        noise = jax.vmap(lambda one: draws.normal(jax.random.fold_in(one, 0), shape))(
            draws.key_of(keys)
        )  # [B] -> [B,T,H,W,C]
        state = self._replicated(self.solver.init(noise, keys))
        first = cfg.guidance_scale if cfg.first_guidance_scale is None else cfg.first_guidance_scale
        scale = jnp.where(index == 0, jnp.float32(first), jnp.float32(cfg.guidance_scale))
        latents = denoise_scan(Partial(self._flow, params, text, past, payload, scale), self.solver, state).x
        if not self._concatenates:
            latents = stamped(payload, latents)
        return self._replicated((latents, nonfinite_share(latents)))

    def _flow(self, params: Params, text: Any, past: Any, payload: Any, scale: Array, x: Array, t: Array) -> Array:
        """The velocity of x [B,T,H,W,C] at t [B], guided."""
        sample = self._branches(concatenated(payload, x) if self._concatenates else stamped(payload, x))
        cfg, t = self._cfg, self._branches(t)
        v = self._net.chunk_velocity(params, cfg.network, cfg.span, sample, t, text, past, **self._forward)
        if not cfg.guided:
            return v
        conditional, unconditional = jnp.split(v, 2)  # [2B,T,H,W,C] -> twice [B,T,H,W,C]
        return unconditional + scale * (conditional - unconditional)

    def decode(self, params: Params, latents: Array, bad: Array, cache: Any) -> tuple[Array, Array, Any]:
        assert self.decoder is not None
        frames, cache = self.decoder.decode(params, latents, cache, placement=self.placement)
        pixels, bad = self._replicated((to_pixels(frames), jnp.maximum(bad, nonfinite_share(frames))))
        return pixels, bad, cache

    def finalize(
        self,
        params: Params,
        text: Any,
        past: Any,
        history: Array,
        key: Array,
        index: Array,
        latents: Array,
        payload: Any,
    ) -> tuple[Any, Array]:
        cfg = self._cfg
        first = past.frames + jnp.arange(cfg.span.chunk) < cfg.span.sink
        if self.model.context_noise or self.model.sink_noise:
            key = jax.random.fold_in(draws.key_of(key), index)
            sigma = self._of_frames(first, lambda t: self.model.scheduler.noise_level(t) if t else 0.0)
            latents = add_noise(
                latents, sigma[None, :, None, None, None], jax.random.fold_in(key, len(self.solver) + 1)
            )
        sample = concatenated(payload, latents) if self._concatenates else latents
        history = self._net.remembered(cfg.span, history, sample, past.frames)
        sample = self._branches(sample)
        t = self._told(len(sample), first)
        past = self._net.extend(params, cfg.network, cfg.span, sample, t, text, past, **self._forward)
        return past, self._replicated(history)

    def reencode(self, params: Params, text: Any, past: Any, history: Array) -> Any:
        cfg, history = self._cfg, self._branches(history)
        t = self._told(len(history), jnp.arange(cfg.span.slots) < cfg.span.sink)
        return self._net.reencode(params, cfg.network, cfg.span, history, t, text, past, **self._forward)

    def _of_frames(self, first: Array, level: Callable[[float], float]) -> Array:
        """float32 [F]: the level at which frames are remembered; `first` bool [F]: which of them stay for ever."""
        ring, sink = self.model.context_noise, self.model.sink_noise
        return jnp.where(first, jnp.float32(level(ring if sink is None else sink)), jnp.float32(level(ring)))

    def _told(self, batch: int, first: Array) -> Array:
        """The timesteps of frames that are remembered: float32 [B], or [B,F] where they differ."""
        if self.model.sink_noise in (None, self.model.context_noise):
            return jnp.full(batch, self.model.context_noise, jnp.float32)
        return jnp.broadcast_to(self._of_frames(first, float), (batch, first.size))

    @property
    def _cfg(self) -> TransformerConfig:
        return self.model.transformer

    @property
    def _net(self) -> Rollout:
        """How the family of the network does it."""
        return models.rollout(self._cfg.network)

    @property
    def _forward(self) -> dict[str, Any]:
        """How the network computes."""
        cfg = self._cfg
        return dict(text_length=cfg.text_length, implementation=cfg.attention, placement=self.placement)

    @property
    def _concatenates(self) -> bool:
        """Whether what is encoded is further channels of the network's input."""
        return self._cfg.network.in_channels != self._cfg.network.out_channels

    def _branches(self, x: Array) -> Array:
        """x [B,...] for the prompts and, with guidance, once more for the negative prompt [2B,...]."""
        return jnp.concatenate([x, x]) if self._cfg.guided else x

    def _replicated(self, tree: Any) -> Any:
        return tree if self.placement is None else self.placement.replicate(tree)


def _rollout_keys(key: Array, batch: int) -> Array:
    """The key data uint32 [B,2] of `batch` rollouts: the first has the key itself, as if it were alone."""
    others = [jax.random.fold_in(key, number) for number in range(1, batch)]
    return jnp.stack([jax.random.key_data(one) for one in (key, *others)])  # B of [2] -> [B,2]
