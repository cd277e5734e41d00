"""A causal repository as a streaming pipeline; configurations from JSON, from repositories, from command lines."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from jvdiff import models, pipeline
from jvdiff import precision as precisions
from jvdiff.errors import CheckpointError, UsageError
from jvdiff.kernels import admission
from jvdiff.models.family import Family, Rollout
from jvdiff.pipeline import Repository
from jvdiff.pipeline.lending import Weights
from jvdiff.pipeline.repository import check_at_once
from jvdiff.pipeline.settings import DEFAULTS_FILE, stream_defaults
from jvdiff.sharding import read_mesh
from jvdiff.streaming.codec import ImageEncoder, NullEncoder, StreamingVideoDecoder, StreamingVideoEncoder
from jvdiff.streaming.config import (
    DiffusionModelConfig,
    FlowMatchSchedulerConfig,
    StreamInferencePipelineConfig,
    TransformerConfig,
    UniPCSchedulerConfig,
)
from jvdiff.streaming.contracts import COMPONENTS, DOCS, Transformer, lacking, members
from jvdiff.streaming.rollout import StreamInferencePipeline
from jvdiff.streaming.text import FamilyTextEncoder
from jvdiff.streaming.values import CLASSES, derive_config, from_json
from jvdiff.types import Params

_OWN = (
    StreamInferencePipelineConfig, DiffusionModelConfig, TransformerConfig, FlowMatchSchedulerConfig,
    UniPCSchedulerConfig, FamilyTextEncoder, StreamingVideoDecoder, StreamingVideoEncoder, ImageEncoder, NullEncoder,
)  # fmt: skip
CLASSES.update({kind.__name__: kind for kind in _OWN})


def register(name: str, cls: type) -> None:
    """Makes a component of your own known to JSON and to command lines, as the class `name`, in this process.

    No class is ever found in another way: what a file names and nobody registered is refused.

    Args:
        cls: a frozen dataclass with what a protocol of `jvdiff.streaming.contracts` asks for.

    Raises:
        UsageError: the name is taken, by jvdiff or by another class; the class is known under another name, is no
            frozen dataclass, or lacks something, which the message tells.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w{0,99}", name):
        raise UsageError(f"register: the name is {name!r:.60}; expected a word of letters, digits and '_'.")
    networks = {kind.__name__ for one in models.rollouts() for kind in one.configs}
    if name in networks | {kind.__name__ for kind in _OWN}:
        raise UsageError(f"register: {name} is a class of jvdiff's own; take another name.")
    if name in CLASSES:
        raise UsageError(f"register: {name} is registered already, for {_told(CLASSES[name])}; take another name.")
    if not isinstance(cls, type):
        raise UsageError(f"register: {name} is {cls!r:.80}; expected a class.")
    if known := [other for other, kind in CLASSES.items() if kind is cls]:
        raise UsageError(f"register: {_told(cls)} has the name {known[0]} already.")
    if told := _lacks(cls):
        raise UsageError(f"register: {_told(cls)} is no component of a stream ({DOCS}):{told}")
    if not dataclasses.is_dataclass(cls) or not _is_value(cls):
        raise UsageError(f"register: {_told(cls)} is no value; expected a class with @dataclass(frozen=True).")
    CLASSES[name] = cls


def _lacks(cls: type) -> str:
    """Lines that say what a class lacks as that which it is most like; nothing where it is a component."""
    gaps = {protocol: lacking(cls, protocol) for protocol in COMPONENTS}
    if not all(gaps.values()):
        return ""
    has = {protocol: len(members(protocol)) - len(gap) for protocol, gap in gaps.items()}
    alike = [protocol for protocol in COMPONENTS if has[protocol] == max(has.values())]
    return "".join(f"\n  as {protocol.__name__} it lacks {', '.join(gaps[protocol])}" for protocol in alike)


