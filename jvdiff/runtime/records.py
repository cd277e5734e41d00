"""Records that say whether they, and the files that they tell of, are what was written.

A record is JSON; `files` in it has size and sha256 of each file that was written before it, by suffix, and `sha256` is
that of all the rest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SUFFIXES = (".mp4", ".apng", ".png", ".npz", ".jsonl")


def signed(base: Path, record: Mapping[str, Any], suffixes: Iterable[str] = SUFFIXES) -> dict[str, Any]:
    """A record with the digests of the files beside it, `base` with each suffix, and its own."""
    there = {suffix: path for suffix in suffixes if (path := Path(f"{base}{suffix}")).is_file()}
    files = {suffix: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for suffix, path in there.items()}
    body = {**record, "files": files}
    return body | {"sha256": digest(body)}


def digest(record: Mapping[str, Any]) -> str:
    """That of a record, its own entry apart."""
    body = {name: value for name, value in record.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none, or it cannot be read."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
