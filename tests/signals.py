"""Every signal to every command, before its first step and in the middle of its work, and then the command again.

    python -m tests.signals [--moments=3] [--seed=0] [--only=sample] [--signal=SIGHUP]

A signal is SIGINT, SIGTERM or SIGHUP to the process, Ctrl-C of a terminal (SIGINT to its whole group), Ctrl-C twice, or
one that was ignored when the command began. Each is sent at the moments that a kind names, and at random ones. Then

* the process ends within two seconds, with 5 where it says how to go on, else with 130 (a converter: 5);
* what it says ends with one sentence;
* nothing is half written;
* the command that it printed, else the same one, makes what an undisturbed run makes, byte for byte but for times.
"""

import argparse
import contextlib
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests import kills
from tests.forks import Process

SLOWEST = 2.0  # seconds from a signal to the end of the process
SIGNALS = {
    "SIGINT": (signal.SIGINT,),
    "SIGTERM": (signal.SIGTERM,),
    "SIGHUP": (signal.SIGHUP,),
    "terminal": (signal.SIGINT,),  # to the whole group
    "twice": (signal.SIGINT, signal.SIGINT),
    "ignored SIGINT": (signal.SIGINT,),
    "ignored SIGTERM": (signal.SIGTERM,),
    "ignored SIGHUP": (signal.SIGHUP,),
}
# As in a process of its own: Python's own start is over, and the program is not there yet. SIGINT and SIGHUP are heard
# under nohup and behind & too.
BEGIN = "import os, signal; os.setpgrp(); [signal.signal(number, signal.SIG_DFL) for number in (2, 1)]"
INSTALLER = """
import time
from pathlib import Path
from jvdiff.plan import targets
code = "import sys, time, pathlib; p = pathlib.Path(sys.argv[2], 'jax_plugins'); (p / 'xla_cuda13').mkdir(parents=True)"
targets._installer = lambda: [targets.sys.executable, "-c", code + "; print('installing', flush=True); time.sleep(0.7)"]
"""


class Kind(NamedTuple):
    """A command, as tests.kills has them.

    words: (folder, checkpoint) -> words of its command line
    moments: what it says, or a file that is there, when it is before its first step, and in the middle of its work
    door: `python -m` what
    setup: code that is run before
    stopped: the status where there is no state
    """

    words: object
    moments: tuple[str, ...]
    door: str = "jvdiff"
    setup: str = ""
    stopped: int = 130


def sample(folder, checkpoint):
    return [*kills.sample(folder, checkpoint), "--steps=30"]


def batch(folder, checkpoint):
    return [*kills.batch(folder, checkpoint), "--steps=10"]


def to_hf(folder, checkpoint):
    """A converted repository becomes a Diffusers folder."""
    if not (source := folder.with_name("orbax")).exists():
        from jvdiff.commands.convert import main

        assert main(["convert", f"--source={checkpoint}", f"--target={source}"]) == 0
    return ["to_hf", f"--source={source}", f"--target={folder}"]


def plan(folder, checkpoint):
    return ["plan", f"--checkpoint={checkpoint}"]


def verify(folder, checkpoint):
    return ["verify", *[str(checkpoint)] * 20]


def digits(folder, checkpoint):
    return ["digits", f"--output={folder}", "--clips=200"]


def install(folder, checkpoint):
    return ["--install"]


HALF = "/.out.staging-*/"  # where a folder is written that appears whole
KINDS = {
    "sample": Kind(sample, ("device:", "seed: 1", "denoise")),
    "batch": Kind(batch, ("device:", "video 2 of 3", "denoise")),
    "stream": Kind(kills.stream, ("device:", "compiling", "/out/*.jsonl", "/out/*.state")),
    "train": Kind(lambda folder, checkpoint: kills.train(folder), ("/out/config.json", "/out/state/2")),
    "convert": Kind(kills.convert, (HALF, f"{HALF}transformer/params*"), stopped=5),
    "to_hf": Kind(to_hf, (HALF, f"{HALF}transformer/*"), stopped=5),
    "plan": Kind(plan, ("video tokens", "denoise")),
    "verify": Kind(verify, (": repository",)),
    "digits": Kind(digits, (HALF, f"{HALF}*/0001.mp4")),
    "install": Kind(install, ("installing",), "jvdiff.commands.compiler", INSTALLER),
}


def start(kind, folder, checkpoint, setup=""):
    folder.parent.mkdir(parents=True, exist_ok=True)
    words, environment = kind.words(folder, checkpoint), {"XDG_CACHE_HOME": str(folder)} if kind.setup else {}
    return Process("-m", kind.door, *words, setup=f"{BEGIN}\n{kind.setup}\n{setup}", environment=environment)


