"""The same clip in environments that people have: the same bits, or a record that says why not.

    python benchmarks/environments.py
    python benchmarks/environments.py --checkpoint checkpoints/digits --only JAX_ENABLE_X64=1

Each runs in a process of its own, without a compilation cache, with a solver that draws noise between its steps. A
fault is: another status than 0, or other bits under a record whose deciding fields are equal.

Exit status: 0 no fault · 1 faults, marked.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = (
    *("JAX_ENABLE_X64=1", "JAX_DEFAULT_PRNG_IMPL=rbg", "JAX_THREEFRY_PARTITIONABLE=0", "JAX_RANDOM_SEED_OFFSET=7"),
    *("JAX_DEBUG_NANS=1", "JAX_DISABLE_JIT=1", "JAX_DEFAULT_MATMUL_PRECISION=bfloat16", "JAX_LOG_COMPILES=1"),
    *("JAX_NUMPY_DTYPE_PROMOTION=strict", "JAX_NUMPY_RANK_PROMOTION=raise", "JAX_DISABLE_MOST_OPTIMIZATIONS=1"),
    *("JAX_NUM_CPU_DEVICES=3", "XLA_FLAGS=--xla_gpu_deterministic_ops=true", "XLA_FLAGS=--xla_cpu_max_isa=AVX"),
    *("JAX_CPU_ENABLE_ASYNC_DISPATCH=0", "JAX_ENABLE_CUSTOM_PRNG=1", "JAX_DEBUG_KEY_REUSE=1", "LANG=C"),
)
# What a record says of how and where, and not of what: the clip does not depend on it.
ASIDE = ("seconds", "files", "sha256", "checkpoint", "device", "versions", "resumed_at_step")


def made(environment: str, checkpoint: str, folder: Path) -> tuple[int, str, str, str]:
    """(exit status, digest of latents and frames, deciding fields of the record, last line of the messages)."""
    name, _, value = environment.partition("=")
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | ({name: value} if name else {})
    fields = {"checkpoint": checkpoint, "seed": 1, "prompt": "a red seven", "num_frames": 5, "save_arrays": "true"}
    fields |= {"solver": "renoise:1000,750,500,250", "compile_cache": "off", "output": folder}
    command = [sys.executable, "-m", "jvdiff", "sample", *(f"--{field}={text}" for field, text in fields.items())]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    said = (done.stderr.strip().splitlines() or [""])[-1]
    if done.returncode:
        return done.returncode, "", "", said
    (path,) = folder.glob("*.npz")
    with np.load(path) as arrays:
        total = hashlib.sha256(b"".join(arrays[name].tobytes() for name in sorted(arrays)))
    record = json.loads(path.with_suffix(".json").read_bytes())
    deciding = {name: value for name, value in record.items() if name not in ASIDE}
    return 0, total.hexdigest(), json.dumps(deciding, sort_keys=True), said


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--checkpoint", default=str(ROOT / "checkpoints" / "digits"))
    parser.add_argument("--only", nargs="*", default=ENVIRONMENTS, help="NAME=VALUE ...")
    arguments = parser.parse_args(argv)
    faults = 0
    with tempfile.TemporaryDirectory(prefix="jvdiff-environments-") as root:
        _, bits, record, _ = made("", arguments.checkpoint, Path(root) / "usual")
        for number, environment in enumerate(arguments.only):
            status, other, said, line = made(environment, arguments.checkpoint, Path(root) / str(number))
            verdict = "the same bits" if other == bits else "other bits and another record"
            if status or (other != bits and said == record):
                verdict, faults = f"FAULT: status {status}, {line}" if status else "FAULT: the same record", faults + 1
            print(f"{environment}: {verdict}", flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
