"""What a training computes once and keeps for the next start: arrays in NAME.npz, and NAME.json with their digest."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from jvdiff.errors import ResourceError
from jvdiff.runtime import peers
from jvdiff.runtime.files import atomic
from jvdiff.runtime.records import file_sha256, read

_log = logging.getLogger("jvdiff.training")


def kept(path: Path, key: str, make: Callable[[], Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
    """The arrays in `path` if they were kept under this key and are what was written; otherwise made, and kept.

    key: names everything that decides them.

    Where the disk refuses them, the run goes on with a warning: the next start makes them anew.
    """
    mark = path.with_suffix(".json")
    if path.is_file():
        if (said := read(mark)).get("key") == key and said.get("sha256") == file_sha256(path):
            with np.load(path) as stored:
                return dict(stored)
        if said.get("key") in (key, None):
            _log.warning("%s: not what was written, or without its digest; it is made anew", path)
    arrays = make()
    if peers.writes():
        try:
            mark.unlink(missing_ok=True)
            with atomic(path) as part, open(part, "wb") as file:
                np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
            with atomic(mark) as part:
                part.write_text(json.dumps({"key": key, "sha256": file_sha256(path)}) + "\n", encoding="utf-8")
        except (ResourceError, OSError) as error:
            _log.warning("%s\nThe run goes on; its next start makes them anew.", error)
    return arrays
