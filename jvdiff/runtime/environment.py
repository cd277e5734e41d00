"""What of the environment decides numbers: settings of JAX and flags of XLA, for records and saved states.

Random numbers are no part of it: `draws` pins them.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jvdiff.errors import SetupError
from jvdiff.runtime import cache

# Settings of JAX under which the same program gives other numbers, to a last bit at least.
SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_disable_jit",
    "jax_disable_most_optimizations",
    "jax_optimization_level",
    "jax_exec_time_optimization_effort",
    "jax_memory_fitting_level",
    "jax_memory_fitting_effort",
    "jax_allow_f16_reductions",
)
VARIABLES = ("LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "TF_ENABLE_ONEDNN_OPTS")
# Flags of XLA that decide no number: how many devices there seem to be, and what is written for people to read.
_HARMLESS = ("--xla_force_host_platform_device_count", "--xla_dump", "--xla_hlo_profile", "--xla_gpu_cuda_data_dir")
_TRIAL = "import jax; jax.jit(lambda x: x + 1)(1.0).block_until_ready()"


def numerics() -> dict[str, Any]:
    """What of the environment decides numbers, as JSON values, by name."""
    import jax

    stored = jax.config.values  # the same for all threads; an attribute, where there is one, knows of contexts too
    values = {name: getattr(jax.config, name, stored.get(name)) for name in SETTINGS}
    told = {
        name: value if isinstance(value, bool | int | float | None) else str(value) for name, value in values.items()
    }
    flags = [flag for flag in shlex.split(os.environ.get("XLA_FLAGS", "")) if not flag.startswith(_HARMLESS)]
    return told | {"XLA_FLAGS": " ".join(flags)} | {name: os.environ.get(name, "") for name in VARIABLES}


def compared(facts: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of the environment decides numbers, as the facts of a saved state have it, and as it is now; by name.

    Of a state of an earlier version, which has none, nothing is compared.
    """
    saved = facts.get("environment")
    if not isinstance(saved, dict):
        return {}, {}
    now = {name: value for name, value in numerics().items() if name in saved}
    return {f"environment.{name}": saved[name] for name in now}, {f"environment.{name}": now[name] for name in now}


def autotuning() -> str | None:
    """A digest of what was found out about this GPU's kernels: by XLA, beside compiled programs, and by `jvdiff tune`.

    None: not a GPU, or nothing is kept.
    """
    import jax

    from jvdiff.runtime.target import here

    folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if here().platform != "gpu":
        return None
    total, files = hashlib.sha256(), []
    if folder:
        kept = Path(folder, "xla_gpu_per_fusion_autotune_cache_dir")
        files = sorted(path for path in kept.rglob("*") if path.is_file())
    with contextlib.suppress(SetupError):  # where no home folder is known
        files += [path for path in [cache.folder("tuned.json")] if path.is_file()]
    for path in files:
        with contextlib.suppress(OSError):  # another process may replace one
            total.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest() if files else None


def check_flags() -> None:
    """Raises SetupError for XLA_FLAGS with which XLA would end this process by a signal.

    They are tried in a process of its own, once for each text and version of XLA. Where JAX is there already, so are
    they.
    """
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if not flags or "jaxlib" in sys.modules:
        return
    names = f"{flags}\0{importlib.metadata.version('jaxlib')}\0{sys.version}"
    mark = None
    with contextlib.suppress(SetupError):  # where no home folder is known, they are tried each time
        mark = cache.folder("xla_flags") / hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()
    if mark and mark.is_file() and flags.startswith("-"):  # otherwise it is the name of a file with flags
        return
    trial = subprocess.run(
        [sys.executable, "-c", _TRIAL], env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True
    )
    said = trial.stderr.decode(errors="replace")
    if trial.returncode and "Traceback" not in said:
        line = next((line for line in said.splitlines() if "XLA_FLAGS" in line), "it ends the process")
        raise SetupError(
            f"XLA does not take XLA_FLAGS={flags!r:.200}: {line.partition('] ')[2] or line:.300}\n"
            "Correct the variable, or unset it."
        )
    if mark:
        with contextlib.suppress(OSError):
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
