"""What a kernel takes of a GPU, read from what its compilers print: registers, spills, shared memory."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from jvdiff.plan.targets import described_number

REGISTERS = 65_536  # of an SM
# What the compilers print by themselves, and what is asked of them: of Mosaic's kernels, and of all others.
_ASKED = {
    "MOSAIC_GPU_DUMP_PTXAS": "1",
    "MOSAIC_GPU_DUMP_RESOURCES": "1",
    "TF_CPP_MIN_LOG_LEVEL": "0",
    "TF_CPP_VMODULE": "subprocess_compilation=2,xtile_compiler=2,thunk_emitter=3",
}


def ask() -> None:
    """Makes the compilers of this process and of its children print; to be called before JAX is imported."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_force_compilation_parallelism=1"  # one after the other
    os.environ.update(_ASKED | {"XLA_FLAGS": flags})


@contextmanager
def printed() -> Iterator[list[str]]:
    """What is written to stdout and stderr within, also outside Python: one text, at the end."""
    texts: list[str] = []
    kept = [os.dup(1), os.dup(2)]
    sys.stdout.flush()
    with tempfile.TemporaryFile() as file:
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            yield texts
        finally:
            sys.stdout.flush()
            for number, old in zip((1, 2), kept, strict=True):
                os.dup2(old, number)
                os.close(old)
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))


def read_log(log: str, kernels: Sequence[str]) -> dict[str, dict[str, int]]:
    """registers, spills (bytes stored) and shared_memory (bytes) of each kernel, from what the compilers print.

    kernels: in the order in which they are lowered, since Mosaic prints shared memory without a name
    """
    pattern = (
        r"Function properties for block_sparse_([a-z]+)\w*\s+\d+ bytes stack frame, (\d+) bytes spill stores, "
        r"\d+ bytes spill loads\s+ptxas info\s*: Used (\d+) registers"
    )
    found = {
        kernel: {"registers": int(used), "spills": int(spills)} for kernel, spills, used in re.findall(pattern, log)
    }
    order = re.findall(r"Generating: block_sparse_([a-z]+)", log) or kernels
    memory = re.findall(r"Resources\(smem_scratch_bytes=(\d+)|Shared memory usage: (\d+) B", log)
    for kernel, sizes in zip(order, memory, strict=True):
        found[kernel]["shared_memory"] = int(max(sizes))
    return found


def shared_memory_of(target: str) -> int:
    """Bytes that one CTA may have."""
    return int(described_number(target, "shared_memory_per_block_optin"))


def ctas(target: str, *, registers: int, shared_memory: int, threads: int, spills: int = 0) -> int:
    """How many CTAs fit on an SM at once: registers come in eights, and each CTA takes 1 KiB more than it asks for."""
    by_registers = REGISTERS // (-(-registers // 8) * 8 * threads)
    by_memory = described_number(target, "shared_memory_per_core") // (shared_memory + 1024)
    by_threads = described_number(target, "threads_per_core_limit") // threads
    return int(min(by_registers, by_memory, by_threads))
