"""What decides a rollout besides prompts, key and weights: frozen, hashable values, made anew with `derive_config`.

    T latent frames of a chunk · H W latent grid · C latent channels · S text tokens

Names and defaults as in NVIDIA's flashdreams; what its code leaves mutable and unhashable is a frozen dataclass here.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from jvdiff import models
from jvdiff.diffusion import Schedule, Solver, renoise, schedules, unipc
from jvdiff.errors import UsageError
from jvdiff.models.family import Rollout
from jvdiff.pipeline.settings import check_seed
from jvdiff.sharding import Placement, Sizes
from jvdiff.streaming.codec import concatenated, stamped
from jvdiff.streaming.contracts import Decoder, Encoder, Scheduler, TextEncoder, Transformer, bind, check, check_network
from jvdiff.streaming.text import text_encoder_of
from jvdiff.streaming.values import check_fields, to_json, tree
from jvdiff.types import Array, Params

if TYPE_CHECKING:
    from jvdiff.streaming.rollout import StreamInferencePipeline


@dataclass(frozen=True)
class FlowMatchSchedulerConfig:
    """Few steps of a distilled network, noised anew between them (`schedules.self_forcing`, `solvers.renoise`).

    num_inference_steps: steps of a chunk, the number of denoising_timesteps
    shift: how much the noise levels lean towards noise; 8 is flashdreams' default, and the published Self-Forcing
        checkpoints were trained with 5
    denoising_timesteps: the steps, falling; d means entry num_train_timesteps - d of the levels of training
    warp_denoising_step: the network gets that entry's timestep; otherwise it gets d itself, and sigma is that of the
        entry whose timestep is nearest
    integer_timesteps: what the network gets is truncated to a whole number
    num_train_timesteps: levels of training
    sigma_max, sigma_min: the highest and the lowest of these, before the shift
    extra_one_step: sigma_min itself is left out of them
    """

    num_inference_steps: int = 4
    shift: float = 8.0
    denoising_timesteps: tuple[int, ...] = (1000, 750, 500, 250)
    warp_denoising_step: bool = True
    integer_timesteps: bool = False
    num_train_timesteps: int = 1000
    sigma_max: float = 1.0
    sigma_min: float = 0.0
    extra_one_step: bool = True

    def __str__(self) -> str:
        return tree(self)

    def __post_init__(self):
        check_fields(self)
        if self.num_inference_steps != len(self.denoising_timesteps):
            raise UsageError(
                f"num_inference_steps is {self.num_inference_steps}, and there are {len(self.denoising_timesteps)} "
                "denoising_timesteps; make the two equal."
            )
        _check_scheduler(self)

    def schedule(self) -> Schedule:
        """Sigmas and timesteps of the steps."""
        table = self._table()
        return schedules.self_forcing(
            self.denoising_timesteps, warp=self.warp_denoising_step, integer=self.integer_timesteps, **table
        )

    def setup(self) -> Solver:
        """The sampler on that schedule."""
        return renoise(self.schedule())

    def noise_level(self, timestep: float) -> float:
        """The sigma of a timestep, between 0 and `num_train_timesteps`."""
        return timestep / self.num_train_timesteps

    def _table(self) -> dict[str, Any]:
        names = ("shift", "sigma_max", "sigma_min", "extra_one_step")
        return {name: getattr(self, name) for name in names} | {"train_steps": self.num_train_timesteps}


@dataclass(frozen=True)
class UniPCSchedulerConfig:
    """UniPC of order 2 on the grid that begins at the highest level of training (`schedules.make(grid="training")`).

    num_inference_steps: steps of a chunk
    shift: how much the noise levels lean towards noise
    num_train_timesteps: levels of training; timesteps count them, and the grid begins at the highest
    use_karras_sigmas: the noise levels are those of Karras et al. in place of the grid (`schedules.karras`), which no
        shift bends. n steps here are n - 1 of flashdreams', which makes one call more than its number says
    """

    num_inference_steps: int = 50
    shift: float = 5.0
    num_train_timesteps: int = 1000
    use_karras_sigmas: bool = False

    def __str__(self) -> str:
        return tree(self)

    def __post_init__(self):
        check_fields(self)
        _check_scheduler(self)

    def schedule(self) -> Schedule:
        """Sigmas and timesteps of the steps."""
        steps, train_steps = self.num_inference_steps, self.num_train_timesteps
        if self.use_karras_sigmas:
            return schedules.karras(steps, train_steps=train_steps)
        return schedules.make(steps, shift=self.shift, grid="training", train_steps=train_steps)

    def setup(self) -> Solver:
        """The solver on that schedule."""
        return unipc(self.schedule())

    def noise_level(self, timestep: float) -> float:
        """The sigma of a timestep, which need not be one of the steps."""
        return timestep / self.num_train_timesteps


def _check_scheduler(config: Scheduler) -> None:
    """Raises UsageError for values of which no solver can be made."""
    with np.errstate(all="ignore"):
        solver = config.setup()
    if not np.isfinite(solver.table).all():
        raise UsageError(
            f"{config!r:.200}: two of its noise levels cannot be told apart; take fewer steps or a shift near 5."
        )


@dataclass(frozen=True)
class TransformerConfig:
    """A causal transformer, and how much of a video it sees: a Transformer of `jvdiff.streaming.contracts`.

    One of your own may be derived from it, and have another `finalize_kv_cache` or `postprocess_clean_latent`.

    network: configuration, of a family that makes a video chunk by chunk
    text_encoder: a TextEncoder, for instance FamilyTextEncoder, which the configuration of a family's network becomes;
        None: rows of text are given in place of prompts
    height, width: of the latents
    text_length: rows of text that the network attends to
    text_rows: how many of these a prompt may fill; the others are zeros, which cost nothing
    len_t: latent frames of a chunk
    window_size_t, sink_size_t: latent frames that a chunk sees, its own among them, and how many are the video's first
    apply_rope_before_kvcache: keys are kept rotated, by their place in the video; otherwise by their place among those
        that are kept
    guidance_scale: weight of classifier-free guidance; 1: none, and half the work
    first_guidance_scale: that of the first chunk, where it differs: that chunk has no past to say what things look
        like. What guidance exaggerates is the next chunk's past, so that a strong one makes a long video drift
    attention: an implementation of `jvdiff.kernels.attention`; None: the best
    pattern: which of the tokens that a chunk sees each of its own sees: dense, or sliding_tile:3x8x8:13x3x3 (tile in
        tokens, window in tiles, time first). Tiles must divide len_t, window_size_t and sink_size_t
    """

    network: Any
    text_encoder: object
    height: int
    width: int
    text_length: int
    text_rows: int
    len_t: int = 3
    window_size_t: int = 21
    sink_size_t: int = 0
    apply_rope_before_kvcache: bool = True
    guidance_scale: float = 1.0
    first_guidance_scale: float | None = None
    attention: str | None = None
    pattern: str = "dense"
    setup = bind

    def __str__(self) -> str:
        return tree(self)

    def __post_init__(self):
        check_fields(self)
        check_network("network", self.network, 0)
        _ = self.span  # refuses what is invalid
        object.__setattr__(self, "text_encoder", text_encoder_of(self.text_encoder))
        for name, patch in zip(("height", "width"), self.network.patch_size[1:], strict=True):
            value = getattr(self, name)
            if value < patch or value % patch:
                raise UsageError(f"{name} of the latents is {value!r}; expected a multiple of {patch}.")
        if not 1 <= self.text_rows <= self.text_length:
            raise UsageError(f"text_rows is {self.text_rows}; expected 1 to text_length, {self.text_length}.")
        for name in ("guidance_scale", "first_guidance_scale"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 100:
                raise UsageError(f"{name} is {value}; expected 1 (none) to 100.")

    @property
    def part(self) -> str:
        """The repository's."""
        return "transformer"

    @property
    def image_shape(self) -> tuple[int, ...] | None:
        """None: the families' networks take no image embeddings."""
        return None

    @property
    def guided(self) -> bool:
        """Whether any chunk is: then all have a branch of the negative prompt, and a past of it."""
        return self.guidance_scale != 1 or self.first_guidance_scale not in (None, 1)

    @property
    def span(self) -> Any:
        """How much of a video a chunk sees."""
        span = models.rollout(self.network).span
        sparse = () if self.pattern == "dense" else (self.pattern,)
        return span(self.len_t, self.window_size_t, self.sink_size_t, not self.apply_rope_before_kvcache, *sparse)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(T,H,W,C) of a chunk."""
        return self.len_t, self.height, self.width, self.network.out_channels

    @property
    def text_shape(self) -> tuple[int, int]:
        """(S,D) of the rows of text."""
        return self.text_rows, self.network.text_dim

    @property
    def input_channels(self) -> int:
        """How many channels the network has for what is encoded."""
        return self.network.in_channels - self.network.out_channels

    def mesh_sizes(self, batch: int) -> Sizes:
        """What a mesh must divide for B rollouts."""
        grid = self.len_t, self.height, self.width
        return self._net.mesh_sizes(self.network, grid, batch * (1 + self.guided), self.span.pattern)

    def text_keys(self, params: Params, text: Array, image: Array | None, *, placement: Placement | None = None) -> Any:
        """Keys and values of the text, of every layer."""
        return self._net.text_keys(params, self.network, text, placement=placement)

    def initialize_cache(self, params: Params, batch: int, *, placement: Placement | None = None) -> Any:
        """The layers' keys and values, all zeros; with guidance those of 2B."""
        grid, dtype = (self.height, self.width), self._net.dtype_of(params)
        batch *= 1 + self.guided
        return self._net.init_kv_cache(self.network, self.span, batch, grid, dtype, placement=placement)

    def predict_flow(
        self, params: Params, noisy_latent: Array, timestep: Array, cache: Any, input: Any, *,
        text: Any, autoregressive_index: Any, placement: Placement | None = None,
    ) -> Array:  # fmt: skip
        """The velocity [B,T,H,W,C] at timestep [B], guided."""
        sample = concatenated(input, noisy_latent) if self.input_channels else stamped(input, noisy_latent)
        sample, t = self._branches(sample), self._branches(timestep)
        v = self._net.chunk_velocity(
            params, self.network, self.span, sample, t, text, cache, **self._forward(placement)
        )
        if not self.guided:
            return v
        first = self.guidance_scale if self.first_guidance_scale is None else self.first_guidance_scale
        scale = jnp.where(autoregressive_index == 0, jnp.float32(first), jnp.float32(self.guidance_scale))
        conditional, unconditional = jnp.split(v, 2)  # [2B,T,H,W,C] -> twice [B,T,H,W,C]
        return unconditional + scale * (conditional - unconditional)

    def postprocess_clean_latent(self, clean_latent: Array, cache: Any, input: Any) -> Array:
        """The latents with those that were given in their places."""
        return clean_latent if self.input_channels else stamped(input, clean_latent)

    def finalize_kv_cache(
        self, params: Params, noisy_latent: Array, timestep: Array, cache: Any, input: Any, *,
        text: Any, autoregressive_index: Any, placement: Placement | None = None,
    ) -> Any:  # fmt: skip
        """The past with one more chunk; timestep [B], or [B,T] with one for each frame."""
        sample, t = self._branches(self._seen(noisy_latent, input)), self._branches(timestep)
        return self._net.extend(params, self.network, self.span, sample, t, text, cache, **self._forward(placement))

    def initialize_history(self, batch: int) -> Array:
        """float32 [B,F,H,W,C]: the network's inputs of the frames that are kept, none yet."""
        return jnp.zeros((batch, self.span.slots, self.height, self.width, self.network.in_channels), jnp.float32)

    def remember(self, history: Array, noisy_latent: Array, cache: Any, input: Any) -> Array:
        """The history with the frames of a chunk."""
        return self._net.remembered(self.span, history, self._seen(noisy_latent, input), cache.frames)

    def reencode(
        self,
        params: Params,
        history: Array,
        timestep: Array,
        cache: Any,
        *,
        text: Any,
        placement: Placement | None = None,
    ) -> Any:
        """The past of the same frames under another text; timestep [B], or [B,F] with one for each frame."""
        history, t = self._branches(history), self._branches(timestep)
        return self._net.reencode(params, self.network, self.span, history, t, text, cache, **self._forward(placement))

    @property
    def _net(self) -> Rollout:
        """How the family of the network does it."""
        return models.rollout(self.network)

    def _forward(self, placement: Placement | None) -> dict[str, Any]:
        """How the network computes."""
        return dict(text_length=self.text_length, implementation=self.attention, placement=placement)

    def _seen(self, x: Array, input: Any) -> Array:
        """Clean latents as the network is given them."""
        return concatenated(input, x) if self.input_channels else x

    def _branches(self, x: Array) -> Array:
        """x [B,...] for the prompts and, with guidance, once more for the negative prompt [2B,...]."""
        return jnp.concatenate([x, x]) if self.guided else x


