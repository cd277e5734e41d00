"""One job becomes a video and the files beside it, or the saved state of a run that was stopped.

T latent frames · H W latent grid · C latent channels · F pixel frames · Y X pixel height, width
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from jvdiff import pipeline, plan, precision
from jvdiff.commands import command_line
from jvdiff.commands.arguments import Request
from jvdiff.commands.command_line import say
from jvdiff.commands.jobs import Job, attention, facts
from jvdiff.diffusion import Solver, samplers
from jvdiff.errors import CheckpointError, Interrupted, InUse, NumericsError, ResourceError, SetupError
from jvdiff.media import video as videos
from jvdiff.models.family import Clip
from jvdiff.pipeline import Pipeline
from jvdiff.runtime import environment, peers, progress, rescue, run_state
from jvdiff.runtime.files import atomic, claim
from jvdiff.runtime.interrupts import deferred
from jvdiff.runtime.records import signed
from jvdiff.runtime.target import here
from jvdiff.streaming import StreamInferencePipeline

T = TypeVar("T")


def stage(name: str) -> contextlib.AbstractContextManager[None]:
    """Names the stage where the device's memory was not enough."""
    return command_line.device_memory(
        f"stage {name}",
        "Try fewer frames (--num_frames), a smaller picture (--height, --width),\n"
        "or --precision=bfloat16; --plan=true prints what each stage needs.",
        first=name in ("load", "compile", "encode"),
    )


class _Stop(Exception):
    """Ctrl-C while decoding; the latents are complete."""


@dataclasses.dataclass(frozen=True, eq=False)
class Maker:
    """What all videos of a run share.

    pipe: models and weights
    config, request: what was asked for
    output: folder of the files
    asked_to_stop: whether Ctrl-C was pressed
    again: the command that goes on with a batch; None where there is one video, whose state goes on
    compiled: bytes that each program needs besides the weights, of those that were compiled, by key
    ahead: waits for programs that are compiled since before weights were read, and gives them by key
    kept: what encoders made of prompts and pictures
    """

    pipe: Pipeline
    config: Any
    request: Request
    output: Path
    asked_to_stop: Callable[[], bool]
    again: str | None = None
    compiled: dict[Any, int] = dataclasses.field(default_factory=dict)
    ahead: Callable[[], dict[Any, Any]] = dict

    @functools.cached_property
    def kept(self) -> pipeline.Kept:
        return pipeline.Kept(self.pipe.run)

    def command(self, state: Path, job: Job) -> str:
        """The command that goes on from a saved state of a job."""
        return self.request.command(
            checkpoint=self.config.checkpoint,
            output=self.config.output,
            resume=state,
            stop_at=self.request.unset("stop_at"),
            **dict.fromkeys(_OF_ONE_RUN),
            **job.files,
        )


# What stands in the record alone, and not in the video's and picture's metadata.
_OF_THE_RECORD = ("sigmas", "seconds", "versions", "device", "residency", "environment", "autotuning")
_OF_THE_RECORD += ("resumed_at_step",)
# Fields that a state holds itself, or that were about the run that it stopped.
_OF_ONE_RUN = ("prompt", "prompts", "class_label", "seed", "seeds", "part")


