"""A sampling run stopped half way, as a folder: everything needed to go on bit for bit, in another process too.

    NAME.state/state.json   prompt, seed, every resolved setting, digest of the checkpoint, versions, digests
    NAME.state/state.npz    the solver's state, one float32 array a field (latents and the solver's history)

The folder appears complete or not at all. Both files are checked against their digests before anything is used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import secrets
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jvdiff.distributed import unfinished
from jvdiff.errors import CheckpointError, IntegrityError, ResourceError, UsageError

FORMAT = 1
MAX_BYTES = 64 * 2**30


@dataclasses.dataclass(frozen=True, eq=False)
class RunState:
    """facts: what decides the clip (prompt, seed, settings, precision, checkpoint digest), JSON values only.
    done: steps computed. arrays: the fields of the solver's state, float32 [B,T,H,W,C]."""

    facts: Mapping[str, Any]
    done: int
    arrays: Mapping[str, np.ndarray]


def save(folder: str | Path, state: RunState) -> Path:
    """Writes `folder`, which must not exist (a name beside it is taken then), and returns where it is.

    Raises:
        ResourceError: the file system refuses.
    """
    buffer = io.BytesIO()
    np.savez(buffer, **{name: np.asarray(array, np.float32) for name, array in state.arrays.items()})  # type: ignore[arg-type]
    data = buffer.getvalue()
    body = {"format": FORMAT, "done": state.done, "facts": dict(state.facts), "arrays_sha256": _sha256(data)}
    text = json.dumps(body | {"sha256": _sha256(_canonical(body))}, indent=2, ensure_ascii=False)
    folder = Path(folder)
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    try:
        with unfinished(part):
            part.mkdir(parents=True)
            for name, content in (("state.npz", data), ("state.json", text.encode())):
                with open(part / name, "xb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            number, target = 1, folder
            while target.exists():
                number += 1
                target = folder.with_name(f"{folder.stem}-{number}{folder.suffix}")
            os.rename(part, target)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise ResourceError(f"cannot save the run's state in {folder}: {error.strerror or error}.") from error
    return target


def load(folder: str | Path) -> RunState:
    """Reads what `save` wrote.

    Raises:
        UsageError: there is no such folder.
        IntegrityError: a file is cut, changed or missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"resume: {folder} is not a folder; expected the .state folder of an interrupted run.")
    text, data = _read(folder / "state.json"), _read(folder / "state.npz")
    try:
        body = json.loads(text)
        digest = body.pop("sha256")
        if digest != _sha256(_canonical(body)):
            raise _changed(folder / "state.json", "its digest does not match its content")
        if body["format"] != FORMAT:
            raise CheckpointError(
                f"{folder / 'state.json'}: format {body['format']!r}, and this version of jvdiff reads {FORMAT}.\n"
                "Resume with the version that wrote it (see facts.versions in that file)."
            )
        if body["arrays_sha256"] != _sha256(data):
            raise _changed(folder / "state.npz", "its digest is not the one in state.json")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return RunState(body["facts"], body["done"], {name: arrays[name] for name in arrays.files})
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise _changed(folder, f"it cannot be read ({type(error).__name__}: {error})") from None


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError listing every key of `now` whose value is not the saved one."""
    differences = [
        f"{name}: the state has {saved.get(name)!r:.60}, this run {value!r:.60}"
        for name, value in now.items()
        if saved.get(name) != value
    ]
    if differences:
        shown = differences[:4] + ([f"and {len(differences) - 4} more"] if len(differences) > 4 else [])
        raise CheckpointError("\n".join([f"{where} cannot be resumed with other settings or weights:", *shown]))


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise _changed(path, "it is larger than any state")
        return path.read_bytes()
    except OSError as error:
        raise _changed(path, error.strerror or str(error)) from None


def _changed(path: Path, found: str) -> IntegrityError:
    return IntegrityError(f"{path}: {found}.\nThe saved state is damaged; begin the run anew, or restore the file.")


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
