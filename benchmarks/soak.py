"""A night in miniature: many clips from one prompts file, by processes that share it and are killed all the time.

    python benchmarks/soak.py
    python benchmarks/soak.py --clips=20 --every=5 --output=soak

Three processes make the clips of one file into one folder. Every ten seconds one of them is killed (SIGKILL) and
another begins in its place. At the end every line must have been made exactly once, nothing of a killed process may be
in the way, and neither memory nor open files of a process may grow from clip to clip.

Exit status: 0 as it must be · 1 not.
"""

import argparse
import collections
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
COLOURS = ("red", "green", "blue", "yellow", "cyan", "magenta", "white", "orange")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WAYS = ("left", "right", "up", "down")


def begin(file: Path, output: Path, number: int) -> subprocess.Popen:
    """Starts a process that makes what is left of the file."""
    flags = ["--config.steps=4", "--config.num_frames=5", "--config.seed=0", "--config.save_arrays=true"]
    command = [sys.executable, "-m", "jvdiff.sample", "--config=digits", *flags]
    with open(output.parent / f"process_{number}.log", "w") as log:
        return subprocess.Popen(
            [*command, f"--config.prompts={file}", f"--config.output={output}"], cwd=ROOT, stdout=log, stderr=log
        )


def usage(pid: int) -> tuple[float, int] | None:
    """(resident memory in MiB, open files) of a process; None where it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir(f"/proc/{pid}/fd"))
    except (OSError, IndexError):
        return None


def records(output: Path) -> list[dict]:
    """The records of the clips that are made."""
    return [json.loads(path.read_text()) for path in output.glob("*.json") if path.stat().st_size]


def run(file: Path, output: Path, processes: int, every: float) -> tuple[int, dict[int, list[tuple[int, float, int]]]]:
    """Makes all clips; (how many were killed, of each process (clips made by all, MiB, open files) by the second)."""
    running = [begin(file, output, number) for number in range(processes)]
    started, killed, seen, next_kill = processes, 0, collections.defaultdict(list), time.monotonic() + every
    while running:
        time.sleep(1)
        for process in running:
            if (now := usage(process.pid)) is not None:
                seen[process.pid].append((len(list(output.glob("*.json"))), *now))
        running = [process for process in running if process.poll() is None]
        if running and time.monotonic() > next_kill:
            next_kill += every
            victim = random.choice(running)
            victim.kill()
            victim.wait()
            killed += 1
            running[running.index(victim)] = begin(file, output, started)
            started += 1
    return killed, seen


def growth(samples: list[tuple[int, float, int]]) -> tuple[float, int] | None:
    """How many MiB and open files a process gained from the middle of its life to its end; None if it was short."""
    if len(samples) < 20:
        return None
    _, memory, files = samples[len(samples) // 2]
    return samples[-1][1] - memory, samples[-1][2] - files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=300, help="lines of the file")
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--every", type=float, default=10.0, help="seconds from one kill to the next")
    parser.add_argument("--seed", type=int, default=0, help="of whom is killed")
    parser.add_argument("--output", type=Path, help="none: a temporary folder")
    args = parser.parse_args()
    random.seed(args.seed)
    folder = (args.output or Path(tempfile.mkdtemp(prefix="jvdiff-soak-"))).absolute()
    output, file = folder / "clips", folder / "prompts.txt"
    output.mkdir(parents=True)
    lines = [
        f"a {random.choice(COLOURS)} {random.choice(DIGITS)} moving {random.choice(WAYS)}" for _ in range(args.clips)
    ]
    file.write_text("\n".join(lines) + "\n")
    began = time.monotonic()
    killed, seen = run(file, output, args.processes, args.every)

    made = collections.Counter((record["prompt"], record["seed"]) for record in records(output))
    wanted = collections.Counter((line, seed) for seed, line in enumerate(lines))
    odd = [path.name for path in output.iterdir() if path.name.startswith(".") or "-2." in path.name]
    print(f"{args.clips} lines, {killed} kills, {time.monotonic() - began:.0f} s, in {folder}")
    print(f"made: {sum(made.values())}; missing {sum((wanted - made).values())}; twice {sum((made - wanted).values())}")
    print(f"left by the killed: {', '.join(sorted(odd)) or 'nothing'}")
    grown = [each for each in map(growth, seen.values()) if each is not None]
    if grown:
        print(f"grown since half of a life: {max(m for m, _ in grown):+.0f} MiB, {max(f for _, f in grown):+d} files")
    return 0 if made == wanted and all(m < 50 and f <= 2 for m, f in grown) else 1


if __name__ == "__main__":
    sys.exit(main())