@dataclasses.dataclass(eq=False)
class _Making:
    """One job under way.

    maker: what it shares with the other jobs
    job: what is made
    base: path of its files without suffix
    solver: of the clip's sampler
    done: steps that are computed
    seconds: how long each phase took
    state: of the solver after those steps; on the host, which a lost device does not take with it
    video: uint8 [F,Y,X,3], once it is decoded
    residency: whose weights are on the device together, where that was a question
    """

    maker: Maker
    job: Job
    base: Path
    solver: Solver
    done: int
    seconds: dict[str, float]
    state: Any = None
    video: np.ndarray | None = None
    residency: plan.Residency | None = None

    @property
    def clip(self) -> Clip:
        return self.job.clip

    @property
    def steps(self) -> int:
        return len(self.solver)

    @property
    def last(self) -> int:
        """The step after which this run stops."""
        return _last(self.steps, self.done, self.maker.config.stop_at)

    @property
    def bases(self) -> list[Path]:
        """Where the state is saved, the first place first; without suffix."""
        earlier = self.maker.config.resume
        return [self.base, *([Path(earlier).parent / self.base.name] if earlier else [])]

    def save(self) -> Path:
        """Saves the solver's state, somewhere, and returns the folder; raises ResourceError where nobody takes it."""
        pipe = self.maker.pipe
        arrays = {name: np.asarray(array) for name, array in zip(self.state._fields, self.state, strict=True)}
        if not peers.writes():
            return Path(f"{self.base}.state")
        identity = facts(self.job, pipe.repository, pipe.precision)
        identity |= {"environment": environment.numerics(), "versions": versions()}
        saved = run_state.RunState(identity, self.done, arrays)
        return rescue.kept(lambda base: run_state.save(f"{base}.state", saved), self.bases)

    def interrupted(self) -> Interrupted:
        """The error that ends a run that Ctrl-C stopped, its state saved."""
        command = self._command(self.save())
        return Interrupted(f"interrupted after step {self.done} of {self.steps}; go on with:\n  {command}")

    def _command(self, state: Path) -> str:
        """The command that goes on: with the whole batch, where that finds the state."""
        found = self.maker.again if state.parent == self.base.parent else None
        return found or self.maker.command(state, self.job)

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Saves what is done, whatever is raised inside, and says where: the state, and the frames if there are any.

        Raises:
            ResourceError: as the block, where the file system refuses.
            Interrupted: a second Ctrl-C after the last step; the state is saved.
        """
        begun = self.done
        try:
            yield
        except (Interrupted, NumericsError, InUse):  # whose state is saved already, or not worth it
            raise
        except BaseException as error:
            whole, at_once = self.done == self.steps, isinstance(error, KeyboardInterrupt)
            kept = (whole or (self.done > begun and not at_once)) and self._keep()
            if kept and at_once:
                raise Interrupted(f"interrupted after step {self.done} of {self.steps}.") from None
            if isinstance(error, OSError | MemoryError):
                reason = getattr(error, "strerror", None) or str(error) or "not enough memory"
                raise ResourceError(f"{self.base}: {reason}.") from error
            raise

    def _keep(self) -> bool:
        """Saves the state and the frames while an error is on its way, which keeps its status; whether that went."""
        if (folder := rescue.attempt(self.save, f"the state after step {self.done} of {self.steps}")) is None:
            return False
        if self.video is not None and peers.writes():
            with contextlib.suppress(ResourceError):  # the state has all that they are made of
                frames = functools.partial(_write_arrays, suffix=".frames.npz", video=self.video)
                say(f"The frames are in {rescue.kept(frames, self.bases, wait=False)}.")
        done = "All steps are done; their result is" if self.done == self.steps else f"{self.done} steps are done, and"
        say(f"{done} kept. Go on with:\n  {self._command(folder)}")
        return True


def make(maker: Maker, job: Job, seconds: dict[str, float]) -> list[Path]:
    """Makes one video and returns [its path], or [the state's folder] where stop_at ended it.

    All processes compute and process 0 writes; the paths that the others return lack the number that process 0 adds to
    a taken name.
    """
    pipe = maker.pipe
    if maker.asked_to_stop():  # while the files of the one before were written
        raise KeyboardInterrupt
    say(f"{_description(pipe, job)}   seed: {job.seed}")
    notice = video_writer(job.clip.settings)
    claimed = claim if peers.writes() else lambda folder, stem: contextlib.nullcontext(folder / stem)
    with claimed(maker.output, job.stem) as base:
        done = job.state.done if job.state else 0
        making = _Making(maker, job, base, job.clip.sampler.make(), done, seconds)
        making.residency = _compile(making)
        with progress.phase("encode", seconds, "encode"), stage("encode"):
            conditions = pipeline.encode(pipe.context, job.clip, job.inputs, maker.kept)
        making.state = _begin(making)
        with deferred():
            with making.keeping():
                state = _denoise(making, conditions)
            if maker.asked_to_stop():
                raise making.interrupted()
            if making.done < making.steps:
                folder = making.save()
                command = maker.command(folder, job)
                say(f"stopped after step {making.done} of {making.steps}; finish it with:\n  {command}")
                return [folder]
            with making.keeping():
                latents = np.array(pipe.family.finish(job.clip, job.inputs, conditions, state.x))
                making.video = _decode(making, latents)
                return [write_files(making, latents[0], _record(making), notice)]


def _description(pipe: Pipeline, job: Job) -> str:
    """What a clip shows, as the person at the terminal reads it: a class by its name and number."""
    subject = pipe.family.describe(pipe.models, job.subject)
    return "   ".join(f"{name.replace('_', ' ')}: {value}" for name, value in subject.items())


def _compile(making: _Making) -> plan.Residency | None:
    """Compiles what the clip runs and no clip before it did; whose weights are to be in turn, as far as that is known.

    The weights are told so, and the person at the terminal where it is another way than before.
    """
    maker, pipe, pool = making.maker, making.maker.pipe, plan.pool()
    with progress.phase("compiling", making.seconds, "compile"), stage("compile"):
        works = measured(pipe.context, making.job, maker.config.stop_at, maker.compiled, maker.ahead)
        maker.kept.parts = plan.encoders(making.clip, works)
        if pool is None and maker.config.in_turn is None:
            return None
        job, chosen, sentence = fitted(pipe.context, making.job, maker.config, maker.compiled, maker.ahead, pool, works)
    if job is not making.job:
        say(f"notice: nothing else fits; the VAE works in tiles ({job.clip.vae_tiles}), and gives other frames")
        making.job = job
    if chosen.in_turn != pipe.weights.in_turn:
        say(sentence)
        pipe.weights.take_turns(chosen.in_turn)
    return chosen


def fitted(
    context: pipeline.Context,
    job: Job,
    config: Any,
    compiled: dict[Any, int],
    ahead: Callable[[], dict[Any, Any]],
    pool: int | None,
    known: list[plan.Work] | None = None,
) -> tuple[Job, plan.Residency, str]:
    """The job as it is to run, whose weights are in turn, and a line about both; see `measured`, `residency`.

    known: the programs of the job as it is, where they were measured before.
    """

    def works(clip: Clip) -> list[plan.Work]:
        if known is not None and clip is job.clip:
            return known
        return measured(context, dataclasses.replace(job, clip=clip), config.stop_at, compiled, ahead)

    def chosen(works: list[plan.Work]) -> tuple[plan.Residency, str]:
        return residency(context, job.clip, works, config.in_turn, pool)

    clip, way, line = plan.fitted(job.clip, works, chosen, pool)
    return job if clip is job.clip else dataclasses.replace(job, clip=clip), way, line


def encode_ahead(maker: Maker, jobs: Sequence[Job]) -> int:
    """Lets encoders that are in turn see these jobs one encoder after another, before any clip is made.

    So the weights of each come to the device once. Returns how many jobs they have seen, as far as that is kept.
    """
    pipe, kept = maker.pipe, maker.kept
    if len(jobs) < 2 or not pipe.weights.in_turn:
        return 0
    works = measured(pipe.context, jobs[0], maker.config.stop_at, maker.compiled, maker.ahead)
    kept.parts = plan.encoders(jobs[0].clip, works)
    kept.clear()
    with progress.phase("encoding what is to be made", {}, "encode"), stage("encode"):
        return pipeline.encode_ahead(pipe.context, jobs, kept)


def measured(
    context: pipeline.Context,
    job: Job,
    stop_at: int | None,
    compiled: dict[Any, int],
    ahead: Callable[[], dict[Any, Any]],
) -> list[plan.Work]:
    """The programs that a job runs, in order, with the memory that each needs besides weights.

    compiled: those bytes, by key, of what was compiled before; it gets the others. ahead: see `Maker`.
    """
    family, shape = context.family, context.placement and context.placement.shape
    abstract, ready, works = pipeline.abstract_params(family, context.models, context.precision), ahead(), []
    for call in calls(context, abstract, job, stop_at):
        part = call.stage.part
        if call.key not in compiled:
            program = ready.get(call.key) or call.traced.lower().compile()
            _, data, temporary = plan.memory_of(call, program, abstract[part], family.parts[part].places, shape)
            compiled[call.key] = data + temporary
        works.append(plan.Work(call.stage.name, part, compiled[call.key]))
    return works


def residency(
    context: pipeline.Context, clip: Clip, works: list[plan.Work], asked: str | None, pool: int | None
) -> tuple[plan.Residency, str]:
    """Whose weights are in turn, and a line about it: what was asked for, else what fits into `pool` bytes."""
    shape = context.placement and context.placement.shape
    held = {part: size for part, (_, size) in plan.resident(context, shape).items()}
    if asked is None:
        return plan.choose(clip, works, held, pool)
    chosen = plan.with_turns(pipeline.check_parts(context.models, () if asked == "off" else asked), works, held)
    return chosen, f"weights on the device: {chosen}, as asked for"


def _last(steps: int, done: int, stop_at: int | None) -> int:
    """The step after which a run of `steps`, of which some are done, stops."""
    return max(done, min(steps, stop_at or steps))


def calls(context: pipeline.Context, weights: Mapping[str, Any], job: Job, stop_at: int | None) -> list[pipeline.Call]:
    """The programs that a job runs, see `pipeline.trace`."""
    steps, done = len(job.clip.sampler.make()), job.state.done if job.state else 0
    last = _last(steps, done, stop_at)
    return pipeline.trace(context, weights, job.clip, job.inputs, None if last == steps else last, done)


def _begin(making: _Making) -> Any:
    """The solver's state: from the seed, or as it was saved."""
    job, clip = making.job, making.clip
    state = pipeline.begin(clip, making.solver, pipeline.initial_noise([job.seed], clip.latents), [job.seed])
    if job.state is None:
        return state
    arrays = job.state.arrays
    expected = {name: (x.shape, x.dtype) for name, x in state._asdict().items()}
    if {n: (x.shape, x.dtype) for n, x in arrays.items()} != expected or not 0 <= making.done <= making.steps:
        content = ", ".join(f"{name} {x.dtype}{list(x.shape)}" for name, x in arrays.items())
        needed = ", ".join(f"{name} {dtype}{list(shape)}" for name, (shape, dtype) in expected.items())
        raise CheckpointError(
            f"{making.maker.config.resume or job.stem}: the state has {content}\n"
            f"after step {making.done} of {making.steps}; this run needs {needed}.\n"
            "Resume it with the version that wrote it, or begin anew."
        )
    return type(state)(**arrays)


def _denoise(making: _Making, conditions: Any) -> Any:
    """The state at the run's last step, or where Ctrl-C was pressed; `making` has it too."""
    maker, clip = making.maker, making.clip
    pipe, every = maker.pipe, maker.config.preview_every
    preview = _preview(pipe, clip) if every or making.last < making.steps else None

    def after_step(now: int, state: Any) -> bool:
        making.done, making.state = now, jax.tree.map(np.array, state)  # copies: the next step takes its buffers
        show(now)
        if preview and ((every and now % every == 0) or now == making.last):
            try:
                preview(state, Path(f"{making.base}.preview.png"))
            except ResourceError as error:  # no reason to lose the clip
                say(f"notice: no preview. {error}")
        return maker.asked_to_stop()

    last = making.last
    with (
        _rescued_latents(making),
        progress.timed(making.seconds, "denoise"),
        stage("denoise"),
        progress.bar("denoise", making.steps, start=making.done) as show,
    ):
        if maker.asked_to_stop():
            return making.state
        return pipeline.denoise(
            pipe.context, clip, conditions, making.state, making.solver, pipe.run,
            start=making.done, stop=last, callback=after_step,
        )  # fmt: skip


def _preview(pipe: Pipeline, clip: Clip) -> Callable[[Any, Path], None]:
    """save(state, path): a strip with one rough picture for each latent frame, as clean as the solver believes it."""
    first = pipe.family.preview(pipe.models, pipe.context.forward(clip))
    factors = videos.fit_preview(lambda latents: pipe.run(first, latents), clip.latents[-1])

    def save(state: Any, path: Path) -> None:
        latents = np.asarray(getattr(state, "clean_1", state.x))[0]
        if peers.writes():
            videos.write_png(path, videos.latent_preview(latents, *factors))

    return save


def _decode(making: _Making, latents: np.ndarray) -> np.ndarray:
    """The video uint8 [F,Y,X,3]; where it is stopped, the state is saved."""
    maker, pipe = making.maker, making.maker.pipe

    def after_frame(now: int) -> None:
        show(now)
        if maker.asked_to_stop():
            raise _Stop

    try:
        with (
            _rescued_latents(making),
            progress.timed(making.seconds, "decode"),
            progress.bar("decode", making.clip.latents[0]) as show,
            stage("decode"),
        ):
            return pipeline.decode(pipe.context, making.clip, latents, pipe.run, callback=after_frame)[0]
    except _Stop:
        raise making.interrupted() from None


def _record(making: _Making) -> dict[str, Any]:
    """Everything that decided the clip, and what made it."""
    pipe, job = making.maker.pipe, making.job
    chosen = attention(pipe.context, job.clip, job.inputs)
    return (
        facts(job, pipe.repository, pipe.precision)
        | pipe.family.describe(pipe.models, job.subject)
        | {
            "fps": job.clip.settings.fps,
            "checkpoint": printable(pipe.repository.path),
            "dtypes": precision.told(pipe.precision),
            "sigmas": samplers.sigmas(making.solver),
            "attention_chosen": chosen[0] if len(chosen) == 1 else chosen,
            "vae_tiles_chosen": str(job.clip.vae_tiles or "off"),
            "environment": environment.numerics(),
            "autotuning": environment.autotuning(),
            "device": device(pipe),
            "residency": making.residency and making.residency._asdict(),
            "versions": versions(),
            "resumed_at_step": job.state.done if job.state else None,
            "seconds": {name: round(value, 3) for name, value in making.seconds.items()},
        }
    )


@contextlib.contextmanager
def _rescued_latents(making: _Making) -> Iterator[None]:
    """Saves the last good latents in NAME.failed.npz when numbers become NaN or infinite, and says so; no video is
    written."""
    try:
        yield
    except NumericsError as error:
        if hasattr(error, "latents") and peers.writes():
            arrays = {"latents": error.latents, "step": error.step}  # type: ignore[attr-defined]
            failed = functools.partial(_write_arrays, suffix=".failed.npz", **arrays)
            path = rescue.kept(failed, making.bases)
            raise NumericsError(f"{error}\nThe last good latents are in {path}; no video was written.") from error
        raise


def video_writer(settings: Any) -> str | None:
    """None where MP4 files can be written, else a notice why an animated PNG takes their place."""
    try:
        return videos.check_mp4(settings.height, settings.width)
    except SetupError as error:
        say(f"notice: an animated PNG will be written instead of an MP4. {error}")
        return str(error)


def write_files(making: _Making, latents: np.ndarray, record: dict[str, Any], no_mp4: str | None) -> Path:
    """Writes the files of one video, the record last, and returns the video's path."""
    base, video, fps = making.base, making.video, record["fps"]
    if not peers.writes():
        return Path(f"{base}.mp4")
    assert video is not None
    if making.job.claim is not None:
        making.job.claim.check()
    metadata = {name: x for name, x in record.items() if name not in _OF_THE_RECORD}
    with _beside(lambda: videos.png(videos.contact_sheet(video), metadata)) as sheet:
        if no_mp4 is None:
            path = videos.write_mp4(f"{base}.mp4", video, fps, metadata)
        else:
            path = videos.write_apng(f"{base}.apng", video, fps)
        with atomic(f"{base}.png") as part:
            part.write_bytes(sheet.result())
    if making.maker.config.save_arrays:
        _write_arrays(base, suffix=".npz", latents=latents, video=video)
    with atomic(f"{base}.json") as part:
        part.write_text(json.dumps(signed(base, record), indent=2, ensure_ascii=False), encoding="utf-8")
    return path


@contextlib.contextmanager
def _beside(work: Callable[[], T]) -> Iterator[Future[T]]:
    """Work in a thread of its own while the block runs, whose errors are raised by `result()`, in this thread.

    The work touches no file: files are written here, in their order. A block that fails, or that a signal ends, does
    not wait for it.
    """
    thread = ThreadPoolExecutor(1)
    try:
        yield thread.submit(work)
    finally:
        thread.shutdown(wait=False)


def _write_arrays(base: Path, *, suffix: str, **arrays: Any) -> Path:
    """Writes arrays as NumPy's .npz, as np.savez does, which says more than once that a disk is full; its path."""
    with atomic(f"{base}{suffix}") as part, zipfile.ZipFile(part, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)
    return Path(f"{base}{suffix}")


def printable(path: str | Path) -> str:
    """A path as text that a file can hold: of another encoding than UTF-8 some letters are lost."""
    return os.fsencode(path).decode("utf-8", "replace")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("jvdiff", "jax", "jaxlib", "flax", "numpy", "tokenizers", "av")
    versions = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def device(pipe: Pipeline | StreamInferencePipeline) -> dict[str, Any]:
    """What a run computes on."""
    mesh = pipe.placement and pipe.placement.shape
    return {
        "backend": jax.default_backend(),
        "kind": jax.devices()[0].device_kind,
        "used": mesh.devices if mesh else 1,
        "present": jax.device_count(),
        "mesh": mesh and str(mesh),
        "compiler_options": (pipe.placement.target if pipe.placement else here()).options,
        **({"refused": dict(refused)} if (refused := here().refused) else {}),
    }
