"""A night in miniature: many clips from one prompts file, by processes that share it and are killed all the time.

    python benchmarks/soak.py
    python benchmarks/soak.py --clips=20 --every=5 --output=soak

Three processes make the clips of one file into one folder. Every ten seconds one of them, but the first, is killed
(SIGKILL) and another begins in its place. At the end every line must have been made exactly once, nothing of a killed
process may be in the way, and neither memory nor open files of the first may have grown from half of its life on.

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


def run(file: Path, output: Path, processes: int, every: float) -> tuple[int, list[tuple[float, int]]]:
    """Makes all clips; (how many processes were killed, (MiB, open files) of the first, second by second)."""
    running = [begin(file, output, number) for number in range(processes)]
    first, killed, seen, next_kill = running[0], 0, [], time.monotonic() + every
    while running:
        time.sleep(1)
        if (now := usage(first.pid)) is not None:
            seen.append(now)
        running = [process for process in running if process.poll() is None]
        if time.monotonic() > next_kill and (others := [process for process in running if process is not first]):
            next_kill += every
            victim = random.choice(others)
            victim.kill()
            victim.wait()
            running[running.index(victim)] = begin(file, output, processes + killed)
            killed += 1
    return killed, seen


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
    (memory, files), (last_memory, last_files) = seen[len(seen) // 2], seen[-2]  # the last may be of its end
    print(f"the first since half of its life: {last_memory - memory:+.0f} MiB, {last_files - files:+d} open files")
    return 0 if made == wanted and last_memory - memory < 50 and last_files - files <= 2 else 1


if __name__ == "__main__":
    sys.exit(main())
