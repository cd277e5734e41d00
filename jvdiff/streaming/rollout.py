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
and never writes it, so that its frames can be shown before `finalize` is waited for. `finalize` alone makes the chunk a
part of the past, and takes the memory of the cache it is given. A rollout that is saved, copied, or interleaved with
another goes on as if nothing had happened. Names are those of NVIDIA's flashdreams, without its hidden state.
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
from jvdiff.runtime import draws, run_state
from jvdiff.sharding import Placement
from jvdiff.streaming import guards
from jvdiff.streaming import programs as stream_programs
from jvdiff.streaming.codec import NullEncoder, StreamingVideoEncoder
from jvdiff.streaming.config import StreamInferencePipelineConfig
from jvdiff.streaming.programs import Programs
from jvdiff.streaming.state import Clock, FinalState, StreamCache
from jvdiff.types import Array, Params

# ----------------------------------------------------------------------------------------------------------- pipeline


@dataclass(frozen=True, eq=False)
class StreamInferencePipeline:
    """Functions of a configuration, bound to weights; see `StreamInferencePipelineConfig.setup`.

    config: what decides a rollout
    params: trees of the transformer, and of the text encoder and the VAE where they are needed
    tokenizer: for rollouts that are given prompts
    placement: mesh that the parameters are on; None is the default device
    """

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
            prompts: B of them.
            text: in their place rows [B or 2B,S,D], zeros beyond a prompt's end, S at most text_rows; with guidance
                those of the negative prompt follow.
            negative_prompt: what guidance leads away from.

        Raises:
            UsageError: `key` is neither a key nor a seed; prompts and text are both given, or neither is; a prompt is
                invalid, or there is no tokenizer for it; text has another shape, or more rows than text_rows; the mesh
                cannot divide the model.
            NumericsError: the text encoder made NaN or infinity.
        """
        key = self.config.diffusion_model.seed if key is None else key
        key = draws.key(check_seed(key)) if isinstance(key, int | np.integer) else key
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

        Args:
            prompts, text, negative_prompt: as of `initialize_cache`, of the same number of rollouts.
            reencode: the past goes through the network once more, as if it had been made under these prompts (as
                LongLive does at a change), and `cache` is used up. Otherwise both share their past, and the `finalize`
                of either takes it from the other: see `copy`.

        Raises:
            UsageError: a cache of another configuration, one that `finalize` was given, or one whose chunk is not
                finalized; another number of rollouts; and as `initialize_cache`.
            NumericsError: as `initialize_cache`.
        """
        guards.check_cache(self.config, cache)
        if cache.generated != cache.finalized:
            raise UsageError(f"chunk {int(cache.finalized)} is not finalized yet; change prompts after that.")
        keys = self._text(prompts, text, negative_prompt)
        if keys[0].shape != cache.text[0].shape:
            new, rollouts = (len(k[0][0]) // self._branches for k in (keys, cache.text))
            raise UsageError(f"there are {new} prompts; this cache is of {rollouts} rollouts.")
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
            what the VAE remembers; and what `finalize` needs. NaN or infinity raises nothing: see
            `FinalState.nonfinite`.

        Raises:
            UsageError: a cache of another configuration, or one that `finalize` was given; a chunk out of turn; an
                input that the encoder does not take.
        """
        i, config, programs = autoregressive_index, self.config, self.programs
        guards.check_generate(config, i, cache, input)
        clock = Clock(config.enable_sync_and_profile)
        payload, encoded, decoded = None, cache.encoder, cache.decoder
        if config.encoder is not None:
            payload, encoded = programs.encode(self._vae, self._everywhere(input), cache.encoder)
            guards.check_payload(config, payload, cache)
            clock.done("encode", payload)
        latents, bad = programs.diffuse(
            self.params["transformer"], cache.text, cache.past, cache.key, np.int32(i), payload
        )
        frames = latents
        clock.done("diffuse", latents)
        if config.decoder is not None:
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

        Raises:
            UsageError: a cache of another configuration, or one that `finalize` was given; a chunk out of turn; what
                `generate` made of another chunk, or of another number of rollouts.
        """
        i = autoregressive_index
        guards.check_finalize(self.config, i, cache, final)
        clock = Clock(self.config.enable_sync_and_profile, final.milliseconds)
        past, history = self.programs.finalize(
            self.params["transformer"], cache.text, cache.past, cache.history, cache.key, np.int32(i),
            final.latents, final.payload,
        )  # fmt: skip
        clock.done("finalize", past)
        after = dataclasses.replace(cache, finalized=np.int32(i + 1), past=past, history=history)
        return after, clock.statistics()

    def abstract_cache(self, batch: int, begun: bool = True) -> StreamCache:
        """The cache of `batch` rollouts as ShapeDtypeStructs, before the first chunk or (`begun`) after one."""
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
        state = jax.tree.map(jnp.array, dataclasses.replace(cache, generated=None, finalized=None))
        if self.placement is not None:
            places = self._past(self._branches)
            past = jax.tree.map(lambda x, place: jax.device_put(x, place.sharding), state.past, places)
            pictures = self.placement.spread(*cache.history.shape[2:4]).sharding
            encoder, decoder = jax.device_put((state.encoder, state.decoder), pictures)
            rest = self._everywhere(dataclasses.replace(state, past=None, encoder=None, decoder=None))
            state = dataclasses.replace(rest, past=past, encoder=encoder, decoder=decoder)
        return dataclasses.replace(state, generated=cache.generated, finalized=cache.finalized)

    def traced(self, cache: StreamCache, input: Any = None) -> Iterator[tuple[str, jax.stages.Traced]]:
        """(name, traced program) of all that rollouts like this one run. Once these are lowered and compiled,
        `generate` and `finalize` do not compile. `reencode` is not among them: few rollouts run it.

        Args:
            cache: of `initialize_cache`, or abstract.
            input: what the first chunk is given.
        """
        programs, network, payload, index = self.programs, self.params["transformer"], None, np.int32(0)
        if self.config.encoder is not None:
            encode = programs.encode.trace(self._vae, self._everywhere(input), None)
            yield "encode first", encode
            payload = self._placed(encode.out_info[0])
            if not isinstance(self.config.encoder, NullEncoder):
                memory = self._placed(encode.out_info[1], pictures=getattr(self.config.encoder, "mode", "") != "stamp")
                yield "encode next", programs.encode.trace(self._vae, self._next_input(input), memory)
        diffuse = programs.diffuse.trace(network, cache.text, cache.past, cache.key, index, payload)
        yield "diffuse", diffuse
        latents, bad = self._placed(diffuse.out_info)
        if self.config.decoder is not None:
            first = programs.decode.trace(self._vae, latents, bad, None)
            yield "decode first", first
            memory = self._placed(first.out_info[2], pictures=True)
            yield "decode next", programs.decode.trace(self._vae, latents, bad, memory)
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
        """Keys and values of the prompts, or of text rows [B or 2B,S,D]."""
        cfg = self.config.diffusion_model.transformer
        if (prompts is None) == (text is None):
            raise UsageError("give either prompts or text rows.")
        rows: Any = text if prompts is None else self._rows(prompts, negative_prompt)
        guards.check_text(cfg, rows)
        rows = rows[:, : cfg.text_rows]
        rows = jnp.pad(rows, ((0, 0), (0, cfg.text_rows - rows.shape[1]), (0, 0)))
        return self.programs.text_keys(self.params["transformer"], self._everywhere(rows))

    def _rows(self, prompts: Sequence[str], negative_prompt: str) -> Any:
        """Text rows [B,S,D] of the prompts; with guidance [2B,S,D], those of the negative prompt last."""
        if isinstance(prompts, str) or not prompts:
            raise UsageError(f"prompts are {prompts!r:.60}; expected a list of at least one.")
        if self.tokenizer is None:
            raise UsageError("this pipeline was set up without a tokenizer; give text rows in place of prompts.")
        texts = [check_prompt(prompt) for prompt in prompts]
        if self._branches == 2:
            texts += [negative_prompt] * len(texts)
        cfg, weights = self.config.diffusion_model.transformer, self.params["text_encoder"]
        rows = self._net.encode_texts(cfg.text_encoder, weights, self.tokenizer, texts, self.placement)
        if share := nonfinite(np.asarray(rows, np.float32)):
            raise NumericsError(
                f"text encoder: {share:.1%} of the numbers of its output ({rows.dtype}) are NaN or infinite."
            )
        return rows

    def _everywhere(self, tree: Any) -> Any:
        return tree if self.placement is None else jax.device_put(tree, self.placement.everywhere)

    def _placed(self, tree: Any, pictures: bool = False) -> Any:
        """Abstract values where they will be: on all devices, or divided among them as the VAE does."""
        if self.placement is None:
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
        cfg = self.config.diffusion_model.transformer
        where = self.placement.spread(cfg.height, cfg.width).sharding if pictures else self.placement.everywhere
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

    def _next_input(self, first: Any) -> Any:
        """What the encoder takes for chunk 1, abstract, where it takes `first` for chunk 0."""
        encoder = self.config.encoder
        if not isinstance(encoder, StreamingVideoEncoder):
            return None
        frames = encoder.get_input_temporal_size(self.config.diffusion_model.transformer.len_t, 1)
        return self._placed(jax.ShapeDtypeStruct((len(first), frames, *first.shape[2:]), first.dtype))

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
