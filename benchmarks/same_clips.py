"""Whether the clips are still the same: made by an earlier commit and by this checkout, compared bit for bit.

    python benchmarks/same_clips.py
    python benchmarks/same_clips.py --before ../earlier --cases unipc stream --output same_clips

Both sides make every clip through the command line, in processes of their own, one after the other on this machine.
They share one environment, because bits differ between machines and between XLA's flags: eight CPU devices, so that
there can be meshes, and a compilation cache for each side. XLA_FLAGS of the caller are kept, for both.

Commands are the earlier commit's, so they also show that its flags still work. A command marked `earlier` is run by the
earlier commit on both sides: what it leaves, a saved state or a record, is where this checkout has to go on. Classes
are named, since their numbers may change. Files are paired by the seed in their names, for the same reason.

Exit status: 0 all equal · 1 something differs, or a command failed · 2 usage.

F pixel frames · Y X pixel height, width
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import av
import ml_dtypes  # noqa: F401, teaches numpy the name bfloat16
import numpy as np

ROOT = Path(__file__).parents[1]
EARLIER = "535d6f2"
DEVICES = 8
SECONDS = 900  # of one command, at most
EQUAL = "equal"

PROMPT = "a red seven moving left"
FILES = {
    "prompts.txt": f"{PROMPT}\na blue two moving up\na green nine moving right\n",
    "prompts.jsonl": "".join(
        json.dumps({"prompt": PROMPT, "guidance": guidance, "solver": solver, "grid": grid}) + "\n"
        for guidance, solver, grid in ((1.0, "euler", "wan"), (2.7, "unipc", "wan"), (7.5, "unipc", "diffusers"))
    ),
}


class Command(NamedTuple):
    """What follows `python -m`.

    words: with {out} for the case's folder, {state} for the saved state in it, {files} for the folder of FILES.
    earlier: whether the earlier commit runs it on both sides.
    """

    words: tuple[str, ...]
    earlier: bool = False


def sample(*words: str, earlier: bool = False) -> Command:
    """Clips of the digits model."""
    start = ("jvdiff.sample", "--config", "configs/digits.py", "--config.output={out}", "--config.save_arrays=true")
    return Command((*start, "--config.seed=3", *words), earlier)


def prompted(*words: str, earlier: bool = False) -> Command:
    """One of PROMPT."""
    return sample(f"--config.prompt={PROMPT}", *(words or SIX), earlier=earlier)


def by_class(*words: str) -> Command:
    """A clip of the digits by class."""
    start = ("jvdiff.sample", "--config", "configs/latent_video_digits.py", "--config.output={out}")
    rest = ("--config.checkpoint=checkpoints/digits-classes", "--config.save_arrays=true", "--config.seed=5", *SIX)
    return Command((*start, *rest, *words))


def stream(*words: str, earlier: bool = False) -> Command:
    """A stream of the digits."""
    return Command(("jvdiff.stream", "--config", "configs/stream_digits.py", "--config.output={out}", *words), earlier)


SIX = ("--config.steps=6",)
STOPPED = ("--config.steps=10", "--config.stop_at=8")
ROLLOUT = ("--config.seed=7", "--config.pipeline.diffusion_model.scheduler.num_inference_steps=4")
CASES: Mapping[str, tuple[Command, ...]] = {
    "unipc": (prompted(),),
    "euler": (prompted(*SIX, "--config.solver=euler", "--config.guidance=1"),),
    "wan": (prompted(*SIX, "--config.grid=wan", "--config.guidance=2.7", "--config.negative_prompt=a blue two"),),
    "bfloat16": (prompted(*SIX, "--config.precision=bfloat16"),),
    "video_sparse": (prompted(*SIX, "--config.checkpoint=checkpoints/digits_sparse"),),
    "sliding_tile": (prompted(*SIX, "--config.pattern=sliding_tile:1x2x2:3x1x1"),),
    "mesh_sequence": (prompted(*SIX, "--config.mesh=sequence=4"),),
    "mesh_fsdp": (prompted(*SIX, "--config.mesh=fsdp=2"),),
    "mesh_tensor": (prompted(*SIX, "--config.mesh=data=2,tensor=3"),),
    "resumed": (prompted(*STOPPED), sample("--config.resume={state}")),
    "earlier_state": (prompted(*STOPPED, earlier=True), sample("--config.resume={state}")),
    "earlier_record": (prompted(earlier=True), sample("--config.prompts={files}/prompts.txt", *SIX)),
    "settings_by_line": (sample("--config.prompts={files}/prompts.jsonl", *SIX),),
    "class_ddim": (by_class("--config.class_label=seven"),),
    "class_ddpm": (by_class("--config.class_label=three", "--config.solver=ddpm"),),
    "class_unipc": (by_class("--config.class_label=zero", "--config.solver=unipc"),),
    "class_euler": (by_class("--config.class_label=eight", "--config.solver=euler", "--config.guidance=1"),),
    "stream": (stream(*ROLLOUT, "--config.chunks=10", "--config.then.4=a red seven moving up"),),
    "stream_earlier_state": (
        stream(*ROLLOUT, "--config.chunks=2", "--config.save_every=2", earlier=True),
        stream("--config.resume={state}", "--config.chunks=4", "--config.save_every=4"),
    ),
}


# ---------------------------------------------------------------------------------------------------------- arrays


def read(folder: Path) -> dict[str, np.ndarray]:
    """Every array of a case's folder: of the .npz files and the saved states, and the frames of videos without .npz.

    Names begin with what the file's name has from the seed on; clips of classes have the class's number before it.
    Where there is an .npz, frames are its own: with macroblock trees, which streams lack, libx264 reads memory that it
    never wrote, and the same frames become other bytes now and then (MALLOC_PERTURB_=85 makes it always).
    """
    arrays: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*_seed*")):
        name = path.name[path.name.rindex("seed") :]
        if path.suffix == ".npz":
            with np.load(path) as file:
                arrays |= {f"{name} {key}": file[key] for key in file.files}
        elif path.suffix == ".mp4" and not path.with_suffix(".npz").exists():
            arrays[name] = _frames(path)
        elif path.suffix == ".state":
            arrays |= {f"{name} {key}": array for key, array in _state(path).items()}
    return arrays


def _frames(path: Path) -> np.ndarray:
    """uint8 [F,Y,X,3]"""
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def _state(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of a saved state, as `jvdiff.runtime.run_state` describes it; whichever version wrote it."""
    data, start, arrays = (folder / "state.bin").read_bytes(), 0, {}
    for name, entry in json.loads((folder / "state.json").read_bytes())["arrays"].items():
        shape, dtype = entry["shape"], np.dtype(entry["dtype"])
        arrays[name] = np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape)
        start += arrays[name].nbytes
    return arrays


