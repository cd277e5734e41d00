"""What a model family is: a value that says which networks there are, and how a request becomes a video with them.

    B batch · T latent frames · H W latent grid · C latent channels · F pixel frames · Y X pixel height, width

The pipeline, plans, sharding, conversion and the command lines know these types and no family. A family tells its
stages once, through `run(stage, *arguments)`: one executor computes, another traces (`jvdiff.pipeline.stages`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from jvdiff.diffusion.samplers import Sampler
from jvdiff.errors import CheckpointError, UnsafeFormat
from jvdiff.kernels import Dense
from jvdiff.runtime.target import Target, here
from jvdiff.sharding import MeshShape, Placement, Sizes, param_shardings
from jvdiff.sharding.rules import Rules
from jvdiff.types import Array, Params
from jvdiff.weights import restore, safetensors, transformed
from jvdiff.weights.naming import Rule


def _as_it_is(config: Mapping[str, Any], tensors: Collection[str]) -> Mapping[str, Any]:
    return config


def _nothing(cfg: Any) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True, eq=False)
class Part:
    """A network with its weights: one folder of a repository.

    config: type of its configuration, hashable, with `from_json` and `to_json`
    classes: what config.json calls it (`_class_name`, `model_type`), any of these
    abstract: (configuration, dtype) -> parameter tree of ShapeDtypeStructs
    places: sharding rules of its leaves
    names: configuration -> rules between published tensors and leaves; None where none are published
    precision: field of `jvdiff.precision.Precision` that its weights are stored in
    published: (library, configuration -> class) in model_index.json
    stem: name of its safetensors file, without suffix
    ignored: configuration -> patterns of published tensors that nobody uses
    renamed: (configuration, tensors as they lie in files) -> the same by their published names, of another layout than
        the published one too
    complete: (config.json, tensor names) -> config.json with what only the names of tensors say
    optional: a repository may lack it
    keeps_dtype: a conversion leaves its weights in the dtype that they are published in, whatever it asks of the others
    """

    config: Any
    classes: tuple[str, ...]
    abstract: Callable[[Any, Any], Params]
    places: Rules
    names: Callable[[Any], Sequence[Rule]] | None
    precision: str
    published: tuple[str, Callable[[Any], str]]
    stem: str = safetensors.STEM
    ignored: Callable[[Any], tuple[str, ...]] = _nothing
    renamed: Callable[[Any, Mapping[str, Any]], Mapping[str, Any]] | None = None
    complete: Callable[[Mapping[str, Any], Collection[str]], Mapping[str, Any]] = _as_it_is
    optional: bool = False
    keeps_dtype: bool = False

    def renaming(self, cfg: Any) -> safetensors.Renamed | None:
        """`renamed` for one configuration, as `safetensors.open_folder` takes it."""
        return partial(self.renamed, cfg) if self.renamed else None


@dataclass(frozen=True, eq=False)
class Files:
    """A folder of a repository without weights: a tokenizer, a scheduler.

    patterns: names of the files that belong to it
    read: folder -> what inputs or schedules are made with
    published: (library, what was read -> class) in model_index.json
    optional: a repository may lack it
    opened: names of which `read` opens the first that is there; (): every file of `patterns`
    """

    patterns: tuple[str, ...]
    read: Callable[[Path], Any]
    published: tuple[str, Callable[[Any], str]]
    optional: bool = False
    opened: tuple[str, ...] = ()

    def files(self, folder: Path) -> list[Path]:
        """The files of a folder that `read` opens, those that are there."""
        named = [folder / name for name in self.opened]
        there = named or sorted(file for pattern in self.patterns for file in folder.glob(pattern))
        return [file for file in there if file.is_file() and not file.name.startswith(".")][: 1 if named else None]


@dataclass(frozen=True, eq=False)
class Models:
    """What a repository says of itself, read once; no weights.

    configs: configuration of each part that is there
    files: what was read of each folder without weights
    index: content of model_index.json
    """

    configs: Mapping[str, Any]
    files: Mapping[str, Any]
    index: Mapping[str, Any]


# Fields of `Request` with one entry for each clip, and the option of the command line that names one.
SUBJECTS = {"prompts": "prompt", "labels": "class_label"}
# Pictures that a clip may have, as options, prompts files and records name them, and the fields of `Request`.
PICTURES = {"image": "images", "last_image": "last_images"}


class Embedding(NamedTuple):
    """What a user may give in place of what an encoder makes of a request.

    part: the encoder
    check: (models, clip, clips, value as given) -> what the part's stage returns, as numpy arrays; UsageError
    """

    part: str
    check: Callable[[Models, Clip, int, Any], Any]


@dataclass(frozen=True, eq=False)
class Request:
    """What to make, besides settings: B clips as one batch.

    prompts: text of each clip, where the family takes prompts
    labels: class of each clip, by name or number, where the family takes labels
    images, last_images: uint8 [Y,X,3] for each clip, the picture that its first or last frame is to show, as it was
        given: of any size; None: no clip has one
    negative_prompts: what guidance leads each clip away from; None: the setting `negative_prompt` holds for all
    """

    prompts: tuple[str, ...] = ()
    labels: tuple[Any, ...] = ()
    images: tuple[np.ndarray, ...] | None = None
    last_images: tuple[np.ndarray, ...] | None = None
    negative_prompts: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Clip:
    """What settings mean for these models: derived once, checked, and handed on. Plain values alone, hence hashable.

    settings: complete, of the family's type
    frames: pixel frames, height and width (F,Y,X)
    latents: (T,H,W,C) of one clip
    tokens: video tokens L that the transformer sees
    sampler: value that makes the solver
    segments: which steps run under which velocity
    attention: implementation of self-attention; None is the best that can
    vae_tiles: how the VAE's pictures are cut, `models.vae_tiles.Tiles`; None: not at all
    """

    settings: Any
    frames: tuple[int, int, int]
    latents: tuple[int, int, int, int]
    tokens: int
    sampler: Sampler
    segments: tuple[Segment, ...]
    attention: Any = None
    vae_tiles: Any = None

    @property
    def guided(self) -> bool:
        """Whether any step has a branch without the condition."""
        return any(segment.guidance != 1 for segment in self.segments)

    def batched(self, clips: int, shape: MeshShape | None) -> bool:
        """Whether guidance's two branches run as one batch: yes where devices share batches, and for small clips on one
        device; large clips run in turn."""
        shared = shape is not None and shape.data * shape.fsdp > 1
        return shared or clips * math.prod(self.latents[:3]) <= 2**14

    def facts(self) -> dict[str, Any]:
        """What of the settings decides the numbers, as JSON values: for the record and for saved states."""
        values = {name: value for name, value in dataclasses.asdict(self.settings).items() if name != "fps"}
        told = {name: _told(value) if callable(value) else value for name, value in values.items()}
        files = {segment.pattern.sha256 for segment in self.segments} - {None}
        return told | ({"pattern_sha256": files.pop()} if files else {})


def _told(function: Any) -> str:
    """A function of the user's own, which no record can bring back."""
    return f"{function.__module__}.{function.__qualname__} (a function; not reproducible from this record)"


