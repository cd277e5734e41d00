"""One rollout becomes a video that grows, its statistics, its record, and a state with which it goes on.

B rollouts (here 1) · F pixel frames · Y X pixel height, width
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jvdiff import precision
from jvdiff.commands import command_line
from jvdiff.commands.command_line import say
from jvdiff.commands.one_video import device, printable, versions
from jvdiff.errors import CheckpointError, Interrupted, NumericsError, ResourceError
from jvdiff.media import video as videos
from jvdiff.media.fragmented_mp4 import FragmentedMP4
from jvdiff.pipeline import Repository
from jvdiff.runtime import environment, profiling, progress, rescue, run_state
from jvdiff.runtime.files import alone, atomic, claim
from jvdiff.runtime.interrupts import deferred
from jvdiff.runtime.records import signed
from jvdiff.streaming import (
    StreamCache,
    StreamInferencePipeline,
    StreamInferencePipelineConfig,
    device_memory,
    to_json,
)

FACTS = ("negative_prompt", "seed", "fps", "precision", "reencode")  # of a rollout, which a state holds as they are
PROFILED = 4  # chunks of a trace
SHEET = 16  # frames that are kept for the contact sheet, at most
_SHEET = "sheet "  # what their names in a state begin with
_UNWRITTEN = "unwritten"  # in a state: the frames of its last chunk, where the video could not take them
_LINE = "line"  # in a state: the statistics of its last chunk, where the file of them could not take them
ELSEWHERE = "files"  # of a state that is not beside its video: the path of the video's files, without suffix


@dataclass(frozen=True, eq=False)
class Rollout:
    """What to make, checked.

    config: of the pipeline
    prompts: by the chunk from which they hold
    negative_prompt: what guidance leads away from
    reencode: whether a change of the prompt changes the past too
    image: uint8 [1,Y,X,3] that chunk 0 begins with; None without one, and where chunk 0 is there already
    image_digest: of the picture that it was made of
    seed: of the rollout's key
    fps: frames a second, for the file
    precision: name of an entry of the precision table
    repository: of the weights
    folder, stem: where the files are, and their name without suffix
    state: where that run stopped; its video, folder/stem.mp4, is continued
    """

    config: StreamInferencePipelineConfig
    prompts: Mapping[int, str]
    negative_prompt: str
    reencode: bool
    image: np.ndarray | None
    image_digest: str | None
    seed: int
    fps: float
    precision: str
    repository: Repository
    folder: Path
    stem: str
    state: run_state.RunState | None = None

    @property
    def done(self) -> int:
        """How many chunks there are already."""
        return self.state.done if self.state else 0

    def facts(self) -> dict[str, Any]:
        """What decides the video, as JSON values."""
        return {
            "prompts": {str(i): prompt for i, prompt in self.prompts.items()},
            **{name: getattr(self, name) for name in FACTS},
            "image": self.image_digest,
            "vae_decode": decoded(self.config),
            "pipeline": to_json(self.config),
            "checkpoint_digest": self.repository.digest,
        }


def decoded(config: StreamInferencePipelineConfig) -> str | None:
    """How frames are decoded, a name of `precision.DECODING`; None where a decoder of one's own does not say."""
    return getattr(config.decoder, "arithmetic", None)


def is_whole(rollout: Rollout) -> bool:
    """Whether the files of a rollout that goes on have all of its chunks, and its record says so."""
    assert rollout.state is not None
    try:
        record = json.loads(Path(f"{rollout.folder / rollout.stem}.json").read_bytes())
        return _UNWRITTEN not in rollout.state.arrays and record["chunks"] == rollout.done
    except (OSError, ValueError, KeyError, TypeError):
        return False


def stage(name: str) -> contextlib.AbstractContextManager[None]:
    """Names the stage where the device's memory was not enough."""
    return command_line.device_memory(
        name,
        "Try a shorter window (--pipeline.diffusion_model.transformer.window_size_t), a smaller picture (its\n"
        "height and width), or --precision=bfloat16. The chunks before it can be played.",
        first=name in ("load", "compiling"),
    )


