"""What a training's folder remembers of the fields that decide its numbers: `config.json`. Without JAX."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jvdiff import config as configs
from jvdiff.errors import CheckpointError, UsageError
from jvdiff.runtime import peers
from jvdiff.runtime.files import atomic
from jvdiff.training.options import FREE, Going, Kind, Training, flat

FILE = "config.json"


def begin(folder: Path, fields: Mapping[str, Any], kind: Kind, allow_changes: bool, free: Iterable[str] = ()) -> None:
    """Records the fields of a run that begins in `folder`, or compares them with those of the run that goes on there.

    Until a step is saved, no field has decided anything that is kept, so fields may still change. `free`: fields that
    decide no number, besides those of `Training` and of the task.

    Raises:
        UsageError: other values than those that the run began with, field by field, and changes are not allowed.
        CheckpointError: the record cannot be read.
    """
    now = _deciding(fields, kind, free)
    content: dict[str, Any] = {"fields": now, "changes": []}
    if (step := _saved(folder)) and (folder / FILE).is_file():
        content = read(folder / FILE)
        before = content["fields"]
        if not (other := {p: (before.get(p), now.get(p)) for p in before | now if before.get(p) != now.get(p)}):
            return
        if not allow_changes:
            raise UsageError(_difference(folder, other))
        change = {"step": step, **{path: {"from": old, "to": new} for path, (old, new) in other.items()}}
        content = {"fields": now, "changes": [*content.get("changes", []), change]}
    if peers.writes():
        with atomic(folder / FILE) as part:
            part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _deciding(fields: Mapping[str, Any], kind: Kind, free: Iterable[str]) -> dict[str, Any]:
    """The values of the fields that decide numbers, as JSON has them, by path; a default counts as given."""
    declared = configs.options((Training, Going, kind.fields))
    parents = {path.rsplit(".", 1)[0] for path in declared if "." in path}
    values = {path: each.default for path, each in declared.items() if path not in parents}
    values |= flat(json.loads(json.dumps(dict(fields))))
    aside = {*FREE, *kind.free, *free}
    return {
        path: value
        for path, value in json.loads(json.dumps(values)).items()
        if value is not None and path not in aside and path.split(".")[0] not in aside
    }


def _difference(folder: Path, other: Mapping[str, tuple[Any, Any]]) -> str:
    told = [f"{path}: it began with {old!r:.60}, now {new!r:.60}" for path, (old, new) in sorted(other.items())]
    more = f" (and {len(told) - 3} more)" if len(told) > 3 else ""
    return "\n".join(
        [
            f"{folder}: the training there began with other fields, which decide its numbers{more}:",
            *(f"  {line}" for line in told[:3]),
            "Give the values it began with, choose another --folder, or go on with --allow_changes.",
        ]
    )


def _saved(folder: Path) -> int:
    """The step of the last checkpoint in the folder or in one of its parts; 0 without one."""
    names = [path.name for pattern in ("state/*", "*/state/*") for path in folder.glob(pattern) if path.is_dir()]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def read(path: Path) -> dict[str, Any]:
    """What `begin` recorded. Raises CheckpointError: it cannot be read."""
    try:
        content = json.loads(path.read_bytes())
        if isinstance(content["fields"], dict) and isinstance(content["changes"], list):
            return content
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise CheckpointError(f"{path}: is not the record of a training's fields; remove it to have it written anew.")
