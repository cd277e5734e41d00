"""What a user gives as a checkpoint becomes a folder: one here, one that comes with jvdiff, or one of the hub's."""

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jvdiff.config import expanded, nearest, shipped
from jvdiff.errors import CheckpointError, ResourceError, UsageError

_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(\w[\w.-]*(?:/\w[\w.-]*)*))?", re.ASCII)
_OURS = ("checkpoints", "runs")  # folders of a checkout or of a user; a name that begins so was meant for a folder
_FILES = ["*.json", "*/*.model", "*/*.txt", "*/*.safetensors", "README.md", "LICENSE*", "NOTICE*"]
_UNFINISHED = (".incomplete", ".aria2", ".part", ".crdownload")  # suffixes that programs give to half a download
_LEFT = ["*/*.*.safetensors"]  # variants beside the weights, NAME.fp16.safetensors for instance


def locate(name: str | Path, *, download: bool = True, tell: Callable[[str], None] = lambda line: None) -> Path:
    """The folder of a checkpoint.

    A branch or tag of the hub is resolved to a commit once, and the folder is that of the commit in the hub's cache.
    What is there already is not downloaded again; where the hub cannot be reached, the cached commit is taken.

    Args:
        name: in this order a folder (of a repository in the hub's cache, models--OWNER--NAME: its snapshot); a
            checkpoint that comes with jvdiff ("digits", or "checkpoints/digits" where no such folder is); a repository
            of the Hugging Face hub, OWNER/NAME or OWNER/NAME@REVISION.
        download: False takes from the hub's cache alone.
        tell: called with a line before the hub is asked; a progress bar comes with huggingface_hub.

    Raises:
        UsageError: not one of the three. A name that begins with a folder here, with `checkpoints` or with `runs` is
            never a repository's: a typing error must not fetch a stranger's weights.
        CheckpointError: not in the hub's cache, and the hub cannot be reached or has no such repository.
        ResourceError: the disk is full.
    """
    if name and "\0" not in str(name):
        name = type(name)(expanded("checkpoint", name))
    if name and os.path.exists(name):  # where Path.exists raises, for instance on a name too long, this is False
        return _stands_for(Path(name))
    if name and os.path.islink(name):
        raise CheckpointError(f"{name}: a link to {os.readlink(name)}, which is not there. Make it anew.")
    ours = _ours()
    *parents, last = Path(name).parts or ("",)
    if parents in ([], ["checkpoints"]) and last in ours:
        return ours[last]
    return _snapshot(*_repository(str(name), list(ours)), download, tell)


def _stands_for(path: Path) -> Path:
    """The folder that a path means: of a repository in a cache of the hub its snapshot, else the path itself."""
    real = path.resolve()
    root = path / ".." if real.name == "snapshots" else path
    if not root.resolve().name.startswith("models--") or not (root / "snapshots").is_dir():
        return path
    snapshots = _snapshots(root)
    if (main := _cached(root, "main")) or len(snapshots) == 1:
        return main or snapshots[0]
    name = root.resolve().name.removeprefix("models--").replace("--", "/", 1)
    if snapshots:
        known = ", ".join(f"{name}@{snapshot.name}" for snapshot in snapshots[:4])
        raise UsageError(f"{path}: holds several snapshots of a repository of the hub. Name one of them: {known}.")
    raise CheckpointError(
        f"{path}: a repository in the hub's cache, without a snapshot: its download was not finished.\n"
        f"Where there is a connection, run: hf download {name}"
    )


def _snapshots(root: Path) -> list[Path]:
    """The snapshots of a repository's folder in a cache, models--OWNER--NAME."""
    return sorted(p for p in (root / "snapshots").glob("*") if p.is_dir())


def _cached(root: Path, revision: str) -> Path | None:
    """The snapshot of a branch, tag or commit in a repository's folder in a cache; None: it is not there."""
    ref = root / "refs" / revision
    commit = ref.read_text(encoding="ascii", errors="replace").strip() if ref.is_file() else revision
    return next((snapshot for snapshot in _snapshots(root) if snapshot.name == commit), None)


