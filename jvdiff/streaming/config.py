"""What decides a rollout besides prompts, key and weights: frozen, hashable values, made anew with `derive_config`.

    T latent frames of a chunk · H W latent grid · C latent channels · S text tokens

Names and defaults as in NVIDIA's flashdreams; what its code leaves mutable and unhashable is a frozen dataclass here.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from jvdiff import models
from jvdiff.config import nearest
from jvdiff.diffusion import Schedule, Solver, renoise, schedules, unipc
from jvdiff.errors import CheckpointError, UsageError
from jvdiff.sharding import Placement
from jvdiff.streaming.codec import Encoder, ImageEncoder, NullEncoder, StreamingVideoDecoder, StreamingVideoEncoder
from jvdiff.types import Params

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

    def __post_init__(self):
        if self.num_inference_steps != len(self.denoising_timesteps):
            raise UsageError(
                f"num_inference_steps is {self.num_inference_steps}, and there are {len(self.denoising_timesteps)} "
                "denoising_timesteps; make the two equal."
            )

    def schedule(self) -> Schedule:
        """Sigmas and timesteps of the steps."""
        table = self._table()
        return schedules.self_forcing(
            self.denoising_timesteps, warp=self.warp_denoising_step, integer=self.integer_timesteps, **table
        )

    def solver(self) -> Solver:
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
    """

    num_inference_steps: int = 50
    shift: float = 5.0

    def schedule(self) -> Schedule:
        """Sigmas and timesteps of the steps."""
        return schedules.make(self.num_inference_steps, shift=self.shift, grid="training")

    def solver(self) -> Solver:
        """The solver on that schedule."""
        return unipc(self.schedule())

    def noise_level(self, timestep: float) -> float:
        """The sigma of a timestep, which need not be one of the steps."""
        return timestep / 1000


