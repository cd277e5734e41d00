"""The shapes that the kernels of GPUs are made for, and which cut of a kernel is the fastest on them.

B batch, 1 · L query tokens · N heads · K head dim, 128 · n tiles · M places in a row of a list.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jvdiff.kernels import block_sparse, layout, sliding_tile, tiles
from jvdiff.kernels.block_sparse import Lists, cuts, triton
from jvdiff.runtime.target import Target

# Grid of tokens after patchify, and heads; 81 frames, HunyuanVideo 117.
MODELS = {
    "1.3B 480p": ((21, 30, 52), 12),
    "14B 480p": ((21, 30, 52), 40),
    "1.3B 720p": ((21, 45, 80), 12),
    "14B 720p": ((21, 45, 80), 40),
    "13B 768p": ((30, 48, 80), 24),
}
# Tile, and n tiles -> how many of them each tile sees.
PATTERNS: dict[str, tuple[tiles.Grid, Callable[[int], int]]] = {
    "STA 6x8x8": ((6, 8, 8), lambda n: min(n, 27)),
    "VSA 4x4x4": ((4, 4, 4), lambda n: tiles.top_k_count(0.9, n)),
    "VSA 4x4x8": ((4, 4, 8), lambda n: tiles.top_k_count(0.9, n)),
    "VSA 4x8x8": ((4, 8, 8), lambda n: tiles.top_k_count(0.9, n)),
}
STREAM = "chunk"  # of an endless video: the tokens of 3 frames see all those of the window, in blocks of 128
HEAD_DIM = 128
WRONG = 0.02  # a relative difference that no order of summation explains
SLOW = 1.15  # times the best: such a cut is not tried on further shapes


class Case(NamedTuple):
    """A kernel at a shape: names in MODELS and PATTERNS (or STREAM), and which kernel."""

    model: str
    pattern: str
    kernel: str

    def __str__(self) -> str:
        return f"{self.model}, {self.pattern}, {self.kernel}"


# The most valuable first: forward passes of clips as most people make them, then larger ones, then backward passes.
CASES = (
    *(Case("1.3B 480p", pattern, "forward") for pattern in ("STA 6x8x8", "VSA 4x4x4")),
    *(Case("14B 720p", pattern, "forward") for pattern in ("STA 6x8x8", "VSA 4x4x4")),
    *(Case("1.3B 480p", pattern, "forward") for pattern in (STREAM, "VSA 4x8x8")),
    *(Case("1.3B 480p", p, kernel) for p in ("STA 6x8x8", "VSA 4x4x4") for kernel in ("dq", "dkv")),
    *(Case(m, p, "forward") for m in ("14B 480p", "1.3B 720p") for p in ("STA 6x8x8", "VSA 4x4x4")),
    *(Case("14B 720p", p, kernel) for p in ("STA 6x8x8", "VSA 4x4x4") for kernel in ("dq", "dkv")),
    *(Case("1.3B 480p", p, kernel) for p in (STREAM, "VSA 4x8x8") for kernel in ("dq", "dkv")),
    Case("14B 720p", "VSA 4x8x8", "forward"),
)


class Row(NamedTuple):
    """One cut of one kernel at one shape.

    problem: why it is not used ("" where nothing is wrong)
    seconds: of one run; nan: not timed
    difference: the relative one to what the cut that ships gives
    """

    case: Case
    block: int
    cut: Any
    problem: str = ""
    seconds: float = math.nan
    difference: float = math.nan


class Shape(NamedTuple):
    """The operands of a case: block, heads, (rows of q, rows of k), and the lists; q2k None: drawn on the device.

    seen: M
    """

    block: int
    heads: int
    rows: tuple[int, int]
    lists: Lists
    seen: int


def shape_of(case: Case, implementation: str, target: Target) -> Shape:
    """As the patterns hand it to the kernel: tiles of a multiple of 8 tokens stay where they lie."""
    grid, heads = MODELS[case.model]
    if case.pattern == STREAM:
        tokens, block = grid[1] * grid[2], 128
        rows = -(-3 * tokens // block) * block, -(-grid[0] * tokens // block) * block
        sizes = np.minimum(grid[0] * grid[1] * grid[2] - np.arange(0, rows[1], block), block).astype(np.int32)
        return Shape(block, heads, rows, Lists(*layout.everything(rows[0] // block, sizes), sizes), sizes.size)
    tile, seen = PATTERNS[case.pattern]
    block, sizes = layout.places(math.prod(tile)), tiles.variable_block_sizes(grid, tile).astype(np.int32)
    laid = layout.blocks(target, implementation, block, layout.video_places(grid, tile, True, block))
    rows = sizes.size * block if laid.first is None else int(sizes.sum())
    q2k = None
    if case.pattern.startswith("STA"):
        q2k = sliding_tile.window_lists(tiles.counts(grid, tile), ((3, 3, 3),))[0]
    M = seen(sizes.size) if q2k is None else q2k.shape[-1]
    count = np.full((1, heads if q2k is None else 1, sizes.size), M, np.int32)
    return Shape(block, heads, (rows, rows), Lists(q2k, count, sizes, sizes, laid.first, laid.first), M)


def candidates(implementation: str, kernel: str, block: int, kind: str, head_dim: int = HEAD_DIM) -> list[Any]:
    """The cuts that are tried for blocks of this size: that which ships first."""
    module = block_sparse.IMPLEMENTATIONS[implementation]
    first = module.shipped(block, head_dim, jnp.bfloat16, kind)[kernel]
    fit = (cut for cut in module.CUTS[kernel] if not module.unfit(kernel, cut, block, head_dim))
    return list(dict.fromkeys([first, *fit]))


def program(implementation: str, shape: Shape, kernel: str, cut: Any, target: Target, head_dim: int = HEAD_DIM) -> Any:
    """A jitted function of (q2k, q, k, v) or (q2k, q, k, v, out, lse, dout, dlse): one kernel, cut so."""
    module, like = block_sparse.IMPLEMENTATIONS[implementation], jax.ShapeDtypeStruct
    q, k = (like((1, rows, shape.heads, head_dim), jnp.bfloat16) for rows in shape.rows)
    how: Any = dict(block=shape.block, target=target, scale=head_dim**-0.5)
    how["cuts"] = module.shipped(shape.block, head_dim, jnp.bfloat16, target.kind) | {kernel: cut}

    def run(q2k: jax.Array, *operands: jax.Array) -> Any:
        lists = block_sparse.prepared(q, k, shape.lists._replace(q2k=q2k), shape.block)
        return cuts.call(implementation, kernel, operands, lists, **how)

    return jax.jit(run)


def arguments(shape: Shape, kernel: str, head_dim: int = HEAD_DIM) -> list[jax.ShapeDtypeStruct]:
    """What `program` takes."""
    like, (L, S), heads = jax.ShapeDtypeStruct, shape.rows, shape.heads
    q2k = shape.lists.q2k
    lists = like((1, heads, shape.lists.q2k_count.shape[2], shape.seen) if q2k is None else q2k.shape, jnp.int32)
    q, k = (like((1, rows, heads, head_dim), jnp.bfloat16) for rows in (L, S))
    row = like((1, heads, L), jnp.float32)
    return [lists, q, k, k, *(() if kernel == "forward" else (q, row, q, row))]


def tune(
    implementation: str, target: Target, chosen: Sequence[Case], seconds: float
) -> Iterator[tuple[list[Row], dict[tuple[str, str, int, int, str], Any]]]:
    """Times the cuts on the devices at hand, case after case, as long as there is time for another.

    Yields after each case its rows, and the best cuts so far by (implementation, kind, block, head dim, kernel): those
    with the lowest product of times, of all that were right wherever they were tried.
    """
    end, longest = time.monotonic() + seconds, 0.0
    ratios: dict[tuple[int, str], dict[Any, list[float]]] = {}
    for case in chosen:
        began = time.monotonic()
        if began + longest > end:
            return
        shape = shape_of(case, implementation, target)
        tried = candidates(implementation, case.kernel, shape.block, target.kind)
        known = ratios.get((shape.block, case.kernel))
        if known is not None:
            best = min(map(_mean, known.values()))
            tried = [cut for cut in tried if cut in known and (cut is tried[0] or _mean(known[cut]) <= SLOW * best)]
        rows = list(_timed(case, shape, implementation, tried, target))
        good = {row.cut: row.seconds for row in rows if not row.problem}
        if tried[0] in good:  # times are told in that of the cut that ships
            before = known or {cut: [] for cut in good}
            now = {cut: [*before[cut], taken / good[tried[0]]] for cut, taken in good.items() if cut in before}
            ratios[shape.block, case.kernel] = now
        found = {
            (implementation, target.kind, block, HEAD_DIM, kernel): min(each, key=lambda cut: _mean(each[cut]))
            for (block, kernel), each in ratios.items()
        }
        longest = max(longest, time.monotonic() - began)
        yield rows, found


def _mean(ratios: Sequence[float]) -> float:
    return math.prod(ratios) ** (1 / len(ratios))


def _timed(case: Case, shape: Shape, implementation: str, tried: Sequence[Any], target: Target) -> Iterator[Row]:
    """A row for each cut; all are compiled at once, and run in turn."""
    how = (implementation, shape)
    with ThreadPoolExecutor() as pool:
        compiled: dict[Any, Future[Any]] = {}
        with triton.lowering(target):
            for cut in tried:
                lowered = program(*how, case.kernel, cut, target).lower(*arguments(shape, case.kernel))
                compiled[cut] = pool.submit(lowered.compile)
        operands = _operands(case, *how, target)
    wanted, runs, differences = None, {}, {}
    for cut, done in compiled.items():
        try:
            run = done.result()
            out = jax.block_until_ready(run(*operands))
        except Exception as error:  # of a compiler, or of a launch; the others are tried all the same
            yield Row(case, shape.block, cut, (str(error).strip().splitlines() or [type(error).__name__])[0][:200])
            continue
        wanted = out if wanted is None else wanted
        differences[cut] = max(map(_difference, jax.tree.leaves(out), jax.tree.leaves(wanted)))
        if differences[cut] < WRONG:
            runs[cut] = run
        else:
            said = f"wrong by {differences[cut]:.0e}"
            yield Row(case, shape.block, cut, said, difference=differences[cut])
    for cut, taken in zip(runs, _in_turn([lambda run=run: run(*operands) for run in runs.values()]), strict=True):
        yield Row(case, shape.block, cut, "", taken, differences[cut])


def _operands(case: Case, implementation: str, shape: Shape, target: Target) -> list[jax.Array]:
    """Random ones, on the device; for a backward pass with the results of the forward pass."""
    like = arguments(shape, case.kernel)
    keys = iter(jax.random.split(jax.random.key(0), 8))
    if shape.lists.q2k is None:
        n = shape.lists.q2k_count.shape[2]
        draw = jax.jit(lambda key: lax.top_k(jax.random.uniform(key, (1, shape.heads, n, n)), shape.seen)[1])
        q2k = draw(next(keys))
    else:
        q2k = jnp.asarray(shape.lists.q2k)
    normal = lambda x: jax.jit(lambda key: jax.random.normal(key, x.shape, x.dtype))(next(keys))  # noqa: E731
    q, k, v = map(normal, like[1:4])
    if case.kernel == "forward":
        return [q2k, q, k, v]
    cut = candidates(implementation, "forward", shape.block, target.kind)[0]
    out, lse = program(implementation, shape, "forward", cut, target)(q2k, q, k, v)
    return [q2k, q, k, v, out, lse, normal(like[6]), jnp.zeros_like(lse)]


@jax.jit
def _difference(x: jax.Array, y: jax.Array) -> jax.Array:
    x, y = (jnp.where(jnp.isneginf(z), 0, z.astype(jnp.float32)) for z in (x, y))
    return jnp.linalg.norm((x - y).ravel()) / jnp.maximum(jnp.linalg.norm(y.ravel()), 1e-30)


def _in_turn(runs: Sequence[Callable[[], Any]], rounds: int = 3, long: float = 0.02) -> list[float]:
    """Seconds of one call of each: the median of rounds, in each of which calls are queued for as `long` as that."""
    counts, taken = [], [[] for _ in runs]
    for run in runs:
        began = time.perf_counter()
        jax.block_until_ready(run())
        counts.append(int(np.clip(long / (time.perf_counter() - began), 1, 20)))
    for _ in range(rounds):
        for run, count, mine in zip(runs, counts, taken, strict=True):
            began, out = time.perf_counter(), None
            for _ in range(count):
                out = run()
            jax.block_until_ready(out)
            mine.append((time.perf_counter() - began) / count)
    return [statistics.median(each) for each in taken]