@dataclass(frozen=True)
class Segment:
    """Steps of the sampler under one velocity.

    start, stop: steps, the first and the one after the last
    part: whose weights
    guidance: weight of classifier-free guidance; 1: no guidance
    pattern: which tokens see each other
    """

    start: int
    stop: int
    part: str
    guidance: float = 1.0
    pattern: Any = Dense()  # noqa: RUF009 - a frozen value


@dataclass(frozen=True)
class Forward:
    """How a network computes: what a compiled program depends on besides configuration and shapes.

    pattern: which tokens see each other
    implementation: of self-attention; None is the best that can
    placement: mesh and where activations live on it; None is one device
    dtype: of products, whatever kernels are stored in; None is the kernels'
    decode: how frames are decoded, a name of `jvdiff.precision.DECODING`; None is as JAX multiplies the weights
    """

    pattern: Any = Dense()  # noqa: RUF009 - a frozen value
    implementation: Any = None
    placement: Placement | None = None
    dtype: str | None = None
    decode: str | None = None

    @property
    def target(self) -> Target:
        """What the program is made for, which decides the implementation where none is named."""
        return self.placement.target if self.placement else here()


@dataclass(frozen=True, eq=False)
class Stage:
    """A compiled function of a family and the part whose weights it needs.

    name: what progress and plans call it
    part: name of the part
    program: jitted (weights of the part, *arguments) -> results
    pictures: (H,W) of the latent grid if the last result is carried to the next call, divided as pictures are
    """

    name: str
    part: str
    program: Any
    pictures: tuple[int, int] | None = None


class Run(Protocol):
    """Computes a stage, or traces it."""

    def __call__(self, stage: Stage, *arguments: Any) -> Any: ...


