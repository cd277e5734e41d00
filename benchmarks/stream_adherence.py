"""Does a stream show what its prompt says, now and 400 chunks later? The part --stream of prompt_adherence.py.

    python benchmarks/prompt_adherence.py --stream checkpoints/digits-stream
    python benchmarks/prompt_adherence.py --stream checkpoints/digits-stream --chunks 400 [--straight]

Every rollout is one digit whose prompt changes its direction every few chunks, or never (--straight). Each chunk is
judged by itself: digit and colour in all chunks, direction in those after the one in which it changed (a digit cannot
turn before it is told to, and may do so anywhere in that chunk). Beside the generated rollouts stand real ones,
held-out glyphs moving by the same prompts: what the judge makes of them is the most that can be reached. Chunks are
counted from 1.

The digit reader sees some digit in a stripe too. So the shape is judged beside it (`jvdiff.digits.judge.shapes`): a
rollout is right at a chunk if digit, colour and direction are, and it is neither closed to a stripe nor too long. It is
kept if it is right and not lost, which is to say still like its own second chunk.

B rollouts · F pixel frames · Y X pixel height, width.
"""

import itertools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jvdiff.digits import clips as digits
from jvdiff.digits import judge as digits_judge
from jvdiff.digits.clips import Combo
from jvdiff.digits.judge import Seen, Shape
from jvdiff.errors import UsageError
from jvdiff.types import Params

CHUNK_FRAMES = (9, 12)  # of chunk 1 and of every later one: 3 latent frames
PAUSES = (3, 9)  # chunks from one change of direction to the next, fewest and most
GOALS = {"digit": 85.0, "colour": 95.0, "direction": 90.0, "drift": 5.0}  # percent, and points
EARLY, LATE = 5, 40  # the chunks between which there may be no drift
AROUND = {EARLY: (3, 7), LATE: (36, 40)}  # and, as one chunk is few clips, windows of five
HELD_AT = (5, 40, 120, 400)  # chunks at which rollouts are counted