@dataclass(eq=False)
class _Making:
    """A rollout under way.

    pipe, rollout: what makes the video, and which
    base: path of the files without suffixes
    film: the video so far
    cache: what the rollout remembers after `done` chunks
    sheet: frames uint8 [Y,X,3] for the contact sheet, by chunk
    done: how many chunks the video has
    saved: how many the saved state has; None without a state
    state: the folder of that state
    frame: uint8 [Y,X,3], the last of the last chunk
    totals: sums of the statistics of the chunks after the first; of that one, how long it took
    latest: while a chunk is written: its frames, the cache after it, and what `finalize` needs where it is to come
    unwritten: uint8 [F,Y,X,3], the frames of the last chunk, where the video could not take them
    line: the statistics of the last chunk, where their file has not taken them
    """

    pipe: StreamInferencePipeline
    rollout: Rollout
    base: Path
    film: FragmentedMP4
    cache: StreamCache
    sheet: dict[int, np.ndarray]
    done: int
    saved: int | None
    state: Path
    frame: np.ndarray | None = None
    totals: dict[str, float] = field(default_factory=dict)
    latest: tuple[np.ndarray, StreamCache, Any] | None = None
    unwritten: np.ndarray | None = None
    line: str | None = None

    def save(self) -> None:
        """Saves what the rollout goes on from, where it is not saved yet: beside the video, or where there is room."""
        if self.saved == self.done:
            return
        facts = self.rollout.facts() | {"frames": self.film.frames, "video": self.film.kept()}
        facts |= {"environment": environment.numerics(), "versions": versions()}
        if self.line is not None:
            facts[_LINE] = self.line
        arrays = run_state.flatten(self.cache) | {f"{_SHEET}{i}": frame for i, frame in self.sheet.items()}
        if self.unwritten is not None:
            arrays[_UNWRITTEN] = self.unwritten

        def save(base: Path) -> Path:
            where = {} if base == self.base else {ELSEWHERE: str(self.base.absolute())}
            return run_state.save(f"{base}.state", run_state.RunState(facts | where, self.done, arrays), overwrite=True)

        try:
            self.film.close()  # so that the disk has all that the state goes on from
        finally:
            self.state = rescue.kept(save, [self.base])
            self.saved = self.done

    def keep(self) -> None:
        """Saves the state after the last chunk that was made, also if it could not be written.

        Raises:
            ResourceError: nobody takes the state.
            RuntimeError: it cannot be read from the device, or its buffers were given to `finalize`, which failed.
        """
        if self.latest is not None:
            pixels, cache, final = self.latest
            if cache.finalized <= self.done:
                cache, _ = self.pipe.finalize(self.done, cache, final)
            self.line = _line({"chunk": self.done, "prompt": self.prompt(self.done), "frames": len(pixels)})
            self.count(pixels, cache)
            self.unwritten = pixels
        try:
            if self.done:
                self.save()
        except ResourceError:
            if self.saved != self.done:  # else it was about the video
                raise

    def prompt(self, chunk: int) -> str:
        """What a chunk shows."""
        prompts = self.rollout.prompts
        return prompts[max(i for i in prompts if i <= chunk)]

    def count(self, pixels: np.ndarray, cache: StreamCache) -> None:
        """Counts a chunk as done."""
        self.sheet = _thinned(self.sheet | {self.done: pixels[-1]})
        self.cache, self.frame, self.done, self.latest = cache, pixels[-1], self.done + 1, None


