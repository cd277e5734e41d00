"""How the kernels of GPUs are cut: as they ship, and over that what `jvdiff tune` found out on this machine.

A file of cuts is JSON: implementation, kind of device, block and head dim, kernel.

    {"mosaic_gpu": {"NVIDIA H200": {"384x128": {"forward": {"warpgroups": 3, "step": 128, "stages": 2, ...}}}}}

Of a machine's own file an entry holds for all blocks that are multiples of its own, unless a larger one does, and goes
before what ships. An invalid entry, or one that the compiler refuses, is left out, and a warning says why.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvdiff.errors import SetupError
from jvdiff.kernels.block_sparse.lists import Lists
from jvdiff.runtime import cache as user
from jvdiff.runtime.target import Target, here

KERNELS = ("forward", "dq", "dkv")
_log = logging.getLogger("jvdiff.kernels")


def path() -> Path:
    """This machine's own file: ~/.cache/jvdiff/tuned.json. SetupError where no home folder is known."""
    return user.folder("tuned.json")


def shapes(implementation: str, block: int, head_dim: int, dtype: Any, kind: str) -> dict[str, Any]:
    """The cut of each kernel of an implementation, for a kind of device."""
    module = _module(implementation)
    found = module.shipped(block, head_dim, dtype, kind)
    entries = _own().get((implementation, kind), {}) if jnp.dtype(dtype).itemsize == 2 else {}
    for kernel in KERNELS:
        fitting = [key for key in entries if block % key[0] == 0 and key[1:] == (head_dim, kernel)]
        for key in sorted(fitting, reverse=True)[:1]:
            found[kernel] = _cut(implementation, kind, key) or found[kernel]
    return found


def call(implementation: str, kernel: str, operands: Any, lists: Lists, cuts: Mapping[str, Any], **how: Any) -> Any:
    """What one kernel computes: out and log-sum-exp of q, k, v; dq, or dk and dv, of q, k, v, out, lse, dout, dlse."""
    module = _module(implementation)
    if kernel == "forward":
        return module.forward(*operands[:3], lists, cuts=cuts, **how)
    dq, *others = module.backward(*operands, lists, cuts=cuts, **how)
    return [dq] if kernel == "dq" else others


def table(rows: Mapping[tuple[str, str, int, int, str], Any]) -> dict[str, Any]:
    """Cuts by (implementation, kind, block, head dim, kernel) as what a file of cuts holds."""
    found: dict[str, Any] = {}
    for (implementation, kind, block, head_dim, kernel), cut in rows.items():
        of_kind = found.setdefault(implementation, {}).setdefault(kind, {})
        of_kind.setdefault(f"{block}x{head_dim}", {})[kernel] = cut._asdict()
    return found


def merged(one: Any, other: Any) -> Any:
    """Two such tables as one; where both have an entry, the other's."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return other
    return one | {key: merged(one.get(key), value) for key, value in other.items()}


def _module(implementation: str) -> Any:
    return importlib.import_module(f"jvdiff.kernels.block_sparse.{implementation}")


@cache
def _own() -> dict[tuple[str, str], dict[tuple[int, int, str], Any]]:
    """The entries of this machine's file by implementation and kind, then by block, head dim and kernel."""
    found: dict[tuple[str, str], dict[tuple[int, int, str], Any]] = {}
    try:
        for implementation, kinds in json.loads(path().read_text()).items():
            for kind, blocks in kinds.items():
                for name, kernels in blocks.items():
                    if not (key := re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", name)):
                        raise ValueError(f"expected a block and a head dim such as 384x128, found {name!r:.40}")
                    entries = {(int(key[1]), int(key[2]), kernel): entry for kernel, entry in kernels.items()}
                    found.setdefault((implementation, kind), {}).update(entries)
    except (FileNotFoundError, NotADirectoryError, SetupError):
        return {}
    except (OSError, ValueError, AttributeError) as error:
        _log.warning("%s is left out, kernels are cut as they ship: %s. Run jvdiff tune, or remove it.", path(), error)
        return {}
    return found


@cache
def _cut(implementation: str, kind: str, key: tuple[int, int, str]) -> Any:
    """The cut of an entry of this machine's file; None: it is left out, with a sentence."""
    module, (block, head_dim, kernel) = _module(implementation), key
    entry = _own()[implementation, kind][key]
    try:
        if not isinstance(entry, dict) or set(entry) != set(module.Shape._fields):
            raise ValueError(f"expected {', '.join(module.Shape._fields)}, found {entry!r:.80}")
        cut = module.Shape(**entry)
        if reason := module.unfit(kernel, cut, block, head_dim):
            raise ValueError(reason)
        if (target := here()).kind == kind:
            _try(implementation, kernel, cut, block, head_dim, target)
    except Exception as error:  # whatever compilers raise
        said = f"{(str(error).strip().splitlines() or [type(error).__name__])[0]:.200}"
        where = f"{path()}: {implementation}, {kind}, {block}x{head_dim}, {kernel}"
        _log.warning("%s is left out, and cut as it ships: %s", where, said.rstrip("."))
        return None
    return cut


def _try(implementation: str, kernel: str, cut: Any, block: int, head_dim: int, target: Target) -> None:
    """Compiles a kernel with a cut for one block; raises what the compiler does. Runs nothing."""
    one = np.ones((1, 1, 1), np.int32)
    lists = Lists(one[..., None] - 1, one, np.full(1, block, np.int32), np.full(1, block, np.int32))
    x = jax.ShapeDtypeStruct((1, block, 1, head_dim), jnp.bfloat16)
    row = jax.ShapeDtypeStruct((1, 1, block), jnp.float32)
    cuts = _module(implementation).shipped(block, head_dim, jnp.bfloat16, target.kind) | {kernel: cut}
    how = dict(block=block, target=target, scale=head_dim**-0.5)
    run = jax.jit(lambda *operands: call(implementation, kernel, operands, lists, cuts, **how))
    with ThreadPoolExecutor(1) as fresh:  # a thread that is in the midst of no other program, and on no mesh
        fresh.submit(lambda: run.lower(x, x, x, x, row, x, row).compile()).result()