def unfinished(path: Path) -> str:
    """A line about downloads in a repository's folder, or in its cache, that were not finished; else empty."""
    real = path.resolve()
    places = [path, *(p for p in path.glob("*") if p.is_dir()), path / ".cache" / "huggingface" / "download"]
    places += [p for p in places[-1].glob("*") if p.is_dir()]
    if real.parent.name == "snapshots":
        places.append(real.parents[1] / "blobs")
    left = [file for place in places for file in place.glob("*") if file.suffix in _UNFINISHED]
    if not left:
        return ""
    more = f" and {len(left) - 1} more" if len(left) > 1 else ""
    return f"\nA download was not finished: {left[0]}{more}. Run the same download again."


def _ours() -> dict[str, Path]:
    """The checkpoints that come with jvdiff, by name: those inside the package, or beside it in a checkout."""
    return {file.parent.name: file.parent for file in sorted(shipped("checkpoints").glob("*/model_index.json"))}


def _repository(name: str, ours: list[str]) -> tuple[str, str | None]:
    """OWNER/NAME and the revision, None where none is given; raises UsageError where a folder was meant."""
    parts = None if "models--" in name else _NAME.fullmatch(name)  # a folder of a cache that is not here
    if parts is None:
        cached = Path(name).name.removeprefix("models--").replace("--", "/", 1)
        meant = f" (did you mean {cached}?)" if "models--" in name else nearest(name, ours)
        raise UsageError(
            f"{name!r:.200}: no such folder, nor is it a repository's name (OWNER/NAME or "
            f"OWNER/NAME@REVISION){meant}.\n"
            f"The checkpoints that come with jvdiff are: {', '.join(ours) or 'none'}."
        )
    first = Path(name.split("/")[0])
    if str(first) in _OURS or os.path.isdir(first):
        there = [str(p) for p in first.iterdir() if p.is_dir()] if os.path.isdir(first) else []
        there += [f"{first}/{one}" for one in ours if str(first) == "checkpoints"]
        raise UsageError(
            f"{name!r:.200}: no such folder{nearest(name, there)}.\n"
            f"A name that begins with {first}/ is not looked up on the hub, so that a typing error fetches nothing.\n"
            f"Where there is a connection: hf download OWNER/{Path(name).name} --local-dir {name}"
        )
    return parts[1], parts[2]


def _snapshot(repository: str, revision: str | None, download: bool, tell: Callable[[str], None]) -> Path:
    from huggingface_hub import constants, snapshot_download

    patterns: dict[str, Any] = {"allow_patterns": _FILES, "ignore_patterns": _LEFT}
    if download:
        tell(f"{repository}: no folder here, taken from the Hugging Face hub or its cache")
    reason = ""
    for local in (False, True) if download else (True,):
        try:
            return Path(snapshot_download(repository, revision=revision, local_files_only=local, **patterns))
        except Exception as error:  # the hub's, the network's and the system's; their texts may hold a token
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceError(
                    f"{constants.HF_HUB_CACHE}: the disk is full; {repository} is not complete there.\n"
                    "Free some space, or let HF_HUB_CACHE name a folder with more, then start again."
                ) from None
            reason = reason or (f", and not downloaded ({type(error).__name__})" if download else "")
    root, there = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}", ""
    try:
        if snapshot := _cached(root, revision or "main"):
            return snapshot  # not whole, as the hub's library knows; what is missing, who reads it says
        there = "".join(f"\nThe cache has {repository}@{other.name}." for other in _snapshots(root)[:1])
    except OSError as error:
        there = f"\n{root}: cannot be read ({error.strerror})."
    wanted = f" --revision {revision}" if revision else ""
    raise CheckpointError(
        f"{repository}: not in the local cache{reason}.{there}\n"
        f"Where there is a connection, run: hf download {repository}{wanted}"
    )
