"""A folder of labelled clips becomes batches: found, decoded, cut out, shuffled, read ahead.

    clips = find("digits")                     # digits/seven/0001.mp4, or digits.csv with columns path,label
    for video, labels in batches(clips, batch=8, frames=16, size=256):
        ...

A batch is a function of the files, the settings, the seed and the step, so that a training that was stopped sees what
it would have seen, whichever thread decoded it and whichever files could not be read.

B batch · F pixel frames · Y X pixel height, width · N clips.
"""

import contextlib
import csv
import itertools
import logging
import math
import os
import threading
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jvdiff.config import expanded, within
from jvdiff.errors import CheckpointError, CorruptFile, DataError, SetupError, UsageError
from jvdiff.media import video

SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv")  # what find() takes for a clip in a folder
MOST_DECODED = 4 * video.MAX_PIXELS  # to get at one clip: seconds of work, where key frames are as far apart as usual
REORDERED = 16  # frames shown before a key frame, but decoded after it, are lost when decoding begins there
RESIZE = 0x4 | 0x2000  # FFmpeg's SWS_BICUBIC and SWS_FULL_CHR_H_INT, without which pixels become darker by 2 of 255
_log = logging.getLogger("jvdiff.media")


class Clips(NamedTuple):
    """Where labelled clips are. A label is an index into the names of the classes."""

    paths: tuple[Path, ...]
    labels: np.ndarray  # int32 [N]
    classes: tuple[str, ...]


class Batch(NamedTuple):
    """What a training step sees."""

    video: np.ndarray  # uint8 [B,F,Y,X,3]
    labels: np.ndarray  # int32 [B]


def find(source: str | os.PathLike) -> Clips:
    """The clips of a folder `class_name/clip.mp4`, or of a CSV with the columns path (relative to it) and label.

    Classes are in the order of their names, numbers by value. No clip is opened; hidden files and others than SUFFIXES
    are passed over in a folder.

    Raises:
      UsageError: no such folder or file.
      DataError: it holds no clip, or a class holds none; a line of the CSV lacks path or label.
      CorruptFile: it is not a CSV.
    """
    source = Path(expanded("clips", source))
    if not source.exists():
        raise UsageError(f"{source}: no such folder or file; expected class_name/clip.mp4 in it, or a CSV.")
    rows = _of_folder(source) if source.is_dir() else _of_csv(source)
    if not rows:
        raise DataError(f"{source}: there is no clip in it; expected class_name/clip.mp4, or a CSV with such paths.")
    paths, names = zip(*rows, strict=True)
    classes = sorted(set(names), key=lambda name: (int(name) if name.isdecimal() else math.inf, name))
    return Clips(paths, np.array([classes.index(name) for name in names], np.int32), tuple(classes))


