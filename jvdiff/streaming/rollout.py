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

from jvdiff.errors import NumericsError, UsageError
from jvdiff.pipeline.stages import nonfinite
from jvdiff.runtime import profiling, run_state
from jvdiff.sharding import Placement
from jvdiff.streaming import guards
from jvdiff.streaming import programs as stream_programs
from jvdiff.streaming.config import StreamInferencePipelineConfig
from jvdiff.streaming.contracts import Reencoding, lacking
from jvdiff.streaming.programs import Programs
from jvdiff.streaming.state import Clock, FinalState, StreamCache
from jvdiff.types import Array, Params

# ----------------------------------------------------------------------------------------------------------- pipeline


@dataclass(frozen=True, eq=False)
class StreamInferencePipeline:
    """Functions of a configuration, bound to weights; see `StreamInferencePipelineConfig.setup`.

    config: what decides a rollout
    params: trees of the transformer, and of the text encoder and the VAE where they are needed; those that components
        name as their `part`
    tokenizer: for rollouts that are given prompts
    placement: mesh that the parameters are on; None is the default device
    """

    config: StreamInferencePipelineConfig
    params: Mapping[str, Params]
    tokenizer: Any = None
    placement: Placement | None = None

    def __post_init__(self):
        if not isinstance(self.params, Mapping):
            raise UsageError(f"params are {self.params!r:.60}; expected trees of weights by name.")
        for name, component in self._compiled.items():
            if component is not None and component.part is not None and component.part not in self.params:
                raise UsageError(
                    f"{name}: {type(component).__name__} takes the weights {component.part!r}, and there are "
                    f"{', '.join(self.params) or 'none'}; give them to setup, or as weights= to load."
                )

    @property
    def _compiled(self) -> dict[str, Any]:
        """The components whose methods are compiled with their weights."""
        config = self.config
        return {"transformer": self._transformer, "encoder": config.encoder, "decoder": config.decoder}

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
        image: Array | None = None,
        negative_prompt: str = "",
    ) -> StreamCache:
        """The state of B rollouts that have not begun.

        Args:
            key: a key of jax.random, or a seed; None: the configuration's seed.
            prompts: B of them.
            text: in their place rows [B or 2B,S,D], zeros beyond a prompt's end, S at most text_rows; with guidance
                those of the negative prompt follow.
            image: embeddings [B,...] that travel beside the text, for a transformer that takes them (`image_shape`).
            negative_prompt: what guidance leads away from.

        Raises:
            UsageError: `key` is neither a key nor a seed; prompts and text are both given, or neither is; a prompt is
                invalid, or the repository has no tokenizer; the shape of text or image does not fit; text has more
                than `text_rows` rows; the mesh cannot divide the model.
            NumericsError: the text encoder made NaN or infinity.
        """
        data = guards.check_key(self.config.diffusion_model.seed if key is None else key)
        rows = self._rows(prompts, text, negative_prompt)
        batch, zero, config = len(rows) // self._branches, np.zeros((), np.int32), self.config
        keys, image = self._text_keys(rows, image, batch)
        past, history = self._past(batch), self._transformer.initialize_history(batch) if self._reencodes else None
        data, history = self._everywhere((jnp.array(data), history))
        encoder, decoder = self._begun(config.encoder), self._begun(config.decoder)
        return StreamCache(zero, zero, data, keys, image, past, history, encoder, decoder, batch, config.digest)

    def set_prompts(
        self,
        cache: StreamCache,
        prompts: Sequence[str] | None = None,
        *,
        text: Array | None = None,
        image: Array | None = None,
        negative_prompt: str = "",
        reencode: bool = False,
    ) -> StreamCache:
        """The same rollouts under other prompts from the next chunk on; between `finalize` and `generate`.

        Args:
            prompts, text, negative_prompt: as of `initialize_cache`, of the same number of rollouts.
            image: as of `initialize_cache`; None: as it was.
            reencode: the past goes through the network once more, as if it had been made under these prompts (as
                LongLive does at a change), and `cache` is used up. Otherwise both share their past, and the `finalize`
                of either takes it from the other: see `copy`.

        Raises:
            UsageError: a cache of another configuration, one that `finalize` was given, or one whose chunk is not
                finalized; another number of rollouts; a transformer that does not re-encode; and as
                `initialize_cache`.
            NumericsError: as `initialize_cache`.
        """
        guards.check_cache(self.config, cache)
        if cache.generated != cache.finalized:
            raise UsageError(f"chunk {int(cache.finalized)} is not finalized yet; change prompts after that.")
        if reencode and not self._reencodes:
            missing = ", ".join(lacking(type(self._transformer), Reencoding))
            raise UsageError(f"{type(self._transformer).__name__} does not re-encode its past: it lacks {missing}.")
        rows = self._rows(prompts, text, negative_prompt)
        if (new := len(rows) // self._branches) != cache.rollouts:
            raise UsageError(f"there are {new} prompts; this cache is of {cache.rollouts} rollouts.")
        keys, image = self._text_keys(rows, cache.image if image is None else image, cache.rollouts)
        past = cache.past
        if reencode:
            past = self.programs.reencode(self._weights(self._transformer), keys, past, cache.history)
        return dataclasses.replace(cache, text=keys, image=image, past=past)

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
            weights = self._weights(config.encoder)
            with profiling.stage("encode"):
                payload, encoded = programs.encode(weights, self._everywhere(input), cache.encoder)
            clock.done("encode", payload)
        weights = self._weights(self._transformer)
        with profiling.stage("diffuse"):
            latents, bad = programs.diffuse(
                weights, cache.text, cache.past, cache.key, np.int32(i), payload, batch=cache.rollouts
            )
        frames = latents
        clock.done("diffuse", latents)
        if config.decoder is not None:
            with profiling.stage("decode"):
                frames, bad, decoded = programs.decode(self._weights(config.decoder), latents, bad, cache.decoder)
            clock.done("decode", frames)
        after = dataclasses.replace(cache, generated=np.int32(i + 1), encoder=encoded, decoder=decoded)
        return frames, after, FinalState(latents, payload, bad, int(i), tuple(clock.milliseconds))

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
        with profiling.stage("finalize"):
            past, history = self.programs.finalize(
                self._weights(self._transformer), cache.text, cache.past, cache.history, cache.key, np.int32(i),
                final.latents, final.payload,
            )  # fmt: skip
        clock.done("finalize", past)
        after = dataclasses.replace(cache, finalized=np.int32(i + 1), past=past, history=history)
        return after, clock.statistics()

    def abstract_cache(self, batch: int, begun: bool = True) -> StreamCache:
        """The cache of `batch` rollouts as ShapeDtypeStructs, before the first chunk or (`begun`) after one."""
        if not isinstance(batch, int) or batch < 1:
            raise UsageError(f"batch is {batch!r:.60}; expected how many rollouts, at least 1.")
        config, transformer, struct = self.config, self._transformer, jax.ShapeDtypeStruct
        network, programs = self._weights(transformer), self.programs
        number, key = struct((), np.int32), struct((2,), jnp.uint32)
        rows = struct((batch * self._branches, *transformer.text_shape), jnp.float32)
        image = transformer.image_shape and struct((batch, *transformer.image_shape), jnp.float32)
        text = jax.eval_shape(programs.text_keys, network, rows, image)
        past = jax.eval_shape(lambda: self._past(batch))
        history = jax.eval_shape(lambda: transformer.initialize_history(batch)) if self._reencodes else None
        encoder, decoder = (jax.eval_shape(lambda c=c: self._begun(c)) for c in (config.encoder, config.decoder))
        if begun and config.encoder is not None:
            given = config.encoder.abstract_input(batch, transformer.latent_shape, 0)
            encoder = jax.eval_shape(programs.encode, self._weights(config.encoder), given, encoder)[1]
        if begun and config.decoder is not None:
            latents = struct((batch, *transformer.latent_shape), jnp.float32)
            weights = self._weights(config.decoder)
            decoder = jax.eval_shape(programs.decode, weights, latents, struct((), jnp.float32), decoder)[2]
        return StreamCache(number, number, key, text, image, past, history, encoder, decoder, batch, config.digest)

    def restore_cache(self, arrays: Mapping[str, Any]) -> StreamCache:
        """The state of one rollout, after a chunk, from what `run_state.flatten` made of it.

        Raises:
            CheckpointError: it is of another configuration.
            UsageError: no arrays by name.
        """
        if not isinstance(arrays, Mapping):
            raise UsageError(f"arrays are {arrays!r:.60}; expected those of run_state.load, by name.")
        cache = run_state.unflatten(self.abstract_cache(1), arrays)
        state = jax.tree.map(jnp.array, dataclasses.replace(cache, generated=None, finalized=None))
        if self.placement is not None:
            places = self._past(1)
            past = jax.tree.map(lambda x, place: jax.device_put(x, place.sharding), state.past, places)
            encoder, decoder = (
                self._held(self.config.encoder, state.encoder),
                self._held(self.config.decoder, state.decoder),
            )
            rest = self._everywhere(dataclasses.replace(state, past=None, encoder=None, decoder=None))
            state = dataclasses.replace(rest, past=past, encoder=encoder, decoder=decoder)
        return dataclasses.replace(state, generated=cache.generated, finalized=cache.finalized)

    def traced(self, cache: StreamCache, input: Any = None) -> Iterator[tuple[str, jax.stages.Traced]]:
        """(name, traced program) of all that rollouts like this one run. Once these are lowered and compiled,
        `generate` and `finalize` do not compile. `reencode` is not among them: few rollouts run it.

        Args:
            cache: of `initialize_cache`, or abstract.
            input: what the first chunk is given, or the like of it (`abstract_input` of the encoder).
        """
        guards.check_cache(self.config, cache)
        config, programs, payload, index = self.config, self.programs, None, np.int32(0)
        network = self._weights(self._transformer)
        if (encoder := config.encoder) is not None:
            weights = self._weights(encoder)
            begin = self._begun(encoder)
            encode = programs.encode.trace(weights, self._placed(input), begin)
            yield "encode first", encode
            payload = self._placed(encode.out_info[0])
            if jax.tree.leaves(encode.out_info[1]):  # with nothing to remember there is one program for all chunks
                following = self._placed(encoder.abstract_input(cache.rollouts, self._transformer.latent_shape, 1))
                memory = self._placed(encode.out_info[1], encoder)
                if (following, memory) != (self._placed(input), self._placed(begin, encoder)):
                    yield "encode next", programs.encode.trace(weights, following, memory)
        diffuse = programs.diffuse.trace(
            network, cache.text, cache.past, cache.key, index, payload, batch=cache.rollouts
        )
        yield "diffuse", diffuse
        latents, bad = self._placed(diffuse.out_info)
        if (decoder := config.decoder) is not None:
            weights, begin = self._weights(decoder), self._begun(decoder)
            first = programs.decode.trace(weights, latents, bad, begin)
            yield "decode first", first
            memory = self._placed(first.out_info[2], decoder)
            if self._placed(begin, decoder) != memory:
                yield "decode next", programs.decode.trace(weights, latents, bad, memory)
        arguments = (cache.text, cache.past, cache.history, cache.key, index, latents, payload)
        yield "finalize", programs.finalize.trace(network, *arguments)

    def compile(self, cache: StreamCache, input: Any = None) -> Iterator[tuple[str, jax.stages.Compiled]]:
        """Compiles the programs of `traced`, and yields each with its name."""
        for name, program in self.traced(cache, input):
            yield name, program.lower().compile()

    # ----- parts

    @property
    def _transformer(self) -> Any:
        return self.config.diffusion_model.transformer

    @property
    def _branches(self) -> int:
        """How many batches guidance makes of one."""
        return 1 + self._transformer.guided

    @property
    def _reencodes(self) -> bool:
        return not lacking(type(self._transformer), Reencoding)

    def _weights(self, component: Any) -> Any:
        """The weights that a component names; None where it names none."""
        return None if component.part is None else self.params[component.part]

    def _past(self, batch: int) -> Any:
        """The past of rollouts that have not begun; on a mesh, what is not placed is put on every device."""
        past = self._transformer.initialize_cache(self._weights(self._transformer), batch, placement=self.placement)
        if self.placement is None:
            return past
        where = lambda x: getattr(x, "sharding", None)  # noqa: E731
        return jax.tree.map(
            lambda x: x if isinstance(where(x), jax.sharding.NamedSharding) else self._everywhere(x), past
        )

    def _rows(self, prompts: Sequence[str] | None, text: Array | None, negative_prompt: str) -> Any:
        """Rows of text [B,S,D]; with guidance [2B,S,D], those of the negative prompt last. S is the transformer's."""
        if (prompts is None) == (text is None):
            raise UsageError("give either prompts or text rows.")
        rows: Any = text if prompts is None else self._encoded(prompts, negative_prompt)
        guards.check_text(self._transformer, rows)
        length = self._transformer.text_shape[0]
        return jnp.pad(rows[:, :length], ((0, 0), (0, max(0, length - rows.shape[1])), (0, 0)))

    def _encoded(self, prompts: Sequence[str], negative_prompt: str) -> Any:
        texts = guards.check_prompts(prompts, negative_prompt)
        if self._branches == 2:
            texts += [negative_prompt] * len(texts)
        encoder = self._transformer.text_encoder
        if encoder is None:
            raise UsageError("this pipeline has no text encoder; give text rows in place of prompts.")
        if encoder.part is not None and encoder.part not in self.params:
            raise UsageError(
                f"this pipeline was set up without the weights {encoder.part!r}, or without a tokenizer; "
                "give text rows in place of prompts."
            )
        rows = encoder.encode_texts(self._weights(encoder), self.tokenizer, texts, placement=self.placement)
        if len(rows) != len(texts):
            raise UsageError(f"{type(encoder).__name__} gives {len(rows)} rows of text for {len(texts)} prompts.")
        if share := nonfinite(np.asarray(rows, np.float32)):
            raise NumericsError(
                f"text encoder: {share:.1%} of the numbers of its output ({rows.dtype}) are NaN or infinite."
            )
        return rows

    def _text_keys(self, rows: Any, image: Any, batch: int) -> tuple[Any, Any]:
        """What the transformer needs of rows of text and image embeddings; and these where they will be."""
        guards.check_image(self._transformer, image, batch)
        rows, image = self._everywhere((rows, image))
        return self.programs.text_keys(self._weights(self._transformer), rows, image), image

    def _everywhere(self, tree: Any) -> Any:
        return tree if self.placement is None else jax.device_put(tree, self.placement.everywhere)

    def _begun(self, component: Any) -> Any:
        """What an encoder or a decoder remembers before chunk 0; None where there is none."""
        return None if component is None else self._held(component, component.initialize_cache())

    def _held(self, component: Any, cache: Any) -> Any:
        """What a component remembers, where it will be."""
        return cache if self.placement is None else jax.device_put(cache, self._where(component))

    def _where(self, component: Any) -> Any:
        """Where it will be on a mesh: on all devices, or divided among them as pictures are."""
        assert self.placement is not None
        divided = getattr(component, "divided", False)
        return (
            self.placement.spread(*self._transformer.latent_shape[1:3]).sharding
            if divided
            else self.placement.everywhere
        )

    def _placed(self, tree: Any, component: Any = None) -> Any:
        """Abstract values where they will be: on all devices, or as what a component remembers."""
        if self.placement is None:
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
        where = self._where(component)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)