def difference(before: np.ndarray | None, after: np.ndarray | None) -> str | None:
    """How two arrays differ: the largest difference of their numbers, or what one of them is; None: not in a bit."""
    if before is None or after is None:
        return f"only {'after' if before is None else 'before'}"
    if (before.dtype, before.shape) != (after.dtype, after.shape):
        return f"{before.dtype}{list(before.shape)}, then {after.dtype}{list(after.shape)}"
    if before.tobytes() == after.tobytes():
        return None
    with np.errstate(invalid="ignore"):  # infinities
        return f"{np.abs(before.astype(np.float64) - after.astype(np.float64)).max():.3g}"


def compare(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> dict[str, str]:
    """{"latents": EQUAL or what differs, "pixels": the same}; a kind that neither side has is left out.

    Pixels are what is uint8, latents everything else: latents and the arrays of solvers and caches.

    Raises:
        ValueError: there is nothing to compare.
    """
    if not before and not after:
        raise ValueError("no arrays on either side")
    found: dict[str, list[str]] = {}
    for name in sorted(before.keys() | after.keys()):
        array = before.get(name, after.get(name))
        kind = "pixels" if array is not None and array.dtype == np.uint8 else "latents"
        reason = difference(before.get(name), after.get(name))
        found.setdefault(kind, []).extend([] if reason is None else [f"{name}: {reason}"])
    return {kind: "; ".join(reasons[:3]) or EQUAL for kind, reasons in found.items()}


# ----------------------------------------------------------------------------------------------------------- clips


class Side(NamedTuple):
    """One of the two checkouts.

    code: its folder.
    output: where its clips go, a folder for each case, and its compilation cache.
    """

    code: Path
    output: Path

    def python(self, *words: str) -> str:
        """What `python WORDS` prints here.

        Raises:
            RuntimeError: it failed; the last lines of its errors.
        """
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(self.code),
            "XDG_CACHE_HOME": str(self.output / "cache"),
            "XLA_FLAGS": flags.strip(),
        }
        done = subprocess.run(
            [sys.executable, *words], cwd=self.code, env=environment, capture_output=True, text=True, timeout=SECONDS
        )
        if done.returncode:
            end = " / ".join(done.stderr.strip().splitlines()[-2:])
            raise RuntimeError(f"exit status {done.returncode} in {self.code}: {end}")
        return done.stdout

    def check(self) -> None:
        """Raises RuntimeError if Python takes jvdiff from elsewhere."""
        place = Path(self.python("-c", "import jvdiff; print(jvdiff.__file__)").strip())
        if self.code not in place.parents:
            raise RuntimeError(f"in {self.code} Python imports {place}; expected the jvdiff of that folder.")