def _of_folder(folder: Path) -> list[tuple[Path, str]]:
    rows = []
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        files = (path for path in inner.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
        found = [(path, inner.name) for path in sorted(files)]
        if not found:
            raise DataError(f"{inner}: there is no clip of this class; expected files {', '.join(SUFFIXES)} in it.")
        rows += found
    return rows


def _of_csv(file: Path) -> list[tuple[Path, str]]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as text:
            reader = csv.DictReader(text)
            columns = reader.fieldnames or []
            lines = [(reader.line_num, line) for line in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise CorruptFile(f"{file} cannot be read as a CSV in UTF-8 ({error}).") from error
    if not {"path", "label"} <= set(columns):
        raise DataError(f"{file} has the columns {columns} in its first line; expected path and label.")
    for number, line in lines:
        if not (line["path"] and line["label"]):
            raise DataError(f"{file}, line {number}: path is {line['path']!r}, label {line['label']!r}; expected both.")
    named = {number: line["path"] for number, line in lines}
    named |= {n: expanded(f"{file}, line {n}", path) for n, path in named.items() if path.startswith("~")}
    return [(file.parent / named[number], line["label"]) for number, line in lines]


def read(
    path: str | os.PathLike,
    frames: int,
    size: int,
    stride: int = 1,
    start: float = 0.0,
    crop: Sequence[float] = (0.5, 0.5),
) -> np.ndarray:
    """A part of a local MP4/MOV or WebM/MKV file, uint8 RGB [frames,size,size,3].

    Every `stride`-th frame is taken, at the file's average rate where its frames do not all last equally long. The
    shorter side is resized to `size` (bicubic), the longer one cut off.

    Args:
      start: where it begins, from 0 (with the first frame) to 1 (so late that it ends with the last).
      crop: where the square lies in (Y, X), from 0 (top, left) to 1.

    Raises:
      DataError: too few frames, or not three channels. CorruptFile: not a readable video.
      CheckpointError: its frames are too large, or its key frames too far apart.
      SetupError: av is not installed.
    """
    span = (frames - 1) * stride + 1
    with video.open_video(path) as (file, stream):
        height, width, rate = stream.codec_context.height, stream.codec_context.width, stream.average_rate
        if not (height and width and rate):
            raise CorruptFile(f"{path} does not say its size, or its frames a second.")
        rows, columns = (max(size, round(side * size / min(height, width))) for side in (height, width))
        for sides in ((height, width), (rows, columns)):
            video.check_pixels(path, span, *sides, video.MAX_PIXELS)
        there = stream.frames or round((file.duration or 0) * rate / 1_000_000)  # the duration is in microseconds
        if there < span:
            raise DataError(f"{path} has {there} frames; expected {span} or more ({frames} with stride {stride}).")

        first = round(start * (there - span))
        top, left = round(crop[0] * (rows - size)), round(crop[1] * (columns - size))
        resizer = video.import_av().video.reformatter.VideoReformatter()
        clip: list[np.ndarray] = []
        for frame in _frames(path, file, stream, first + stride * np.arange(frames)):
            matrix = video.colour_matrix(frame)
            rgb = resizer.reformat(frame, columns, rows, "rgb24", matrix, interpolation=RESIZE, threads=1)
            clip.append(rgb.to_ndarray()[top : top + size, left : left + size])
    if len(clip) < frames:
        raise CorruptFile(f"{path} is cut off: it ends before frame {first + stride * len(clip)} of {there}.")
    return np.stack(clip)


def _frames(path: str | os.PathLike, file: Any, stream: Any, numbers: np.ndarray) -> Iterator[Any]:
    """The frames of these rising numbers, decoded from a key frame before the first; fewer where the file ends."""
    context = stream.codec_context
    size = context.height, context.width
    context.thread_count = 1  # the cores are the workers', here and in resizing
    period = float(1 / (stream.average_rate * stream.time_base))  # of a frame, in units of time stamps
    origin = stream.start_time or 0
    middles = [origin + (number + 0.5) * period for number in numbers.tolist()]
    file.seek(max(origin, int(middles[0] - REORDERED * period)), stream=stream)
    stamped = (frame for frame in file.decode(stream) if frame.pts is not None)
    for decoded, (frame, following) in enumerate(itertools.pairwise(itertools.chain(stamped, [None])), 1):
        video.check_pixels(path, decoded, *size, MOST_DECODED)
        if (frame.height, frame.width) != size:
            raise CorruptFile(f"{path}: a frame is {frame.width}x{frame.height}, the file says {size[1]}x{size[0]}.")
        if (channels := len(frame.format.components)) != 3:
            raise DataError(f"{path} has {channels} channels ({frame.format.name}); expected 3, as in yuv420p.")
        if decoded == 1 and frame.pts > middles[0]:
            raise CorruptFile(f"{path}: frame {numbers[0]} cannot be found; the file's index is damaged.")
        # Of a frame's own duration the files are not sure; the last one may be somewhat early.
        until = frame.pts + 2 * period if following is None else following.pts
        while middles and middles[0] < until:
            del middles[0]
            yield frame
        if not middles:
            return


def batches(
    clips: Clips,
    *,
    batch: int,
    frames: int,
    size: int,
    stride: int = 1,
    seed: int = 0,
    start: int = 0,
    workers: int = 2,
    most_bad: float = 0.05,
) -> Generator[Batch, None, None]:
    """Batches without end, from that of step `start` on; closing the iterator ends its workers.

    Each epoch has every clip once, in an order of its own, from a random frame on and cut at a random place. A clip
    that cannot be read is replaced by another, and logged once.

    Args:
      frames, size, stride: as for `read`.
      workers: threads that read ahead (decoding lets other threads run), each a batch of its own.
      most_bad: which share of the clips may be unreadable, below 1.

    Raises:
      UsageError: an invalid setting.
      SetupError: grain or av are not installed.
      DataError: fewer clips than a batch; while reading: more unreadable ones than `most_bad` of them.
    """
    _check_numbers(batch, frames, size, stride, seed, start, workers, most_bad)
    if (count := len(clips.paths)) < batch:
        raise DataError(f"there are {count} clips, fewer than a batch of {batch}; add clips, or lower batch.")
    grain = _grain()
    unreadable, lock = {}, threading.Lock()

    def example(position: int, index: int) -> Batch:
        rng = np.random.default_rng((seed, position))
        moment, *crop = rng.random(3)
        while True:  # ends, because a clip that is drawn again and again is counted once, and some can be read
            try:
                return Batch(read(clips.paths[index], frames, size, stride, moment, crop), clips.labels[index])
            except CheckpointError as error:
                note(clips.paths[index], error)
            index = int(rng.integers(count))

    def note(path: Path, error: CheckpointError) -> None:
        with lock:
            if path not in unreadable:
                unreadable[path] = error
                _log.warning("another clip takes the place of one that cannot be read: %s", error)
            if len(unreadable) > most_bad * count:
                raise DataError(
                    f"{len(unreadable)} of {count} clips cannot be read, more than most_bad={most_bad:g} of them. "
                    f"The first:\n{next(iter(unreadable.values()))}"
                )

    order = grain.MapDataset.range(count).shuffle(seed=seed).repeat()
    steps = order.map_with_index(example).batch(batch)[start:]
    return _until_closed(steps.to_iter_dataset(grain.ReadOptions(workers, prefetch_buffer_size=2 * workers)))


def _check_numbers(
    batch: int, frames: int, size: int, stride: int, seed: int, start: int, workers: int, most_bad: float
) -> None:
    for name, value in (("batch", batch), ("frames", frames), ("size", size), ("stride", stride), ("workers", workers)):
        within(name, value, 1, 2**31)
    within("seed", seed, 0, 2**32 - 1)
    within("start", start, 0, 2**63)
    if not 0 <= most_bad < 1:
        raise UsageError(f"most_bad is {most_bad}; expected a share of the clips, 0 or more and below 1.")


def _grain() -> Any:
    try:
        import grain
    except ImportError as error:
        raise SetupError(
            "reading clips needs the package grain, which is not installed.\n"
            'Install it with: pip install "jvdiff[train]"'
        ) from error
    return grain


def _until_closed(steps: Any) -> Generator[Batch, None, None]:
    with contextlib.closing(iter(steps)) as ahead:
        yield from ahead
