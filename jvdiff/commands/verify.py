"""The command line that says whether what is on a disk is what was written.

    jvdiff verify out runs/digits_dit checkpoints/NAME

Each PATH is a repository, published or converted, a component of one, the folder of a training, a saved state, the
record of a clip or a stream (NAME.json; NAME.mp4 means the same), or a folder that holds such things. There is a line
for each.

Exit status: 0 all are what was written · 2 usage · 3 something differs, is missing, or cannot be read.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jvdiff import config as configs
from jvdiff.commands import arguments, command_line, options
from jvdiff.commands.arguments import Command, Section
from jvdiff.errors import IntegrityError, JvdiffError, UsageError
from jvdiff.runtime import records
from jvdiff.runtime.staging import MANIFEST
from jvdiff.weights.hub import locate

_HASHED = re.compile(r"[0-9a-f]{64}")


class How(NamedTuple):
    """How repositories are read.

    family: a user's own; None: as their files say
    follow_symlinks: weights may be links to files elsewhere
    """

    family: Any
    follow_symlinks: bool


class Thing(NamedTuple):
    """Something that was written as a whole.

    path: where it is
    kind: what it is, for the line
    check: -> what more there is to say; raises where it is not what was written
    """

    path: Path
    kind: str
    check: Callable[[], str]


COMMAND = Command(
    name="verify",
    about="whether checkpoints, runs, states and clips are what was written",
    examples=("PATH ...", "out runs/digits_dit checkpoints/NAME"),
    sections=lambda config, flags: [Section(str(options.Verify.__doc__), configs.options(options.Verify))],
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status; errors are sentences on stderr."""
    words = list(sys.argv if argv is None else argv)
    return command_line.ended(lambda: _verify(words), words)


def _verify(words: Sequence[str]) -> None:
    names = [word for word in words[1:] if not word.startswith("-")]
    values = arguments.values(COMMAND, [words[0], *(word for word in words[1:] if word.startswith("-"))])
    if not names:
        raise UsageError("no path. Usage: jvdiff verify PATH ... (a checkpoint, a run, a state, a clip, or a folder).")
    from jvdiff import models
    from jvdiff.runtime import foreign

    how = How(models.named(values["family"]), values["follow_symlinks"])
    wrong = 0
    for name in names:
        path = Path(configs.expanded("the path", name))
        things = list(found_in(path if path.exists() else locate(name, download=False), how))
        if not things:
            raise UsageError(f"{name}: nothing there that jvdiff writes or reads: no checkpoint, run, state or record.")
        for thing in things:
            try:
                line = f"{thing.path}: {thing.kind}, {thing.check()}"
            except (JvdiffError, OSError) as raised:
                error = raised if isinstance(raised, JvdiffError) else foreign.explained(raised)
                line, wrong = f"{thing.path}: {thing.kind}, DIFFERS: {' '.join(str(error).split())}", wrong + 1
            print(line, flush=True)
    if wrong:
        raise IntegrityError(f"not what was written, or not to be read: {wrong} of the above, marked DIFFERS.")


def found_in(path: Path, how: How) -> Iterator[Thing]:
    """The things at a path, or below a folder; what is inside a thing is part of it."""
    if path.is_file():
        record = path if path.suffix == ".json" else path.with_suffix(".json")
        if _is_record(record):
            yield Thing(record, "record", lambda: _record(record))
        return
    if path.name.startswith("."):
        return
    if (path / "state.json").is_file():
        yield Thing(path, "saved state", lambda: _state(path))
    elif (path / "model_index.json").is_file():
        yield Thing(path, "repository", lambda: _repository(path, how))
    elif (path / MANIFEST).is_file() or ((path / "config.json").is_file() and (path.parent / MANIFEST).is_file()):
        yield Thing(path, "component", lambda: _component(path, how.follow_symlinks))
    else:
        yield from _inside(path, how)


def _inside(path: Path, how: How) -> Iterator[Thing]:
    """The things in a folder that is none itself: an output folder, or that of a training."""
    for inner in sorted(path.iterdir()):
        step = path.name == "state" and inner.name.isdecimal()
        if inner.is_dir() and step:
            yield Thing(inner, "training state", lambda inner=inner: _training_state(inner))
        elif inner.is_dir() and not inner.is_symlink():
            yield from found_in(inner, how)
        elif (
            inner.suffix == ".json"
            and inner.with_suffix(".npz").is_file()
            and set(records.read(inner)) == {"key", "sha256"}
        ):
            kept = inner.with_suffix(".npz")
            yield Thing(kept, "kept arrays", lambda kept=kept: _kept(kept))
        elif _is_record(inner):
            yield Thing(inner, "record", lambda inner=inner: _record(inner))


