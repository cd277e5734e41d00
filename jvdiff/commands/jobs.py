"""What a sampling run is to make: subjects, seeds, settings and file names, checked before any weight is read."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jvdiff import config as options
from jvdiff import plan, sharding
from jvdiff.commands.command_line import say
from jvdiff.commands.prompts import Entry, read_subjects
from jvdiff.errors import CheckpointError, UsageError
from jvdiff.media import pictures
from jvdiff.models.family import PICTURES, SUBJECTS, Clip
from jvdiff.pipeline import Context, Repository, check_seed, check_subjects, make_request, size_for
from jvdiff.precision import Precision
from jvdiff.runtime import environment, peers, run_state
from jvdiff.runtime.claims import Claim
from jvdiff.sharding import MeshShape

MAX_SEEDS = 10_000
WEIGHTS = "checkpoint_digest"  # the fact that names the weights
PATTERN = "pattern_sha256"  # and that of a file with the pattern, where it has one


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """One video to make.

    subject: prompt, or name of the class
    seed: of its noise
    clip: what its settings mean
    made: -> the arrays of its request
    name: of its files
    pictures: digests of its pictures, by option (`image`, `last_image`)
    files: where those of them are that its own entry names
    numbered: whether the seed stands behind the name
    seed_given: somebody asked for this seed
    state: where an earlier run stopped
    claim: what keeps other processes from making it, where they may
    """

    subject: Any
    seed: int
    clip: Clip
    made: Callable[[], Any]
    name: str
    pictures: Mapping[str, str] = dataclasses.field(default_factory=dict)
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    numbered: bool = False
    seed_given: bool = True
    state: run_state.RunState | None = None
    claim: Claim | None = None

    @property
    def inputs(self) -> Any:
        """The arrays of its request; in a large batch, pictures are read once more, and must be the same."""
        return _kept(self.made)

    @property
    def stem(self) -> str:
        """The name of its files, complete."""
        return f"{self.name}_seed{self.seed}" if self.numbered else self.name


@functools.lru_cache(maxsize=256)  # with pictures they are a few MiB each
def _kept(made: Callable[[], Any]) -> Any:
    return made()


def make_jobs(config: Any, repository: Repository, given: Collection[str] = ()) -> tuple[list[Job], list[str]]:
    """What to make, checked, before any weight is read; and the problems of single entries of a file or a tuple.

    Entry i has the seed `config.seed` + i, whether the entries before it can be used or not. given: the fields that the
    command line itself sets: a height or width among them stays, whatever a picture's proportions.
    """
    family, jobs, problems = repository.family, [], []
    field = SUBJECTS[family.subject]
    _check_fields(config, field)
    common = {name: config.get(name) for name in options.names(family.settings)}
    shared = _Shared(repository, common, _paths(config), frozenset(given))
    shared.clip(repository.settings(**common))  # settings that cannot be are told once, not line by line
    shared.shown(shared.paths)  # a file that cannot be read is told once, not line by line
    seeds, (part, parts) = _seeds(config), _part(config.part)
    first = peers.gather(check_seed(config.seed))[0]  # of several processes each would draw its own
    for i, entry in enumerate(_entries(config, field, repository)):
        every = seeds or [(first + i) % 2**32]
        if not (chosen := [seed for j, seed in enumerate(every, i * len(every)) if j % parts == part - 1]):
            continue
        try:
            job = _job(entry, shared)
            if seeds and job.seed_given:
                raise UsageError(f"seed is {job.seed}, and --seeds={config.seeds}; leave one of them out.")
            if job.seed_given:
                jobs.append(job)
                continue
            told, numbered = bool(seeds) or config.seed is not None, job.numbered or bool(seeds)
            jobs += [dataclasses.replace(job, seed=seed, seed_given=told, numbered=numbered) for seed in chosen]
        except (UsageError, CheckpointError) as error:
            if not are_entries(config, repository):
                raise
            problems.append(f"{entry.where}: {str(error).splitlines()[0]}")
    return jobs, problems


@dataclasses.dataclass(frozen=True, eq=False)
class _Shared:
    """What the entries of a run share.

    repository: of the weights
    settings: of the configuration
    paths: of its pictures, by option
    given: fields that the command line itself sets
    """

    repository: Repository
    settings: Mapping[str, Any]
    paths: Mapping[str, str]
    given: frozenset[str] = frozenset()

    @functools.cached_property
    def _read(self) -> Callable[[str, str], np.ndarray]:
        return functools.lru_cache(maxsize=4)(pictures.read)  # entry after entry may name the same file

    @functools.cached_property
    def clip(self) -> Callable[[Any], Clip]:
        """Of complete settings."""
        return functools.cache(functools.partial(self.repository.family.clip, self.repository.models))

    def shown(self, paths: Mapping[str, str]) -> dict[str, np.ndarray]:
        """The pictures uint8 [Y,X,3] of these files, by option."""
        return {name: self._read(path, name) for name, path in paths.items()}

    def job(self, subject: Any, seed: int, clip: Clip, name: str, paths: Mapping[str, str], **more: Any) -> Job:
        """A job whose request can be made, with these pictures."""
        digests = _digests(self.shown(paths))
        job = Job(
            subject, seed, clip, functools.partial(self._inputs, subject, clip, paths, digests), name, digests, **more
        )
        _ = job.inputs  # says what is wrong with it
        return job

    def _inputs(self, subject: Any, clip: Clip, paths: Mapping[str, str], digests: Mapping[str, str]) -> Any:
        shown, family = self.shown(paths), self.repository.family
        if changed := [paths[name] for name, digest in _digests(shown).items() if digest != digests[name]]:
            raise CheckpointError(f"{changed[0]}: changed since it was read before; start again.")
        each: dict[str, Any] = {name: (picture,) for name, picture in shown.items()}
        request = make_request(family, clip, (subject,), **each)
        return family.inputs(self.repository.models, clip, request)


def by_size(jobs: Sequence[Job]) -> list[Job]:
    """The jobs with those of one size together, so that each size is compiled once; where there are several, that is
    said."""
    sizes = collections.Counter(job.clip.frames for job in jobs)
    if len(sizes) > 1:
        each = ", ".join(f"{n} of {width}x{height} and {frames} frames" for (frames, height, width), n in sizes.items())
        say(f"{len(sizes)} sizes of clips, each compiled once: {each:.200}")
    order = {size: number for number, size in enumerate(sizes)}
    return sorted(jobs, key=lambda job: order[job.clip.frames])


def are_entries(config: Any, repository: Repository) -> bool:
    """Whether a config names its subjects one by one, in a file or a tuple, so that each may fail alone."""
    return config.prompts is not None or isinstance(config[SUBJECTS[repository.family.subject]], tuple | list)


def _entries(config: Any, field: str, repository: Repository) -> list[Entry]:
    """The subjects that a config names, or those of its prompts file."""
    if config.prompts is not None:
        return read_subjects(config.prompts, repository)
    family, named = repository.family, config[field]
    if not are_entries(config, repository) or not named:
        return [Entry(field, {field: each}) for each in check_subjects(repository, **{family.subject: named})]
    entries = []
    for number, subject in enumerate(named, 1):
        where = f"{field} {number}"
        try:
            entries.append(Entry(where, {field: family.check_subject(repository.models, subject)}))
        except UsageError as error:
            entries.append(Entry(where, {}, str(error)))
    return entries


def _job(entry: Entry, shared: _Shared) -> Job:
    """The job of an entry, whose seed is 0 where it has none; UsageError or CheckpointError where it cannot be made."""
    if entry.problem is not None:
        raise UsageError(entry.problem)
    values, repository, own = entry.values, shared.repository, _paths(entry.values)
    changes, paths = {n: values[n] for n in shared.settings if values.get(n) is not None}, {**shared.paths, **own}
    complete = repository.settings(**{**shared.settings, **changes})
    if first := [image for name, image in shared.shown(paths).items() if name == "image"]:
        size = size_for(repository.family, repository.models, complete, first, shared.given | changes.keys())
        complete = dataclasses.replace(complete, **size)
    subject, seed, name = values[SUBJECTS[repository.family.subject]], values.get("seed"), values.get("id")
    told = {"seed_given": seed is not None, "numbered": name is None, "files": own}
    seed = 0 if seed is None else check_seed(seed)
    return shared.job(subject, seed, shared.clip(complete), name or slug(subject), paths, **told)


def _paths(fields: Any) -> dict[str, str]:
    """The files of pictures that fields name, by option."""
    return {name: options.expanded(name, fields[name]) for name in PICTURES if fields.get(name) is not None}


def _seeds(config: Any) -> list[int]:
    """The field `seeds`: 0:16 are sixteen, 3,5,8 are three; [] where it is None.

    Raises:
        UsageError: it is neither, too much, or there is `seed` too.
    """
    if config.seeds is None:
        return []
    if config.seed is not None:
        raise UsageError(f"seed is {config.seed}, and seeds {config.seeds}; leave one of them out (--seed=none).")
    if match := re.fullmatch(r"(\d{1,10}):(\d{1,10})", config.seeds):
        seeds = range(int(match[1]), int(match[2]))
    elif re.fullmatch(r"\d{1,10}(,\d{1,10})+", config.seeds):
        seeds = [int(each) for each in config.seeds.split(",")]
    else:
        raise UsageError(f"seeds is {config.seeds!r:.80}; expected 0:16 for sixteen from 0 to 15, or a list: 3,5,8.")
    if not 1 <= len(seeds) <= MAX_SEEDS or len({*seeds}) < len(seeds):
        raise UsageError(f"seeds is {config.seeds!r:.80}; expected 1 to {MAX_SEEDS} of them, each once.")
    return [check_seed(seed) for seed in seeds]


def _part(text: str | None) -> tuple[int, int]:
    """The field `part` as (which, of how many), from 1; (1, 1) where it is None."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", "1/1" if text is None else text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"part is {text!r:.80}; expected 1/16 for the first of sixteen, up to 16/16 for the last.")
    return int(match[1]), int(match[2])


