"""What a sampling run is to make: prompts, seeds, settings and file names, checked before any weight is read."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jvdiff import pipeline, plan, precision, sharding
from jvdiff.commands.command_line import say
from jvdiff.errors import CheckpointError, UsageError
from jvdiff.models import wan
from jvdiff.pipeline.settings import FIELDS, Configs, Settings, check_prompt, check_seed, latent_shape, read_pattern
from jvdiff.runtime import distributed, run_state
from jvdiff.sharding import MeshShape

MAX_PROMPTS_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Job:
    """One video to make; `state` where an earlier run stopped."""

    prompt: str
    seed: int
    settings: Settings
    stem: str
    seed_given: bool = True
    state: run_state.RunState | None = None


def read_prompts(path: str | Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of a prompts file as (objects with at least `prompt`, one sentence for each line that is unusable).

    A .jsonl file holds one JSON object a line: prompt, and optionally id (the file name), seed, and any setting.
    Any other file holds one prompt a line. Blank lines are passed over.

    Raises:
        UsageError: the file cannot be read or is empty.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_PROMPTS_BYTES:
            raise UsageError(f"prompts: {path} is larger than {MAX_PROMPTS_BYTES >> 20} MiB; split it.")
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError(f"prompts: cannot read {path}: {error.strerror}.") from None
    allowed = {"prompt", "id", "seed", *FIELDS}
    entries, problems, ids = [], [], set()
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if not text:
                continue
            entry = json.loads(text) if path.suffix == ".jsonl" else {"prompt": text}
            if not isinstance(entry, dict):
                raise UsageError("not a JSON object")
            if unknown := sorted(entry.keys() - allowed):
                raise UsageError(f"unknown key {', '.join(unknown)}; expected some of {', '.join(sorted(allowed))}")
            check_prompt(entry.get("prompt"))
            if (name := entry.get("id")) is not None:
                if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]{0,99}", name):
                    raise UsageError(f"id is {name!r:.80}; expected up to 100 letters, digits, '-', '_' or '.'")
                if name in ids:
                    raise UsageError(f"id {name!r} was used on an earlier line")
                ids.add(name)
            entries.append(entry | {"line": number})
        except (UsageError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            problems.append(f"{path} line {number}: {str(error).splitlines()[0]}")
    if not entries and not problems:
        raise UsageError(f"prompts: {path} holds no prompt.")
    return entries, problems


def make_jobs(config: Any, resolve: Callable[..., Settings]) -> tuple[list[Job], list[str]]:
    """What to make, checked, before any weight is read; and the problems of single lines of a prompts file.

    `resolve(**settings)` gives complete settings.
    """
    if (config.prompt is None) == (config.prompts is None):
        raise UsageError('give either --config.prompt="..." or --config.prompts=FILE.')
    common = {name: config[name] for name in FIELDS}
    resolve(**common)
    problems: list[str] = []
    if config.prompts is not None:
        entries, problems = read_prompts(config.prompts)
    else:
        prompts = config.prompt if isinstance(config.prompt, tuple | list) else (config.prompt,)
        entries = [{"prompt": check_prompt(prompt)} for prompt in prompts]
        if not entries:
            raise UsageError("prompt is an empty tuple; give at least one.")
    first = distributed.gather(check_seed(config.seed))[0]  # of several processes each would draw its own
    jobs = []
    for i, entry in enumerate(entries):
        try:
            seed = check_seed(entry["seed"]) if entry.get("seed") is not None else (first + i) % 2**32
            own = {name: entry[name] for name in FIELDS if entry.get(name) is not None}
            stem = entry.get("id") or f"{slug(entry['prompt'])}_seed{seed}"
            given = config.seed is not None or entry.get("seed") is not None
            jobs.append(Job(entry["prompt"], seed, resolve(**common | own), stem, given))
        except UsageError as error:
            problems.append(f"{config.prompts} line {entry['line']}: {str(error).splitlines()[0]}")
    return jobs, problems


def slug(prompt: str) -> str:
    """A prompt as a part of a file's name."""
    return re.sub(r"\W+", "-", prompt.lower())[:48].strip("-_") or "video"