def _is_record(path: Path) -> bool:
    """Whether a file is the record of a clip or a stream, damaged or not: JSON with a picture or a video beside it."""
    beside = any(path.with_suffix(suffix).is_file() for suffix in (".mp4", ".apng", ".png"))
    return path.suffix == ".json" and path.is_file() and (beside or "checkpoint_digest" in records.read(path))


# ------------------------------------------------------------------------------------------------------------ the kinds


def _record(path: Path) -> str:
    record = records.read(path)
    if not {"files", "sha256"} & set(record) and "checkpoint_digest" in record:
        return "written by a version without digests; nothing to compare"
    if record.get("sha256") != records.digest(record) or not isinstance(record.get("files"), dict):
        raise IntegrityError("its content does not match its digest.")
    for suffix, said in record["files"].items():
        file = path.with_name(f"{path.name.removesuffix('.json')}{suffix}")
        if not file.is_file():
            raise IntegrityError(f"{file.name} is missing.")
        if (size := file.stat().st_size) != said["bytes"]:
            raise IntegrityError(f"{file.name} has {size:,} bytes instead of {said['bytes']:,}.")
        if records.file_sha256(file) != said["sha256"]:
            raise IntegrityError(f"{file.name} has other content.")
    return f"as written, with {', '.join(record['files'])}"


def _state(path: Path) -> str:
    from jvdiff.runtime import run_state

    state = run_state.load(path)
    video = state.facts.get("video")
    if isinstance(video, dict):
        from jvdiff.media.fragmented_mp4 import FragmentedMP4

        film = Path(f"{state.facts.get('files', path.with_suffix(''))}.mp4")
        FragmentedMP4(film, state.facts["fps"], frames=state.facts["frames"], kept=video)
        return f"as written after {state.done} chunks, with {film.name} so far"
    return f"as written after {state.done} steps or chunks"


def _component(path: Path, follow_symlinks: bool) -> str:
    from jvdiff.weights.manifest import verify_files

    verify_files(path, follow_symlinks)
    return "as written"


def _training_state(path: Path) -> str:
    if not (path / MANIFEST).is_file():
        return "written by a version without digests; nothing to compare"
    return _component(path, follow_symlinks=True)


def _kept(path: Path) -> str:
    if records.read(path.with_suffix(".json")).get("sha256") != records.file_sha256(path):
        raise IntegrityError("other content; the training makes it anew.")
    return "as written"


def _repository(path: Path, how: How) -> str:
    from jvdiff.pipeline import repository

    if (path / MANIFEST).is_file():
        said = _component(path, how.follow_symlinks)
        repository.inspect(path, family=how.family, follow_symlinks=how.follow_symlinks)
        return said
    return _published(path, how)


def _published(path: Path, how: How) -> str:
    """What can be said of a folder in Diffusers' layout. One that was written here has a manifest; of others there are
    the digests that the hub's cache, git-annex and `hf download` keep."""
    from jvdiff.pipeline import repository
    from jvdiff.weights import manifest, safetensors

    said = repository.inspect(path, family=how.family, follow_symlinks=how.follow_symlinks)
    for name in said.models.configs:
        part = said.family.parts[name]
        ignored = part.ignored(said.models.configs[name])
        safetensors.open_folder(path / name, part.stem, ignored=ignored, follow_symlinks=how.follow_symlinks)
    files = repository.read_files(said)
    if (path / manifest.PUBLISHED).is_file():
        manifest.verify_published(path, files, how.follow_symlinks)
        return f"as written; sha256 {said.digest}"
    named = {name: digest for name, file in files.items() if (digest := _named_digest(path, file))}
    whole = said.digest
    for name, digest in named.items():
        if said.digests[files[name]] != digest:
            raise IntegrityError(f"{name} is not what its publisher's digest says. Download it again.")
    compared = f"{len(named)} of {len(files)} files compared with the digests they were downloaded under"
    return f"whole; {compared if named else 'it has no digests of its own'}; sha256 {whole}"


def _named_digest(root: Path, file: Path) -> str | None:
    """The sha256 under which a file was downloaded: its blob's name, git-annex's key, or what hf wrote beside it."""
    real = os.path.realpath(file)
    if _HASHED.fullmatch(name := os.path.basename(real)):
        return name
    if annexed := re.match(r"SHA256E?-s\d+--([0-9a-f]{64})", name):
        return annexed[1]
    told = root / ".cache" / "huggingface" / "download" / f"{file.relative_to(root)}.metadata"
    lines = told.read_text(errors="replace").splitlines() if told.is_file() else []
    return next((line for line in lines if _HASHED.fullmatch(line)), None)
