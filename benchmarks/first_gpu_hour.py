"""What is asked first of a GPU, part by part, the most valuable first; at most five minutes, and again to go on.

    python benchmarks/first_gpu_hour.py                     # the next five minutes of it
    python benchmarks/first_gpu_hour.py --minutes 15
    python benchmarks/first_gpu_hour.py --only decode       # parts whose name contains this, done or not
    python benchmarks/first_gpu_hour.py --rehearse          # tiny sizes, on a CPU too: that all of it runs

Each part is a process of its own with a limit of time, so that a kernel that hangs or crashes ends its part alone; what
a part has found by then is kept. The report is written after each: benchmarks/results/first_gpu_hour_DEVICE.json, with
the device, its driver and versions, and what is nearest to the goals and what is farthest. A part that is done is not
done again; one that failed or ran out of time is tried again when all others have had their turn.

Compiled programs are kept beside the report, in a folder .first_gpu_hour, so that a part that ran out of time goes on
where its compiler was; only "compile, cold" does without. B batch · L tokens · N heads · K head dim.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jvdiff.errors import JvdiffError, SetupError, UsageError
from jvdiff.runtime.files import atomic

HERE = Path(__file__).resolve().parent
SOON = 15.0  # seconds: no part is begun with less
PATIENCE = 10  # times as long as a GPU may a rehearsal take: of a busy CPU it proves that all runs, not how fast
TOLD = 12  # lines of what a part that failed has printed


class Part(NamedTuple):
    """A thing to find out.

    name: of it
    limit: seconds that it may take, with everything compiled anew
    words: the command behind `python`; {out} is the JSON file that it writes, {checkout} the folder of the checkout
    rehearsal: the same at tiny sizes
    """

    name: str
    limit: float
    words: tuple[str, ...]
    rehearsal: tuple[str, ...]


def own(name: str, limit: float, function: str, *words: str) -> Part:
    """A part that is a function of `first_gpu_parts`."""
    command = ("{checkout}/benchmarks/first_gpu_parts.py", function, *words, "--output={out}")
    return Part(name, limit, command, (*command, "--tiny"))


def attention(name: str, limit: float, only: str, tiny: str) -> Part:
    """Rows of benchmarks/attention.py; tiny: of its --quick."""
    command = ("{checkout}/benchmarks/attention.py", "--alone", "--output={out}")
    return Part(
        name,
        limit,
        (*command, "--device=gpu", f"--only={only}"),
        (*command, "--device=cpu", "--quick", f"--only={tiny}"),
    )


STA, VSA = "sliding_tile:6x8x8:3x3x3", "video_sparse:4x4x4:0.9"
STREAMING, LOADING = "{checkout}/benchmarks/streaming.py", "{checkout}/benchmarks/loading.py"
PARTS = (
    own("right: mosaic_gpu", 90, "right", "mosaic_gpu"),
    own("step, dense", 90, "step", "dense"),
    own("right: cudnn", 60, "right", "cudnn"),
    attention("attention, STA", 60, f"Wan 1.3B 480p, {STA}, forward", "sliding_tile:2x4x4:1x1x1, forward"),
    attention("attention, VSA", 60, f"Wan 1.3B 480p, {VSA}, forward", "video_sparse:2x4x4:0.5, forward"),
    own("decode", 120, "decode"),
    own("attention, dense, side by side", 60, "side_by_side"),
    own("step, STA", 60, "step", STA),
    own("step, VSA", 60, "step", VSA),
    own("step, without what it gained", 180, "without"),
    Part(
        "stream",
        180,
        (STREAMING, "--device=gpu", "--chunks=20", "--json={out}"),
        (STREAMING, "--checkpoint={checkout}/checkpoints/digits-stream", "--chunks=20", "--json={out}"),
    ),
    own("top-k", 30, "top_k"),
    own("right: triton", 90, "right", "triton"),
    own("compile, cold", 240, "cold"),
    Part(
        "loading",
        120,
        (LOADING, "--layers=4", "--runs=1", "--output={out}"),
        (LOADING, "--layers=1", "--heads=1", "--runs=1", "--output={out}"),
    ),
    attention(
        "attention, STA, backwards", 120, f"Wan 1.3B 480p, {STA}, backward", "sliding_tile:2x4x4:1x1x1, backward"
    ),
    attention("attention, VSA, backwards", 120, f"Wan 1.3B 480p, {VSA}, backward", "video_sparse:2x4x4:0.5, backward"),
    Part("tune", 240, ("-m", "jvdiff", "tune", "--seconds=180", "--output={out}"), ("-m", "jvdiff", "tune", "--help")),
)


class Goal(NamedTuple):
    """What is wanted of an H200.

    what: in words
    wanted: the number
    rate: more is better; otherwise it is a time
    part, find: where the number is, and how it is read from that part's result; an error where it is not there
    """

    what: str
    wanted: float
    rate: bool
    part: str
    find: Callable[[Any], float]


def _rate(result: Any) -> float:
    return max(row["tflops_per_s"] for row in result["rows"] if row["ours"] and row["pattern"] != "dense")


GOALS = (
    Goal("step of Wan 1.3B 480p, dense, ms", 850, False, "step, dense", lambda result: result["seconds"] * 1e3),
    Goal("decoding of 81 frames at 480p, bf16, s", 0.75, False, "decode", lambda result: result["bf16"]["seconds"]),
    Goal("STA, effective TFLOP/s", 600, True, "attention, STA", _rate),
    Goal("VSA, effective TFLOP/s", 530, True, "attention, VSA", _rate),
    Goal("chunk of a stream, ms", 267, False, "stream", lambda result: result["rows"][19]["total_ms"]),
)


def judged(parts: Any) -> dict[str, Any]:
    """The goals whose numbers there are, from the nearest to the farthest; one with a ratio of at most 1 is reached."""
    rows = []
    for goal in GOALS:
        try:
            found = float(goal.find(parts[goal.part]["result"]))
        except (KeyError, IndexError, TypeError, ValueError):
            continue
        ratio = goal.wanted / found if goal.rate else found / goal.wanted
        rows.append({"goal": goal.what, "wanted": goal.wanted, "found": found, "ratio": float(f"{ratio:.3g}")})
    rows.sort(key=lambda row: row["ratio"])
    return {"goals": rows} | ({"nearest": rows[0], "farthest": rows[-1]} if rows else {})


def run(part: Part, limit: float, rehearse: bool, cache: Path) -> dict[str, Any]:
    """Runs a part in a process group of its own, and returns what the report has of it."""
    words = part.rehearsal if rehearse else part.words
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "out.json", Path(folder) / "log"
        places = {"{out}": str(out), "{checkout}": str(HERE.parent)}
        words = [re.sub("{out}|{checkout}", lambda found: places[found[0]], word) for word in words]
        paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": os.pathsep.join(paths),
        }
        if not rehearse:
            environment["JAX_PLATFORMS"] = "cuda,cpu"
        began = time.monotonic()
        with open(log, "wb") as file:
            child = subprocess.Popen(
                [sys.executable, *words],
                env=os.environ | environment,
                cwd=HERE.parent,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = child.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)  # its own group, whatever it started
                    child.wait()
        status = {None: "out of time", 0: "done"}.get(code, "failed" if (code or 0) > 0 else "crashed")
        told = {"status": status, "seconds": round(time.monotonic() - began, 1), "limit": round(limit)}
        if code:
            told["exit"] = code
        if status != "done":
            told["said"] = log.read_text(errors="replace").splitlines()[-TOLD:]
        if out.is_file():
            told["result"] = json.loads(out.read_text())
        return told


def waiting(parts: Sequence[Part], report: Any, only: Sequence[str]) -> list[Part]:
    """The parts to run: those of some names; else those that never ran, then those that were not done."""
    if only:
        return [part for part in parts if any(words in part.name for words in only)]
    status = {part.name: report["parts"].get(part.name, {}).get("status") for part in parts}
    fresh = [part for part in parts if status[part.name] is None]
    return fresh + [part for part in parts if status[part.name] not in (None, "done")]


def write(path: Path, report: Any) -> None:
    """The report as it stands, whole."""
    with atomic(path) as part:
        part.write_text(json.dumps(report | judged(report["parts"]), indent=2) + "\n")


def line(name: str, told: Any) -> str:
    """A part on one line of the terminal."""
    result = told.get("result") or {}
    numbers = {k: v for k, v in result.items() if isinstance(v, int | float)} if isinstance(result, dict) else {}
    shown = "  ".join(f"{key} {value:.4g}" for key, value in numbers.items())
    return f"{name:<32}{told['status']:<12}{told['seconds']:>7.1f} s  {shown or (told.get('said') or [''])[-1]:.100}"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--only", action="append", default=[], help="parts whose name contains this, or another --only")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on whatever is here")
    parser.add_argument("--output", type=Path, help="the report; none: by the device's name")
    args = parser.parse_args(words)
    end = time.monotonic() + 60 * args.minutes
    for wanted in args.only:
        if any(wanted in part.name for part in PARTS):
            continue
        raise UsageError(f"--only={wanted!r:.80} is in none of: {'; '.join(part.name for part in PARTS)}.")
    folder = args.output.parent if args.output else HERE / "results"
    cache = folder / ".first_gpu_hour"
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = run(own("machine", 60, "machine"), 60 * (PATIENCE if args.rehearse else 1), args.rehearse, cache)
    machine = found.get("result")
    if found["status"] != "done" or not machine:
        raise SetupError(f"JAX finds no GPU here ({found['status']}):\n" + "\n".join(found.get("said", [])[-3:]))
    name = re.sub(r"\W+", "_", machine["device"]).strip("_").lower()
    output = args.output or folder / f"first_gpu_hour_{'rehearsal_' * args.rehearse}{name}.json"
    report = json.loads(output.read_text()) if output.is_file() else {"machine": machine, "parts": {}}
    same = ("device", "driver", "jax", "python")
    if different := [key for key in same if report["machine"].get(key) != machine.get(key)]:
        what = ", ".join(f"{key} {report['machine'].get(key)} there, {machine.get(key)} here" for key in different)
        raise UsageError(f"{output} is of another machine: {what}. Choose another --output.")
    report |= {"machine": machine, "rehearsal": args.rehearse}
    print(f"{machine['device']}, driver {machine['driver']}, jax {machine['jax']}: {output}", flush=True)
    every = True
    for part in waiting(PARTS, report, args.only):
        if (left := end - time.monotonic()) < SOON:
            print("out of time; the same command goes on", flush=True)
            break
        told = run(part, min(part.limit * (PATIENCE if args.rehearse else 1), left), args.rehearse, cache)
        told["at"] = machine["commit"]
        report["parts"][part.name] = told
        write(output, report)
        every &= told["status"] == "done"
        print(line(part.name, told), flush=True)
    for row in judged(report["parts"])["goals"]:
        print(f"{row['goal']:<44}{row['found']:>10.4g} of {row['wanted']:<8g}ratio {row['ratio']:.3g}")
    return 0 if every else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
    except JvdiffError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
