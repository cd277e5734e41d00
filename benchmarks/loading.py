"""How fast weights are read, their digests compared or made meanwhile: in both layouts, from the page cache.

    python benchmarks/loading.py                          # benchmarks/results/loading_cpu.json
    python benchmarks/loading.py --against=CHECKOUT       # in turn with another version of jvdiff
    python benchmarks/loading.py --layers=30 --runs=3     # the transformer of Wan 2.1 1.3B, whole

A folder with a transformer of the 1.3B's width and random float32 weights in two files is made, and converted to
bfloat16, compressed and not. Each run is a process of its own, which three times loads the folder as bfloat16 and asks
for its digest, as a command does; the fastest counts, and of the runs the median. Rates are of the files' bytes; `cpu`
counts the seconds of all threads, which depend less on what else the machine does. `memory` is what the process took
beside the weights, at most.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import machine
import numpy as np
from timing import RESULTS, short, write

from convert.from_diffusers import convert
from jvdiff.config import shipped
from jvdiff.models.family import read_config
from jvdiff.models.wan.family import TEXT_TO_VIDEO
from jvdiff.weights import naming, orbax

RUN = r"""
import re, sys, time
from pathlib import Path
import jax
from jvdiff import pipeline, precision

def memory(name):
    return 1024 * int(re.search(name + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])

repository, dtypes = pipeline.inspect(sys.argv[1]), precision.choose("bfloat16")
pipeline.abstract_params(repository.family, repository.models, dtypes)
jax.block_until_ready(jax.device_put(1.0))
before, times = memory("VmRSS"), []
for _ in range(3):
    repository = pipeline.inspect(sys.argv[1])
    wall, cpu = time.perf_counter(), time.process_time()
    weights = dict(pipeline.read_parts(repository, dtypes, None))
    jax.block_until_ready(weights)
    repository.digest
    times.append((time.perf_counter() - wall, time.process_time() - cpu))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    most = memory("VmHWM") - before - held
    del weights
print(*map(min, zip(*times)), most)
"""
WIDE = {"attention_head_dim": 128, "ffn_dim": 8960, "freq_dim": 256}


def make(folder: Path, layers: int, heads: int) -> dict[str, Path]:
    """The folder in each layout, by name."""
    from safetensors.numpy import save_file

    made = {name: folder / name for name in ("safetensors", "orbax", "orbax, compressed")}
    source, part = made["safetensors"], TEXT_TO_VIDEO.parts["transformer"]
    shutil.copytree(shipped("checkpoints") / "digits", source)
    file = source / "transformer" / "config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | WIDE | {"num_layers": layers, "num_attention_heads": heads})
    )
    (source / "transformer" / f"{part.stem}.safetensors").unlink()
    assert part.names is not None
    cfg = read_config(source / "transformer", part)
    entries = naming.expected(part.names(cfg), part.abstract(cfg, np.float32))
    random, names, places = np.random.default_rng(0), sorted(entries), {}
    for number, half in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        places |= dict.fromkeys(half, name := f"{part.stem}-{number:05}-of-00002.safetensors")
        tensors = {tensor: random.standard_normal(entries[tensor].shape, np.float32) / 50 for tensor in half}
        save_file(tensors, source / "transformer" / name)
    index = source / "transformer" / f"{part.stem}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    convert(source, made["orbax"], dtype="bfloat16")
    real = orbax._orbax
    with mock.patch.object(orbax, "_orbax", lambda **how: real(**how | {"use_compression": True})):
        convert(source, made["orbax, compressed"], dtype="bfloat16")
    return made


def run(folder: Path, checkout: Path) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and bytes of one load, by the jvdiff of a checkout."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
    words = [sys.executable, "-c", RUN, str(folder)]
    told = subprocess.run(words, env=environment, cwd=checkout, stdout=subprocess.PIPE, text=True, check=True)
    wall, cpu, memory = map(float, told.stdout.split())
    return wall, cpu, memory


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="of the transformer, of 186 MB each")
    parser.add_argument("--heads", type=int, default=12, help="of the transformer, of 128 channels each")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--folder", type=Path, help="where the folders are, or are made; none: a temporary one")
    parser.add_argument("--output", type=Path, default=RESULTS / "loading_cpu.json")
    args = parser.parse_args(words)
    checkouts = {"": Path(__file__).resolve().parents[1]}
    checkouts |= {"before": args.against.resolve()} if args.against else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        names = ("safetensors", "orbax", "orbax, compressed")
        made = (
            {n: folder / n for n in names} if (folder / names[-1]).is_dir() else make(folder, args.layers, args.heads)
        )
        found: dict[str, list[tuple[float, float, float]]] = {}
        for name, path in args.runs * [*made.items()]:
            for version, checkout in checkouts.items():
                found.setdefault(f"{name}, {version}".strip(", "), []).append(run(path, checkout))
        sizes = {name: sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) for name, path in made.items()}
    report: dict[str, Any] = {}
    for name, each in found.items():
        size = sizes[name.removesuffix(", before")]
        wall, cpu, memory = (statistics.median(x) for x in zip(*each, strict=True))
        report[name] = {"gigabytes": size / 1e9, "wall_s": wall, "cpu_s": cpu}
        report[name] |= {"gb_per_s": size / wall / 1e9, "gb_per_cpu_s": size / cpu / 1e9, "memory_mb": memory / 1e6}
        report[name] = {key: short(value) for key, value in report[name].items()}
        print(f"{name:28}" + "   ".join(f"{key} {value:g}" for key, value in report[name].items()))
    words = [
        f"--{name}={value}" for name, value in (("layers", args.layers), ("heads", args.heads), ("runs", args.runs))
    ]
    write(args.output, {"machine": machine.describe(), "command": " ".join(words), "loads": report})
    return 0


if __name__ == "__main__":
    sys.exit(main())
