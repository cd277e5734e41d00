"""Whether clips come as fast as a device asks for them: how long a step waits for its batch, and what that costs.

    python benchmarks/loader.py                   # 8 clips of 16x256x256 every 0.2 s; benchmarks/results/loader.json
    python benchmarks/loader.py --workers=4 --clip_frames=240

The clips are H.264 of 320x320 with one key frame, which it writes itself; the step is a sleep, as the device's would be
for the host. `waited` is the share of the time of all steps but the first, which waits for the first batch.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import machine
import numpy as np
from timing import RESULTS, in_turn, short, write

from jvdiff.errors import JvdiffError
from jvdiff.media import clips, video


def write_clips(folder: Path, count: int, frames: int, side: int = 320) -> clips.Clips:
    """Coarse noise that moves by three pixels a frame, in one class."""
    rng = np.random.default_rng(0)
    for i in range(count):
        picture = rng.integers(0, 256, (side // 8, side // 8, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
        moving = np.stack([np.roll(picture, 3 * f, 1) for f in range(frames)])
        video.write_mp4(folder / "noise" / f"{i:03}.mp4", moving, 24)
    return clips.find(folder)


def waiting(found: clips.Clips, step: float, steps: int, **settings: Any) -> float:
    """The share of a step's time that is spent waiting for its batch."""
    waited = 0.0
    batches = clips.batches(found, **settings)
    next(batches)
    for _ in range(steps):
        began = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - began
        time.sleep(step)
    batches.close()
    return waited / (waited + steps * step)


def costs(path: Path, batch: int, frames: int, size: int, repeats: int = 20) -> dict[str, float]:
    """Milliseconds of one clip from the middle of a file, in one thread: decoding, the rest of reading, batching."""
    there = video.read_video(path).shape[0]
    clip = clips.read(path, frames, size)

    def decode() -> None:
        with video.open_video(path) as (file, stream):
            stream.codec_context.thread_count = 1
            for number, _ in enumerate(file.decode(stream), 1):
                if number == (there - frames) // 2 + frames:
                    return

    runs = decode, lambda: clips.read(path, frames, size, start=0.5), lambda: np.stack([clip] * batch)
    decoded, read, stacked = (1000 * statistics.median(seconds) for seconds in in_turn(runs, repeats))
    return {"decode": short(decoded), "resize_and_copy": short(read - decoded), "batch": short(stacked / batch)}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 8), ("frames", 16), ("size", 256), ("workers", 2), ("clips", 32), ("steps", 50)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--clip_frames", type=int, default=48, help="frames of a file")
    parser.add_argument("--step", type=float, default=0.2, help="seconds")
    parser.add_argument("--output", type=Path, default=RESULTS / "loader.json")
    args = parser.parse_args(words)
    settings = {name: getattr(args, name) for name in ("batch", "frames", "size", "workers")}
    with tempfile.TemporaryDirectory() as folder:
        found = write_clips(Path(folder), args.clips, args.clip_frames)
        waited = waiting(found, args.step, args.steps, **settings)
        each = costs(found.paths[0], args.batch, args.frames, args.size)
    limit = max(each, key=each.__getitem__)
    print(f"a step of {args.step:g} s waits {waited:.1%} of the time for {args.batch} clips; most goes into: {limit}")
    print("a clip, in one thread: " + " · ".join(f"{name} {ms:.3g} ms" for name, ms in each.items()))
    settings |= {"step": args.step, "clip_frames": args.clip_frames}
    report = {"machine": machine.describe(), "settings": settings, "waited": short(waited)}
    write(args.output, report | {"milliseconds_of_a_clip": each})
    return 0


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    try:
        sys.exit(main())
    except JvdiffError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