def facts(job: Job, precision: str, digest: str) -> dict[str, Any]:
    """What decides a clip, as JSON values: two runs with equal facts make the same one (on CPU, bit for bit)."""
    settings = {k: v for k, v in dataclasses.asdict(job.settings).items() if k != "fps"}
    return {"prompt": job.prompt, "seed": job.seed, **settings, "precision": precision, "checkpoint_digest": digest}


def without_done(jobs: Sequence[Job], output: Path, precision: str, digest: str) -> list[Job]:
    """The jobs that no record in `output` describes; each record stands for one of them."""
    done = []
    for path in sorted(output.glob("*.json")):
        with contextlib.suppress(OSError, ValueError):
            record = json.loads(path.read_bytes())
            if isinstance(record, dict):
                done.append(record)
    left = []
    for job in jobs:
        wanted = {k: v for k, v in facts(job, precision, digest).items() if k != "seed" or job.seed_given}
        match = next((f for f in done if all(f.get(k) == v for k, v in wanted.items())), None)
        if match is None:
            left.append(job)
        else:
            done.remove(match)
    return left


def resumed(
    config: Any, state: run_state.RunState, given: Mapping[str, Any], digest: str, resolve: Callable[..., Settings]
) -> Job:
    """The job that `state` is half of; refuses what differs from it."""
    folder, saved = config.resume, state.facts
    now: dict[str, Any] = {"checkpoint_digest": digest}
    for name, value in given.items():
        if name in saved and value is not None:
            now[name] = float(value) if isinstance(saved[name], float) else value
    run_state.check_same(saved, now, folder)
    try:
        settings = resolve(**{k: saved[k] for k in FIELDS if k in saved}, fps=config.fps)
        stem = Path(folder).resolve().name.removesuffix(".state")
        return Job(saved["prompt"], saved["seed"], settings, stem, state=state)
    except (KeyError, UsageError) as error:
        raise CheckpointError(f"{folder}: the state does not describe a run of this model: {error}") from None


def check_attention(jobs: Sequence[Job], configs: Configs, dtypes: str, mesh: MeshShape | None) -> None:
    """Raises UsageError if an implementation that was asked for cannot compute a job, or not on this machine."""
    for job in jobs:
        try:
            chosen = attention(job.settings, configs, dtypes, 512, mesh)["self"]
            if reason := read_pattern(job.settings.pattern).unavailable(chosen):
                raise NotImplementedError(reason)
        except NotImplementedError as error:
            raise UsageError(f"{error}.\nLeave --config.attention out to take the best that can.") from None


def choose_mesh(jobs: Sequence[Job], configs: Configs, dtypes: str, mesh: Any) -> MeshShape | None:
    """The mesh that a config names or, for "auto", the smallest that the largest job fits; None for one device.

    Raises:
        UsageError: it cannot be, not on this machine, or not for one of the jobs.
        ResourceError: "auto", and none fits.
    """
    shape = sharding.read_mesh(mesh)
    if distributed.several() and getattr(shape, "devices", 0) != jax.device_count():
        raise UsageError(
            f"mesh is {shape}; expected one of all {jax.device_count()} devices of {jax.process_count()} processes,\n"
            f"for instance --config.mesh=sequence={jax.device_count()}."
        )
    if shape is None or not jobs:
        return None
    if isinstance(shape, str):  # "auto"
        largest = max((job.settings for job in jobs), key=lambda settings: plan.token_count(configs, settings))
        shape, sentence = plan.smallest_mesh(configs, largest, precision.choose(dtypes))
        say(sentence)
    for job in jobs:
        sharding.check_mesh(shape, pipeline.mesh_sizes(configs, job.settings, 1, shape), jax.device_count())
    return shape


def attention(
    settings: Settings, configs: Configs, dtypes: str, rows: int, mesh: MeshShape | None = None
) -> dict[str, str]:
    """The implementation of self- and cross-attention that a job takes; `rows` of text."""
    dtype = jnp.dtype(precision.choose(dtypes).transformer)
    grid = latent_shape(configs, settings)[:3]
    return wan.attention_choice(
        configs.transformer,
        grid,
        pattern=read_pattern(settings.pattern),
        text_rows=rows,
        dtype=dtype,
        implementation=settings.attention,
        ring=mesh is not None and pipeline.mesh_sizes(configs, settings, 1, mesh).ring(mesh) > 1,
    )
