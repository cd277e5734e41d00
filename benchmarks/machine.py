"""What a figure was measured on: written into every file of benchmarks/results."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax


def describe() -> dict[str, Any]:
    """Processor, cores that this process may use, JAX device, versions and the date."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu,
        "cores": cores,
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "jax": version("jax"),
        "date": datetime.now(UTC).date().isoformat(),
    }
