"""GPUs that are not there: their descriptions, and the compiler that needs no more."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

from jvdiff.errors import SetupError, UsageError

TARGETS = Path(__file__).parent / "targets"


def check_target(target: str) -> None:
    """That the description and the compiler of a GPU are there; before jax is first imported, if possible.

    Raises:
        UsageError: there is no such description in targets/.
        SetupError: the compiler is not installed; the message says how.
    """
    known = sorted(path.stem for path in TARGETS.glob("*.textproto"))
    if target not in known:
        raise UsageError(f"plan_target is {target!r}; expected one of {', '.join(known)}.")
    os.environ["JAX_PLATFORMS"] = "cpu"  # or the plugin asks for a driver, where jax is first imported below
    plugins = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12") if importlib.util.find_spec("jax_plugins") else ()
    if not any(importlib.util.find_spec(name) for name in plugins):
        import jax

        version = jax.__version__
        raise SetupError(
            f"planning for {target} needs the CUDA compiler (no GPU, no driver). Install it with:\n"
            f"pip install --no-deps jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version} nvidia-cuda-nvcc "
            "nvidia-nvvm nvidia-cuda-crt nvidia-cuda-nvdisasm nvidia-cuda-cuobjdump"
        )


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
        raise SetupError(f"the CUDA compiler cannot be used: {error}\nIts packages must have jax's version.") from error
    return make_mesh(shape, topology.devices)


def target_memory(target: str) -> int:
    """Bytes that JAX takes of the memory of a described GPU: three quarters, or XLA_PYTHON_CLIENT_MEM_FRACTION."""
    found = re.search(r"device_memory_size: (\d+)", (TARGETS / f"{target}.textproto").read_text())
    assert found, target
    return int(int(found[1]) * float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")))
