"""Damaged files of every kind that is read: a sentence with a status, or the same numbers, and nothing else.

    python benchmarks/mutations.py                                   # 2,000 in all
    python benchmarks/mutations.py --count 100 --kinds state prompts --seed 3

Files of tiny repositories, states, runs, prompts and clips are changed at random (bits, bytes, cuts, insertions, values
of JSON) and read through the command lines, in this process, one after another. A fault is: exit status 1, a traceback,
a hang of 90 s (the process ends by SIGALRM, its last line says where), or other numbers with status 0 where a digest
was recorded: of a published repository or a prompts file, where none is, the record has to be another one.

Exit status: 0 no fault · 1 faults, listed.
"""

import argparse
import collections
import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parents[1]
SECONDS = 90  # of one reading, at most
ASIDE = ("seconds", "files", "sha256", "checkpoint", "resumed_at_step")  # in a record, what decides no number
VALUES = (
    *("null", "true", "-1", "0", "1e308", "NaN", "1" + "0" * 30, "3.5", '"x"', "[]", "{}", "[[[[]]]]", "1e-320"),
    *('"../../../etc/passwd"', '"\\u0000"', '"\\ud800"', "9" * 5000, "[" * 20_000),
)
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|true|false|null')


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    """Some bytes flipped, set, cut off, removed, inserted, zeroed or doubled."""
    if not data:
        return bytes([rng.randrange(256)])
    at, size = rng.randrange(len(data)), rng.choice([1, 4, 64, 4096])
    match rng.randrange(7):
        case 0:
            out = bytearray(data)
            for _ in range(rng.choice([1, 1, 3, 10])):
                out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
            return bytes(out)
        case 1:
            return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        case 2:
            return data[:at]
        case 3:
            return data[:at] + data[at + size :]
        case 4:
            return data[:at] + rng.randbytes(size) + data[at:]
        case 5:
            return data[:at] + bytes(len(data[at : at + size])) + data[at + size :]
        case _:
            return data[:at] + data[at : at + size] + data[at:]


def changed_json(data: bytes, rng: random.Random) -> bytes:
    """One value replaced by another, or by one that no file should hold."""
    text = data.decode("utf-8", "surrogateescape")
    tokens = list(TOKEN.finditer(text))
    if not tokens:
        return changed_bytes(data, rng)
    old, new = rng.choice(tokens), rng.choice(VALUES)
    if rng.random() < 0.3:
        new = rng.choice(tokens).group()
    return (text[: old.start()] + new + text[old.end() :]).encode("utf-8", "surrogateescape")


def mutate(path: Path, rng: random.Random) -> bool:
    """Changes one file, as its kind suggests; whether its bytes are others than before."""
    data = path.read_bytes()
    if path.suffix in (".json", ".jsonl") and rng.random() < 0.7:
        new = changed_json(data, rng)
    elif path.suffix == ".safetensors" and rng.random() < 0.5:
        size = int.from_bytes(data[:8], "little")
        head = (changed_json if rng.random() < 0.7 else changed_bytes)(data[8 : 8 + size], rng)
        new = (len(head).to_bytes(8, "little") if rng.random() < 0.8 else data[:8]) + head + data[8 + size :]
    else:
        new = changed_bytes(data, rng)
    path.write_bytes(new)
    return new != data


class Kind(NamedTuple):
    """One kind of thing that is read.

    make: writes it into an empty folder
    read: (folder, output folder) -> exit status
    """

    make: Callable[[Path], None]
    read: Callable[[Path, Path], int]


def numbers(output: Path, folder: Path) -> list[tuple[str, ...]]:
    """What a command made: name, digest of its numbers, and what its record says of what decided them."""
    found = []
    for path in sorted(output.rglob("*.npz")):
        with np.load(path) as arrays:
            total = hashlib.sha256(b"".join(arrays[name].tobytes() for name in sorted(arrays)))
        record = path.with_suffix(".json")
        said = json.loads(record.read_bytes()) if record.is_file() else {}
        deciding = {name: value for name, value in said.items() if name not in ASIDE}
        found.append((path.name, total.hexdigest(), json.dumps(deciding, sort_keys=True)))
    if (path := folder / "s.mp4").is_file():  # a stream's, which a resumed run has continued
        found.append((path.name, hashlib.sha256(path.read_bytes()).hexdigest(), ""))
    return found