@dataclass(frozen=True)
class DiffusionModelConfig:
    """The network and its sampler.

    transformer: the network, and how much of a video it sees
    scheduler: the steps of a chunk
    seed: of rollouts that are given no key; None draws one, once, which is the field's value from then on
    context_noise: timestep, 0..1000, which the network is told of a finished chunk when it goes into the cache; above 0
        it is noised first, to the sigma that the scheduler's `noise_level` has for that timestep
    sink_noise: the same for the frames that stay for ever, the first `sink_size_t` of the video; None: context_noise
    """

    transformer: Transformer
    scheduler: Scheduler = FlowMatchSchedulerConfig()
    seed: int | None = 0
    context_noise: float = 0
    sink_noise: float | None = None

    def __str__(self) -> str:
        return tree(self)

    def __post_init__(self):
        check_fields(self)
        object.__setattr__(self, "seed", check_seed(self.seed))
        check("transformer", self.transformer, Transformer)
        check("scheduler", self.scheduler, Scheduler)
        if self.transformer.text_encoder is not None:
            check("text_encoder", self.transformer.text_encoder, TextEncoder)
        shape = self.transformer.latent_shape
        if len(shape) != 4 or not all(type(size) is int and size > 0 for size in shape):
            raise UsageError(f"latent_shape of {type(self.transformer).__name__} is {shape!r:.60}; expected (T,H,W,C).")
        for name in ("context_noise", "sink_noise"):
            value = getattr(self, name)
            if value and not (0 <= value <= 1000 and self.scheduler.noise_level(value) <= 1):
                raise UsageError(f"{name} is {value}; expected a timestep from 0 to 1000, of a sigma from 0 to 1.")

    def setup(
        self, params: Mapping[str, Params], tokenizer: Any = None, placement: Placement | None = None
    ) -> "StreamInferencePipeline":
        """A pipeline of latents, without encoder and decoder; as `StreamInferencePipelineConfig.setup`."""
        return StreamInferencePipelineConfig("latents", self).setup(params, tokenizer, placement)