def _digests(shown: Mapping[str, np.ndarray]) -> dict[str, str]:
    return {name: pictures.digest(each) for name, each in shown.items()}


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


def slug(text: Any) -> str:
    """A prompt, or the name of a class, as a part of a file's name."""
    return re.sub(r"\W+", "-", str(text).lower())[:48].strip("-_") or "video"


def facts(job: Job, repository: Repository, dtypes: Precision) -> dict[str, Any]:
    """What decides a clip, as JSON values: two runs with equal facts make the same one (on CPU, bit for bit)."""
    return asked(job, repository, dtypes) | weights(repository)


def weights(repository: Repository) -> dict[str, Any]:
    """What of the facts names the weights; reads them all, unless they are loaded."""
    return {WEIGHTS: repository.digest}


def asked(job: Job, repository: Repository, dtypes: Precision) -> dict[str, Any]:
    """The facts but for the weights: what is known before those are read."""
    family = repository.family
    subject = family.describe(repository.models, job.subject)
    return {
        **{name: subject[name] for name in family.facts},
        "seed": job.seed,
        **{name: job.pictures.get(name) for name in family.takes},
        **job.clip.facts(),
        "precision": dtypes.name,
        "vae_decode": dtypes.vae_decode,
    }


def resumed(config: Any, state: run_state.RunState, fields: Mapping[str, Any], repository: Repository) -> Job:
    """The job that `state` is half of; of which weights it is, is compared when they are read.

    Args:
        fields: those that the command line itself sets; one that differs from the state is refused.

    Raises:
        CheckpointError: other fields or another picture than the state's, or a state of another model.
        UsageError: subjects that the model cannot use, or a file of them.
    """
    folder, saved, family = config.resume, state.facts, repository.family
    field, (fact, *_) = SUBJECTS[family.subject], family.facts
    if missing := [name for name in (fact, "seed", "precision") if name not in saved]:
        raise CheckpointError(f"{folder}: the state does not describe a run of this model: it has no {missing[0]}.")
    _check_kind(fields, field)
    for name in ("prompts", "seeds", "part"):
        if fields.get(name) is not None:
            raise UsageError(f"{name} is {fields[name]}, and {folder} is the state of one video; leave it out.")
    now: dict[str, Any] = {}
    for name, value in fields.items():
        if name in saved and value is not None and name not in PICTURES:  # a state has their digests, compared below
            now[name] = float(value) if isinstance(saved[name], float) else value
    if (named := fields.get(field)) is not None:
        subjects = check_subjects(repository, **{family.subject: named})
        now[field] = subjects[0] if len(subjects) == 1 else subjects
    saved_there, there = environment.compared(saved)
    same = functools.partial(weights, repository)
    run_state.check_same({**saved, field: saved[fact], **saved_there}, now | there, folder, same)
    try:
        settings = {name: saved[name] for name in options.names(family.settings) if name in saved}
        clip = family.clip(repository.models, repository.settings(**settings, fps=config.get("fps")))
        run_state.check_same(saved, {name: value for name, value in clip.facts().items() if name == PATTERN}, folder)
        shared = _Shared(repository, settings, _paths(config))
        run_state.check_same(saved, dict.fromkeys(PICTURES) | _digests(shared.shown(shared.paths)), folder)
        name = Path(folder).resolve().name.removesuffix(".state")
        subject = family.check_subject(repository.models, saved[fact])
        return shared.job(subject, saved["seed"], clip, name, shared.paths, state=state)
    except UsageError as error:
        raise CheckpointError(f"{folder}: the state does not describe a run of this model: {error}") from None


