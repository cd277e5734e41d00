"""What a run would take, found out without weights.

report     the plan of a sampling run, line by line
compiled   its compiled programs, measured
meshes     the smallest split that fits
residency  whose weights are on a device together
training   the plan of a training
counting   operations of a traced program, arrays of a compiled one
targets    GPUs that are not there
resources  what a kernel takes of one
"""

from jvdiff.lazy import attach

__all__ = [
    "TARGETS",
    "Program",
    "Residency",
    "Work",
    "attention_in",
    "candidates",
    "check_target",
    "choose",
    "compile_for",
    "compiled",
    "count_flops",
    "counting",
    "describe",
    "described",
    "described_number",
    "encoders",
    "fitted",
    "flops",
    "gib",
    "in_tiles",
    "known_targets",
    "largest_array",
    "leaves",
    "lines",
    "memory_limit",
    "memory_of",
    "meshes",
    "pool",
    "products",
    "programs",
    "report",
    "residency",
    "resident",
    "resolved",
    "resources",
    "run_with_compiler",
    "sampling",
    "smallest_mesh",
    "stage_text",
    "target_memory",
    "target_mesh",
    "target_placement",
    "targets",
    "training",
    "ways",
    "with_turns",
]

# `targets` is searched first, since it must run before JAX is imported.

__getattr__ = attach(__name__, __all__, ("targets", "counting", "report", "compiled", "meshes", "residency"))