@dataclass(frozen=True)
class StreamInferencePipelineConfig:
    """Everything that decides a rollout besides prompts, key and weights.

    name: for messages
    diffusion_model: the network and its sampler
    encoder: of what `generate` is given for every chunk; None: it is given nothing
    decoder: of the frames that `generate` returns; None: it returns latents
    enable_sync_and_profile: `finalize` returns how long each stage took, for which each is waited for
    """

    name: str
    diffusion_model: DiffusionModelConfig
    encoder: Encoder | None = None
    decoder: Decoder | None = None
    enable_sync_and_profile: bool = False

    def __str__(self) -> str:
        return tree(self)

    def __post_init__(self):
        check_fields(self)
        for name, protocol in (("encoder", Encoder), ("decoder", Decoder)):
            if (component := getattr(self, name)) is not None:
                check(name, component, protocol)
        given = 0 if self.encoder is None else self.encoder.channels
        taken = self.diffusion_model.transformer.input_channels
        if given is not None and taken is not None and given != taken:
            kind = "no encoder" if self.encoder is None else f"the encoder {type(self.encoder).__name__}"
            channels = self.diffusion_model.transformer.latent_shape[-1]
            raise UsageError(
                f"the network takes {channels + taken} channels; with {kind} it is given {channels + given}: "
                f"{channels} of noise, {given} of what is encoded."
            )
        try:
            _ = hash(self), json.dumps(to_json(self))
        except TypeError as error:
            raise UsageError(
                f"{self.name}: a configuration is a frozen value that can go to JSON ({error}).\n"
                "Expected fields that are numbers, text, tuples, None, or dataclasses of these."
            ) from None

    def setup(
        self, params: Mapping[str, Params], tokenizer: Any = None, placement: Placement | None = None
    ) -> "StreamInferencePipeline":
        """Binds the configuration to weights.

        Args:
            params: the trees transformer, text_encoder (unless rollouts are given text rows) and vae (unless there is
                neither encoder nor decoder), where `placement` wants them; and those that components of your own name.
            tokenizer: of `jvdiff.models.text.tokenizer.load`, for rollouts that are given prompts.
            placement: the mesh that the parameters are on; None: the default device.
        """
        from jvdiff.streaming.rollout import StreamInferencePipeline

        return StreamInferencePipeline(self, params, tokenizer, placement)

    @property
    def digest(self) -> str:
        """Names what a cache must agree with: all but the name, the default seed and whether time is taken."""
        same = to_json(self) | {"name": "", "enable_sync_and_profile": False}
        same["diffusion_model"]["seed"] = 0
        if same["diffusion_model"]["transformer"].get("pattern") == "dense":  # of versions that had no other
            del same["diffusion_model"]["transformer"]["pattern"]
        return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]
