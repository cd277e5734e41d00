"""SIGKILL at random moments, and then the same command again.

    python -m tests.kills [--moments=200] [--seed=0] [--only=sample]

Each kind of run is first made undisturbed. Then it is killed at a moment between its beginning and its end, and started
again: that must succeed, and leave what the undisturbed run left, byte for byte but for times and places, and nothing
else. A run that was complete before the kill may be there twice.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.forks import Process

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "digits"
STREAM = CHECKPOINT.with_name("digits-stream")
PASSING = {"seconds", "resumed_at_step", "resumed_at_chunk", "speed", "seconds_per_step", "sha256", ".jsonl"}
MEASURED = ("_ms", "_gib", "_wo_finalize")  # ends of names; both are of times, or of what holds times
SMALL = ("--num_frames=5", "--steps=3", "--seed=1")
PROMPTS = ("a red seven moving left", "a blue two moving up", "a cyan three moving down")
TRAINING = """
from ml_collections import ConfigDict
def get_config():
    vae = dict(base_dim=4, dim_mult=(1, 2), temperal_downsample=(True,), num_res_blocks=1, z_dim=4)
    vae |= dict(latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)
    config = dict(task="vae", folder="", seed=0, compile_cache=None, vae=vae, stages=((6, 2, 1, 16),))
    config |= dict(loss=dict(latent_noise=0.02), schedule=dict(steps=6, warmup=1), loop=dict(save_every=2, log_every=1))
    return ConfigDict(config)
"""


def sample(folder, checkpoint=CHECKPOINT):
    """One clip."""
    return ["sample", f"--checkpoint={checkpoint}", f"--prompt={PROMPTS[0]}", f"--output={folder}", *SMALL]


def batch(folder, checkpoint=CHECKPOINT):
    """Three clips of a prompts file."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.with_name("prompts.txt")
    file.write_text("\n".join(PROMPTS))
    return ["sample", f"--checkpoint={checkpoint}", f"--prompts={file}", f"--output={folder}", *SMALL]


def stream(folder, checkpoint=STREAM):
    """Three chunks, the state saved after each; from there it goes on."""
    words = ["stream", f"--checkpoint={checkpoint}", "--chunks=3", "--save_every=1", f"--output={folder}"]
    states = sorted(folder.glob("*.state"))
    return words + ([f"--resume={states[0]}"] if states else [f"--prompt={PROMPTS[0]}", "--seed=1"])


def train(folder):
    """Six steps of a tiny VAE, saved after every second."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.with_name("training.py")
    file.write_text(TRAINING)
    return ["train", f"--config={file}", f"--folder={folder}"]


def convert(folder, checkpoint=CHECKPOINT):
    """A repository becomes an Orbax directory."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return ["convert", f"--source={checkpoint}", f"--target={folder}"]


KINDS = (sample, batch, stream, train, convert)


def content(folder):
    """{name: digest} of what a run leaves: of an Orbax directory its arrays, of JSON what is no time and no place."""
    found, ours = {}, {file.parent: file for file in folder.rglob("jvdiff.json")}
    for place, manifest in ours.items():
        arrays = {name: each["sha256"] for name, each in json.loads(manifest.read_bytes())["tensors"].items()}
        found[str(place.relative_to(folder))] = digest(arrays)
    for file in folder.rglob("*"):
        if ours.keys() & {*file.parents} or not file.is_file():
            continue
        data = file.read_bytes()
        with contextlib.suppress(ValueError):  # an empty one, for instance
            if file.suffix == ".json":
                data = lasting(json.loads(data), folder)
            elif file.suffix == ".jsonl":
                lines = [lasting(json.loads(line), folder) for line in data.splitlines()]
                data = [{name: value for name, value in line.items() if name != "fps"} for line in lines]
        name = str(file.relative_to(folder))
        found[name] = digest(data) if "state/" not in name else "its folder"
    return found


def digest(value):
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()


def lasting(value, folder):
    if isinstance(value, dict):
        return {k: lasting(v, folder) for k, v in value.items() if k not in PASSING and not k.endswith(MEASURED)}
    if isinstance(value, list):
        return [lasting(v, folder) for v in value]
    return value.replace(str(folder), "FOLDER") if isinstance(value, str) else value


def run(kind, folder):
    return Process("-m", "jvdiff", *kind(folder))


def whole(kind, folder, times=2):
    """(what an undisturbed run leaves, seconds it takes, the second time with everything compiled)."""
    for _ in range(times):
        shutil.rmtree(folder, ignore_errors=True)
        began, process = time.perf_counter(), run(kind, folder)
        assert process.wait() == 0, process.err
        seconds = time.perf_counter() - began
    return content(folder), seconds


def killed(kind, folder, expected, moment):
    """What is wrong after a kill `moment` seconds after the start and another run; None where nothing is."""
    shutil.rmtree(folder, ignore_errors=True)
    process = run(kind, folder)
    time.sleep(moment)
    process.kill()
    if (left := content(folder)) == expected:
        return None
    again = run(kind, folder)
    if status := again.wait():
        return f"status {status}: {again.err[-800:]}"
    left = content(folder)
    extra = {name for name in left.keys() - expected.keys() if "-2." not in name}
    different = [name for name, value in expected.items() if left.get(name) != value]
    return f"left {sorted(extra)}, other or missing {different}" if extra or different else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[kind.__name__ for kind in KINDS])
    args = parser.parse_args()
    kinds = [kind for kind in KINDS if args.only in (None, kind.__name__)]
    chance, failures = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as place:
        known = {kind: whole(kind, Path(place, kind.__name__, "out")) for kind in kinds}
        for number, kind in zip(range(args.moments), itertools.cycle(kinds)):
            expected, seconds = known[kind]
            moment = chance.uniform(0, seconds)
            wrong = killed(kind, Path(place, kind.__name__, "out"), expected, moment)
            failures += wrong is not None
            print(
                f"{number} {kind.__name__} killed after {moment:.2f} of {seconds:.2f} s: {wrong or 'right'}", flush=True
            )
    print(f"{args.moments - failures} of {args.moments} right")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
