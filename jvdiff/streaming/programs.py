"""The compiled functions of a streaming pipeline: each a pure function of weights, cache and input.

B rollouts · T latent frames of a chunk · H W latent grid · C latent channels
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jvdiff import models
from jvdiff.diffusion import add_noise, denoise_scan
from jvdiff.models.pixels import to_pixels
from jvdiff.sharding import Placement
from jvdiff.streaming.codec import Encoder, StreamingVideoDecoder, StreamingVideoEncoder, concatenated, stamped
from jvdiff.streaming.config import DiffusionModelConfig
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
    cfg, scheduler = model.transformer, model.scheduler
    span, network, guided = cfg.span, cfg.network, cfg.guided
    net = models.rollout(network)
    first = cfg.guidance_scale if cfg.first_guidance_scale is None else cfg.first_guidance_scale
    concatenates = network.in_channels != network.out_channels
    forward: Any = dict(text_length=cfg.text_length, implementation=cfg.attention, placement=placement)
    solver = scheduler.solver()
    level = scheduler.noise_level(model.context_noise) if model.context_noise else 0.0

    def replicated(tree: Any) -> Any:
        return tree if placement is None else placement.replicate(tree)

    def branches(x: Array) -> Array:  # the prompts', then the negative prompt's
        return jnp.concatenate([x, x]) if guided else x

    def flow(params: Params, text: Any, past: Any, payload: Any, scale: Array, x: Array, t: Array) -> Array:
        sample = branches(concatenated(payload, x) if concatenates else stamped(payload, x))
        v = net.chunk_velocity(params, network, span, sample, branches(t), text, past, **forward)
        if not guided:
            return v
        conditional, unconditional = jnp.split(v, 2)  # [2B,T,H,W,C] -> twice [B,T,H,W,C]
        return unconditional + scale * (conditional - unconditional)

    def diffuse(params: Params, text: Any, past: Any, key: Array, index: Array, payload: Any) -> tuple[Array, Array]:
        key = jax.random.fold_in(jax.random.wrap_key_data(key), index)
        batch = past.keys.shape[1] // (2 if guided else 1)
        shape = (batch, span.chunk, cfg.height, cfg.width, network.out_channels)
        keys = _rollout_keys(key, batch)  # [B,2]
        noise = jax.vmap(lambda one: jax.random.normal(jax.random.fold_in(one, 0), shape[1:], jnp.float32))(
            jax.random.wrap_key_data(keys)
        )  # [B] -> [B,T,H,W,C]
        state = solver.init(noise, keys)
        scale = jnp.where(index == 0, jnp.float32(first), jnp.float32(cfg.guidance_scale))
        latents = denoise_scan(Partial(flow, params, text, past, payload, scale), solver, replicated(state)).x
        if not concatenates:
            latents = stamped(payload, latents)
        return replicated((latents, _nonfinite(latents)))

    def finalize(
        params: Params,
        text: Any,
        past: Any,
        history: Array,
        key: Array,
        index: Array,
        latents: Array,
        payload: Any,
    ) -> tuple[Any, Array]:
        if level:
            key = jax.random.fold_in(jax.random.wrap_key_data(key), index)
            latents = add_noise(latents, level, jax.random.fold_in(key, len(solver) + 1))
        sample = concatenated(payload, latents) if concatenates else latents
        t = jnp.full(past.keys.shape[1], model.context_noise, jnp.float32)
        history = net.remembered(span, history, sample, past.frames)
        return net.extend(params, network, span, branches(sample), t, text, past, **forward), replicated(history)

    def reencode(params: Params, text: Any, past: Any, history: Array) -> Any:
        t = jnp.full(past.keys.shape[1], model.context_noise, jnp.float32)
        return net.reencode(params, network, span, branches(history), t, text, past, **forward)

    def decode(params: Params, latents: Array, bad: Array, cache: Any) -> tuple[Array, Array, Any]:
        assert decoder is not None
        frames, cache = decoder.decode(params, latents, cache, placement=placement)
        pixels, bad = replicated((to_pixels(frames), jnp.maximum(bad, _nonfinite(frames))))
        return pixels, bad, cache

    def encode(params: Params, input: Any, cache: Any) -> tuple[Any, Any]:
        assert encoder is not None
        payload, cache = encoder.encode(params, input, cache, latent_frames=span.chunk, placement=placement)
        if isinstance(encoder, StreamingVideoEncoder):
            payload = {"latent": payload}
        return replicated(payload), cache

    return Programs(
        text_keys=jax.jit(lambda params, rows: net.text_keys(params, network, rows, placement=placement)),
        encode=jax.jit(encode),
        diffuse=jax.jit(diffuse),
        decode=jax.jit(decode),
        finalize=jax.jit(finalize, donate_argnums=(2, 3)),
        reencode=jax.jit(reencode, donate_argnums=2),
    )


def _nonfinite(x: Array) -> Array:
    return jnp.mean(1.0 - jnp.isfinite(x).astype(jnp.float32))


def _rollout_keys(key: Array, batch: int) -> Array:
    """The key data uint32 [B,2] of that many rollouts: the first has the key itself, as if it were alone."""
    others = [jax.random.fold_in(key, number) for number in range(1, batch)]
    return jnp.stack([jax.random.key_data(one) for one in (key, *others)])
