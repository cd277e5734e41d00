"""What a sampling run is to make: subjects, seeds, settings and file names, checked before any weight is read."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jvdiff import config as options
from jvdiff import plan, sharding
from jvdiff.commands.command_line import say
from jvdiff.errors import CheckpointError, UsageError
from jvdiff.media import video as videos
from jvdiff.models.family import SUBJECTS, Clip
from jvdiff.pipeline import Context, Repository, check_seed, check_subjects, make_request
from jvdiff.precision import Precision
from jvdiff.runtime import environment, peers, run_state
from jvdiff.sharding import MeshShape

MAX_PROMPTS_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """One video to make.

    subject: prompt, or name of the class
    seed: of its noise
    clip: what its settings mean
    inputs: arrays of its request, made once
    stem: name of its files
    image: uint8 [Y,X,3] of the first frame, where there is one
    seed_given: somebody asked for this seed
    state: where an earlier run stopped
    """

    subject: Any
    seed: int
    clip: Clip
    inputs: Any
    stem: str
    image: Any = None
    seed_given: bool = True
    state: run_state.RunState | None = None


def read_subjects(path: str | Path, repository: Repository) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of a prompts file as (objects that name a subject, one sentence for each line that is unusable).

    A .jsonl file holds one JSON object a line: prompt (or class_label), and optionally id (the file name), seed, and
    any setting. Any other file holds one prompt, or class, a line. Blank lines are passed over.

    Raises:
        UsageError: the file cannot be read or is empty.
    """
    path, entries, problems, ids = Path(path), [], [], set()
    for number, line in enumerate(_lines(path), 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if text:
                entries.append(_entry(text, path.suffix == ".jsonl", repository, ids) | {"line": number})
        except (UsageError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            problems.append(f"{path} line {number}: {str(error).splitlines()[0]}")
    if not entries and not problems:
        raise UsageError(f"prompts: {path} holds no prompt.")
    return entries, problems


def _lines(path: Path) -> list[bytes]:
    try:
        if path.stat().st_size > MAX_PROMPTS_BYTES:
            raise UsageError(f"prompts: {path} is larger than {MAX_PROMPTS_BYTES >> 20} MiB; split it.")
        return path.read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError(f"prompts: cannot read {path}: {error.strerror}.") from None


def _entry(text: str, is_json: bool, repository: Repository, ids: set[str]) -> dict[str, Any]:
    """One line of a prompts file, checked; its id joins `ids`."""
    field = SUBJECTS[repository.family.subject]
    entry = json.loads(text) if is_json else {field: text}
    if not isinstance(entry, dict):
        raise UsageError("not a JSON object")
    options.check_names("key", entry, (field, "id", "seed", *options.names(repository.family.settings)))
    entry[field] = repository.family.check_subject(repository.models, entry.get(field))
    if (name := entry.get("id")) is not None:
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]{0,99}", name):
            raise UsageError(f"id is {name!r:.80}; expected up to 100 letters, digits, '-', '_' or '.'")
        if name in ids:
            raise UsageError(f"id {name!r} was used on an earlier line")
        ids.add(name)
    return entry


def make_jobs(config: Any, repository: Repository) -> tuple[list[Job], list[str]]:
    """What to make, checked, before any weight is read; and the problems of single lines of a prompts file."""
    family, problems = repository.family, []
    field, names = SUBJECTS[family.subject], options.names(family.settings)
    _check_fields(config, field)
    common = {name: config.get(name) for name in names}
    clip = family.clip(repository.models, repository.settings(**common))
    picture = functools.cache(lambda height, width: _picture(config, height, width))
    picture(*clip.frames[1:])  # a file that cannot be read is told once, not line by line
    if config.prompts is not None:
        entries, problems = read_subjects(config.prompts, repository)
    else:
        named = config[field]
        subjects = list(named) if isinstance(named, tuple | list) else named
        entries = [{field: subject} for subject in check_subjects(repository, **{family.subject: subjects})]
    first = peers.gather(check_seed(config.seed))[0]  # of several processes each would draw its own
    jobs = []
    for i, entry in enumerate(entries):
        try:
            seed = check_seed(entry["seed"]) if entry.get("seed") is not None else (first + i) % 2**32
            changes = {name: entry[name] for name in names if entry.get(name) is not None}
            subject = entry[field]
            stem = entry.get("id") or f"{slug(subject)}_seed{seed}"
            asked = config.seed is not None or entry.get("seed") is not None
            chosen = family.clip(repository.models, repository.settings(**common | changes)) if changes else clip
            image = picture(*chosen.frames[1:])
            jobs.append(make_job(repository, subject, seed, chosen, stem, image, seed_given=asked))
        except UsageError as error:
            if "line" not in entry:
                raise
            problems.append(f"{config.prompts} line {entry['line']}: {str(error).splitlines()[0]}")
    return jobs, problems


def make_job(repository: Repository, subject: Any, seed: int, clip: Clip, stem: str, image: Any, **more: Any) -> Job:
    """A job and the arrays of its request."""
    request = make_request(repository.family, clip, (subject,), image=image)
    return Job(subject, seed, clip, repository.family.inputs(repository.models, clip, request), stem, image, **more)


def _check_fields(config: Any, field: str) -> None:
    """Raises UsageError unless the config names subjects of the model's kind, in one way."""
    _check_kind(config, field)
    if (config.get(field) is None) == (config.prompts is None):
        raise UsageError(f'give either --{field}="..." or --prompts=FILE.')


def _check_kind(fields: Any, field: str) -> None:
    """Raises UsageError where subjects of another kind than the model's are named."""
    other = next((name for name in SUBJECTS.values() if name != field and fields.get(name) is not None), None)
    if other is not None:
        raise UsageError(f"{other} is given; this model takes {field}.")


def _picture(config: Any, height: int, width: int) -> Any:
    """The pixels uint8 [Y,X,3] of the field `image`, None where it is empty."""
    path = config.get("image")
    return None if path is None else videos.read_picture(path, height, width)


def slug(text: Any) -> str:
    """A prompt, or the name of a class, as a part of a file's name."""
    return re.sub(r"\W+", "-", str(text).lower())[:48].strip("-_") or "video"


def facts(job: Job, repository: Repository, precision: str) -> dict[str, Any]:
    """What decides a clip, as JSON values: two runs with equal facts make the same one (on CPU, bit for bit)."""
    family = repository.family
    subject = family.describe(repository.models, job.subject)
    image = {} if job.image is None else {"image": hashlib.sha256(job.image.tobytes()).hexdigest()}
    return {
        **{name: subject[name] for name in family.facts},
        "seed": job.seed,
        **image,
        **job.clip.facts(),
        "precision": precision,
        "checkpoint_digest": repository.digest,
    }


def without_done(jobs: Sequence[Job], output: Path, repository: Repository, precision: str) -> list[Job]:
    """The jobs that no record in `output` describes; each record stands for one of them."""
    records = []
    for path in sorted(output.glob("*.json")):
        with contextlib.suppress(OSError, ValueError):
            record = json.loads(path.read_bytes())
            if isinstance(record, dict):
                records.append(record)
    left = []
    for job in jobs:
        asked = {k: v for k, v in facts(job, repository, precision).items() if k != "seed" or job.seed_given}
        match = next((record for record in records if all(record.get(k) == v for k, v in asked.items())), None)
        if match is None:
            left.append(job)
        else:
            records.remove(match)
    return left


def resumed(config: Any, state: run_state.RunState, fields: Mapping[str, Any], repository: Repository) -> Job:
    """The job that `state` is half of.

    Args:
        fields: those that the command line itself sets; one that differs from the state is refused.

    Raises:
        CheckpointError: other weights, fields or picture than the state's, or a state of another model.
        UsageError: subjects that the model cannot use, or a file of them.
    """
    folder, saved, family = config.resume, state.facts, repository.family
    field, (fact, *_) = SUBJECTS[family.subject], family.facts
    if missing := [name for name in (fact, "seed", "precision") if name not in saved]:
        raise CheckpointError(f"{folder}: the state does not describe a run of this model: it has no {missing[0]}.")
    _check_kind(fields, field)
    if fields.get("prompts") is not None:
        raise UsageError(f"prompts is {fields['prompts']}, and {folder} is the state of one video; leave it out.")
    now: dict[str, Any] = {"checkpoint_digest": repository.digest}
    for name, value in fields.items():
        if name in saved and value is not None and name != "image":  # a state has its digest, compared below
            now[name] = float(value) if isinstance(saved[name], float) else value
    if (named := fields.get(field)) is not None:
        subjects = check_subjects(repository, **{family.subject: named})
        now[field] = subjects[0] if len(subjects) == 1 else subjects
    saved_there, there = environment.compared(saved)
    run_state.check_same({**saved, field: saved[fact], **saved_there}, now | there, folder)
    try:
        settings = {name: saved[name] for name in options.names(family.settings) if name in saved}
        clip = family.clip(repository.models, repository.settings(**settings, fps=config.get("fps")))
        image = _picture(config, *clip.frames[1:])
        if image is not None or "image" in saved:
            digest = None if image is None else hashlib.sha256(image.tobytes()).hexdigest()
            run_state.check_same({"image": saved.get("image")}, {"image": digest}, folder)
        stem = Path(folder).resolve().name.removesuffix(".state")
        subject = family.check_subject(repository.models, saved[fact])
        return make_job(repository, subject, saved["seed"], clip, stem, image, state=state)
    except UsageError as error:
        raise CheckpointError(f"{folder}: the state does not describe a run of this model: {error}") from None


def check_attention(context: Context, jobs: Sequence[Job]) -> None:
    """Raises UsageError if an implementation that was asked for cannot compute a job, or not on this machine."""
    for job in jobs:
        try:
            attention(context, job.clip, job.inputs)
        except NotImplementedError as error:
            raise UsageError(f"{error}.\nLeave --attention out to take the best that can.") from None


def attention(context: Context, clip: Clip, inputs: Any) -> list[Mapping[str, str]]:
    """The implementation of each kind of attention that a clip takes, for each segment."""
    return [
        context.family.attention(context.models, clip, context.forward(clip, segment), inputs)
        for segment in clip.segments
    ]


def choose_mesh(jobs: Sequence[Job], repository: Repository, dtypes: Precision, mesh: Any) -> MeshShape | None:
    """The mesh that a config names or, for "auto", the smallest that the largest job fits; None for one device.

    Raises:
        UsageError: invalid, not on this machine, or not for one of the jobs.
        ResourceError: "auto", and none fits.
    """
    shape = sharding.read_mesh(mesh)
    if peers.several() and getattr(shape, "devices", 0) != jax.device_count():
        raise UsageError(
            f"mesh is {shape}; expected one of all {jax.device_count()} devices of {jax.process_count()} processes,\n"
            f"for instance --mesh=sequence={jax.device_count()}."
        )
    if shape is None or not jobs:
        return None
    context = Context(repository.family, repository.models, dtypes)
    if isinstance(shape, str):  # "auto"
        largest = max((job.clip for job in jobs), key=lambda clip: clip.tokens)
        shape, sentence = plan.smallest_mesh(context, largest)
        say(sentence)
    for job in jobs:
        sizes = repository.family.mesh_sizes(repository.models, job.clip, 1, shape)
        sharding.check_mesh(shape, sizes, jax.device_count())
    return shape
