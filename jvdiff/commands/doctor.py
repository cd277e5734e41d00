"""The command line that says what this machine has for jvdiff, and what to do about what is wrong.

    jvdiff doctor
    jvdiff doctor --devices=8

Each examination runs in a process of its own, for a limited time, so that nothing that it meets ends this one. A line
that begins with `advice:` belongs to the line above it. Where the kernels of a GPU are checked, they are checked anew.

Exit status: 0, or 7 where a device that was asked for is missing: by JAX_PLATFORMS, by --devices, or by installing
JAX's packages for the GPU that is there.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jvdiff import config as configs
from jvdiff.commands import arguments, command_line, options
from jvdiff.commands.arguments import Command, Section
from jvdiff.errors import SetupError
from jvdiff.runtime import cache, children, environment, gpus, memory

EXAMINE = (sys.executable, "-m", "jvdiff.commands.examinations")  # tests put other children in its place
_ALONE = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # others may be at work on the GPU
_VERSIONS = ("jvdiff", "jax", "jaxlib", "flax", "numpy", "orbax-checkpoint", "av")

COMMAND = Command(
    name="doctor",
    about="what this machine has for jvdiff, and what to do about what is wrong",
    examples=("", "--devices=8"),
    sections=lambda config, flags: [Section(str(options.Doctor.__doc__), configs.options(options.Doctor))],
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status; errors are sentences on stderr."""
    words = list(sys.argv if argv is None else argv)

    def work() -> int:
        values = arguments.values(COMMAND, words)
        environment.check_flags()
        gpus.reserve()
        missing: list[str] = []
        for line in lines(values["devices"], values["limit"], missing):
            print(line, flush=True)
        if missing:
            raise SetupError(missing[0])
        return 0

    return command_line.ended(work, words)


def lines(devices: int | None, limit: float, missing: list[str]) -> Iterator[str]:
    """What is found, line by line, each as soon as it is known.

    devices: how many GPUs there must be; None: nobody said.
    limit: seconds for each examination.
    missing: gets a sentence for each device that was asked for and is not there.
    """
    yield from _versions()
    found = gpus.driver(free=True)
    yield from _gpus(found)
    yield from _host()
    yield from _caches()
    refused: dict[str, str] = {}
    for name, problem in _kernels(found):
        yield f"attention kernel {name}: {'right' if problem is None else f'left out, {problem}'}"
        if problem is not None:
            refused[name] = problem
            yield f"advice: the next implementation takes its place; please report this with the lines above ({name})"
    told, problem = children.ask([*EXAMINE, "devices", json.dumps(refused)], limit, _ALONE)
    yield from _jax(found, told, problem, devices, missing)
    if problem is None:
        yield from _reduced(*children.ask([*EXAMINE, "reduce"], limit, _ALONE))


def _versions() -> Iterator[str]:
    found = {name: _version(name) for name in _VERSIONS}
    yield f"versions: Python {platform.python_version()}, {', '.join(f'{n} {v}' for n, v in found.items() if v)}"
    if found["jax"] in ("0.11.0", "0.11.1"):
        yield f"advice: jax {found['jax']} refuses Triton's kernels on many GPUs: pip install 'jax>=0.11.2,<0.13'"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus(found: gpus.Driver) -> Iterator[str]:
    files, packages = gpus.devices(), gpus.packages()
    if not files and not found.gpus:
        yield "GPU: none of NVIDIA's"
        if packages:
            yield "advice: JAX's packages for CUDA are installed; start a container with `--gpus all`"
        return
    serves = f"serves CUDA {found.cuda[0]}.{found.cuda[1]}" if found.cuda else "its library was not found"
    needs = "".join(f"; CUDA {cuda} needs {gpus.NEEDED[cuda]} or newer" for cuda in packages)
    yield f"driver: {found.version or 'unknown'}, {serves}{needs}"
    for number, gpu in enumerate(found.gpus):
        major, minor = gpu.capability
        free = "" if gpu.free is None else f", {_gib(gpu.free)} free"
        yield f"GPU {number}: {gpu.name}, compute capability {major}.{minor}, {_gib(gpu.memory)}{free}"
        if gpu.free is not None and gpu.free < gpu.memory * gpus.share():
            yield f"advice: another process uses it, and a run takes {gpus.share():g} of it: nvidia-smi shows which"
        if gpu.capability == (9, 0) and str(_version("jax")).startswith("0.10."):
            yield "advice: Mosaic's kernels for a Hopper need JAX 0.11, for which take Python 3.12 or newer"
    if not packages:
        cuda = 13 if found.cuda and found.cuda[0] >= 13 else 12
        yield f"advice: JAX has no package for it: pip install 'jvdiff[cuda{cuda}]'"
    elif not found.gpus:
        yield f"advice: {gpus.advice(found, packages[0])}"


