"""The command line: prompts become video files.

    python -m jvdiff.sample --config configs/digits.py --config.prompt="a red seven moving left" --config.output=out

Every field is listed with its meaning in `default_config`. For each video the output folder gets NAME.mp4, NAME.png (a
contact sheet), NAME.json (the record of the run, written last: where it is, the video is complete) and, with
save_arrays, NAME.npz. An interrupted run leaves NAME.state, to be given to --config.resume.

Exit status: 0 done, or stopped at stop_at · 2 usage · 3 checkpoint or data, or some lines of a prompts file failed ·
4 memory or disk · 5 interrupted, resumable · 6 NaN or infinity · 7 set-up · 1 anything else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import config_dict

from jvdiff import command_line, progress, run_state
from jvdiff.command_line import say
from jvdiff.errors import (
    CheckpointError,
    Interrupted,
    JvdiffError,
    NumericsError,
    ResourceError,
    SetupError,
    UsageError,
)
from jvdiff.interrupts import interrupts

MAX_PROMPTS_BYTES = 64 * 2**20


def default_config() -> config_dict.ConfigDict:
    """Every field of a sampling config. None: from the repository, else from the model's family."""
    none = config_dict.placeholder
    return config_dict.ConfigDict(
        {
            "checkpoint": none(str),  # a Hugging Face (diffusers) folder, or what `convert` made of one
            "prompt": none(object),  # one, or a tuple of them
            "prompts": none(str),  # a file, one video a line: text, or JSONL objects with prompt, id, seed, settings
            "negative_prompt": none(str),
            "seed": none(int),  # video i gets seed + i; None draws one and prints it
            "num_frames": none(int),
            "height": none(int),  # pixels
            "width": none(int),
            "fps": none(int),
            "steps": none(int),
            "guidance": none(float),  # 1: none, and half the work
            "shift": none(float),
            "solver": none(str),  # unipc, euler
            "grid": none(str),  # diffusers, wan: whose sigmas
            "precision": none(str),  # float32, bfloat16
            "attention": none(str),  # cudnn, xla, reference; None: the best that can
            "output": "out",
            "save_arrays": False,  # NAME.npz with latents float32 [T,H,W,C] and video uint8 [F,Y,X,3]
            "resume": none(str),  # a .state folder
            "stop_at": none(int),  # stop after so many steps and save the state
            "preview_every": 0,  # write NAME.preview.png, a rough strip of all latent frames, every so many steps
            "compile_cache": none(str),  # a folder of your own, or "off"; None: the user's cache folder
            "plan": False,  # print what it would take, without weights, and exit
            "plan_target": none(str),  # h200: plan for that instead of the device at hand
        }
    )