def fault(status: int, said: str, before: Sequence[tuple[str, ...]], now: Sequence[tuple[str, ...]]) -> str | None:
    """What is wrong with how a damaged thing was read; None: nothing."""
    if status not in (0, 2, 3, 4, 6, 7):
        return f"status {status}"
    if "Traceback" in said or "panicked" in said:
        return "a traceback"
    if status == 0 and [name for name, *_ in now] == [name for name, *_ in before]:
        for (name, one, digest), (_, other, another) in zip(before, now, strict=True):
            if one != other and digest == another:
                return f"other numbers in {name}, and the same record"
    return None


# -------------------------------------------------------------------------------------------------------------- kinds


SMALL = {"num_frames": 5, "height": 16, "width": 16, "steps": 4, "guidance": 3.0, "seed": 1, "save_arrays": True}


def _words(**fields: object) -> list[str]:
    return ["jvdiff", *(f"--{name}={value}" for name, value in {**fields, "compile_cache": "off"}.items())]


def kinds(repository: Path) -> dict[str, Kind]:
    """Every kind, made of a tiny repository in the published layout."""
    from convert.from_diffusers import convert
    from jvdiff.commands import sample, stream, verify

    def clip(checkpoint: Path, output: Path, **more: object) -> int:
        fields = {**SMALL, "prompt": "a red seven", **more}
        return sample.main(_words(checkpoint=checkpoint, output=output, **fields))

    def resumed(folder: Path, output: Path) -> int:
        state = next(folder.glob("*.state"))
        return sample.main(_words(checkpoint=repository, resume=state, output=output, save_arrays=True))

    def prompts(folder: Path) -> None:
        lines = [
            {"prompt": "a red seven", "id": "one", "seed": 3},
            {"prompt": "a blue two moving left", "id": "two", "steps": 3, "guidance": 2.0},
        ]
        (folder / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def listed(folder: Path, output: Path) -> int:
        fields = {name: value for name, value in SMALL.items() if name not in ("seed", "steps")}
        return sample.main(_words(checkpoint=repository, prompts=folder / "p.jsonl", output=output, steps=4, **fields))

    causal = repository.with_name("causal")

    def rollout(folder: Path, **more: object) -> int:
        return stream.main(_words(checkpoint=causal, output=folder, **more))

    def begun(folder: Path) -> None:
        rollout(folder, prompt="a red seven", chunks=2, save_every=1, seed=1, name="s")

    def checked(folder: Path, _: Path) -> int:
        return verify.main(["jvdiff verify", str(folder)])

    return {
        "published": Kind(lambda folder: _copy(repository, folder), clip),
        "converted": Kind(lambda folder: convert(repository, folder / "x"), lambda f, out: clip(f / "x", out)),
        "state": Kind(lambda folder: _ignore(clip(repository, folder, stop_at=2)), resumed),
        "prompts": Kind(prompts, listed),
        "stream": Kind(begun, lambda folder, _: rollout(folder, resume=folder / "s.state", chunks=3)),
        "run": Kind(lambda folder: _ignore(_fit(folder)), _going_on),
        "video": Kind(_film, _read_clip),
        "clip": Kind(lambda folder: _ignore(clip(repository, folder)), checked),
    }


def _fit(folder: Path) -> Any:
    from jvdiff.training import loop

    task = loop.Task(lambda key: {"kernel": np.ones((3, 5), np.float32)}, _loss, loop.each(_batch))
    return loop.fit(task, loop.Schedule(steps=6, learning_rate=1e-2, warmup=1), folder, save_every=2)


def _going_on(folder: Path, output: Path) -> int:
    from jvdiff.commands import command_line

    def work() -> None:
        np.savez(output / "x.npz", kernel=np.asarray(_fit(folder).average["kernel"]))

    return command_line.ended(work, ["jvdiff"])


def _film(folder: Path) -> None:
    from jvdiff.media import video as videos

    video = np.random.default_rng(0).integers(255, size=(9, 32, 40, 3), dtype=np.uint8)
    videos.write_mp4(folder / "clip.mp4", video, 8)


def _read_clip(folder: Path, _: Path) -> int:
    from jvdiff.commands import command_line
    from jvdiff.media import clips

    return command_line.ended(lambda: _ignore(clips.read(folder / "clip.mp4", 4, 32, 1, 0.5, (0.5, 0.5))), ["jvdiff"])


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True)