def make(
    pipe: StreamInferencePipeline,
    rollout: Rollout,
    config: Any,
    again: Callable[..., str],
    asked_to_stop: Callable[[], bool],
    seconds: dict[str, float],
    began: float,
    ahead: Callable[[], Any] = set,
) -> Path:
    """Makes chunks up to config.chunks, or until it is asked to stop, and returns the path of the video.

    Args:
        again: (resume=) -> the command that goes on.
        seconds: how long each phase took; compiling joins it.
        began: time.perf_counter() when the program began.
        ahead: waits for programs that are compiled since before weights were read.

    Raises:
        Interrupted: the video has fewer chunks than asked for; its state is saved.
    """
    with _claimed(rollout) as base:
        with progress.phase("compiling", seconds, "compile"), stage("compiling"):
            ahead()
            cache, sheet, unwritten = _begin(pipe, rollout)
            for _ in pipe.compile(cache, _first_input(rollout)):
                pass
        frames = rollout.state.facts["frames"] if rollout.state else 0
        kept = rollout.state.facts.get("video") if rollout.state else None
        film = FragmentedMP4(f"{base}.mp4", rollout.fps, rollout.facts(), frames=frames, kept=kept)
        saved = rollout.done if rollout.state else None
        making = _Making(pipe, rollout, base, film, cache, sheet, rollout.done, saved, Path(config.resume or ""))
        with deferred(), _kept(making, again), profiling.profile(config.profile, PROFILED):
            if unwritten is not None:  # the chunk that the disk did not take when it was made
                film.append(unwritten)
            _make_chunks(making, config, asked_to_stop, began)
            stopped = not config.chunks or making.done < config.chunks
            if not making.done:
                raise KeyboardInterrupt  # there is nothing to keep
            if making.done > rollout.done or (rollout.state is not None and not is_whole(rollout)):
                if stopped:
                    making.save()
                _write_record(making, config.checkpoint, seconds)
    say(_summary(making))
    if stopped:
        command = again(resume=making.state)
        raise Interrupted(f"interrupted after {making.done} chunks; the video can be played. Go on with:\n  {command}")
    return film.path


def programs(rollout: Rollout, abstract: Mapping[str, Any]) -> Iterator[tuple[str, jax.stages.Traced]]:
    """(name, program) of all that a rollout runs on one device, from abstract weights."""
    pipe = rollout.config.setup(abstract, rollout.repository.models.files["tokenizer"])
    return pipe.traced(pipe.abstract_cache(1), _first_input(rollout))


def _make_chunks(making: _Making, config: Any, asked_to_stop: Callable[[], bool], began: float) -> None:
    """Makes chunk after chunk, each with its line of statistics, and saves the state every config.save_every."""
    with (
        making.film,
        open(f"{making.base}.jsonl", "a", encoding="utf-8") as lines,
        progress.bar("chunks", config.chunks or None, start=making.done) as show,
    ):
        while (making.done < config.chunks or not config.chunks) and not asked_to_stop():
            with stage(f"chunk {making.done}"), _what_is_left(making), profiling.step("chunk", making.done):
                line, shown = _make_chunk(making)
            _count(making.totals, line, (shown - began) * 1000)
            making.line = _line(line)
            lines.write(making.line)
            lines.flush()
            making.line = None
            show(making.done)
            if config.save_every and (making.done % config.save_every == 0 or making.done == config.chunks):
                making.save()
                if making.state != Path(f"{making.base}.state"):
                    raise ResourceError(f"{making.base}.state: cannot be saved there.")


def _line(statistics: Mapping[str, Any]) -> str:
    """What the file of statistics has of a chunk."""
    rounded = {name: round(x, 3) if isinstance(x, float) else x for name, x in statistics.items()}
    return json.dumps(rounded, ensure_ascii=False) + "\n"


