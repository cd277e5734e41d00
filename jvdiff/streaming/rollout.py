"""Video without end: chunks of latent frames, each made from those before it, and a cache that is all the state.

    B rollouts · T latent frames of a chunk · H W latent grid · C latent channels · S text tokens · F pixel frames ·
    Y X pixel height, width

    model  = DiffusionModelConfig(TransformerConfig(...), FlowMatchSchedulerConfig())
    cfg    = StreamInferencePipelineConfig("mine", model, decoder=StreamingVideoDecoder(...))
    cfg    = derive_config(cfg, diffusion_model=dict(scheduler=dict(shift=5.0)))
    pipe   = cfg.setup(params, tokenizer)                        # or pipe = streaming.load("checkpoints/digits-stream")
    cache  = pipe.initialize_cache(jax.random.key(0), prompts=["a red seven moving left"])
    for i in range(chunks):
        frames, cache, final = pipe.generate(i, cache)
        cache, stats = pipe.finalize(i, cache, final)

Configurations are frozen values; a pipeline binds them to parameters and remembers nothing. `generate` reads the cache
and never writes it, so that its frames can be shown before `finalize` is waited for; `finalize` alone makes the chunk a
part of the past, and takes the memory of the cache it is given. A rollout that is saved, copied, or interleaved with
another goes on as if nothing had happened. Names as in NVIDIA's flashdreams, whose hidden state this does not have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvdiff import models
from jvdiff.errors import NumericsError, UsageError
from jvdiff.models.text.tokenizer import check_prompt
from jvdiff.pipeline.settings import check_seed
from jvdiff.pipeline.stages import nonfinite
from jvdiff.runtime import run_state
from jvdiff.sharding import Placement
from jvdiff.streaming import programs as stream_programs
from jvdiff.streaming.codec import NullEncoder, StreamingVideoEncoder
from jvdiff.streaming.config import StreamInferencePipelineConfig
from jvdiff.streaming.programs import Programs
from jvdiff.streaming.state import Clock, FinalState, StreamCache
from jvdiff.types import Array, Params

# ----------------------------------------------------------------------------------------------------------- pipeline


@dataclass(frozen=True, eq=False)
class StreamInferencePipeline:
    """Functions of a configuration, bound to weights; see `StreamInferencePipelineConfig.setup`."""

    config: StreamInferencePipelineConfig
    params: Mapping[str, Params]
    tokenizer: Any = None
    placement: Placement | None = None

    @property
    def programs(self) -> Programs:
        """The compiled functions, shared by all pipelines of the same configuration and mesh."""
        model = dataclasses.replace(self.config.diffusion_model, seed=0)
        return stream_programs.programs(model, self.config.encoder, self.config.decoder, self.placement)

    def initialize_cache(
        self,
        key: Array | int | None = None,
        prompts: Sequence[str] | None = None,
        *,
        text: Array | None = None,
        negative_prompt: str = "",
    ) -> StreamCache:
        """The state of B rollouts that have not begun.

        Args:
            key: a key of jax.random, or a seed; None: the configuration's seed.
            prompts: B of them. text: in their place rows [B or 2B,S,D], zeros beyond a prompt's end, S at most
                text_rows; with guidance those of the negative prompt follow.
            negative_prompt: what guidance leads away from.
        """
        key = self.config.diffusion_model.seed if key is None else key
        key = jax.random.key(np.uint32(check_seed(key))) if isinstance(key, int | np.integer) else key
        data: Any = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
        if data.shape != (2,) or data.dtype != jnp.uint32:
            raise UsageError(f"key is {key.dtype}{list(key.shape)}; expected one key of jax.random.key, or a seed.")
        keys = self._text(prompts, text, negative_prompt)
        branches = len(keys[0][0])
        cfg, past = self.config.diffusion_model.transformer, self._past(branches)
        shape = (branches // self._branches, cfg.span.slots, cfg.height, cfg.width, cfg.network.in_channels)
        zero = np.zeros((), np.int32)
        data, history = self._everywhere((jnp.array(data), jnp.zeros(shape, jnp.float32)))
        return StreamCache(zero, zero, data, keys, past, history, None, None, self.config.digest)

    def set_prompts(
        self,
        cache: StreamCache,
        prompts: Sequence[str] | None = None,
        *,
        text: Array | None = None,
        negative_prompt: str = "",
        reencode: bool = False,
    ) -> StreamCache:
        """The same rollouts under other prompts from the next chunk on; between `finalize` and `generate`.

        reencode: what is kept of the past goes through the network once more, as if it had been made under these
        prompts (as LongLive does at a change); `cache` is used up then. Otherwise both share their past, and the
        `finalize` of either takes it from the other: see `copy`.
        """
        self._check(cache)
        if cache.generated != cache.finalized:
            raise UsageError(f"chunk {int(cache.finalized)} is not finalized yet; change prompts after that.")
        keys = self._text(prompts, text, negative_prompt)
        if keys[0].shape != cache.text[0].shape:
            found, wanted = (len(k[0][0]) // self._branches for k in (keys, cache.text))
            raise UsageError(f"there are {found} prompts; this cache is of {wanted} rollouts.")
        past = cache.past
        if reencode:
            past = self.programs.reencode(self.params["transformer"], keys, past, cache.history)
        return dataclasses.replace(cache, text=keys, past=past)

    def generate(
        self, autoregressive_index: int, cache: StreamCache, input: Any = None
    ) -> tuple[Array, StreamCache, FinalState]:
        """Makes the chunk of this number, which must follow the last one that was finalized.

        Args:
            cache: stays as it is, and may be used again.
            input: what the encoder takes (see `jvdiff.streaming.codec`); None without an encoder.

        Returns:
            (frames, cache, final): uint8 [B,F,Y,X,3], or latents float32 [B,T,H,W,C] without a decoder; the state with
            what the VAE remembers; and what `finalize` needs.
        """
        self._check(cache)
        i, finalized = int(cache.generated), int(cache.finalized)
        if i != finalized:
            raise UsageError(f"chunk {finalized} was generated and is not finalized; finalize it before the next one.")
        if i != autoregressive_index:
            raise UsageError(
                f"generate was called for chunk {autoregressive_index}; expected {i}: chunks are made one by one."
            )
        encoder, decoder, programs = self.config.encoder, self.config.decoder, self.programs
        if input is not None and encoder is None:
            raise UsageError("generate was given an input, and this configuration has no encoder; leave it out.")
        self._check_input(input, cache)
        clock = Clock(self.config.enable_sync_and_profile)
        payload, encoded, decoded = None, cache.encoder, cache.decoder
        if encoder is not None:
            payload, encoded = programs.encode(self._vae, self._everywhere(input), cache.encoder)
            self._check_payload(payload, cache)
            clock.done("encode", payload)
        latents, bad = programs.diffuse(
            self.params["transformer"], cache.text, cache.past, cache.key, np.int32(i), payload
        )
        frames = latents
        clock.done("diffuse", latents)
        if decoder is not None:
            frames, bad, decoded = programs.decode(self._vae, latents, bad, cache.decoder)
            clock.done("decode", frames)
        after = dataclasses.replace(cache, generated=np.int32(i + 1), encoder=encoded, decoder=decoded)
        return frames, after, FinalState(latents, payload, bad, i, tuple(clock.milliseconds))

    def finalize(
        self, autoregressive_index: int, cache: StreamCache, final: FinalState
    ) -> tuple[StreamCache, dict[str, float]]:
        """Makes the chunk a part of the past. The last one of a rollout need not be.

        Args:
            cache: of `generate`; its memory is taken, so use the one that is returned from here on.
            final: of the same `generate`.

        Returns:
            (cache, statistics): where time is taken encode_ms, diffuse_ms, decode_ms, finalize_ms, total_ms,
            total_ms_wo_finalize and, where the device tells, mem_alloc_gib and mem_peak_gib; else {}.
        """
        self._check(cache)
        i, generated = int(cache.finalized), int(cache.generated)
        if i == generated:
            raise UsageError(
                f"finalize was called for chunk {autoregressive_index}, and all {i} chunks that were generated are "
                "finalized."
            )
        if i != autoregressive_index:
            raise UsageError(f"finalize was called for chunk {autoregressive_index}; expected {i}, the last generated.")
        if final.autoregressive_index != i:
            raise UsageError(f"finalize({i}) was given what generate({final.autoregressive_index}) made.")
        if final.latents.shape != (shape := self._chunk_shape(cache)):
            raise UsageError(
                f"finalize({i}) was given a chunk of latents {list(final.latents.shape)}; expected {list(shape)}."
            )
        clock = Clock(self.config.enable_sync_and_profile, final.milliseconds)
        past, history = self.programs.finalize(
            self.params["transformer"], cache.text, cache.past, cache.history, cache.key, np.int32(i), final.latents,
            final.payload,
        )  # fmt: skip
        clock.done("finalize", past)
        after = dataclasses.replace(cache, finalized=np.int32(i + 1), past=past, history=history)
        return after, clock.statistics()

    def abstract_cache(self, batch: int, begun: bool = True) -> StreamCache:
        """The cache of so many rollouts as ShapeDtypeStructs, before the first chunk or (`begun`) after one."""
        cfg, struct = self.config.diffusion_model.transformer, jax.ShapeDtypeStruct
        branches, grid = batch * self._branches, (cfg.height, cfg.width)
        network, programs = self.params["transformer"], self.programs
        rows = struct((branches, cfg.text_rows, cfg.network.text_dim), jnp.float32)
        text = jax.eval_shape(programs.text_keys, network, rows)
        past = jax.eval_shape(lambda: self._past(branches))
        history = struct((batch, cfg.span.slots, *grid, cfg.network.in_channels), jnp.float32)
        number, key = struct((), np.int32), struct((2,), jnp.uint32)
        encoder = decoder = None
        if begun and self.config.encoder is not None:
            encoder = jax.eval_shape(programs.encode, self._vae, self._abstract_input(batch), None)[1]
        if begun and self.config.decoder is not None:
            latents = struct((batch, cfg.len_t, *grid, cfg.network.out_channels), jnp.float32)
            decoder = jax.eval_shape(programs.decode, self._vae, latents, struct((), jnp.float32), None)[2]
        return StreamCache(number, number, key, text, past, history, encoder, decoder, self.config.digest)

    def restore_cache(self, arrays: Mapping[str, Any]) -> StreamCache:
        """The state of one rollout, after a chunk, from what `run_state.flatten` made of it.

        Raises:
            CheckpointError: it is of another configuration.
        """
        cache = run_state.unflatten(self.abstract_cache(1), arrays)
        held = jax.tree.map(jnp.array, dataclasses.replace(cache, generated=None, finalized=None))
        if self.placement is not None:
            past = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), held.past, self._past(self._branches))
            pictures = self.placement.spread(*cache.history.shape[2:4]).sharding
            encoder, decoder = jax.device_put((held.encoder, held.decoder), pictures)
            rest = self._everywhere(dataclasses.replace(held, past=None, encoder=None, decoder=None))
            held = dataclasses.replace(rest, past=past, encoder=encoder, decoder=decoder)
        return dataclasses.replace(held, generated=cache.generated, finalized=cache.finalized)

    def traced(self, cache: StreamCache, input: Any = None) -> Iterator[tuple[str, jax.stages.Traced]]:
        """(name, traced program) of all that rollouts like this one run. Once these are lowered and compiled,
        `generate` and `finalize` do not compile.

        Args:
            cache: of `initialize_cache`, or abstract. input: what the first chunk is given.
        """
        programs, network, payload, index = self.programs, self.params["transformer"], None, np.int32(0)
        if self.config.encoder is not None:
            encode = programs.encode.trace(self._vae, self._everywhere(input), None)
            yield "encode first", encode
            payload = self._placed(encode.out_info[0])
        diffuse = programs.diffuse.trace(network, cache.text, cache.past, cache.key, index, payload)
        yield "diffuse", diffuse
        latents, bad = self._placed(diffuse.out_info)
        if self.config.decoder is not None:
            first = programs.decode.trace(self._vae, latents, bad, None)
            yield "decode first", first
            held = self._placed(first.out_info[2], pictures=True)
            yield "decode next", programs.decode.trace(self._vae, latents, bad, held)
        arguments = (cache.text, cache.past, cache.history, cache.key, index, latents, payload)
        yield "finalize", programs.finalize.trace(network, *arguments)

    def compile(self, cache: StreamCache, input: Any = None) -> Iterator[tuple[str, jax.stages.Compiled]]:
        """Compiles the programs of `traced`, and yields each with its name."""
        for name, program in self.traced(cache, input):
            yield name, program.lower().compile()

    # ----- parts

    @property
    def _branches(self) -> int:
        """How many batches guidance makes of one."""
        return 1 + self.config.diffusion_model.transformer.guided

    @property
    def _net(self) -> Any:
        """How the family of the network does it."""
        return models.rollout(self.config.diffusion_model.transformer.network)

    @property
    def _vae(self) -> Any:
        return self.params.get("vae")

    def _past(self, branches: int) -> Any:
        cfg = self.config.diffusion_model.transformer
        dtype = self._net.dtype_of(self.params["transformer"])
        grid = cfg.height, cfg.width
        return self._net.init_kv_cache(cfg.network, cfg.span, branches, grid, dtype, placement=self.placement)

    def _text(self, prompts: Sequence[str] | None, text: Array | None, negative_prompt: str) -> Any:
        cfg = self.config.diffusion_model.transformer
        if (prompts is None) == (text is None):
            raise UsageError("give either prompts or text rows.")
        if prompts is not None:
            if isinstance(prompts, str) or not prompts:
                raise UsageError(f"prompts are {prompts!r:.60}; expected a list of at least one.")
            if self.tokenizer is None:
                raise UsageError("this pipeline was set up without a tokenizer; give text rows in place of prompts.")
            texts = [check_prompt(prompt) for prompt in prompts]
            if self._branches == 2:
                texts += [negative_prompt] * len(texts)
            weights = self.params["text_encoder"]
            rows: Any = self._net.encode_texts(cfg.text_encoder, weights, self.tokenizer, texts, self.placement)
            if share := nonfinite(np.asarray(rows, np.float32)):
                raise NumericsError(f"text encoder: {share:.1%} of its output ({rows.dtype}) is NaN or infinite.")
            text = rows
        assert text is not None
        if text.ndim != 3 or len(text) % self._branches or text.shape[2] != cfg.network.text_dim:
            raise UsageError(
                f"text is {list(text.shape)}; expected "
                f"[{'2B' if self._branches == 2 else 'B'},S,{cfg.network.text_dim}]."
            )
        if text.shape[1] > cfg.text_rows:
            if np.asarray(text[:, cfg.text_rows :]).any():
                raise UsageError(f"a prompt has more than {cfg.text_rows} tokens, which is text_rows; shorten it.")
            text = text[:, : cfg.text_rows]
        text = jnp.pad(text, ((0, 0), (0, cfg.text_rows - text.shape[1]), (0, 0)))
        return self.programs.text_keys(self.params["transformer"], self._everywhere(text))

    def _check(self, cache: StreamCache) -> None:
        """That `cache` is of this configuration, and alive."""
        if cache.config != self.config.digest:
            raise UsageError(
                f"this cache is of another configuration ({cache.config}); expected one of {self.config.digest}, "
                f"{self.config.name}. Make it with initialize_cache of the same pipeline."
            )
        if any(x.is_deleted() for x in jax.tree.leaves(cache.past) if isinstance(x, jax.Array)):
            raise UsageError(
                "this cache was given to finalize, which took its memory; use the one that finalize returned, and "
                "streaming.copy(cache) beforehand where a rollout is to go on in two ways."
            )

    def _chunk_shape(self, cache: StreamCache) -> tuple[int, ...]:
        """(B,T,H,W,C) of the latents of a chunk."""
        cfg = self.config.diffusion_model.transformer
        return (len(cache.history), cfg.len_t, cfg.height, cfg.width, cfg.network.out_channels)

    def _check_input(self, given: Any, cache: StreamCache) -> None:
        """That a picture or video is of the size of the frames; what else it must be, its encoder says."""
        encoder, cfg = self.config.encoder, self.config.diffusion_model.transformer
        if given is None or encoder is None or isinstance(encoder, NullEncoder):
            return
        ratio, found = encoder.spatial_compression_ratio, np.shape(given)
        size = (cfg.height * ratio, cfg.width * ratio)
        if len(found) >= 4 and (found[0], *found[-3:-1]) != (len(cache.history), *size):
            wanted = f"[{len(cache.history)},...,{size[0]},{size[1]},3]"
            raise UsageError(f"the input is {list(found)}; expected {wanted}, as many pixels as the frames have.")

    def _check_payload(self, payload: Any, cache: StreamCache) -> None:
        shape = self._chunk_shape(cache)
        latent = payload["latent"] if isinstance(payload, Mapping) and "latent" in payload else None
        if latent is None or latent.shape != shape:
            found = "no latent" if latent is None else f"latents {list(latent.shape)}"
            raise UsageError(f"the encoder gives {found}; chunks of these rollouts are {list(shape)}.")

    def _everywhere(self, tree: Any) -> Any:
        return tree if self.placement is None else jax.device_put(tree, self.placement.everywhere)

    def _placed(self, tree: Any, pictures: bool = False) -> Any:
        """Abstract values where they will be: on all devices, or divided among them as the VAE does."""
        if self.placement is None:
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
        cfg = self.config.diffusion_model.transformer
        where = self.placement.spread(cfg.height, cfg.width).sharding if pictures else self.placement.everywhere
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

    def _abstract_input(self, batch: int) -> Any:
        encoder, cfg = self.config.encoder, self.config.diffusion_model.transformer
        if isinstance(encoder, NullEncoder) or encoder is None:
            return {}
        ratio = encoder.spatial_compression_ratio
        frames = encoder.get_input_temporal_size(cfg.len_t, 0)
        shape = (batch, cfg.height * ratio, cfg.width * ratio, 3)
        if isinstance(encoder, StreamingVideoEncoder):
            shape = (batch, frames, *shape[1:])
        return jax.ShapeDtypeStruct(shape, jnp.uint8)
