"""What a pipeline asks of its components, as protocols. jvdiff's own components and a user's go through the same ones.

    B rollouts · T latent frames of a chunk · H W latent grid · C latent channels · S text tokens · D width of text ·
    F pixel frames · Y X pixel height, width

A component is a value: a frozen dataclass whose fields are its configuration. Its methods are pure functions, which are
compiled: they get weights and state as arguments, and return new state. Weights are the tree that stands under the name
`part` in the parameters of the pipeline, and None where `part` is None. placement: mesh, and where activations live on
it; None is one device.

A component may have besides: `setup` (for instance `setup = bind`), with which it can be used alone; and, where its
cache is divided among the devices of a mesh as pictures are, `divided = True`. Otherwise each device has all of it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jvdiff import models
from jvdiff.diffusion import Solver
from jvdiff.errors import UsageError
from jvdiff.sharding import Placement
from jvdiff.types import Array, Params

DOCS = "docs/streaming.md"


class Encoder(Protocol):
    """What `generate` is given for a chunk -> what the transformer is given (its `input`).

    part: name of its weights
    channels: how many channels its output adds to the network's input; None: not known
    """

    @property
    def part(self) -> str | None: ...
    @property
    def channels(self) -> int | None: ...
    def initialize_cache(self) -> Any:
        """What it remembers before chunk 0, a pytree; None: nothing."""
        ...

    def abstract_input(self, batch: int, latent_shape: tuple[int, ...], autoregressive_index: int) -> Any:
        """What it takes for chunk 0 or a later one, as ShapeDtypeStructs; {}: anything."""
        ...

    def encode(
        self, params: Any, input: Any, cache: Any, *, latent_frames: int, placement: Placement | None
    ) -> tuple[Any, Any]:
        """(what the transformer is given, a pytree; the new cache). latent_frames: T."""
        ...


class Decoder(Protocol):
    """Latents of a chunk -> its pixel frames.

    part: name of its weights
    spatial_compression_ratio: pixels per latent cell, along height and along width
    """

    @property
    def part(self) -> str | None: ...
    @property
    def spatial_compression_ratio(self) -> int: ...
    def initialize_cache(self) -> Any:
        """What it remembers before chunk 0, a pytree; None: nothing."""
        ...

    def decode(self, params: Any, latents: Array, cache: Any, *, placement: Placement | None) -> tuple[Array, Any]:
        """(float32 frames [B,F,Y,X,3] in -1..1, the new cache) of latents [B,T,H,W,C]."""
        ...


class TextEncoder(Protocol):
    """Prompts -> rows of text.

    part: name of its weights
    """

    @property
    def part(self) -> str | None: ...
    def encode_texts(self, params: Any, tokenizer: Any, texts: Sequence[str], *, placement: Placement | None) -> Array:
        """Rows [B,S,D], zeros beyond each text's end. tokenizer: what the pipeline was set up with. Not compiled."""
        ...


class Scheduler(Protocol):
    """The steps of a chunk."""

    def setup(self) -> Solver:
        """The solver on its schedule (`jvdiff.diffusion`)."""
        ...

    def noise_level(self, timestep: float) -> float:
        """The sigma 0..1 of a timestep, for `context_noise`."""
        ...


class Transformer(Protocol):
    """The network with what it remembers of the video, chunk by chunk.

    part: name of its weights
    text_encoder: a TextEncoder for its prompts; None: it is given rows of text
    latent_shape: of a chunk of one rollout, (T,H,W,C)
    text_shape: (S,D) of the rows of text that it takes
    image_shape: of the image embeddings of one rollout that travel beside the text; None: it takes none
    input_channels: how many channels it takes of an encoder; None: not known
    guided: whether there is a negative prompt: then text has 2B rows, the negative ones last
    """

    @property
    def part(self) -> str | None: ...
    @property
    def text_encoder(self) -> Any: ...
    @property
    def latent_shape(self) -> tuple[int, ...]: ...
    @property
    def text_shape(self) -> tuple[int, int]: ...
    @property
    def image_shape(self) -> tuple[int, ...] | None: ...
    @property
    def input_channels(self) -> int | None: ...
    @property
    def guided(self) -> bool: ...
    def text_keys(self, params: Any, text: Array, image: Array | None, *, placement: Placement | None) -> Any:
        """What it needs of text [B or 2B,S,D] and image embeddings [B,...], made once for each prompt: a pytree."""
        ...

    def initialize_cache(self, params: Any, batch: int, *, placement: Placement | None) -> Any:
        """The past of B rollouts that have not begun: a pytree of arrays of fixed shapes. Not compiled."""
        ...

    def predict_flow(
        self, params: Any, noisy_latent: Array, timestep: Array, cache: Any, input: Any, *,
        text: Any, autoregressive_index: Array, placement: Placement | None,
    ) -> Array:  # fmt: skip
        """The velocity [B,T,H,W,C] at noisy_latent and timestep float32 [B]; the cache stays as it is."""
        ...

    def postprocess_clean_latent(self, clean_latent: Array, cache: Any, input: Any) -> Array:
        """Clean latents [B,T,H,W,C] as they are decoded and remembered."""
        ...

    def finalize_kv_cache(
        self, params: Any, noisy_latent: Array, timestep: Array, cache: Any, input: Any, *,
        text: Any, autoregressive_index: Array, placement: Placement | None,
    ) -> Any:  # fmt: skip
        """The past with this chunk, as the network sees it at this timestep: 0 where it is clean. Where the transformer
        has a `sink_size_t`, whose frames have another noise (`sink_noise`), it is [B,T]."""
        ...