@dataclass(frozen=True, eq=False)
class Family:
    """One kind of repository, and how a request becomes a video with it. Functions are pure but for `run`.

    name: for messages
    pipeline: `_class_name` in model_index.json
    parts, files: folders of a repository
    settings: type of what a user may set, a group of `jvdiff.config.option`s
    subject: the field of `Request` with one entry for each clip, of SUBJECTS
    takes: pictures that it takes, of PICTURES
    needs: those of them that it cannot do without
    instead: picture that it does not take -> models that do, for the message
    unit: models -> of what height and width of a clip are multiples; where it takes pictures, whose proportions a clip
        has unless its size is given
    misfits: models -> what does not fit together, or None
    complete: (models, defaults of the repository, values that are given) -> complete values, with what the
        repository's other files ask for
    check_subject: (models, one subject as given) -> as `Request` has it; UsageError
    clip: (models, settings) -> Clip; UsageError for what these models cannot do
    mesh_sizes: (models, clip, clips, mesh) -> what a mesh must divide
    inputs: (models, clip, request) -> arrays of the request, made once
    longest: (models, clip, clips) -> the same as ShapeDtypeStructs, at their largest
    encode: (models, clip, forward, run, inputs) -> condition, and that of guidance's other branch or None
    network: (models, segment, forward) -> (weights, x, t, condition) -> velocity; the same object for equal arguments
    finish: (clip, inputs, both conditions as `encode` gave them, latents) -> latents, after the last step
    decode: (models, clip, forward, run, latents [1,T,H,W,C]) -> (uint8 [1,F,Y,X,3], non-finite share, latent frames
        so far), as frames come; F is 0 where there is none yet, and only a chance to stop
    preview: (models, forward) -> Stage of (latents [B,1,H,W,C]) -> float32 [B,1,Y,X,3] in -1..1
    attention: (models, clip, forward, inputs) -> implementation of each attention by kind; NotImplementedError where
        the one that was asked for cannot compute the clip, or not on this machine
    describe: (models, one subject) -> what the record says of it; `facts` of them decide the numbers
    embeddings: name -> what may be given in place of an encoder's work, "text_embeddings" for instance
    facts: names in `describe` that say which clip it is; the first is the subject, as `check_subject` takes it
    window_losses: (models, part, forward, tile, candidate windows) -> (weights, x, t, condition) -> (velocity, how far
        each window is from dense attention, float32 [layers,candidates,heads]); None: nothing searches for its windows
    published: what can be planned without a download: name of a published repository -> its models
    at_once: whether it makes a clip at once, rather than chunk by chunk (`jvdiff.models.rollout`)
    """

    name: str
    pipeline: str
    parts: Mapping[str, Part]
    files: Mapping[str, Files]
    settings: Any
    subject: str
    misfits: Callable[[Models], str | None]
    complete: Callable[[Models, Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]]
    check_subject: Callable[[Models, Any], Any]
    clip: Callable[[Models, Any], Clip]
    mesh_sizes: Callable[[Models, Clip, int, MeshShape], Sizes]
    inputs: Callable[[Models, Clip, Request], Any]
    longest: Callable[[Models, Clip, int], Any]
    encode: Callable[[Models, Clip, Forward, Run, Any], tuple[Any, Any]]
    network: Callable[[Models, Segment, Forward], Callable[[Params, Array, Array, Any], Array]]
    decode: Callable[[Models, Clip, Forward, Run, Any], Iterator[tuple[Any, Any, int]]]
    preview: Callable[[Models, Forward], Stage]
    attention: Callable[[Models, Clip, Forward, Any], Mapping[str, str]]
    describe: Callable[[Models, Any], dict[str, Any]]
    finish: Callable[[Clip, Any, tuple[Any, Any], Array], Array] = lambda clip, inputs, conditions, latents: latents
    embeddings: Mapping[str, Embedding] = dataclasses.field(default_factory=dict)
    facts: tuple[str, ...] = ("prompt",)
    takes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    instead: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unit: Callable[[Models], int] = lambda models: 1
    window_losses: Callable[..., Callable[[Params, Array, Array, Any], tuple[Array, Array]]] | None = None
    published: Mapping[str, Models] = dataclasses.field(default_factory=dict)
    at_once: bool = True