def check_mesh(job: Job, repository: Repository, mesh: MeshShape | None) -> None:
    """Raises UsageError if the mesh is not on this machine, or does not divide what the job computes."""
    if mesh is not None:
        sharding.check_mesh(
            mesh, repository.family.mesh_sizes(repository.models, job.clip, 1, mesh), jax.device_count()
        )


def check_attention(job: Job, context: Context) -> None:
    """Raises UsageError if an implementation that was asked for cannot compute the job, or not on this machine."""
    try:
        attention(context, job.clip, job.inputs)
    except NotImplementedError as error:
        raise UsageError(f"{error}.\nLeave --attention out to take the best that can.") from None


def tell_tables(jobs: Sequence[Job], repository: Repository) -> None:
    """Says of every pattern that it was found with other weights, if so; reads all, unless they are loaded."""
    for pattern in dict.fromkeys(segment.pattern for job in jobs for segment in job.clip.segments):
        if (of := pattern.recorded_of) not in (None, repository.digest):
            say(f"notice: {pattern} was recorded of other weights ({of:.12}); it is taken all the same.")


def attention(context: Context, clip: Clip, inputs: Any) -> list[Mapping[str, str]]:
    """The implementation of each kind of attention that a clip takes, for each segment."""
    return [
        context.family.attention(context.models, clip, context.forward(clip, segment), inputs)
        for segment in clip.segments
    ]


def choose_mesh(jobs: Sequence[Job], repository: Repository, dtypes: Precision, mesh: Any) -> MeshShape | None:
    """The mesh that a config names or, for "auto", the smallest that the largest job fits; None for one device.

    Raises:
        UsageError: invalid, or not of all devices of all processes.
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
    return shape
