"""A causal repository as a streaming pipeline; configurations from JSON, from repositories, from command lines."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from jvdiff import models, pipeline
from jvdiff import precision as precisions
from jvdiff.errors import CheckpointError, UsageError
from jvdiff.models.family import Family, Rollout
from jvdiff.pipeline import Repository
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
    derive_config,
    from_json,
)
from jvdiff.streaming.rollout import StreamInferencePipeline

_CLASSES = {
    kind.__name__: kind
    for kind in (
        StreamInferencePipelineConfig, DiffusionModelConfig, TransformerConfig, FlowMatchSchedulerConfig,
        UniPCSchedulerConfig, StreamingVideoDecoder, StreamingVideoEncoder, ImageEncoder, NullEncoder,
    )
}  # fmt: skip


def _classes(rollout: Rollout) -> dict[str, type]:
    """The classes of configurations by their names in JSON, those of a family's networks too."""
    return _CLASSES | {kind.__name__: kind for kind in rollout.configs}


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
    fields that it leaves out have their defaults. Encoders get the decoder's VAE.

    Raises:
        KeyError, TypeError, UsageError: as `derive_config`.
        CheckpointError: an unknown class or field.
    """
    classes: dict[str, Any] = _classes(models.rollout(config.diffusion_model.transformer.network))
    if config.decoder is not None:
        for kind in (StreamingVideoEncoder, ImageEncoder):
            classes[kind.__name__] = partial(kind, config.decoder.vae)

    def read(value: Any) -> Any:
        if isinstance(value, Mapping) and "class" not in value:
            return {name: read(item) for name, item in value.items()}
        return tuple(map(read, value)) if isinstance(value, list) else from_json(value, classes)

    return derive_config(config, **read(patch))


def load(
    path: str | Path | Repository,
    precision: str | None = None,
    mesh: Any = None,
    config: StreamInferencePipelineConfig | None = None,
    *,
    family: Family | None = None,
    follow_symlinks: bool = False,
) -> StreamInferencePipeline:
    """A pipeline with the weights of a causal repository.

    Args:
        path: the folder with model_index.json, a Hugging Face one or what `convert` made of it; or what `inspect` said.
        precision, mesh: see `jvdiff.load`.
        config: one derived from `config_of(path)`, with the same networks; None: that one.
        family, follow_symlinks: see `jvdiff.load`.

    Raises:
        CheckpointError: incomplete, damaged or unknown weights or configurations.
        UsageError: no such folder, a model that is not causal, an unknown precision, or a mesh of more devices than
            there are.
    """
    if isinstance(path, Repository):
        repository = path
    else:
        repository = pipeline.inspect(path, at_once=False, family=family, follow_symlinks=follow_symlinks)
    check_at_once(repository.path, repository.family, False)
    placement, dtypes = pipeline.place(read_mesh(mesh)), precisions.choose(precision)
    config = config or config_of(repository)
    params = pipeline.read_parts(repository, dtypes, placement)
    return config.setup(params, repository.models.files["tokenizer"], placement)