@dataclass(frozen=True, eq=False)
class Rollout:
    """What streaming needs of a family that makes a video chunk by chunk.

    A cache is the family's own pytree, with `keys` [layers,B,...] and `frames` int32 [], those of the video so far.
    `how` are the keywords text_length, implementation and placement.

    The parts of such a family are transformer, text_encoder and vae, its files tokenizer. Of the transformer's
    configuration streaming reads patch_size, in_channels, out_channels and text_dim; of the VAE's spatial_factor,
    temporal_factor and latent_channels.

    configs: types of the configurations, in this order: transformer, VAE, text encoder. Saved configurations name them,
        and are read with those of their own family
    config: (name, models) -> StreamInferencePipelineConfig that a repository asks for
    dtype_of: weights of the transformer -> dtype of its keys and values
    span: (latent frames of a chunk, of the window, of the sink, whether positions are relative) -> how much of a video
        a chunk sees, with `chunk`, `slots` (frames that are kept) and `pattern`; the text of a pattern of these tokens
        comes last, unless it is dense
    encode_texts: (configuration, weights, tokenizer, texts, placement) -> rows [B,S,D], zeros beyond each text's end
    token_counts: (tokenizer, texts) -> tokens of each text
    text_keys: (weights, configuration, rows [B,S,D], placement=) -> keys and values of the text, [layers,B,S,...]
    init_kv_cache: (configuration, span, batch, (H,W), dtype, placement=) -> cache of a video that has not begun
    chunk_velocity: (weights, configuration, span, x [B,T,H,W,C], timestep [B], text keys, cache, **how) -> float32
        [B,T,H,W,C]; the cache stays as it is
    remembered: (span, history [B,slots,H,W,C], x [B,T,H,W,C], frames so far) -> history with those of the chunk
    extend: as `chunk_velocity` -> cache with one more chunk
    reencode: as `chunk_velocity`, with history [B,slots,H,W,C] as x -> cache of the same frames under this text
    mesh_sizes: (configuration, (T,H,W), batch, pattern) -> what a mesh must divide
    encode_chunk: (weights, configuration, frames [B,F,Y,X,3] in -1..1, VAE's cache or None, placement=) -> (latents
        [B,T,H,W,C] at the VAE's scale, cache)
    decode_chunk: (weights, configuration, latents [B,T,H,W,C], VAE's cache or None, placement=, arithmetic=) ->
        (float32 frames [B,F,Y,X,3] in -1..1, cache); arithmetic: as `Forward.decode`
    normalize_latents: (configuration, latents) -> latents from the VAE's scale to the transformer's
    denormalize_latents: the inverse
    picture_shape: cache of `encode_chunk` -> shape [B,F,Y,X,3] of the frames that it was given
    """

    configs: tuple[type, ...]
    config: Callable[[str, Models], Any]
    dtype_of: Callable[[Params], Any]
    span: Callable[..., Any]
    encode_texts: Callable[..., Array]
    token_counts: Callable[..., list[int]]
    text_keys: Callable[..., Any]
    init_kv_cache: Callable[..., Any]
    chunk_velocity: Callable[..., Array]
    remembered: Callable[..., Array]
    extend: Callable[..., Any]
    reencode: Callable[..., Any]
    mesh_sizes: Callable[..., Sizes]
    encode_chunk: Callable[..., Any]
    decode_chunk: Callable[..., Any]
    normalize_latents: Callable[..., Array]
    denormalize_latents: Callable[..., Array]
    picture_shape: Callable[[Any], tuple[int, ...]]


# ---------------------------------------------------------------------------------------------- parts in their folders


def read_config(folder: Path, parts: Mapping[str, Part] | Part) -> Any:
    """The configuration of a component folder, which holds one of these parts.

    Raises:
        CheckpointError: no config.json, another model, or a field out of range.
        UnsafeFormat: the configuration asks for code of its own.
    """
    candidates = [parts] if isinstance(parts, Part) else list(parts.values())
    config = safetensors.read_json(folder / "config.json")
    if "auto_map" in config:
        raise UnsafeFormat(f"{folder / 'config.json'}: remote code is not supported (auto_map).")
    name = config.get("_class_name") or config.get("model_type") or config.get("architectures")
    part = next((part for part in candidates if isinstance(name, str) and name in part.classes), None)
    if part is None:
        classes = [name for part in candidates for name in part.classes]
        raise CheckpointError(
            f"{folder / 'config.json'}: describes {str(name)!r:.80}, expected _class_name or model_type to be "
            f"{' or '.join(classes)}.\nTake all folders from one repository."
        )
    if part.complete is not _as_it_is:
        config = part.complete(config, safetensors.tensor_names(folder, part.stem))
    return part.config.from_json(config)


def read_weights(folder: Path, part: Part, cfg: Any, dtype: Any, placement: Placement | None = None, **how: Any) -> Any:
    """The weights of a component folder in either layout, where they live on a mesh; how, raises: `weights.restore`."""
    abstract = part.abstract(cfg, dtype)
    names = part.names(cfg) if part.names else []
    made = transformed(abstract, how.get("transform"))
    where = param_shardings(placement.mesh, made, part.places) if placement else None
    layout: Any = dict(stem=part.stem, ignored=part.ignored(cfg), renamed=part.renaming(cfg))
    return restore(folder, abstract, names, where, **layout, **how)
