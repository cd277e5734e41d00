"""Files of embeddings: what `jvdiff.pipeline.embed` gives, kept from one program to the next."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jvdiff.errors import CheckpointError
from jvdiff.runtime.files import atomic


def save_embeddings(path: str | Path, embeddings: Mapping[str, Any]) -> None:
    """Writes a safetensors file: NAME of each, or NAME.0 and NAME.1 where there are those of a negative prompt."""
    arrays = {}
    for name, value in embeddings.items():
        several = value if isinstance(value, tuple | list) else (value,)
        labels = [f"{name}.{i}" for i in range(len(several))] if isinstance(value, tuple | list) else [name]
        arrays |= {label: np.ascontiguousarray(x) for label, x in zip(labels, several, strict=True) if x is not None}
    with atomic(path) as part:
        save_file(arrays, part)


def read_embeddings(path: str | Path) -> dict[str, Any]:
    """The embeddings of a file that `save_embeddings` wrote, for `generate(pipe, **embeddings)`.

    Raises:
        CheckpointError: no such file, or not one of these.
    """
    try:
        arrays = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as a file of embeddings: {error}.") from None
    embeddings: dict[str, Any] = {}
    for label in sorted(arrays):
        name, _, place = label.partition(".")
        embeddings[name] = (*embeddings.get(name, ()), arrays[label]) if place else arrays[label]
    return {name: (*value, None)[:2] if isinstance(value, tuple) else value for name, value in embeddings.items()}