def _host() -> Iterator[str]:
    size, said = memory.host()
    yield f"host memory: {_gib(size)} ({said} that much)"


def _caches() -> Iterator[str]:
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    for name, what in (("compiled", "compiled programs"), ("admitted", "checks of kernels"), ("compiler", "compilers")):
        try:
            folder = Path(named) if named and name == "compiled" else cache.folder(name)
            if not folder.is_dir():
                yield f"cache of {what}: {folder}, empty"
                continue
            sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
            yield f"cache of {what}: {folder}, {len(sizes)} files, {_gib(sum(sizes))}"
            cache.check_private(folder, f"the cache of {what}")
            if not os.access(folder, os.W_OK):
                yield f"advice: it cannot be written: chmod u+w {folder}"
        except (SetupError, OSError) as error:
            yield f"advice: {' '.join(str(error).split())}"


def _kernels(found: gpus.Driver) -> Iterator[tuple[str, str | None]]:
    if not found.gpus or not gpus.packages() or gpus.unwanted():
        return
    from jvdiff.kernels import admission

    yield from admission.results(found, command_line.say, again=True).items()


def _jax(
    found: gpus.Driver, told: Mapping[str, Any], problem: str | None, devices: int | None, missing: list[str]
) -> Iterator[str]:
    asked = gpus.asked()
    if problem is not None:
        yield f"JAX: {problem}"
        yield (
            f"advice: {gpus.advice(found, (gpus.packages() or [12])[0])}"
            if gpus.devices()
            else ("advice: unset JAX_PLATFORMS, or install jvdiff with the extra for your GPU")
        )
        missing.append(f"JAX cannot start{f' on JAX_PLATFORMS={asked}' if asked else ''}; see above.")
        return
    pool = f"; pool of {_gib(told['pool'])}, {gpus.share():g} of each" if told["pool"] else ""
    yield f"JAX: {told['platform']}, {told['count']} x {told['kind']}{pool}"
    if told["platform"] == "cpu" and gpus.devices() and gpus.packages() and not gpus.unwanted():
        yield f"advice: {gpus.advice(found, gpus.packages()[0])}"
        missing.append("a GPU is there, and JAX cannot use it; see above.")
    there = told["count"] if told["platform"] == "gpu" else 0
    if devices is not None and there < devices:
        missing.append(f"{devices} GPUs were asked for, and JAX finds {there}; see above.")
    yield from _cudnn(told["cudnn"])
    for name, (chosen, reasons) in told["attention"].items():
        why = "".join(f"; {other}: {reason}" for other, reason in reasons.items())
        yield f"attention, {name}: {chosen}{why}"


def _cudnn(versions: Mapping[str, Any]) -> Iterator[str]:
    found, needed = versions["found"], versions["needed"]
    if needed is None:
        return
    spoken = [f"{v // 10_000}.{v // 100 % 100}.{v % 100}" if v else "none" for v in (found, needed)]
    yield f"cuDNN: {spoken[0]} found, {spoken[1]} needed"
    if not found or found // 100 < needed // 100:
        places = gpus.libraries_in_the_way()
        yield f"advice: LD_LIBRARY_PATH has another, in {places[0]}: unset it" if places else "advice: install it again"


def _reduced(told: Mapping[str, Any], problem: str | None) -> Iterator[str]:
    if problem is not None or not told["right"]:
        yield f"all-reduce of 1 MB: {problem or 'its result is wrong'}"
        yield "advice: NCCL_DEBUG=INFO says where it stops; try NCCL_P2P_DISABLE=1 (docs/clusters.md)"
    elif told["devices"] == 1:
        yield "all-reduce of 1 MB: right, on the one device that there is"
    else:
        yield f"all-reduce of 1 MB: right, {told['ms']:.2f} ms on {told['devices']} devices"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