# ----------------------------------------------------------------------------------------------------- entry and exit


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status; errors are sentences on stderr."""
    return command_line.main(argv, parse, lambda request: run(*request), "output")


def parse(argv: Sequence[str]) -> command_line.Request:
    """The config, what the command line itself set in it, the config's file.

    Raises:
        UsageError: an unknown flag or field (with the nearest one), a value of the wrong type, no config.
    """
    usage = 'python -m jvdiff.sample --config configs/digits.py --config.prompt="a red seven moving left"'
    request = command_line.parse(_quoted_prompts(argv), f"{usage}\nFields: {', '.join(default_config())}.")
    if unknown := sorted(set(request.config) - set(default_config())):
        raise UsageError(f"the config file has unknown fields: {', '.join(unknown)}.")
    return request


def _quoted_prompts(argv: Sequence[str]) -> list[str]:
    """argv with each prompt as a Python string, unless it is a tuple or list of them.

    The field may hold either, so its value is read as Python; a prompt such as 7 or None must stay text, and Python's
    parser gives up on a bare one of ten thousand characters.
    """
    flag = "--config.prompt="
    values = [word.removeprefix(flag) if word.startswith(flag) else None for word in argv]
    bare = [value is not None and not value.lstrip().startswith(("(", "[")) for value in values]
    return [f"{flag}{v!r}" if quote else word for word, v, quote in zip(argv, values, bare, strict=True)]


# -------------------------------------------------------------------------------------------------------------- jobs


@dataclasses.dataclass(frozen=True)
class Job:
    """One video to make; `settings` is a complete pipeline.Settings, `state` where an earlier run stopped."""

    prompt: str
    seed: int
    settings: Any
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
    from jvdiff import pipeline

    path = Path(path)
    try:
        if path.stat().st_size > MAX_PROMPTS_BYTES:
            raise UsageError(f"prompts: {path} is larger than {MAX_PROMPTS_BYTES >> 20} MiB; split it.")
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError(f"prompts: cannot read {path}: {error.strerror}.") from None
    allowed = {"prompt", "id", "seed", *pipeline.FIELDS}
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
            pipeline.check_prompt(entry.get("prompt"))
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


def make_jobs(config: Any, resolve: Callable[..., Any]) -> tuple[list[Job], list[str]]:
    """What to make, checked, before any weight is read; and the problems of single lines of a prompts file.

    `resolve(**settings)` gives complete settings.
    """
    from jvdiff import pipeline

    if (config.prompt is None) == (config.prompts is None):
        raise UsageError('give either --config.prompt="..." or --config.prompts=FILE.')
    common = {name: config[name] for name in pipeline.FIELDS}
    resolve(**common)
    problems: list[str] = []
    if config.prompts is not None:
        entries, problems = read_prompts(config.prompts)
    else:
        prompts = config.prompt if isinstance(config.prompt, tuple | list) else (config.prompt,)
        entries = [{"prompt": pipeline.check_prompt(prompt)} for prompt in prompts]
        if not entries:
            raise UsageError("prompt is an empty tuple; give at least one.")
    first = pipeline.check_seed(config.seed)
    jobs = []
    for i, entry in enumerate(entries):
        try:
            seed = pipeline.check_seed(entry["seed"]) if entry.get("seed") is not None else (first + i) % 2**32
            own = {name: entry[name] for name in pipeline.FIELDS if entry.get(name) is not None}
            stem = entry.get("id") or f"{_slug(entry['prompt'])}_seed{seed}"
            given = config.seed is not None or entry.get("seed") is not None
            jobs.append(Job(entry["prompt"], seed, resolve(**common | own), stem, given))
        except UsageError as error:
            problems.append(f"{config.prompts} line {entry['line']}: {str(error).splitlines()[0]}")
    return jobs, problems


def _slug(prompt: str) -> str:
    return re.sub(r"\W+", "-", prompt.lower())[:48].strip("-_") or "video"


def facts(job: Job, precision: str, digest: str) -> dict[str, Any]:
    """What decides a clip, as JSON values: two runs with equal facts make the same one (on CPU, bit for bit)."""
    settings = {k: v for k, v in dataclasses.asdict(job.settings).items() if k != "fps"}
    return {"prompt": job.prompt, "seed": job.seed, **settings, "precision": precision, "checkpoint_digest": digest}


def _without_done(jobs: Sequence[Job], output: Path, precision: str, digest: str) -> list[Job]:
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


# --------------------------------------------------------------------------------------------------------------- run


def run(config: Any, given: Mapping[str, Any] | None = None, file: str = "CONFIG") -> list[Path]:
    """Makes every video that the config asks for and returns their paths.

    given: the fields that were set on purpose; on resuming, the state's own values hold, and one of these that differs
    is an error. file: the config's, for the command that resumes.
    """
    given = dict(given or {})
    if config.plan:
        from jvdiff import plan  # before jax: it may have to be kept from looking for GPUs

        plan.show(config)
        return []
    from jvdiff import checkpoint, pipeline, precision
    from jvdiff.data import tokenizer

    if config.checkpoint is None:
        raise UsageError("no checkpoint; give --config.checkpoint=FOLDER.")
    _check_numbers(config)
    output = command_line.writable(config.output, "output")
    repository = checkpoint.inspect(config.checkpoint)
    configs = pipeline.Configs(repository.transformer, repository.vae, repository.text_encoder)
    defaults = pipeline.read_defaults(config.checkpoint)

    def resolve(**settings: Any) -> Any:
        return pipeline.resolve(configs, repository.scheduler, defaults, **settings)

    problems: list[str] = []
    if config.resume is not None:
        state = run_state.load(config.resume)
        jobs, dtypes = [_resumed(config, state, given, repository.digest, resolve)], state.facts["precision"]
    else:
        dtypes = precision.choose(config.precision).name
        jobs, problems = make_jobs(config, resolve)
        if config.prompts is not None:
            asked, jobs = len(jobs), _without_done(jobs, output, dtypes, repository.digest)
            if len(jobs) < asked:
                say(f"{asked - len(jobs)} of {asked} videos are already in {output}")
    for problem in problems:
        say(f"error: {problem}")
    _check_attention(jobs, configs, dtypes)
    pipeline.tokenize(tokenizer.load(repository.tokenizer), [job.prompt for job in jobs] or [""])  # warns of long ones

    paths: list[Path] = []
    if jobs:
        with interrupts() as asked_to_stop:
            seconds: dict[str, float] = {}
            command_line.compile_cache(config.compile_cache)
            _say_device(configs)
            with progress.phase(f"loading {config.checkpoint}", seconds, "load"), _stage("load"):
                pipe = pipeline.load(config.checkpoint, dtypes)
            compiled: set[Any] = set()
            for number, job in enumerate(jobs, 1):
                if len(jobs) > 1:
                    say(f"video {number} of {len(jobs)}")
                try:
                    paths += _make(pipe, job, config, file, output, asked_to_stop, compiled, dict(seconds))
                except (ResourceError, Interrupted):
                    raise
                except JvdiffError as error:
                    if len(jobs) + len(problems) == 1:
                        raise
                    problems.append(f"{job.stem}: {error}")
                    say(f"error: {problems[-1]}")
    if problems:
        asked = len(problems) + len(paths)
        raise CheckpointError("\n".join([f"{len(problems)} of {asked} videos were not made:", *problems[:4]]))
    return paths


def _check_numbers(config: Any) -> None:
    for name, low in (("stop_at", 1), ("preview_every", 0)):
        if config[name] is not None and config[name] < low:
            raise UsageError(f"{name} is {config[name]}; expected {low} or more.")


def _resumed(config: Any, state: run_state.RunState, given: Mapping[str, Any], digest: str, resolve: Any) -> Job:
    """The job that `state` is half of; refuses what differs from it."""
    from jvdiff import pipeline

    folder, saved = config.resume, state.facts
    now: dict[str, Any] = {"checkpoint_digest": digest}
    for name, value in given.items():
        if name in saved and value is not None:
            now[name] = float(value) if isinstance(saved[name], float) else value
    run_state.check_same(saved, now, folder)
    try:
        settings = resolve(**{k: saved[k] for k in pipeline.FIELDS if k in saved}, fps=config.fps)
        stem = Path(folder).resolve().name.removesuffix(".state")
        return Job(saved["prompt"], saved["seed"], settings, stem, state=state)
    except (KeyError, UsageError) as error:
        raise CheckpointError(f"{folder}: the state does not describe a run of this model: {error}") from None


def _check_attention(jobs: Sequence[Job], configs: Any, dtypes: str) -> None:
    for job in jobs:
        try:
            _attention(job.settings, configs, dtypes, 512)
        except NotImplementedError as error:
            raise UsageError(f"{error}.\nLeave --config.attention out to take the best that can.") from None


def _attention(settings: Any, configs: Any, dtypes: str, rows: int) -> dict[str, str]:
    import jax.numpy as jnp

    from jvdiff import pipeline, precision
    from jvdiff.models import wan

    dtype = jnp.dtype(precision.choose(dtypes).transformer)
    grid = pipeline.latent_shape(configs, settings)[:3]
    return wan.attention_choice(
        configs.transformer, grid, text_rows=rows, dtype=dtype, implementation=settings.attention
    )


def _say_device(configs: Any) -> None:
    import jax

    device = jax.devices()[0]
    say(f"device: {device.device_kind} ({jax.default_backend()}), jax {jax.__version__}")
    if jax.default_backend() == "cpu" and configs.transformer.width >= 1024:
        say("warning: no GPU was found; a model of this size takes hours on a CPU (see docs for the GPU extras)")


def _stage(name: str) -> contextlib.AbstractContextManager[None]:
    return command_line.device_memory(
        f"stage {name}",
        "Try fewer frames (--config.num_frames), a smaller picture (--config.height, --config.width),\n"
        "or --config.precision=bfloat16; --config.plan=true prints what each stage needs.",
    )


# ---------------------------------------------------------------------------------------------------------- one video


class _Stop(Exception):
    """Ctrl-C while decoding; the latents are complete."""


def _make(
    pipe: Any,
    job: Job,
    config: Any,
    file: str,
    output: Path,
    asked_to_stop: Callable[[], bool],
    compiled: set,
    seconds: dict,
) -> list[Path]:
    """Makes one video and returns [its path], or [the state's folder] where stop_at ended it."""
    from jvdiff import pipeline
    from jvdiff.data import video as videos

    settings, done = job.settings, job.state.done if job.state else 0
    last = min(settings.steps, config.stop_at or settings.steps)
    say(f"prompt: {job.prompt}   seed: {job.seed}")
    notice = _video_writer(settings)
    with videos.claim(output, job.stem) as base:
        against = settings.negative_prompt if settings.guidance != 1 else None
        texts = [job.prompt] + ([] if against is None else [against])
        rows = pipeline.tokenize(pipe.tokenizer, texts)[0].shape[1]
        if (settings, rows) not in compiled:
            with progress.phase("compiling", seconds, "compile"), _stage("compile"):
                for name, program in pipeline.traced(pipe.configs, settings, pipe.params, rows):
                    if name.startswith("decode") and last < settings.steps:
                        break
                    program.lower().compile()
            compiled.add((settings, rows))
        with progress.phase("text", seconds, "text"), _stage("text"):
            text, negative = pipeline.encode_prompts(pipe, [job.prompt], against)
        state = _begin(pipe, job)
        preview = _preview(pipe) if config.preview_every or last < settings.steps else None

        def save(state: Any, done: int) -> Path:
            arrays = {name: np.asarray(array) for name, array in zip(state._fields, state, strict=True)}
            kept = facts(job, pipe.precision.name, pipe.digest) | {"versions": versions()}
            return run_state.save(Path(f"{base}.state"), run_state.RunState(kept, done, arrays))

        def after_step(now: int, state: Any) -> bool:
            nonlocal done
            done = now
            show(now)
            wanted = config.preview_every and now % config.preview_every == 0
            if preview and (wanted or now == last):
                preview(state, Path(f"{base}.preview.png"))
            return asked_to_stop()

        with (
            _rescued_latents(base),
            progress.timed(seconds, "denoise"),
            _stage("denoise"),
            progress.bar("denoise", settings.steps, start=done) as show,
        ):
            if not asked_to_stop():
                state = pipeline.denoise(
                    pipe, settings, state, text, negative, start=done, stop=max(done, last), callback=after_step
                )
        if asked_to_stop():
            raise _interrupted(save(state, done), config, file, done, settings.steps)
        if done < settings.steps:
            kept = save(state, done)
            command = _resume_command(kept, config, file)
            say(f"stopped after step {done} of {settings.steps}; finish it with:\n  {command}")
            return [kept]

        latents = np.array(state.x)
        frames = pipeline.latent_shape(pipe.configs, settings)[0]

        def after_frame(now: int) -> None:
            show(now)
            if asked_to_stop():
                raise _Stop

        try:
            with (
                _rescued_latents(base),
                progress.timed(seconds, "decode"),
                progress.bar("decode", frames) as show,
                _stage("decode"),
            ):
                video = pipeline.decode(pipe, latents, callback=after_frame)[0]
        except _Stop:
            raise _interrupted(save(state, done), config, file, done, settings.steps) from None
        except ResourceError as error:
            kept = save(state, done)
            raise ResourceError(f"{error}\nAll steps are done; resume with --config.resume={kept}") from error
        record = facts(job, pipe.precision.name, pipe.digest) | {
            "fps": settings.fps,
            "checkpoint": pipe.path,
            "dtypes": dataclasses.asdict(pipe.precision),
            "sigmas": [float(s) for s in pipeline.schedule(settings).sigmas],
            "attention_chosen": _attention(settings, pipe.configs, pipe.precision.name, rows),
            "device": _device(),
            "versions": versions(),
            "resumed_at_step": job.state.done if job.state else None,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
        }
        return [_write(base, video, latents[0], record, config.save_arrays, notice)]


def _begin(pipe: Any, job: Job) -> Any:
    """The solver's state: from the seed, or as it was saved."""
    from jvdiff import pipeline

    shape = pipeline.latent_shape(pipe.configs, job.settings)
    state = pipeline.solver(job.settings).init(pipeline.initial_noise([job.seed], shape))
    if job.state is None:
        return state
    arrays = job.state.arrays
    fits = set(arrays) == set(state._fields) and all(a.shape == (1, *shape) for a in arrays.values())
    if not fits or not 0 <= job.state.done <= job.settings.steps:
        raise CheckpointError(
            f"the saved state has {', '.join(f'{k} {list(v.shape)}' for k, v in arrays.items())} after step "
            f"{job.state.done};\nthis run needs {', '.join(state._fields)}, each {[1, *shape]}."
        )
    return type(state)(**arrays)


def _preview(pipe: Any) -> Callable[[Any, Path], None]:
    """save(state, path): a strip with one rough picture for each latent frame, as clean as the solver believes it."""
    from jvdiff import pipeline
    from jvdiff.data import video as videos

    decode = pipeline.first_frames(pipe.configs.vae)
    factors = videos.fit_preview(lambda latents: decode(pipe.params["vae"], latents), pipe.configs.vae.z_dim)

    def save(state: Any, path: Path) -> None:
        latents = np.asarray(getattr(state, "clean_1", state.x))[0]
        videos.write_png(path, videos.latent_preview(latents, *factors))

    return save


@contextlib.contextmanager
def _rescued_latents(base: Path) -> Iterator[None]:
    """Where numbers went wrong, keeps the last good latents in NAME.failed.npz and says so; there is no video."""
    from jvdiff.data import video as videos

    try:
        yield
    except NumericsError as error:
        if hasattr(error, "latents"):
            path = Path(f"{base}.failed.npz")
            with videos.atomic(path) as part, open(part, "wb") as file:
                np.savez(file, latents=error.latents, step=error.step)  # type: ignore[attr-defined]
            raise NumericsError(f"{error}\nThe last good latents are in {path}; no video was written.") from error
        raise


def _interrupted(kept: Path, config: Any, file: str, done: int, steps: int) -> Interrupted:
    return Interrupted(
        f"interrupted after step {done} of {steps}; go on with:\n  {_resume_command(kept, config, file)}"
    )


def _resume_command(kept: Path, config: Any, file: str) -> str:
    words = ["python", "-m", "jvdiff.sample", "--config", file]
    words += [f"--config.checkpoint={config.checkpoint}", f"--config.output={config.output}", f"--config.resume={kept}"]
    return shlex.join(words)


def _video_writer(settings: Any) -> str | None:
    """None where MP4 files can be written, else a notice why an animated PNG takes their place."""
    from jvdiff.data import video as videos

    try:
        return videos.check_mp4(settings.height, settings.width)
    except SetupError as error:
        say(f"notice: an animated PNG will be written instead of an MP4. {error}")
        return str(error)


def _write(base: Path, video: np.ndarray, latents: np.ndarray, record: dict, arrays: bool, no_mp4: str | None) -> Path:
    """Writes the files of one video, the record last, and returns the video's path."""
    from jvdiff.data import video as videos

    fps = record["fps"]
    told = {name: value for name, value in record.items() if name not in ("sigmas", "seconds", "versions", "device")}
    try:
        if no_mp4 is None:
            path = videos.write_mp4(f"{base}.mp4", video, fps, told)
        else:
            path = _write_apng(Path(f"{base}.apng"), video, fps)
        videos.write_png(f"{base}.png", videos.contact_sheet(video), told)
        if arrays:
            with videos.atomic(f"{base}.npz") as part, open(part, "wb") as file:
                np.savez(file, latents=latents, video=video)
        with videos.atomic(f"{base}.json") as part:
            part.write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding="utf-8")
        return path
    except ResourceError as error:
        folder = Path(tempfile.mkdtemp(prefix="jvdiff-"))
        np.savez(folder / "video.npz", latents=latents, video=video)
        raise ResourceError(f"{error}\nThe frames are in {folder / 'video.npz'}.") from error


def _write_apng(path: Path, video: np.ndarray, fps: int) -> Path:
    """An animated PNG, which needs no package beyond Pillow and plays in browsers."""
    from PIL import Image

    from jvdiff.data import video as videos

    first, *rest = [Image.fromarray(frame) for frame in video]
    with videos.atomic(path) as part:
        first.save(part, format="png", save_all=True, append_images=rest, duration=1000 / fps, loop=0)
    return path


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    names = ("jvdiff", "jax", "jaxlib", "flax", "numpy", "tokenizers", "av")
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _device() -> dict[str, Any]:
    import jax

    device = jax.devices()[0]
    return {"backend": jax.default_backend(), "kind": device.device_kind, "used": 1, "present": jax.device_count()}


if __name__ == "__main__":
    sys.exit(main())