class Reencoding(Protocol):
    """What a transformer has besides where its past can be made anew under another prompt (`set_prompts`).

    A history is a pytree of arrays [B,F,...] of fixed shapes: what the network was given for the frames in the past.
    """

    def initialize_history(self, batch: int) -> Any:
        """The history of B rollouts that have not begun."""
        ...

    def remember(self, history: Any, noisy_latent: Array, cache: Any, input: Any) -> Any:
        """The history with a chunk; cache: the past before it."""
        ...

    def reencode(
        self, params: Any, history: Any, timestep: Array, cache: Any, *, text: Any, placement: Placement | None
    ) -> Any:
        """The past of the same frames under this text; timestep [B], or [B,F] as in `finalize_kv_cache`."""
        ...


COMPONENTS = (Encoder, Decoder, TextEncoder, Scheduler, Transformer)


def members(protocol: type) -> dict[str, Any]:
    """The properties and functions of a protocol."""
    kinds = property | types.FunctionType
    return {name: x for name, x in vars(protocol).items() if isinstance(x, kinds) and not name.startswith("_")}


@functools.cache
def lacking(kind: type, protocol: type) -> tuple[str, ...]:
    """What of a protocol a class lacks: members that are not there, and methods that cannot be called as it says."""
    fields = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    found = []
    for name, wanted in members(protocol).items():
        if name not in fields and not hasattr(kind, name):
            found.append(name)
        elif inspect.isfunction(wanted) and not _called_alike(kind, name, wanted):
            parameters = list(inspect.signature(wanted).parameters.values())[1:]
            plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
            found.append(f"{name}{inspect.Signature(plain)}")
    return tuple(found)


def _called_alike(kind: type, name: str, wanted: Any) -> bool:
    method = getattr(kind, name, None)
    if not callable(method):
        return False
    bound = isinstance(inspect.getattr_static(kind, name), staticmethod | classmethod)
    parameters = list(inspect.signature(wanted).parameters.values())[bool(bound) :]
    named = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    try:
        inspect.signature(method).bind(*parameters[: len(parameters) - len(named)], **dict.fromkeys(named))
    except (TypeError, ValueError):  # other arguments; a builtin, which does not tell its own
        return False
    return True


def check(where: str, value: Any, protocol: type) -> None:
    """Raises UsageError unless a value is what the protocol asks for; the message tells what it lacks."""
    if missing := lacking(type(value), protocol):
        raise UsageError(
            f"{where} is {value!r:.80}, which is no {protocol.__name__}: it lacks {', '.join(missing)}.\n"
            f"{DOCS} has the contract."
        )


def check_network(where: str, config: Any, place: int) -> None:
    """Raises UsageError unless it is the configuration of a transformer (place 0), VAE (1) or text encoder (2), of a
    family that makes videos chunk by chunk (`jvdiff.models.rollout`)."""
    kind = models.rollout(config).configs[place]
    if type(config) is not kind:
        raise UsageError(f"{where} is a {type(config).__name__}; expected a {kind.__name__}.")


@dataclass(frozen=True, eq=False)
class Bound:
    """A component with its weights, for its use alone: its methods without the arguments `params` and `placement`.

        frames, cache = decoder.setup(params["vae"]).decode(latents, cache)

    component: the value
    params: its weights
    placement: mesh that they are on; None is the default device
    """

    component: Any
    params: Any = None
    placement: Placement | None = None

    def __getattr__(self, name: str) -> Any:
        member = getattr(self.component, name)
        if not inspect.ismethod(member):
            return member
        takes = inspect.signature(member).parameters
        how = {"placement": self.placement} if "placement" in takes else {}
        return functools.partial(member, *([self.params] if "params" in takes else []), **how)


def bind(component: Any, params: Params | None = None, placement: Placement | None = None) -> Bound:
    """A component with its weights; as a class's `setup`, a method."""
    return Bound(component, params, placement)
