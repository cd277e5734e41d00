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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jvdiff import program
from jvdiff.errors import SetupError, UsageError
from jvdiff.runtime import cache, gpus
from jvdiff.runtime.interrupts import shielded
from jvdiff.runtime.verdict import unfinished

if TYPE_CHECKING:  # JAX must not be imported before `check_target`
    import jax

    from jvdiff.runtime.target import Target
    from jvdiff.sharding import Placement

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


def known_targets() -> list[str]:
    """The names of the GPUs that are described."""
    return sorted(path.stem for path in TARGETS.glob("*.textproto"))


def _check_known(target: str) -> None:
    if target not in known_targets():
        raise UsageError(f"plan_target is {target!r:.80}; expected one of {', '.join(known_targets())}.")


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


def described(name: str, devices: int = 1) -> Target:
    """A described GPU as a target: "h200", of which there are `devices`.

    Raises:
        UsageError: there is no such description in targets/.
    """
    from jvdiff.runtime.target import Target

    _check_known(name)
    text = (TARGETS / f"{name}.textproto").read_text()

    def numbers(field: str) -> tuple[int, int]:
        found = re.search(rf"{field} {{ major: (\d+) minor: (\d+)", text)
        assert found, (name, field)
        return int(found[1]), int(found[2])

    kind = re.search(r'device_description_str: "(.+)"', text)
    assert kind, name
    major, minor = numbers("dnn_version_info")
    return Target("gpu", kind[1], numbers("cuda_compute_capability"), devices, major * 10_000 + minor * 100)


def described_number(name: str, field: str) -> float:
    """A number of a described GPU: device_memory_size, memory_bandwidth, shared_memory_per_block_optin, core_count."""
    found = re.search(rf"{field}: ([\d.]+)", (TARGETS / f"{name}.textproto").read_text())
    assert found, (name, field)
    return float(found[1])


def target_memory(target: str) -> int:
    """Bytes that JAX takes of the memory of a described GPU in a run of ours, see `gpus.share`."""
    return int(described_number(target, "device_memory_size") * gpus.share())


def target_placement(target: str, shape: Any = None) -> Placement:
    """Where models work on a mesh (a `jvdiff.sharding.MeshShape`; None: one device) of described GPUs in one machine.

    Models that are given it choose the kernels of such a GPU. Compile what is traced with it by `compile_for`.

    Raises:
        UsageError: there is no such description in targets/.
        SetupError: the compiler's packages are not there, or cannot be used.
    """
    from jvdiff.sharding import MeshShape, Placement

    shape = shape or MeshShape()
    return Placement(target_mesh(target, shape), shape.ring, described(target, shape.devices))


def compile_for(
    placement: Placement | None, program: Any, *arguments: Any, options: Mapping[str, str | bool] | None = None
) -> jax.stages.Compiled:
    """Compiles a jitted function, for GPUs that are not there too; `.as_text()` is the optimised HLO.

        placement = plan.target_placement("h200", MeshShape(sequence=8))
        struct = jax.ShapeDtypeStruct((1, 32_760, 1536), jnp.bfloat16, sharding=placement.everywhere)
        text = plan.compile_for(placement, jax.jit(function), struct).as_text()

    placement: of `target_placement`, which the function hands to its model or, as `placement.target`, to its kernels;
        None: the devices at hand.
    program: a jitted function, or what its `trace` returned.
    arguments: ShapeDtypeStructs on the placement's mesh; of what is traced already, none.
    options: XLA's, for this program alone: {"xla_gpu_enable_triton_gemm": False}.

    Raises:
        SetupError: `check_target` was not called first, and this process has no compiler.
    """
    import jax

    from jvdiff.kernels.block_sparse import triton

    target = None if placement is None else placement.described
    traced = program if isinstance(program, jax.stages.Traced) else program.trace(*arguments)
    if target is None:
        return traced.lower().compile(dict(options or {}))
    with triton.lowering(target):
        lowered = traced.lower(lowering_platforms=("cuda",))
    return lowered.compile(dict(options or {}))


def target_mesh(target: str, shape: Any = None) -> Any:
    """A mesh of a `jvdiff.sharding.MeshShape` (None: one device) of the described GPUs in one machine.

    Raises:
        UsageError: there is no such description in targets/.
        SetupError: the compiler's packages are there, but cannot be used.
    """
    from jax.experimental import topologies

    from jvdiff.sharding import MeshShape, make_mesh

    _check_known(target)
    shape = shape or MeshShape()
    text = (TARGETS / f"{target}.textproto").read_text()
    try:
        topology = topologies.get_topology_desc(platform="cuda", topology=f"1x1x{shape.devices}", target_config=text)
    except Exception as error:
        raise SetupError(f"{_WHAT} cannot be used: {error}\nIts packages must have jax's version.") from error
    return make_mesh(shape, topology.devices)