def _ignore(_: object) -> None: ...


def _loss(params: Any, batch: Any, key: Any) -> tuple[Any, dict[str, Any]]:
    return ((batch @ params["kernel"] - 1.0) ** 2).mean(), {}


def _batch(step: int) -> np.ndarray:
    return np.random.default_rng(step).standard_normal((4, 3), np.float32)


def repositories(folder: Path) -> Path:
    """The tiny repositories of the tests, published and causal; the path of the first."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("conftest", ROOT / "tests" / "conftest.py")
    assert spec is not None and spec.loader is not None
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)

    class Factory:
        def mktemp(self, name: str) -> Path:
            (folder / f"_{name}").mkdir()
            return folder / f"_{name}"

    shutil.move(conftest.tiny_repository.__wrapped__(Factory()), folder / "published")
    shutil.move(conftest.tiny_causal_repository.__wrapped__(folder / "published", Factory()), folder / "causal")
    return folder / "published"


# ---------------------------------------------------------------------------------------------------------------- main


def trial(kind: Kind, folder: Path, output: Path) -> tuple[int, str]:
    """(exit status, all that was printed) of one reading."""
    said = io.StringIO()
    signal.alarm(SECONDS)
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = kind.read(folder, output)
    signal.alarm(0)
    return status, said.getvalue()


def run(name: str, kind: Kind, count: int, rng: random.Random, root: Path) -> list[str]:
    """The faults of `count` mutations of one kind."""
    original, folder, output = root / "original", root / "folder", root / "output"
    original.mkdir(parents=True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        kind.make(original)
    files = sorted(path.relative_to(original) for path in original.rglob("*") if path.is_file())
    shutil.copytree(original, folder)
    output.mkdir()
    status, said = trial(kind, folder, output)
    assert status == 0, f"{name}: undamaged, it gives {status}: {said[-500:]}"
    before, faults, seen = numbers(output, folder), [], collections.Counter[int]()
    for number in range(count):
        for path in (folder, output):
            shutil.rmtree(path)
        shutil.copytree(original, folder)
        output.mkdir()
        file = rng.choice(files)
        if not mutate(folder / file, rng):
            continue
        print(f"{name} {number}: {file}", end="\r", file=sys.stderr)
        status, said = trial(kind, folder, output)
        seen[status] += 1
        if wrong := fault(status, said, before, numbers(output, folder)):
            kept = Path(tempfile.mkdtemp(prefix=f"jvdiff-{name}-{number}-"))
            shutil.copytree(folder, kept, dirs_exist_ok=True)
            faults.append(f"{name} {number}: {file}: {wrong}; it is in {kept}: {said.strip()[-200:]}")
            print(faults[-1])
    print(f"{name}: {dict(sorted(seen.items()))}, {len(faults)} faults")
    return faults


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="mutations in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", help="default: all")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    faults = []
    with tempfile.TemporaryDirectory(prefix="jvdiff-mutations-") as root:
        every = kinds(repositories(Path(root)))
        chosen = arguments.kinds or list(every)
        for number, name in enumerate(chosen):
            share = arguments.count // len(chosen) + (number < arguments.count % len(chosen))
            rng = random.Random(f"{arguments.seed} {name}")
            faults += run(name, every[name], share, rng, Path(root) / "work" / name)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