def _make_chunk(making: _Making) -> tuple[dict[str, Any], float]:
    """Makes the next chunk and writes it: (its statistics, time.perf_counter() when its frames were there).

    The frames are in the file before anybody waits for `finalize`; where no time is taken, that runs meanwhile.
    """
    pipe, rollout, i, cache = making.pipe, making.rollout, making.done, making.cache
    begun, timed = time.perf_counter(), pipe.config.enable_sync_and_profile
    line: dict[str, Any] = {"chunk": i, "prompt": making.prompt(i)}
    if i and i in rollout.prompts:
        against, reencode = rollout.negative_prompt, rollout.reencode
        cache = pipe.set_prompts(cache, [line["prompt"]], negative_prompt=against, reencode=reencode)
        line["prompt_ms"] = (time.perf_counter() - begun) * 1000
    frames, cache, final = pipe.generate(i, cache, rollout.image if i == 0 else None)
    statistics = {}
    if not timed:
        cache, _ = pipe.finalize(i, cache, final)
    pixels = np.asarray(frames)[0]  # [1,F,Y,X,3] -> [F,Y,X,3]
    shown = time.perf_counter()
    if share := float(final.nonfinite):
        raise NumericsError(f"chunk {i}: {share:.1%} of its latents or pixels are NaN or infinite.")
    making.latest = pixels, cache, final
    making.film.append(pixels)
    written = time.perf_counter()
    if timed:
        cache, statistics = pipe.finalize(i, cache, final)
    ended = time.perf_counter()
    making.count(pixels, cache)
    line |= {"frames": len(pixels), **statistics}
    line.setdefault("total_ms", (ended - written + shown - begun) * 1000)
    line |= {"write_ms": (written - shown) * 1000, "wall_ms": (ended - begun) * 1000}
    line |= {"first_frame_ms": (shown - begun) * 1000, **_rates(line)} | _memory()
    return line, shown


def _count(totals: dict[str, float], line: dict[str, Any], cold: float) -> None:
    """Adds a chunk's statistics to the totals; the first chunk's say how long its frames took, and nothing else.

    cold: milliseconds from the beginning of the program to the chunk's frames.
    """
    if not totals:
        line["first_frame_cold_ms"] = cold
        totals |= {name: line[name] for name in ("first_frame_ms", "first_frame_cold_ms")}
        return
    del line["first_frame_ms"]
    for name in ("frames", "total_ms", "total_ms_wo_finalize"):
        totals[name] = totals.get(name, 0) + line.get(name, 0)


def _write_record(making: _Making, checkpoint: str, seconds: Mapping[str, float]) -> None:
    """Writes the contact sheet, and then the record of the run."""
    rollout, done = making.rollout, making.done
    record = rollout.facts() | {"chunks": done, "frames": making.film.frames, "checkpoint": printable(checkpoint)}
    if how := decoded(rollout.config):
        record["dtypes"] = precision.told(precision.choose(rollout.precision, how))
    record |= {"device": device(making.pipe), "versions": versions(), "resumed_at_chunk": rollout.done or None}
    record |= {"environment": environment.numerics(), "autotuning": environment.autotuning()}
    record |= {"seconds": {name: round(value, 3) for name, value in seconds.items()}}
    record |= {"speed": {name: round(value, 3) for name, value in _rates(making.totals).items()}}
    shown = making.sheet if making.frame is None else {**making.sheet, done - 1: making.frame}
    videos.write_png(f"{making.base}.png", videos.contact_sheet(np.stack(list(shown.values()))), rollout.facts())
    with atomic(f"{making.base}.json") as part:
        text = json.dumps(signed(making.base, record, (".mp4", ".png", ".jsonl")), indent=2, ensure_ascii=False)
        part.write_text(text, encoding="utf-8")


def _begin(
    pipe: StreamInferencePipeline, rollout: Rollout
) -> tuple[StreamCache, dict[int, np.ndarray], np.ndarray | None]:
    """The state of a rollout, from its seed or as it was saved; the frames for its contact sheet; and those that the
    video lacks."""
    if rollout.state is None:
        against = rollout.negative_prompt
        return pipe.initialize_cache(rollout.seed, [rollout.prompts[0]], negative_prompt=against), {}, None
    arrays = dict(rollout.state.arrays)
    sheet = {int(name.removeprefix(_SHEET)): arrays.pop(name) for name in list(arrays) if name.startswith(_SHEET)}
    unwritten = arrays.pop(_UNWRITTEN, None)
    cache = pipe.restore_cache(arrays)
    if not cache.generated == cache.finalized == rollout.done:
        raise CheckpointError(
            f"the saved state has {rollout.done} chunks; its cache has {cache.generated}, {cache.finalized} finalized."
        )
    return cache, sheet, unwritten


