"""One job becomes a video and the files beside it, or the saved state of a run that was stopped.

T latent frames · H W latent grid · C latent channels · F pixel frames · Y X pixel height, width
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
import shlex
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jvdiff import pipeline
from jvdiff.commands import command_line
from jvdiff.commands.command_line import say
from jvdiff.commands.jobs import Job, attention, facts
from jvdiff.errors import CheckpointError, Interrupted, NumericsError, ResourceError, SetupError
from jvdiff.media import video as videos
from jvdiff.pipeline import Pipeline
from jvdiff.pipeline.settings import latent_shape
from jvdiff.runtime import peers, progress, run_state
from jvdiff.runtime.files import atomic, claim
from jvdiff.streaming import StreamInferencePipeline


def stage(name: str) -> contextlib.AbstractContextManager[None]:
    """Names the stage where the device's memory was not enough."""
    return command_line.device_memory(
        f"stage {name}",
        "Try fewer frames (--config.num_frames), a smaller picture (--config.height, --config.width),\n"
        "or --config.precision=bfloat16; --config.plan=true prints what each stage needs.",
    )


class _Stop(Exception):
    """Ctrl-C while decoding; the latents are complete."""


def make(
    pipe: Pipeline,
    job: Job,
    config: Any,
    file: str,
    output: Path,
    asked_to_stop: Callable[[], bool],
    compiled: set,
    seconds: dict,
) -> list[Path]:
    """Makes one video and returns [its path], or [the state's folder] where stop_at ended it.

    Of several processes all compute and process 0 writes; what the others return has no number for a taken name.
    """
    settings, done = job.settings, job.state.done if job.state else 0
    last = min(settings.steps, config.stop_at or settings.steps)
    say(f"prompt: {job.prompt}   seed: {job.seed}")
    notice = video_writer(settings)
    claimed = claim if peers.writes() else lambda folder, stem: contextlib.nullcontext(folder / stem)
    with claimed(output, job.stem) as base:
        against = settings.negative_prompt if settings.guidance != 1 else None
        texts = [job.prompt] + ([] if against is None else [against])
        rows = pipeline.tokenize(pipe.tokenizer, texts)[0].shape[1]
        if (settings, rows) not in compiled:
            with progress.phase("compiling", seconds, "compile"), stage("compile"):
                for name, program in pipeline.traced(pipe.configs, settings, pipe.params, rows, pipe.placement):
                    if name.startswith("decode") and last < settings.steps:
                        break
                    program.lower().compile()
            compiled.add((settings, rows))
        with progress.phase("text", seconds, "text"), stage("text"):
            text, negative = pipeline.encode_prompts(pipe, [job.prompt], against)
        state = _begin(pipe, job)
        preview = _preview(pipe) if config.preview_every or last < settings.steps else None

        def save(state: Any, done: int) -> Path:
            arrays = {name: np.asarray(array) for name, array in zip(state._fields, state, strict=True)}
            kept = facts(job, pipe.precision.name, pipe.digest) | {"versions": versions()}
            if not peers.writes():
                return Path(f"{base}.state")
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
            stage("denoise"),
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
        frames = latent_shape(pipe.configs, settings)[0]

        def after_frame(now: int) -> None:
            show(now)
            if asked_to_stop():
                raise _Stop

        try:
            with (
                _rescued_latents(base),
                progress.timed(seconds, "decode"),
                progress.bar("decode", frames) as show,
                stage("decode"),
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
            "attention_chosen": attention(
                settings, pipe.configs, pipe.precision.name, rows, pipe.placement and pipe.placement.shape
            ),
            "device": device(pipe),
            "versions": versions(),
            "resumed_at_step": job.state.done if job.state else None,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
        }
        return [write_files(base, video, latents[0], record, config.save_arrays, notice)]


def _begin(pipe: Pipeline, job: Job) -> Any:
    """The solver's state: from the seed, or as it was saved."""
    shape = latent_shape(pipe.configs, job.settings)
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


def _preview(pipe: Pipeline) -> Callable[[Any, Path], None]:
    """save(state, path): a strip with one rough picture for each latent frame, as clean as the solver believes it."""
    decode = pipeline.first_frames(pipe.configs.vae, pipe.placement)
    factors = videos.fit_preview(lambda latents: decode(pipe.params["vae"], latents), pipe.configs.vae.z_dim)

    def save(state: Any, path: Path) -> None:
        latents = np.asarray(getattr(state, "clean_1", state.x))[0]
        if peers.writes():
            videos.write_png(path, videos.latent_preview(latents, *factors))

    return save


@contextlib.contextmanager
def _rescued_latents(base: Path) -> Iterator[None]:
    """Where numbers went wrong, keeps the last good latents in NAME.failed.npz and says so; there is no video."""
    try:
        yield
    except NumericsError as error:
        if hasattr(error, "latents") and peers.writes():
            path = Path(f"{base}.failed.npz")
            with atomic(path) as part, open(part, "wb") as file:
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


def video_writer(settings: Any) -> str | None:
    """None where MP4 files can be written, else a notice why an animated PNG takes their place."""
    try:
        return videos.check_mp4(settings.height, settings.width)
    except SetupError as error:
        say(f"notice: an animated PNG will be written instead of an MP4. {error}")
        return str(error)


def write_files(
    base: Path, video: np.ndarray, latents: np.ndarray, record: dict, arrays: bool, no_mp4: str | None
) -> Path:
    """Writes the files of one video, the record last, and returns the video's path."""
    if not peers.writes():
        return Path(f"{base}.mp4")
    fps = record["fps"]
    told = {name: value for name, value in record.items() if name not in ("sigmas", "seconds", "versions", "device")}
    try:
        if no_mp4 is None:
            path = videos.write_mp4(f"{base}.mp4", video, fps, told)
        else:
            path = videos.write_apng(f"{base}.apng", video, fps)
        videos.write_png(f"{base}.png", videos.contact_sheet(video), told)
        if arrays:
            with atomic(f"{base}.npz") as part, open(part, "wb") as file:
                np.savez(file, latents=latents, video=video)
        with atomic(f"{base}.json") as part:
            part.write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding="utf-8")
        return path
    except ResourceError as error:
        folder = Path(tempfile.mkdtemp(prefix="jvdiff-"))
        np.savez(folder / "video.npz", latents=latents, video=video)
        raise ResourceError(f"{error}\nThe frames are in {folder / 'video.npz'}.") from error


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    names = ("jvdiff", "jax", "jaxlib", "flax", "numpy", "tokenizers", "av")
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def device(pipe: Pipeline | StreamInferencePipeline) -> dict[str, Any]:
    """What a run computes on."""
    mesh = pipe.placement and pipe.placement.shape
    return {
        "backend": jax.default_backend(),
        "kind": jax.devices()[0].device_kind,
        "used": mesh.devices if mesh else 1,
        "present": jax.device_count(),
        "mesh": mesh and str(mesh),
    }
