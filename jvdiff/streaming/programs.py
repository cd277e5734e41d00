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

from jvdiff.diffusion import Solver, add_noise, denoise_scan
from jvdiff.errors import UsageError
from jvdiff.models.pixels import nonfinite_share, to_pixels
from jvdiff.runtime import draws
from jvdiff.runtime.target import here
from jvdiff.sharding import Placement
from jvdiff.streaming.config import DiffusionModelConfig
from jvdiff.streaming.contracts import Decoder, Encoder, Transformer
from jvdiff.types import Array, Params


class Programs(NamedTuple):
    """The jitted functions of a configuration, each of a component's weights and of what a rollout remembers.

    One program of each serves all chunks of a rollout; the VAE's first chunk has one more.

    text_keys: (network, rows, image embeddings) -> its keys and values
    encode: (weights, input, cache) -> (payload, cache)
    diffuse: (network, text, past, key, index, payload, batch=B) -> (latents, non-finite share)
    decode: (weights, latents, non-finite share, cache) -> (uint8 frames, non-finite share, cache)
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
    decoder: Decoder | None,
    placement: Placement | None,
) -> Programs:
    """The compiled functions of a configuration on a mesh (None: one device)."""
    solver = model.scheduler.setup()
    if not isinstance(solver, Solver):
        name = type(model.scheduler).__name__
        raise UsageError(f"{name}.setup gives {solver!r:.60}; expected a jvdiff.diffusion.Solver.")
    functions = _Functions(model, encoder, decoder, placement, solver)
    options = (placement.target if placement else here()).options
    return Programs(
        text_keys=jax.jit(functions.text_keys),
        encode=jax.jit(functions.encode),
        diffuse=jax.jit(functions.diffuse, static_argnames="batch", compiler_options=options),
        decode=jax.jit(functions.decode),
        finalize=jax.jit(functions.finalize, donate_argnums=(2, 3), compiler_options=options),
        reencode=jax.jit(functions.reencode, donate_argnums=2, compiler_options=options),
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
    decoder: Decoder | None
    placement: Placement | None
    solver: Solver

    def text_keys(self, params: Params, rows: Array, image: Array | None) -> Any:
        return self._transformer.text_keys(params, rows, image, placement=self.placement)

    def encode(self, params: Any, input: Any, cache: Any) -> tuple[Any, Any]:
        assert self.encoder is not None
        frames, placement = self._transformer.latent_shape[0], self.placement
        payload, cache = self.encoder.encode(params, input, cache, latent_frames=frames, placement=placement)
        return self._replicated(payload), self._held(self.encoder, cache)

    def diffuse(
        self, params: Params, text: Any, past: Any, key: Array, index: Array, payload: Any, *, batch: int
    ) -> tuple[Array, Array]:
        key = jax.random.fold_in(draws.key_of(key), index)
        shape = self._transformer.latent_shape
        keys = _rollout_keys(key, batch)  # [B,2]
        noise = jax.vmap(lambda one: draws.normal(jax.random.fold_in(one, 0), shape))(
            draws.key_of(keys)
        )  # [B] -> [B,T,H,W,C]
        state = self._replicated(self.solver.init(noise, keys))
        latents = denoise_scan(Partial(self._flow, params, text, past, payload, index), self.solver, state).x
        clean = self._transformer.postprocess_clean_latent(latents, past, payload)
        _expect(self._transformer, "postprocess_clean_latent", clean, latents)
        return self._replicated((clean, nonfinite_share(clean)))

    def _flow(self, params: Params, text: Any, past: Any, payload: Any, index: Array, x: Array, t: Array) -> Array:
        """The velocity of x [B,T,H,W,C] at t [B]."""
        how = dict(text=text, autoregressive_index=index, placement=self.placement)
        v = self._transformer.predict_flow(params, x, t, past, payload, **how).astype(jnp.float32)
        _expect(self._transformer, "predict_flow", v, x)
        return v

    def decode(self, params: Any, latents: Array, bad: Array, cache: Any) -> tuple[Array, Array, Any]:
        assert self.decoder is not None
        frames, cache = self.decoder.decode(params, latents, cache, placement=self.placement)
        if frames.ndim != 5 or frames.shape[0] != len(latents) or frames.shape[-1] != 3:
            name = type(self.decoder).__name__
            raise UsageError(f"{name}.decode gives {list(frames.shape)}; expected frames [{len(latents)},F,Y,X,3].")
        pixels, bad = self._replicated((to_pixels(frames), jnp.maximum(bad, nonfinite_share(frames))))
        return pixels, bad, self._held(self.decoder, cache)

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
        first = index * len(latents[0]) + jnp.arange(len(latents[0])) < self._sink
        if self.model.context_noise or self.model.sink_noise:
            key = jax.random.fold_in(draws.key_of(key), index)
            sigma = self._of_frames(first, lambda t: self.model.scheduler.noise_level(t) if t else 0.0)
            latents = add_noise(
                latents, sigma[None, :, None, None, None], jax.random.fold_in(key, len(self.solver) + 1)
            )
        if history is not None:
            history = self._transformer.remember(history, latents, past, payload)
        t, how = self._told(len(latents), first), dict(autoregressive_index=index, placement=self.placement)
        after = self._transformer.finalize_kv_cache(params, latents, t, past, payload, text=text, **how)
        _expect(self._transformer, "finalize_kv_cache", after, past)
        return after, self._replicated(history)

    def reencode(self, params: Params, text: Any, past: Any, history: Any) -> Any:
        batch, slots = jax.tree.leaves(history)[0].shape[:2]
        t = self._told(batch, jnp.arange(slots) < self._sink)
        return self._transformer.reencode(params, history, t, past, text=text, placement=self.placement)

    @property
    def _sink(self) -> int:
        """How many of the video's first latent frames are never dropped from the cache."""
        return getattr(self._transformer, "sink_size_t", 0)

    def _of_frames(self, first: Array, level: Callable[[float], float]) -> Array:
        """float32 [F]: the level at which frames are remembered; `first` bool [F]: which of them stay for ever."""
        ring, sink = self.model.context_noise, self.model.sink_noise
        return jnp.where(first, jnp.float32(level(ring if sink is None else sink)), jnp.float32(level(ring)))

    def _told(self, batch: int, first: Array) -> Array:
        """The timesteps of frames that are remembered: float32 [B], or [B,F] where they differ."""
        if not self._sink or self.model.sink_noise in (None, self.model.context_noise):
            return jnp.full(batch, self.model.context_noise, jnp.float32)
        return jnp.broadcast_to(self._of_frames(first, float), (batch, first.size))

    @property
    def _transformer(self) -> Any:
        return self.model.transformer

    def _held(self, component: Any, cache: Any) -> Any:
        """What a component remembers, on every device unless it is divided."""
        return cache if getattr(component, "divided", False) else self._replicated(cache)

    def _replicated(self, tree: Any) -> Any:
        return tree if self.placement is None else self.placement.replicate(tree)


def _expect(transformer: Transformer, method: str, found: Any, like: Any) -> None:
    """Raises UsageError unless a transformer's method gives arrays of the shapes and dtypes that it was given."""
    describe = lambda tree: jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", tree)  # noqa: E731
    if describe(found) != describe(like):
        raise UsageError(
            f"{type(transformer).__name__}.{method} gives {describe(found)!s:.200}; expected {describe(like)!s:.200}, "
            "as it was given."
        )


def _rollout_keys(key: Array, batch: int) -> Array:
    """The key data uint32 [B,2] of `batch` rollouts: the first has the key itself, as if it were alone."""
    others = [jax.random.fold_in(key, number) for number in range(1, batch)]
    return jnp.stack([jax.random.key_data(one) for one in (key, *others)])  # B of [2] -> [B,2]