def measure(
    judge: Params, pipe: Any, rollouts: int, batch: int, seed: int, chunks: int = LATE, straight: bool = False
) -> tuple[dict[str, Any], np.ndarray]:
    """The report on rollouts of so many chunks, at least 40, and the video of the first 40, uint8 [B,F,Y,X,3].

    straight: prompts never change.
    """
    if chunks < LATE:
        raise UsageError(f"chunks is {chunks}; expected {LATE} or more.")
    real, wanted = streams(rollouts, chunks, seed)
    shown = [stream[:LATE] for stream in wanted]
    if straight:
        wanted = [stream[:1] * chunks for stream in wanted]
    seen: list[list[Seen]] = []
    shapes: list[list[Shape]] = []
    videos, began, seconds = [], time.perf_counter(), 0.0
    for i, part in _parts(wanted, batch):
        video = generate(pipe, part, seed + i)
        seconds += time.perf_counter() - began
        seen, shapes = seen + seen_in(judge, video), shapes + shapes_in(video)
        videos.append(video[:, : _start(LATE)].copy())
        began = time.perf_counter()
    generated = report_on(seen, wanted)
    report = {
        "rollouts": rollouts,
        "chunks": chunks,
        "turning": not straight,
        "seed": seed,
        "seconds": round(seconds, 1),
        "seconds_per_chunk_of_a_batch": round(seconds / chunks / -(-rollouts // batch), 3),
        "judge_on_real_streams": report_on(seen_in(judge, real), shown),
        "generated": generated,
        "rollouts_at": {f"chunk {n}": held_at(seen, shapes, wanted, n) for n in HELD_AT if n <= chunks},
        "goals": GOALS,
        "met": goals_met(generated),
    }
    return report, np.concatenate(videos)


def streams(rollouts: int, chunks: int, seed: int) -> tuple[np.ndarray, list[list[Combo]]]:
    """Real streams of held-out glyphs, at most 40 chunks of each, uint8 [B,F,64,64,3], and what each chunk should show.

    A direction lasts PAUSES chunks, the first one any number up to that, so that chunks of all numbers are equally far
    from a change. All combinations appear, also those that training never shows.
    """
    videos, wanted = [], []
    for i in range(rollouts):
        rng = np.random.default_rng((seed, i))
        first = rng.integers(1, PAUSES[1] + 1)
        at = first + np.concatenate([[0], rng.integers(PAUSES[0], PAUSES[1] + 1, size=chunks).cumsum()])
        changes = at[at < chunks]
        video, prompts = digits.stream(rng, _start(chunks), [_start(c) for c in changes.tolist()], "test", "all")
        combos = [digits.parse_prompt(p) for p in prompts]
        videos.append(video[: _start(LATE)].copy())  # 400 chunks of 64 streams are 4 GB
        wanted.append([combos[n] for n in np.searchsorted(changes, np.arange(chunks), side="right")])
    return np.stack(videos), wanted


def generate(pipe: Any, wanted: Sequence[Sequence[Combo]], seed: int) -> np.ndarray:
    """Rollouts of a streaming pipeline as one batch, uint8 [B,F,Y,X,3], each prompted chunk by chunk."""
    prompts = [[digits.prompt(*combos[i]) for combos in wanted] for i in range(len(wanted[0]))]  # [chunks][B]
    cache = pipe.initialize_cache(jax.random.key(seed), prompts=prompts[0])
    chunks = []
    for i, now in enumerate(prompts):
        if i and now != prompts[i - 1]:
            cache = pipe.set_prompts(cache, now)
        frames, cache, final = pipe.generate(i, cache)
        cache, _ = pipe.finalize(i, cache, final)
        chunks.append(np.asarray(frames))
        if len(chunks[-1][0]) != CHUNK_FRAMES[i > 0]:
            raise UsageError(
                f"chunk {i + 1} has {len(chunks[-1][0])} frames; expected {CHUNK_FRAMES[i > 0]}: this benchmark knows "
                "chunks of 3 latent frames."
            )
        if (i + 1) % 10 == 0:
            print(f"generated {i + 1} of {len(prompts)} chunks", file=sys.stderr)
    return np.concatenate(chunks, axis=1)


def seen_in(judge: Params, videos: np.ndarray) -> list[list[Seen]]:
    """What each chunk of each stream uint8 [B,F,Y,X,3] shows."""
    by_chunk = [digits_judge.look(judge, chunk, torus=True) for chunk in _chunks(videos)]
    return [list(stream) for stream in zip(*by_chunk, strict=True)]


def shapes_in(videos: np.ndarray) -> list[list[Shape]]:
    """The shape in each chunk of each stream uint8 [B,F,Y,X,3], beside its own second chunk."""
    chunks = _chunks(videos)
    by_chunk = [digits_judge.shapes(chunk, chunks[1]) for chunk in chunks]
    return [list(stream) for stream in zip(*by_chunk, strict=True)]


def held_at(
    seen: Sequence[Sequence[Seen]], shapes: Sequence[Sequence[Shape]], wanted: Sequence[Sequence[Combo]], chunk: int
) -> dict[str, dict[str, Any]]:
    """How many rollouts are right at a chunk, counted from 1, and how many wrong in which way, each with its interval.

    A rollout that is told to turn in this very chunk may move as it likes.
    """
    i = chunk - 1
    cells = [(s[i], shape[i], w[max(i - 1, 0) : chunk]) for s, shape, w in zip(seen, shapes, wanted, strict=True)]
    settled = [s.direction == w[-1].direction or w[0] != w[-1] for s, _, w in cells]
    ways = {
        "digit": [s.digit == w[-1].digit for s, _, w in cells],
        "colour": [s.colour == w[-1].colour for s, _, w in cells],
        "direction": settled,
        "closed": [shape.closed for _, shape, _ in cells],
        "too_long": [shape.too_long for _, shape, _ in cells],
        "lost": [shape.lost for _, shape, _ in cells],
    }
    rows = list(zip(*ways.values(), strict=True))
    ways["right"] = [all(row[:3]) and not any(row[3:5]) for row in rows]
    ways["kept"] = [all(row[:3]) and not any(row[3:]) for row in rows]
    return {way: {"rollouts": sum(found), "of": len(found)} | _interval(found) for way, found in ways.items()}


def _interval(found: Sequence[bool]) -> dict[str, Any]:
    """Wilson's interval of 95 % for the share of what is true, in percent."""
    n, z = len(found), 1.96
    share = sum(found) / n
    middle, scale = share + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return {"interval_percent": [round(100 * (middle + sign * half) / scale, 1) for sign in (-1, 1)]}


def report_on(seen: Sequence[Sequence[Seen]], wanted: Sequence[Sequence[Combo]]) -> dict[str, Any]:
    """score() of all chunks, of those around the fifth and the fortieth, and of each kind of prompt; and the drift."""
    every = range(1, len(wanted[0]) + 1)
    result: dict[str, Any] = {f"chunks 1 to {every[-1]}": score(seen, wanted, every)}
    for chunk, (first, last) in AROUND.items():
        result[f"chunk {chunk}"] = score(seen, wanted, [chunk])
        result[f"chunks {first} to {last}"] = score(seen, wanted, range(first, last + 1))
    for name, combos in (("trained prompts", digits.combinations("train")), ("held-out prompts", digits.HELD_OUT)):
        result[name] = score(seen, wanted, every, frozenset(combos))
    names = [f"chunks {first} to {last}" for first, last in AROUND.values()]
    result["drift_points"] = {
        pair: {field: _lost(result[a][field], result[b][field]) for field in (*Combo._fields, "all")}
        for pair, (a, b) in {
            f"chunk {EARLY} to {LATE}": (f"chunk {EARLY}", f"chunk {LATE}"),
            f"{names[0]}, to {names[1]}": names,
        }.items()
    }
    return result


def score(
    seen: Sequence[Sequence[Seen]],
    wanted: Sequence[Sequence[Combo]],
    chunks: Sequence[int],
    combos: frozenset[Combo] = frozenset(digits.COMBOS),
) -> dict[str, dict[str, Any]]:
    """How many of these chunks, counted from 1, whose prompt is one of `combos`, are right, field by field.

    direction, and all three at once, are counted where the direction is that of the chunk before; `turning` is the
    direction in the others.
    """
    cells = [
        (s[i], w[i], i == 0 or w[i] == w[i - 1])
        for s, w in zip(seen, wanted, strict=True)
        for i in (chunk - 1 for chunk in chunks)
        if w[i] in combos
    ]
    return {
        "colour": _count(s.colour == w.colour for s, w, _ in cells),
        "digit": _count(s.digit == w.digit for s, w, _ in cells),
        "direction": _count(s.direction == w.direction for s, w, settled in cells if settled),
        "all": _count(tuple(s) == tuple(w) for s, w, settled in cells if settled),
        "turning": _count(s.direction == w.direction for s, w, settled in cells if not settled),
    }


def show(what: str, report: dict[str, Any]) -> None:
    """Prints scores by name, or a report_on(), as a table."""
    rows = {name: row for name, row in report.items() if name != "drift_points"}
    fields = ("colour", "digit", "direction", "all", "turning")
    print(f"{what:34}" + "".join(f"{field:>21}" for field in fields))
    for name, row in rows.items():
        counts = (f"{row[f]['right']}/{row[f]['of']} = {row[f]['percent']} %" if row[f]["of"] else "-" for f in fields)
        print(f"  {name:32}" + "".join(f"{count:>21}" for count in counts))
    for pair, lost in report.get("drift_points", {}).items():
        print(f"  points lost, {pair}: " + ", ".join(f"{field} {points}" for field, points in lost.items()))


def show_held(report: dict[str, dict[str, Any]]) -> None:
    """Prints `held_at` of some chunks."""
    for name, ways in report.items():
        counts = (
            f"{way.replace('_', ' ')} {row['rollouts']}/{row['of']} ({row['interval_percent'][0]:.0f} to "
            f"{row['interval_percent'][1]:.0f} %)"
            for way, row in ways.items()
        )
        print(f"  rollouts at {name}: {', '.join(counts)}")


def goals_met(report: dict[str, Any]) -> dict[str, bool]:
    """Whether generated streams reach GOALS; drift is judged over the windows of chunks."""
    whole = next(iter(report.values()))
    met = {field: whole[field]["percent"] >= GOALS[field] for field in ("digit", "colour", "direction")}
    drift = list(report["drift_points"].values())[-1]
    return met | {"drift": all(drift[field] <= GOALS["drift"] for field in Combo._fields)}


def _chunks(videos: np.ndarray) -> list[np.ndarray]:
    """The chunks of streams uint8 [B,F,Y,X,3]."""
    starts = [_start(i) for i in range(videos.shape[1] // CHUNK_FRAMES[1] + 2)]
    return [videos[:, a:b] for a, b in itertools.pairwise(starts) if b <= videos.shape[1]]


def _start(chunk: int) -> int:
    """The first pixel frame of a chunk, counted from 0."""
    return CHUNK_FRAMES[0] + CHUNK_FRAMES[1] * (chunk - 1) if chunk else 0


def _parts(wanted: list[list[Combo]], batch: int) -> Iterator[tuple[int, list[list[Combo]]]]:
    if len(wanted) % batch:
        raise UsageError(f"{len(wanted)} rollouts do not divide into batches of {batch}.")
    return ((i, wanted[i : i + batch]) for i in range(0, len(wanted), batch))


def _count(right: Iterator[bool]) -> dict[str, Any]:
    found = list(right)
    return {
        "right": sum(found),
        "of": len(found),
        "percent": round(100 * sum(found) / len(found), 1) if found else None,
    }


def _lost(early: dict[str, Any], late: dict[str, Any]) -> float | None:
    return round(early["percent"] - late["percent"], 1) if early["of"] and late["of"] else None
