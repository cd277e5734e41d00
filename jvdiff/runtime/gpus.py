"""NVIDIA's GPUs as the machine and its driver tell of them, and whether JAX uses them.

The driver is asked in a process of its own, without JAX, so that no memory of a GPU is taken and nothing here hangs.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from jvdiff.errors import SetupError, UsageError
from jvdiff.runtime import children

# Where it is looked, and what is asked; tests put others in their place.
DEVICES = Path("/dev")
DRIVER = Path("/proc/driver/nvidia/version")
LIBCUDA = (sys.executable, "-I", "-S", str(Path(__file__).with_name("libcuda.py")))
LIMIT = 30.0  # seconds for an answer of the driver, which takes 3 where it is not loaded yet

NEEDED = {13: "580", 12: "525"}  # the first driver that serves JAX's packages for CUDA 13 and for CUDA 12
FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
FRACTION = "0.9"  # of a GPU's memory, for JAX's pool


class Gpu(NamedTuple):
    """A GPU, as its driver tells.

    name: "NVIDIA H200"
    capability: (9, 0)
    memory: in bytes
    free: how much of that, in bytes; None: it was not asked
    """

    name: str
    capability: tuple[int, int]
    memory: int
    free: int | None = None


class Driver(NamedTuple):
    """What the driver says.

    version: of its module in the kernel, "550.54.14"; None: there is none
    cuda: the newest CUDA that its library serves, (12, 4); None: it was not found
    gpus: that this process may use (CUDA_VISIBLE_DEVICES)
    problem: why there are none, in its own words
    """

    version: str | None
    cuda: tuple[int, int] | None
    gpus: tuple[Gpu, ...]
    problem: str | None


def devices() -> list[Path]:
    """The files of NVIDIA's GPUs on this machine; a container has those that it was given."""
    return sorted(path for path in DEVICES.glob("nvidia[0-9]*") if path.name[6:].isdecimal())


def driver(free: bool = False) -> Driver:
    """Asks the driver; free: for the free memory too, for which it makes a context on each GPU."""
    version = None
    if DRIVER.is_file() and (found := re.search(r"\b(\d{3}\.[\d.]+)\b", DRIVER.read_text(errors="replace"))):
        version = found[1]
    answer, problem = children.ask([*LIBCUDA, *(["--free"] if free else [])], LIMIT)
    if problem is not None:
        return Driver(version, None, (), f"the driver does not answer: {problem}")
    number = answer["cuda"]
    gpus = tuple(Gpu(g["name"], tuple(g["capability"]), g["memory"], g["free"]) for g in answer["gpus"])
    return Driver(version, number and (number // 1000, number % 1000 // 10), gpus, answer["problem"])


def packages() -> list[int]:
    """For which versions of CUDA JAX's packages are installed: [13]."""
    if importlib.util.find_spec("jax_plugins") is None:
        return []
    return [cuda for cuda in NEEDED if importlib.util.find_spec(f"jax_plugins.xla_cuda{cuda}")]


def asked() -> str:
    """The platforms that somebody asked JAX for: "cuda,cpu"; "" for whatever there is."""
    if jax := sys.modules.get("jax"):
        config: Any = jax.config
        return config.jax_platforms or ""
    return os.environ.get("JAX_PLATFORMS", "")


def unwanted() -> bool:
    """Whether somebody asked for another platform, or for no GPU."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles")
    return hidden or bool(asked() and not {"cuda", "gpu"} & set(asked().split(",")))


def reserve() -> None:
    """JAX's pool takes `FRACTION` of a GPU, unless the environment says otherwise; before JAX looks for devices."""
    if not any(os.environ.get(name) for name in FRACTIONS):
        os.environ[FRACTIONS[0]] = FRACTION


def share() -> float:
    """How much of a GPU's memory JAX's pool takes in a run of ours.

    Raises:
        UsageError: the environment has something else than a number.
    """
    name, text = next(((name, os.environ[name]) for name in FRACTIONS if os.environ.get(name)), ("", FRACTION))
    try:
        return float(text)
    except ValueError:
        raise UsageError(
            f"{name} is {text!r:.40}; expected a share of a GPU's memory, for instance {FRACTION}."
        ) from None


def check_used() -> None:
    """Checks that JAX uses the GPUs of this machine, if there are any and it has the packages; starts it.

    Raises:
        SetupError: it took the CPU instead, which nobody asked for; the message has the driver found and needed.
    """
    if unwanted() or not devices() or not packages():
        return
    import jax

    if jax.default_backend() == "cpu":
        raise SetupError("\n".join(unused(driver())))


def unused(found: Driver) -> list[str]:
    """Why JAX cannot use the GPUs that are there, and what to do, in at most six lines."""
    cuda = packages()[0]
    serves = f"CUDA {found.cuda[0]}.{found.cuda[1]}" if found.cuda else "no CUDA"
    there = ", ".join(str(path) for path in devices()[:3])
    return [
        "a GPU is there, and JAX cannot use it: this would run on the CPU.",
        f"Found: {there}; driver {found.version or 'unknown'}, which serves {serves}.",
        f"Needed: driver {NEEDED[cuda]} or newer, for JAX's packages for CUDA {cuda}.",
        *([f"The driver says: {found.problem}."] if found.problem else []),
        advice(found, cuda),
        "`jvdiff doctor` looks closer; JAX_PLATFORMS=cpu takes the CPU on purpose.",
    ]


def advice(found: Driver, cuda: int) -> str:
    """What to do where JAX's packages for a version of CUDA cannot use the GPUs that are there."""
    if found.cuda is not None and found.cuda[0] < cuda:
        other = "" if found.cuda[0] < 12 else ", or install jvdiff[cuda12] in place of jvdiff[cuda13]"
        return f"Update the driver{other}."
    if places := libraries_in_the_way():
        return f"LD_LIBRARY_PATH has other CUDA libraries, in {places[0]}: unset it."
    if found.cuda is None:
        return "Install the driver's libraries; start a container with `--gpus all`."
    return "Install jvdiff with its extra again, so that JAX and its packages for CUDA have one version."


def libraries_in_the_way() -> list[str]:
    """Folders of LD_LIBRARY_PATH with libraries that are loaded in place of those that came with JAX."""
    names = ("libcudnn*.so*", "libcublas*.so*", "libcudart*.so*", "libnccl*.so*", "libcusparse*.so*")
    folders = [folder for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    return [folder for folder in folders if any(any(Path(folder).glob(name)) for name in names)]