def make(name: str, side: Side, earlier: Side) -> dict[str, np.ndarray]:
    """The arrays of a case as one side makes it.

    Raises:
        RuntimeError: a command failed.
    """
    out = side.output / name
    shutil.rmtree(out, ignore_errors=True)
    for command in CASES[name]:
        places = {"{out}": out, "{files}": side.output.parent, "{state}": next(out.glob("*.state"), out / "no.state")}
        code = earlier.code if command.earlier else side.code
        side._replace(code=code).python("-m", *(_filled(word, places) for word in command.words))
    return read(out)


def _filled(word: str, places: Mapping[str, Path]) -> str:
    for name, path in places.items():
        word = word.replace(name, str(path))
    return word


def row(name: str, before: Side, after: Side) -> tuple[str, bool]:
    """A case's line of the table, and whether all is equal."""
    try:
        columns = compare(make(name, before, before), make(name, after, before))
    except (RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
        return f"| {name} | failed: {error} | |", False
    cells = [columns.get(kind, "") for kind in ("latents", "pixels")]
    return f"| {name} | {' | '.join(cells)} |", set(columns.values()) == {EQUAL}


@contextlib.contextmanager
def checkout(before: str) -> Iterator[Path]:
    """The folder of a commit: `before` itself if it is a folder, else a worktree of it for as long as it is needed.

    Raises:
        RuntimeError: it is neither a folder nor a commit of this repository.
    """
    if Path(before).is_dir():
        yield Path(before).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="jvdiff-before-") as root:
        folder = Path(root).resolve() / "jvdiff"
        git = ["git", "-C", str(ROOT), "worktree"]
        done = subprocess.run([*git, "add", "--detach", str(folder), before], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(
                f"--before: {before} is neither a folder nor a commit that is here: {done.stderr.strip()}\n"
                "In a shallow clone run git fetch --unshallow, or give the folder of a checkout."
            )
        try:
            yield folder
        finally:
            subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default=EARLIER, help="a commit, or the folder of a checkout; default: %(default)s")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--output", type=Path, help="keep clips and compiled programs in this folder")
    args = parser.parse_args(words)

    with checkout(args.before) as code, tempfile.TemporaryDirectory(prefix="jvdiff-clips-") as temporary:
        output = (args.output or Path(temporary)).resolve()
        output.mkdir(parents=True, exist_ok=True)
        for name, text in FILES.items():
            (output / name).write_text(text, encoding="utf-8")
        before, after = Side(code, output / "before"), Side(ROOT, output / "after")
        before.check()
        after.check()
        print(f"before: {args.before}\n\n| case | latents | pixels |\n| --- | --- | --- |", flush=True)
        differing = []
        for name in args.cases:
            line, equal = row(name, before, after)
            print(line, flush=True)
            differing += [] if equal else [name]
    print(f"\n{len(args.cases) - len(differing)} of {len(args.cases)} cases are equal, bit for bit")
    return 1 if differing else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