def clean(folder):
    """Removes what a run left, its folder's neighbours that are hidden too."""
    shutil.rmtree(folder, ignore_errors=True)
    for path in [*folder.parent.glob(".*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def left(folder):
    """Names of what is half written: hidden, or not named yet."""
    inside = [folder.parent, *folder.parent.rglob("*")]
    return sorted(str(path) for path in inside if path.name.startswith((".", "part-")) or "-tmp" in path.name)


def wait_for(process, moment, folder):
    """Waits for a moment: seconds, or a sign of it; whether it came before the end."""
    if isinstance(moment, float):
        time.sleep(moment)
        return process.poll() is None
    place = folder.parent
    while process.poll() is None:
        if any(place.glob(moment[1:])) if moment.startswith("/") else moment in process.err + process.out:
            return True
        time.sleep(0.002)
    return False


def whole(kind, folder, checkpoint):
    """(what an undisturbed run leaves, seconds it takes when everything is compiled)."""
    for _ in range(2):
        clean(folder)
        began, process = time.perf_counter(), start(kind, folder, checkpoint)
        assert process.wait() == 0, process.err
    return kills.content(folder), time.perf_counter() - began


def signalled(kind, folder, checkpoint, expected, name, moment):
    """(seconds from the signal to the end, status, what is wrong); None where it came too late.

    expected: what an undisturbed run leaves; None: the command is not run again.
    """
    clean(folder)
    ignored, numbers = name.startswith("ignored"), SIGNALS[name]
    process = start(kind, folder, checkpoint, f"signal.signal({numbers[0]:d}, signal.SIG_IGN)" if ignored else "")
    if not wait_for(process, moment, folder):
        assert process.wait() == 0, process.err
        return None
    began = time.perf_counter()
    for number in numbers:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number, group=name == "terminal")
        if len(numbers) > 1:
            time.sleep(0.05)
    status, seconds = process.wait(), time.perf_counter() - began
    if ignored or status == 0:
        problems = [f"status {status}"] * (status != 0) + ["told of it"] * (ignored and "stopp" in process.err)
        problems += other(folder, expected)
    else:
        problems = [f"{seconds:.2f} s"] * (seconds > SLOWEST) + told(kind, status, process.err)
        problems += [f"left {half}" for half in [left(folder)] if half]
        problems += again(kind, folder, checkpoint, expected, process.err) if expected is not None else []
    return seconds, status, problems and f"{problems}: {process.err[-900:]}"


def told(kind, status, said):
    """What is wrong with a status and what was said."""
    if status < 0 and not said:  # before the program was there
        return []
    goes_on = "go on with:" in said.lower() or "the same command goes on" in said
    right = 5 if goes_on else kind.stopped
    last = f"\n{said.rstrip()}".rpartition("\nerror: ")[2]
    sentence = last[:1].islower() or last.startswith("/")
    problems = [f"status {status} instead of {right}"] * (status != right)
    problems += ["no sentence"] * (not sentence or len(last.splitlines()) > 1 + ("go on with:" in last.lower()))
    return problems + [word for word in ("Traceback", "Exception", "Fatal", "This is a bug", "Error") if word in said]


def again(kind, folder, checkpoint, expected, said):
    """What is wrong with the run that goes on, or begins anew."""
    if "go on with:" in said.lower():
        process = Process(*shlex.split(said.splitlines()[-1])[1:], setup=f"{BEGIN}\n{kind.setup}")
    else:
        process = start(kind, folder, checkpoint)
    status = process.wait()
    return [f"then {status}: {process.err[-800:]}"] * (status != 0) + other(folder, expected)


def other(folder, expected):
    """What differs from an undisturbed run, saved states apart."""
    if expected is None:
        return []
    now = kills.content(folder)
    different = [file for file, value in expected.items() if now.get(file) != value]
    more = [file for file in now.keys() - expected.keys() if ".state" not in file]
    return [f"other or missing {different}, more {more}"] if different or more else []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--signal", choices=SIGNALS)
    parser.add_argument("--checkpoint", type=Path, default=kills.CHECKPOINT)
    parser.add_argument("--stream", type=Path, default=kills.STREAM)
    args = parser.parse_args()
    chance, failures, count = random.Random(args.seed), 0, 0
    with tempfile.TemporaryDirectory() as place:
        for name in [args.only] if args.only else KINDS:
            kind, folder = KINDS[name], Path(place, name, "out")
            checkpoint = args.stream if name == "stream" else args.checkpoint
            expected, seconds = whole(kind, folder, checkpoint)
            print(f"{name}: {seconds:.2f} s", flush=True)
            for sent in [args.signal] if args.signal else SIGNALS:
                for moment in (*kind.moments, *(chance.uniform(0, seconds) for _ in range(args.moments))):
                    if (outcome := signalled(kind, folder, checkpoint, expected, sent, moment)) is None:
                        print(f"{name} {sent} at {moment}: too late", flush=True)
                        continue
                    took, status, wrong = outcome
                    count, failures = count + 1, failures + bool(wrong)
                    print(f"{name} {sent} at {moment}: {took:.2f} s, {status} {wrong or 'right'}", flush=True)
    print(f"{count - failures} of {count} right")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
