"""The GPUs that can be planned for on a machine without one, and how the compiler that this needs is found.

JAX's CUDA compiler needs no GPU and no driver, only the description of a GPU (`targets/`) and packages of 0.7 GB.
Installed beside JAX, they make it look for a driver at every start, and complain. So they lie in a folder of the
user's cache, named by the versions of JAX and Python, and only the process that plans has it on its path.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jvdiff import program
from jvdiff.errors import SetupError, UsageError
from jvdiff.runtime import cache
from jvdiff.runtime.interrupts import shielded
from jvdiff.runtime.verdict import unfinished

TARGETS = Path(__file__).with_name("targets")
_PLUGINS = ("xla_cuda13", "xla_cuda12")
_COMPILER = ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-nvdisasm", "nvidia-cuda-cuobjdump")
_WHAT = "the CUDA compiler"


def compiler_folder() -> Path:
    """Where the compiler for this JAX lies, or is put by `install`: ~/.cache/jvdiff/compiler/0.10.2-cpython-311."""
    return cache.folder("compiler") / f"{importlib.metadata.version('jax')}-{sys.implementation.cache_tag}"


def has_compiler() -> bool:
    """Whether this process can compile for a GPU that is not there."""
    return bool(importlib.util.find_spec("jax_plugins")) and any(
        importlib.util.find_spec(f"jax_plugins.{name}") for name in _PLUGINS
    )


def check_target(target: str) -> None:
    """Checks that a GPU is described and that this process has the compiler; keeps JAX from looking for GPUs.

    Raises:
        UsageError: there is no such description in targets/.
        SetupError: the compiler is not installed, or not on this process's path; the message says what to run.
    """
    _check_known(target)
    os.environ["JAX_PLATFORMS"] = "cpu"  # or the plugin asks for a driver
    if jax := sys.modules.get("jax"):  # which has read that variable when it was imported
        jax.config.update("jax_platforms", "cpu")
    if not has_compiler():
        _check_installed()
        raise SetupError(
            f"{_WHAT} is in {compiler_folder()}, which is not on the path of this process.\n"
            f"Start it with: {_door()} PROGRAM.py, or: {_door()} -m MODULE"
        )


def run_with_compiler(target: str, command: Sequence[str]) -> int | None:
    """Runs this program again in a process that has the compiler on its path, unless this one has it already.

    Args:
        target: the GPU to plan for; one that is not described is refused before anything else.
        command: what follows `python` to start the same program: ["-m", "jvdiff", "plan", ...].

    Returns:
        The exit status of that process, to be returned at once. None: this process goes on, and `check_target` passes.

    Raises:
        UsageError: there is no such description in targets/.
        SetupError: the compiler is not installed; the message has the command that installs it.
    """
    _check_known(target)
    return None if has_compiler() else python(command)


def python(command: Sequence[str]) -> int:
    """Runs `python COMMAND` with the compiler on its path and JAX kept from looking for GPUs; returns its exit status.

    Raises:
        SetupError: the compiler is not installed, or others can write into its folder.
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    if not has_compiler():
        _check_installed()
        paths = (os.environ.get("PYTHONPATH"), str(compiler_folder()))
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    sys.stdout.flush()
    if program.ours():  # it becomes that process, so that signals reach it, and its status is its own
        os.execve(sys.executable, [sys.executable, *command], environment)
    status = subprocess.call([sys.executable, *command], env=environment)
    return status if status >= 0 else 128 - status  # as a shell reports the death by a signal


def install() -> Path:
    """Fills the compiler's folder from the package index, complete or not at all, and returns it; 0.7 GB.

    Raises:
        SetupError: neither pip nor uv is there, or they fail, or others can write into the folder.
    """
    target = compiler_folder()
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    cache.check_private(target.parent, _WHAT)
    if _complete(target):
        return target
    part = Path(tempfile.mkdtemp(prefix="part-", dir=target.parent))  # mode 0700
    with unfinished(part):
        try:
            _fill(part)
            if not _complete(target):  # another installer may have been faster
                shutil.rmtree(target, ignore_errors=True)  # what another program left there
                part.rename(target)
        except OSError as error:
            if not _complete(target):
                raise SetupError(f"{_WHAT} was not installed in {target}: {error.strerror or error}.") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return target


def _fill(part: Path) -> None:
    """Runs the installer, which a signal ends too; it is in a group of its own, so that Ctrl-C comes here alone."""
    version = importlib.metadata.version("jax")
    packages = [f"jax-cuda13-plugin=={version}", f"jax-cuda13-pjrt=={version}", *_COMPILER]
    with shielded(on=False):
        done = subprocess.run(
            [*_installer(), "--target", str(part), "--no-deps", *packages], check=False, process_group=0
        )
    if done.returncode:
        raise SetupError(f"{_WHAT} was not installed: its installer ended with status {done.returncode}, see above.")


def _installer() -> list[str]:
    """The command that installs packages for this Python: pip, or uv, whose environments have no pip."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "install"]
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--python", sys.executable]
    raise SetupError(f"{_WHAT} is installed by pip or uv, and {sys.executable} has neither.\nRun: python -m ensurepip")


def _check_known(target: str) -> None:
    known = sorted(path.stem for path in TARGETS.glob("*.textproto"))
    if target not in known:
        raise UsageError(f"plan_target is {target!r}; expected one of {', '.join(known)}.")


def _complete(folder: Path) -> bool:
    return any((folder / "jax_plugins" / name).is_dir() for name in _PLUGINS)


def _check_installed() -> None:
    folder = compiler_folder()
    if not _complete(folder):
        raise SetupError(
            f"planning for a GPU that is not there needs {_WHAT} (no GPU, no driver), which is not installed.\n"
            f"Install it, once, 0.7 GB in {folder} and nowhere else, with:\n{_door()} --install"
        )
    cache.check_private(folder.parent, _WHAT)
    cache.check_private(folder, _WHAT)


def _door() -> str:
    return f"{shlex.quote(sys.executable)} -m jvdiff.commands.compiler"


def target_memory(target: str) -> int:
    """Bytes that JAX takes of the memory of a described GPU: three quarters, or XLA_PYTHON_CLIENT_MEM_FRACTION."""
    size = re.search(r"device_memory_size: (\d+)", (TARGETS / f"{target}.textproto").read_text())
    assert size, target
    return int(int(size[1]) * float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")))


def target_mesh(target: str, shape: Any = None) -> Any:
    """A mesh of a `jvdiff.sharding.MeshShape` (None: one device) of the described GPUs in one machine.

    Raises:
        SetupError: the compiler's packages are there, but cannot be used.
    """
    from jax.experimental import topologies

    from jvdiff.sharding import MeshShape, make_mesh

    shape = shape or MeshShape()
    text = (TARGETS / f"{target}.textproto").read_text()
    try:
        topology = topologies.get_topology_desc(platform="cuda", topology=f"1x1x{shape.devices}", target_config=text)
    except Exception as error:
        raise SetupError(f"{_WHAT} cannot be used: {error}\nIts packages must have jax's version.") from error
    return make_mesh(shape, topology.devices)
