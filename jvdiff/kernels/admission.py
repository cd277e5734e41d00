"""Hand-written kernels earn their admission: where one was never seen right, it is compared with the reference first.

A bad launch poisons the process that made it and a lost barrier hangs, so the comparison runs in a child, before this
process has a GPU. What came of it is remembered beside the compile cache, for a kind of device, driver, JAX and these
kernels. One that fails is refused by `Target.refusal`: who leaves the choice to jvdiff gets the next implementation,
who names it gets a sentence.

    python -m jvdiff.kernels.admission NAME       the child: one line of JSON, {"problem": null} where NAME is right
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvdiff.errors import ResourceError, SetupError
from jvdiff.kernels import block_sparse
from jvdiff.kernels.block_sparse import cuts
from jvdiff.kernels.sliding_tile import sliding_tile_attention
from jvdiff.runtime import cache, children, gpus, peers, target
from jvdiff.runtime.files import atomic
from jvdiff.runtime.target import Target

_log = logging.getLogger("jvdiff.kernels")

KERNELS = ("mosaic_gpu", "triton")  # written by hand; the others are XLA's and cuDNN's
LIMIT = 120.0  # seconds for a child: start, compile and run
# What is run, with the name of an implementation behind it. Tests put other children in its place: a kernel that is
# wrong, hangs or crashes is one that replaces `block_sparse.IMPLEMENTATIONS[NAME]` and calls `main`.
COMMAND = (sys.executable, "-m", "jvdiff.kernels.admission")
_ALONE = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # a case takes little, and leaves the rest to others
_PASSING = ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY")  # what may be otherwise next time is not remembered

# Sliding tiles of a small video: (grid, tile); blocks of 64 with lists of their own, blocks of 128 that are shared.
CASES = (((4, 8, 10), (4, 4, 4)), ((3, 8, 12), (2, 8, 8)))
BOUNDS = {"out": 1e-2, "lse": 2e-3, "dq": 2e-2, "dk": 2e-2, "dv": 2e-2}  # of the norm; bfloat16 rounds to 4e-3


def admit(tell: Callable[[str], None] = _log.warning) -> None:
    """Has the kernels that the GPUs at hand would run checked, unless they are known; before JAX takes their memory.

    Where there is no GPU, or the process asks for another platform, it does nothing; nor a second time.

    tell: takes a line: that kernels are being checked, and each that is refused with the reason.

    Raises:
        SetupError: a GPU is there, and JAX cannot use it.
    """
    refused = {} if gpus.unwanted() or not gpus.devices() else _refused(tell)
    for each in peers.gather(refused):  # of several processes all take the same kernels
        for name, problem in each.items():
            target.refuse(name, problem)
    gpus.check_used()


_known: list[dict[str, str]] = []  # what this process has found out


def _refused(tell: Callable[[str], None]) -> dict[str, str]:
    if _known:
        return _known[0]
    found = gpus.driver()
    refused = {name: problem for name, problem in results(found, tell).items() if problem is not None}
    for name, problem in refused.items():
        tell(
            f"notice: the attention kernel {name!r} is left out on {found.gpus[0].name}: {problem}.\n"
            "The next implementation takes its place; `jvdiff doctor` checks it again."
        )
    _known.append(refused)
    return refused


def results(found: gpus.Driver, tell: Callable[[str], None], *, again: bool = False) -> dict[str, str | None]:
    """Of each kernel that the first GPU would run: None where it is right, else what is wrong; the end of a sentence.

    again: without what is remembered, which is then replaced.
    """
    if not found.gpus:
        return {}
    known: dict[str, str | None] = {}
    told = False
    for name in runnable(Target("gpu", found.gpus[0].name, found.gpus[0].capability)):
        place = _place(name, found)
        if not again and place is not None and place.is_file():
            with contextlib.suppress(OSError, ValueError, KeyError):
                known[name] = json.loads(place.read_text(encoding="utf-8"))["problem"]
                continue
        if not told:
            tell(f"checking the attention kernels on {found.gpus[0].name}, once; at most {LIMIT:g} s for each")
            told = True
        known[name] = _examined(name, place, found)
    return known


def runnable(where: Target) -> list[str]:
    """The hand-written kernels that some program for a target may hold."""
    x = jax.ShapeDtypeStruct((1, 64, 1, 128), jnp.bfloat16)
    every = ((name, block_sparse.IMPLEMENTATIONS[name]) for name in KERNELS)
    return [name for name, each in every if not (each.unavailable(where) or each.unsupported(x, x, x, 64))]


def _examined(name: str, place: Path | None, found: gpus.Driver) -> str | None:
    answer, problem = children.ask([*COMMAND, name], LIMIT, _ALONE)
    problem = answer["problem"] if problem is None else problem
    if place is not None and not any(word in str(problem) for word in _PASSING):
        with contextlib.suppress(OSError, ResourceError):
            place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with atomic(place) as part:
                part.write_text(json.dumps(_facts(name, found) | {"problem": problem}), encoding="utf-8")
    return problem


def _facts(name: str, found: gpus.Driver) -> dict[str, Any]:
    """What the result of a check holds for."""
    driver = [found.version, found.cuda]
    jax = [importlib.metadata.version(package) for package in ("jax", "jaxlib")]
    return {"kernel": name, "gpu": found.gpus[0].name, "driver": driver, "jax": jax, "digest": digest()}


def _place(name: str, found: gpus.Driver) -> Path | None:
    """The file that remembers a result; None where no home folder is known."""
    key = hashlib.sha256(json.dumps(_facts(name, found)).encode()).hexdigest()[:16]
    with contextlib.suppress(SetupError):
        return cache.folder("admitted") / f"{name}-{key}.json"
    return None


@functools.cache
def digest() -> str:
    """Of the kernels' source and of how they are cut, also by this machine's own file."""
    total = hashlib.sha256()
    files = [path for path in sorted(Path(block_sparse.__file__).parent.iterdir()) if path.suffix in (".py", ".json")]
    with contextlib.suppress(SetupError):  # where no home folder is known
        files += [path for path in [cuts.path()] if path.is_file()]
    for path in files:
        total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]


# --------------------------------------------------------------------------------------------------- inside the child


def differences(name: str, cases: Iterable[Any] = CASES, head_dim: int = 128) -> Iterator[str]:
    """What an implementation computes otherwise than the reference on the devices at hand, forwards and backwards."""
    for grid, tile in cases:
        values = np.random.default_rng(0).standard_normal((4, 1, int(np.prod(grid)), 2, head_dim), np.float32)
        operands = [jnp.asarray(x, jnp.bfloat16) for x in values]  # q, k, v and a cotangent: [1,L,2,K]
        got = jax.jit(functools.partial(_results, name, grid, tile))(*operands)
        with jax.default_matmul_precision("highest"):
            want = jax.jit(functools.partial(_results, "reference", grid, tile))(
                *(x.astype(jnp.float32) for x in operands)
            )
        for (what, bound), a, b in zip(BOUNDS.items(), got, want, strict=True):
            a, b = np.asarray(a, np.float32), np.asarray(b)
            error = np.linalg.norm(a - b) / np.linalg.norm(b)
            if not error <= bound:  # NaN neither
                tiles = "x".join(map(str, tile))
                yield f"with tiles of {tiles} its {what} is off by {error:.2g} of the norm; at most {bound:g} is right"


def _results(name: str, grid: Any, tile: Any, q: Any, k: Any, v: Any, dout: Any) -> Any:
    """out, lse, dq, dk, dv of an implementation, see `BOUNDS`."""

    def attend(q: Any, k: Any, v: Any) -> Any:
        how: Any = dict(grid=grid, tile=tile, window=(1, 1, 1), return_lse=True, implementation=name)
        return sliding_tile_attention(q, k, v, **how)

    results, pull = jax.vjp(attend, q, k, v)
    return *results, *pull((dout, jnp.swapaxes(dout[..., 0], 1, 2).astype(jnp.float32)))


def main(words: list[str]) -> int:
    """The child: prints what is wrong with an implementation."""
    children.end_with_parent()
    children.answer({"problem": next(differences(words[0]), None)})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