@dataclass(frozen=True)
class TransformerConfig:
    """A causal transformer, and how much of a video it sees.

    network, text_encoder: configurations
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
    """

    network: Any
    text_encoder: Any
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

    def __post_init__(self):
        _ = self.span  # refuses what is invalid
        for name, patch in zip(("height", "width"), self.network.patch_size[1:], strict=True):
            value = getattr(self, name)
            if type(value) is not int or value < patch or value % patch:
                raise UsageError(f"{name} of the latents is {value!r}; expected a multiple of {patch}.")
        if not 1 <= self.text_rows <= self.text_length:
            raise UsageError(f"text_rows is {self.text_rows}; expected 1 to text_length, {self.text_length}.")
        for name in ("guidance_scale", "first_guidance_scale"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 100:
                raise UsageError(f"{name} is {value}; expected 1 (none) to 100.")

    @property
    def guided(self) -> bool:
        """Whether any chunk is: then all have a branch of the negative prompt, and a past of it."""
        return self.guidance_scale != 1 or self.first_guidance_scale not in (None, 1)

    @property
    def span(self) -> Any:
        """How much of a video a chunk sees."""
        span = models.rollout(self.network).span
        return span(self.len_t, self.window_size_t, self.sink_size_t, not self.apply_rope_before_kvcache)


@dataclass(frozen=True)
class DiffusionModelConfig:
    """The network and its sampler.

    transformer: the network, and how much of a video it sees
    scheduler: the steps of a chunk
    seed: of rollouts that are given no key
    context_noise: timestep, 0..1000, which the network is told of a finished chunk when it goes into the cache; above 0
        it is noised first, to the sigma that the scheduler's `noise_level` has for that timestep
    sink_noise: the same for the frames that stay for ever, the first `sink_size_t` of the video; None: context_noise
    """

    transformer: TransformerConfig
    scheduler: FlowMatchSchedulerConfig | UniPCSchedulerConfig = FlowMatchSchedulerConfig()
    seed: int = 0
    context_noise: float = 0
    sink_noise: float | None = None

    def __post_init__(self):
        for name in ("context_noise", "sink_noise"):
            value = getattr(self, name)
            if value and not (0 <= value <= 1000 and self.scheduler.noise_level(value) <= 1):
                raise UsageError(f"{name} is {value}; expected a timestep from 0 to 1000, of a sigma from 0 to 1.")


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
    decoder: StreamingVideoDecoder | None = None
    enable_sync_and_profile: bool = False

    def __post_init__(self):
        network, encoder = self.diffusion_model.transformer.network, self.encoder
        more = 0
        if isinstance(encoder, StreamingVideoEncoder):
            more = encoder.vae.latent_channels
        elif isinstance(encoder, ImageEncoder) and encoder.mode == "concat":
            more = encoder.vae.latent_channels + encoder.vae.temporal_factor
        if not isinstance(encoder, NullEncoder) and network.in_channels != network.out_channels + more:
            kind = "no encoder" if encoder is None else f"the encoder {type(encoder).__name__}"
            raise UsageError(
                f"the network takes {network.in_channels} channels; with {kind} it is given "
                f"{network.out_channels + more}: {network.out_channels} of noise, {more} of what is encoded."
            )

    def setup(
        self, params: Mapping[str, Params], tokenizer: Any = None, placement: Placement | None = None
    ) -> "StreamInferencePipeline":
        """Binds the configuration to weights.

        Args:
            params: the trees transformer, text_encoder (unless rollouts are given text rows) and vae (unless there is
                neither encoder nor decoder), where `placement` wants them.
            tokenizer: of `jvdiff.models.text.tokenizer.load`, for rollouts that are given prompts.
            placement: the mesh that the parameters are on; None: the default device.
        """
        from jvdiff.streaming.rollout import StreamInferencePipeline

        return StreamInferencePipeline(self, params, tokenizer, placement)

    @property
    def digest(self) -> str:
        """Names what a cache must agree with: all but the name, the default seed and whether time is taken."""
        model = dataclasses.replace(self.diffusion_model, seed=0)
        same = dataclasses.replace(self, name="", diffusion_model=model, enable_sync_and_profile=False)
        return hashlib.sha256(json.dumps(to_json(same), sort_keys=True).encode()).hexdigest()[:16]


def derive_config(config: Any, **patch: Any) -> Any:
    """`config` with other values: a dict goes on into the field's own fields, anything else replaces the field.

    Raises:
        KeyError: there is no such field; the message has its path and the nearest name.
        TypeError: a dict for a field that has no fields.
        UsageError: a value of another type than the field's, or an invalid one.
    """
    return _derived(config, patch, "")


def _derived(config: Any, patch: Mapping[str, Any], path: str) -> Any:
    names, kinds = [field.name for field in dataclasses.fields(config)], get_type_hints(type(config))
    changed = {}
    for name, value in patch.items():
        where = f"{path}{name}"
        if name not in names:
            hint = nearest(name, names) or f"; {type(config).__name__} has {', '.join(names)}"
            raise KeyError(f"no field {where}{hint}.")
        old = getattr(config, name)
        if isinstance(value, Mapping):
            if not dataclasses.is_dataclass(old):
                raise TypeError(
                    f"{where} is {old!r:.60}, which has no fields; give a value instead of {dict(value)!r:.60}"
                )
            value = _derived(old, value, f"{where}.")
        kind = kinds[name]
        if kind is Any and dataclasses.is_dataclass(old):  # a network's configuration, which stays one of its family
            kind = type(old)
        if kind is float and type(value) is int:
            value = float(value)
        if not _is(value, kind):
            expected = kind.__name__ if isinstance(kind, type) else str(kind)
            raise UsageError(f"{where} is {value!r:.60}; expected {expected}.")
        changed[name] = value
    return dataclasses.replace(config, **changed)


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a field's type."""
    inner = get_args(kind)
    if kind is Any:
        return True
    if isinstance(kind, UnionType) or get_origin(kind) is Union:
        return any(_is(value, one) for one in inner)
    if get_origin(kind) is Literal:
        return value in inner
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and (inner[1:] != (...,) or all(_is(item, inner[0]) for item in value))
    if kind in (int, float) and (isinstance(value, bool) or value != value):
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def to_json(config: Any) -> Any:
    """A configuration as JSON values; each object names its class."""
    if dataclasses.is_dataclass(config):
        values = {field.name: to_json(getattr(config, field.name)) for field in dataclasses.fields(config)}
        return {"class": type(config).__name__} | values
    return [to_json(value) for value in config] if isinstance(config, tuple) else config


def from_json(value: Any, classes: Mapping[str, type]) -> Any:
    """The inverse of `to_json`, for objects of these classes.

    Raises:
        CheckpointError: an unknown class or field, or an invalid value.
    """
    if isinstance(value, list):
        return tuple(from_json(item, classes) for item in value)
    if not isinstance(value, Mapping):
        return value
    fields = {name: from_json(item, classes) for name, item in value.items() if name != "class"}
    name = str(value.get("class"))
    if name not in classes:
        raise CheckpointError(f"a configuration has the class {name!r:.60}; expected one of {', '.join(classes)}.")
    try:
        return classes[name](**fields)
    except (TypeError, ValueError) as error:  # UsageError is one
        raise CheckpointError(f"a configuration of {name} cannot be read: {error}") from None
