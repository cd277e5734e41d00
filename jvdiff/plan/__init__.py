"""What a run would take, found out without weights.

report     the plan of a sampling run, line by line
programs   its compiled programs, measured
meshes     the smallest split that fits
training   the plan of a training
counting   operations of a traced program, arrays of a compiled one
targets    GPUs that are not there
"""

import importlib
from typing import Any

# A file and its names, imported when one is first used: what a GPU that is not there needs comes before JAX.
_NAMES = {
    "counting": ("count_flops", "flops", "gib", "largest_array"),
    "meshes": ("candidates", "memory_limit", "smallest_mesh"),
    "programs": ("Program", "leaves", "programs", "resident"),
    "report": ("describe", "lines", "resolved", "show"),
    "targets": ("TARGETS", "check_target", "run_with_compiler", "target_memory", "target_mesh"),
}


def __getattr__(name: str) -> Any:
    for file, names in _NAMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{file}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