def _told(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_value(cls: Any) -> bool:
    return cls.__dataclass_params__.frozen and cls.__hash__ is not object.__hash__


def _classes(rollout: Rollout) -> dict[str, Any]:
    """The classes of configurations by their names in JSON, those of a family's networks too.

    Raises:
        UsageError: a registered class and one of the family have the same name.
    """
    networks = {kind.__name__: kind for kind in rollout.configs}
    if taken := sorted(networks.keys() & CLASSES.keys()):
        raise UsageError(f"{taken[0]} is a class of this family, and was registered; register yours by another name.")
    return CLASSES | networks


def config_from_json(value: Mapping[str, Any], rollout: Rollout) -> StreamInferencePipelineConfig:
    """The inverse of `to_json` for a whole configuration.

    rollout: of its family, `jvdiff.models.rollout(network)`; networks of two families may have the same class name.

    Raises:
        CheckpointError: an unknown class or field, or an invalid value.
    """
    config = from_json(value, _classes(rollout))
    if not isinstance(config, StreamInferencePipelineConfig):
        raise CheckpointError(f"this is a configuration of {type(config).__name__}, expected a whole pipeline's.")
    return config


def rollout_of(repository: Repository) -> Rollout:
    """How a causal repository's family makes a video chunk by chunk."""
    return models.rollout(repository.models.configs["transformer"])


def config_of(path: str | Path | Repository) -> StreamInferencePipelineConfig:
    """The configuration that a causal repository asks for (`Rollout.config`).

    The object `stream` of its jvdiff_defaults.json goes before what its family says.

    Raises:
        CheckpointError: not a repository, or one whose files are invalid.
        UsageError: one that is not causal.
    """
    repository = path if isinstance(path, Repository) else pipeline.inspect(path, at_once=False)
    config = rollout_of(repository).config(repository.path.name, repository.models)
    try:
        return override(config, {"diffusion_model": stream_defaults(repository.path)})
    except (KeyError, TypeError, UsageError) as error:
        raise CheckpointError(
            f"{repository.path / DEFAULTS_FILE}: its defaults for streaming are invalid: {error.args[0]}"
        ) from None


def override(config: StreamInferencePipelineConfig, patch: Mapping[str, Any]) -> StreamInferencePipelineConfig:
    """`derive_config` of values as JSON and command lines have them.

    A list is a tuple. An object that names its class, as those of `to_json` do, takes the place of what was there; the
    fields that it leaves out have their defaults. Where they have none, `vae` is the decoder's, and those of a
    transformer are those of the one that was there; a class derived from that one's keeps all of its values.

    Raises:
        KeyError, TypeError, UsageError: as `derive_config`.
        CheckpointError: an unknown class or field.
    """
    if not isinstance(config, StreamInferencePipelineConfig) or not isinstance(patch, Mapping):
        raise UsageError(f"override was given {config!r:.60} and {patch!r:.60}; expected a configuration and a dict.")
    decoder, transformer = config.decoder, config.diffusion_model.transformer
    network = getattr(transformer, "network", None) or getattr(decoder, "vae", None)
    classes: dict[str, Any] = dict(CLASSES) if network is None else _classes(models.rollout(network))
    vae = {"vae": getattr(decoder, "vae", None)}
    for name, kind in classes.items():
        known = vae if lacking(kind, Transformer) else vars(transformer)
        derived = type(transformer) in kind.__mro__[1:]
        fields = [field.name for field in dataclasses.fields(kind) if derived or field.default is dataclasses.MISSING]
        classes[name] = partial(kind, **{field: known[field] for field in fields if known.get(field) is not None})

    def read(value: Any) -> Any:
        if isinstance(value, Mapping) and "class" not in value:
            return {name: read(item) for name, item in value.items()}
        return tuple(map(read, value)) if isinstance(value, list) else from_json(value, classes)

    return derive_config(config, **read(patch))


def decoding(config: StreamInferencePipelineConfig, dtypes: precisions.Precision) -> StreamInferencePipelineConfig:
    """A configuration whose decoder says how it decodes: as it did, or as the precision table does."""
    decoder = config.decoder
    if not isinstance(decoder, StreamingVideoDecoder) or decoder.arithmetic is not None:
        return config
    return dataclasses.replace(config, decoder=dataclasses.replace(decoder, arithmetic=dtypes.vae_decode))


def load(
    path: str | Path | Repository,
    precision: str | None = None,
    mesh: Any = None,
    config: StreamInferencePipelineConfig | None = None,
    *,
    vae_decode: str | None = None,
    weights: Mapping[str, Params] | None = None,
    family: Family | None = None,
    follow_symlinks: bool = False,
) -> StreamInferencePipeline:
    """A pipeline with the weights of a causal repository.

    Args:
        path: the folder with model_index.json, a Hugging Face one or what `convert` made of it; or what `inspect` said.
        precision, mesh, vae_decode: see `jvdiff.load`. A decoder whose `arithmetic` says how it decodes does that.
        config: one derived from `config_of(path)`, with the same networks; None: that one.
        weights: trees for components of your own, by what they call their `part`, where the mesh wants them. One that
            is named as a part of the repository takes its place.
        family, follow_symlinks: see `jvdiff.load`.

    Raises:
        CheckpointError: incomplete, damaged or unknown weights or configurations.
        UsageError: no such folder, a model that is not causal, an unknown precision, or a mesh of more devices than
            there are.
        SetupError: a GPU is there, and JAX cannot use it.
    """
    admission.admit()
    if isinstance(path, Repository):
        repository = path
    else:
        repository = pipeline.inspect(path, at_once=False, family=family, follow_symlinks=follow_symlinks)
    check_at_once(repository.path, repository.family, False)
    placement, dtypes = pipeline.place(read_mesh(mesh)), precisions.choose(precision, vae_decode)
    config = config_of(repository) if config is None else config
    for name, value, kind in (("config", config, StreamInferencePipelineConfig), ("weights", weights or {}, Mapping)):
        if not isinstance(value, kind):
            raise UsageError(f"{name} is {value!r:.60}; expected a {kind.__name__}.")
    config = decoding(config, dtypes)
    params = pipeline.read_parts(repository, dtypes, placement)
    if weights:
        params = Weights({**params, **weights})
    return config.setup(params, repository.models.files["tokenizer"], placement)