def _first_input(rollout: Rollout) -> Any:
    """What chunk 0 is given, or something like it."""
    encoder, shape = rollout.config.encoder, rollout.config.diffusion_model.transformer.latent_shape
    if rollout.image is not None or encoder is None:
        return rollout.image
    return encoder.abstract_input(1, shape, 0)


@contextlib.contextmanager
def _claimed(rollout: Rollout) -> Iterator[Path]:
    """The path of the files without their suffixes: a name that nobody has, or that of the rollout that goes on."""
    if rollout.state is None:
        with claim(rollout.folder, rollout.stem, (".jsonl", ".mp4")) as base:
            yield base
        return
    base = rollout.folder / rollout.stem
    path, refused = Path(f"{base}.jsonl"), rollout.state.facts.get(_LINE)
    if path.exists() or refused:  # without lines of chunks after the state was saved, and one that was cut
        count = rollout.done - (refused is not None)
        whole = path.read_bytes().splitlines(keepends=True)[:count] if path.exists() else []
        with atomic(path) as part:
            part.write_bytes(b"".join([line for line in whole if line.endswith(b"\n")] + [(refused or "").encode()]))
    with alone(base) if ELSEWHERE in rollout.state.facts else contextlib.nullcontext():  # otherwise it is held
        yield base


@contextlib.contextmanager
def _kept(making: _Making, again: Callable[..., str]) -> Iterator[None]:
    """Saves the state after the last chunk that was made, whatever is raised inside, and says how to go on."""
    try:
        yield
    except (KeyboardInterrupt, NumericsError):
        raise
    except BaseException as error:
        rescue.attempt(making.keep, f"the state after chunk {making.done - (making.latest is None)}")
        if making.saved is not None:
            command = again(resume=making.state)
            say(f"The state after chunk {making.saved - 1} is kept. Go on with:\n  {command}")
        if isinstance(error, OSError):
            raise ResourceError(f"cannot write {making.base}: {error.strerror or error}.") from error
        raise


@contextlib.contextmanager
def _what_is_left(making: _Making) -> Iterator[None]:
    """Says what there is of a rollout in which numbers went wrong."""
    try:
        yield
    except NumericsError as error:
        state = "" if making.saved is None else f"\nThe state after chunk {making.saved - 1} is in {making.state}."
        film = making.film
        raise NumericsError(f"{error}\nThe {film.frames} frames before it are in {film.path}.{state}") from error


def _thinned(sheet: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Frames by chunk, evenly spaced, at most SHEET however long the video; the last chunk is in `sheet`."""
    stride = 1
    while max(sheet) // stride >= SHEET:
        stride *= 2
    return {i: frame for i, frame in sheet.items() if i % stride == 0}


def _rates(times: Mapping[str, Any]) -> dict[str, float]:
    """Frames a second, with and without finalize, and how long the first took."""
    rates = {name: times[name] for name in ("first_frame_ms", "first_frame_cold_ms") if name in times}
    for name, of in (("fps", "total_ms"), ("fps_wo_finalize", "total_ms_wo_finalize")):
        if times.get(of):
            rates[name] = times["frames"] * 1000 / times[of]
    return rates


def _summary(making: _Making) -> str:
    parts, rates = [f"{making.done} chunks, {making.film.frames} frames"], _rates(making.totals)
    if "first_frame_ms" in rates:
        warm, cold = rates["first_frame_ms"] / 1000, rates["first_frame_cold_ms"] / 1000
        parts.append(f"the first after {warm:.2f} s ({cold:.1f} s with loading and compiling)")
    if "fps" in rates:
        apart = f" ({rates['fps_wo_finalize']:.1f} without finalize)" if "fps_wo_finalize" in rates else ""
        parts.append(f"then {rates['fps']:.1f} a second{apart}")
    return ", ".join(parts)


def _memory() -> dict[str, float]:
    """GiB of the device in use and at most, where it tells; otherwise of the process, at most."""
    if memory := device_memory():
        return memory
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return {"rss_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
