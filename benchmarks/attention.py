"""How fast is attention, dense and sparse, beside its rivals? One machine, one process, runs in turn.

    python benchmarks/attention.py                # on the CPU: XLA against dense, float32, up to 8,192 tokens
    python benchmarks/attention.py --device gpu   # the three production shapes in bfloat16

A row is one implementation, forward or backward. Its time has everything that the public function does to operands in
raster order: permutations, padding, pooling, top-k and lists; VSA's its coarse branch, too. Only the products of kept
query-key pairs count as work: 4 FLOPs per pair and channel forward, 10 backward. `x dense` is how many times faster
than our dense attention in the same run (cuDNN's on a GPU), `x SDPA` than PyTorch's, `x rival` than the fastest rival
at the same mask.
`difference` is the relative L2 distance to float64 of the results for two tiles of one head, and of the gradients of
a loss that sees those.

Dense rows of a GPU are cuDNN's, those of the block-sparse kernel with every block listed, and flash-attn3-jax's. Rivals
under PyTorch, where they are installed: scaled dot product attention for the dense rows, FlexAttention with a
block mask and the Triton kernel of fastvideo-kernel for the sparse ones. The last two get operands in padded tile order
and finished lists, and have no coarse branch: what they leave out is timed on our side.

B batch · L tokens · N heads · K head dim · V tokens of a tile · n tiles · M places in a row of a list · r some tokens
"""

import argparse
import gc
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from machine import describe
from timing import RESULTS, in_turn, matmul_peak, short, write

from jvdiff import kernels
from jvdiff.errors import JvdiffError, SetupError
from jvdiff.kernels import Dense, SlidingTile, VideoSparse, block_sparse, tiles
from jvdiff.kernels.block_sparse import Lists
from jvdiff.kernels.dense import blocks
from jvdiff.kernels.patterns import read as read_pattern
from jvdiff.kernels.sliding_tile import check_windows, window_lists
from jvdiff.runtime.target import here

DIRECTIONS = {"forward": 4.0, "backward": 10.0}  # FLOPs of one query-key pair and channel
WRONG = 0.05  # a relative error that no rounding explains
FLASH = "flash-attn3-jax"  # FlashAttention-3 under JAX, beside cuDNN in the dense rows
_DENSE_TILE = (4, 8, 8)  # dense attention has no tiles; its results are checked in such ones


@dataclass(frozen=True)
class Shape:
    name: str
    grid: tiles.Grid
    heads: int
    head_dim: int = 128


PRODUCTION = (
    (
        Shape("Wan 1.3B 480p", (21, 30, 52), 12),
        Shape("Wan 14B 720p", (21, 45, 80), 40),
        Shape("HunyuanVideo", (30, 48, 80), 24),
    ),
    (
        "dense",
        "sliding_tile:6x8x8:3x3x3",
        "sliding_tile:6x8x8:5x5x5",
        "video_sparse:4x4x4:0.8",
        "video_sparse:4x4x4:0.9",
    ),
)
CPU = (
    (Shape("2k tokens", (8, 16, 16), 2), Shape("8k tokens", (8, 32, 32), 2)),
    (
        "dense",
        "sliding_tile:4x4x4:3x3x3",
        "sliding_tile:4x4x4:5x5x5",
        "video_sparse:4x4x4:0.5",
        "video_sparse:4x4x4:0.8",
        "video_sparse:4x4x4:0.9",
    ),
)
QUICK = (
    (Shape("quick", (3, 8, 8), 2, 64),),
    ("dense", "sliding_tile:2x4x4:1x1x1", "video_sparse:2x4x4:0.5"),
)


# ------------------------------------------------------------------------------------------------- what is computed


@dataclass(frozen=True)
class Problem:
    """One shape under one pattern, its operands and what should come out.

    shape: of the video
    name: of the pattern
    pattern: which tokens see each other
    operands: q, k, v and, for VSA, gate, [1,L,N,K]
    dout: [1,L,N,K], the cotangent that is timed; the checked one is zero but for the checked tiles
    place: [L], where each token lies in padded tile order
    lists: of the tiles, numpy
    """

    shape: Shape
    name: str
    pattern: Dense | SlidingTile | VideoSparse
    operands: tuple[jax.Array, ...]
    dout: jax.Array
    place: np.ndarray
    lists: Lists

    @property
    def block(self) -> int:
        return int(np.prod(tile_of(self.pattern)))

    @property
    def head(self) -> int:
        """The head that is checked."""
        return self.shape.heads // 2

    @property
    def rows(self) -> list[np.ndarray]:
        """The tokens of the checked tiles: one in the middle, and the last one."""
        ids, n = self.place // self.block, self.lists.kv_sizes.size
        return [np.flatnonzero(ids == b) for b in sorted({n // 2, n - 1})]

    @property
    def pairs(self) -> float:
        """Kept query-key pairs of all heads."""
        sizes = self.lists.kv_sizes.astype(np.float64)
        counted = np.arange(self.lists.q2k.shape[-1]) < self.lists.q2k_count[..., None]
        keys = (sizes[self.lists.q2k] * counted).sum(-1)
        return float((keys * sizes).sum()) * self.shape.heads / self.lists.q2k.shape[1]

    def attend(self, implementation: str | None) -> Callable[..., jax.Array]:
        """The public function on the operands."""
        pattern, common = self.pattern, dict[str, Any](implementation=implementation)
        if implementation == FLASH:
            from flash_attn3_jax import flash_mha  # pyright: ignore[reportMissingImports]

            return flash_mha
        if isinstance(pattern, Dense):
            # `blocks` is there for the log-sum-exp, and asked for it.
            lse = implementation == "blocks"
            attend = lambda q, k, v: kernels.attention(q, k, v, return_lse=lse, **common)  # noqa: E731
            return lambda q, k, v: attend(q, k, v)[0] if lse else attend(q, k, v)
        common |= {"grid": self.shape.grid, "tile": pattern.tile}
        if isinstance(pattern, SlidingTile):
            return lambda q, k, v: kernels.sliding_tile_attention(q, k, v, window=pattern.window, **common)
        return lambda q, k, v, gate: kernels.video_sparse_attention(q, k, v, gate, sparsity=pattern.sparsity, **common)


def tile_of(pattern: Dense | SlidingTile | VideoSparse) -> tiles.Grid:
    """The pattern's tile."""
    return _DENSE_TILE if isinstance(pattern, Dense) else pattern.tile


def problem(shape: Shape, name: str, dtype: Any) -> Problem:
    """Random operands; `name` as in `jvdiff.kernels.patterns.read`."""
    pattern: Any = read_pattern(name, shape.heads)
    tile = tile_of(pattern)
    sizes = tiles.variable_block_sizes(shape.grid, tile)
    slots = tiles.non_pad_index(sizes, int(np.prod(tile)))
    place = slots[tiles.reverse_partition_indices(shape.grid, tile)]
    full = (1, int(np.prod(shape.grid)), shape.heads, shape.head_dim)
    keys = jax.random.split(jax.random.key(0), 5)
    draw = jax.jit(lambda key: jax.random.normal(key, full, dtype))
    q, k, v, gate, dout = (draw(key) for key in keys)
    operands = (q, k, v, gate) if isinstance(pattern, VideoSparse) else (q, k, v)
    q2k = key_tiles(shape, pattern, q, k, place // int(np.prod(tile)), sizes)
    count = np.full(q2k.shape[:3], q2k.shape[3], np.int32)
    return Problem(shape, name, pattern, operands, dout, place, Lists(q2k, count, sizes.astype(np.int32)))


def key_tiles(
    shape: Shape, pattern: Dense | SlidingTile | VideoSparse, q: Any, k: Any, ids: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
    """int32 [1,N or 1,n,M]: the tiles that each tile sees. For VSA chosen here anew, from the tile `ids` of tokens."""
    n = sizes.size
    if isinstance(pattern, Dense):
        return np.broadcast_to(np.arange(n, dtype=np.int32), (1, 1, n, n))
    if isinstance(pattern, SlidingTile):
        return window_lists(tiles.counts(shape.grid, pattern.tile), check_windows(pattern.window, shape.heads))[0]

    @jax.jit
    def choose(q: jax.Array, k: jax.Array) -> jax.Array:
        q, k = (
            jax.ops.segment_sum(x[0].astype(jnp.float32), ids, n) / sizes.astype(np.float32)[:, None, None]
            for x in (q, k)
        )
        scores = jnp.einsum("ink,jnk->nij", q, k, precision=lax.Precision.HIGHEST)
        return lax.top_k(scores, tiles.top_k_count(pattern.sparsity, n))[1]

    return np.asarray(choose(q, k))[None]


def expected(problem: Problem, coarse: bool) -> tuple[np.ndarray, list[np.ndarray]]:
    """(out of the checked rows [r,K], [dq [r,K], dk [L,K], dv [L,K]]) in float64, of the checked head."""
    n, ids, scale = problem.lists.kv_sizes.size, problem.place // problem.block, problem.shape.head_dim**-0.5
    sizes = problem.lists.kv_sizes.astype(np.float64)[:, None]
    with jax.enable_x64(True):
        head = lambda x: np.asarray(np.asarray(x)[0, :, problem.head], np.float64)  # noqa: E731
        operands, dout = [head(x) for x in problem.operands], head(problem.dout)

        def tile(rows: np.ndarray, q: Any, k: Any, v: Any, gate: Any = None) -> Any:
            b = ids[rows[0]]
            heads = problem.lists.q2k[0]
            seen = np.isin(ids, heads[problem.head % heads.shape[0], b])
            logits = jnp.where(seen[None], q[rows] @ k.T * scale, -jnp.inf)
            out = jax.nn.softmax(logits, axis=-1) @ v
            if gate is not None and coarse:
                mean = lambda x: jax.ops.segment_sum(x, ids, n) / sizes  # noqa: E731
                weights = jax.nn.softmax(mean(q)[b] @ mean(k).T * scale)
                out += (weights @ mean(v))[None] * gate[rows]
            return out

        @jax.jit
        def checked(operands: Any, dout: Any) -> Any:
            rows = np.concatenate(problem.rows)
            out, pull = jax.vjp(lambda *x: jnp.concatenate([tile(r, *x) for r in problem.rows]), *operands)
            dq, dk, dv, *_ = pull(dout[rows])
            return out, [dq[rows], dk, dv]

        return jax.tree.map(np.asarray, checked(operands, dout))


# ----------------------------------------------------------------------------------------------------- who computes


@dataclass(frozen=True)
class Contestant:
    """One implementation at work.

    run: starts the work once, returns something to `wait` for
    wait: for what `run` returned
    result: [L,K] arrays of the checked head: out, or dq, dk and dv for the checked cotangent
    compile: seconds that compiling took; None: not compiled
    coarse: whether the coarse branch of VSA is part of the work
    """

    run: Callable[[], Any]
    wait: Callable[[Any], Any]
    result: Callable[[], list[np.ndarray]]
    compile: float | None = None
    coarse: bool = False


def ours(problem: Problem, implementation: str, direction: str) -> Contestant:
    """The public function, compiled."""
    f, operands = problem.attend(implementation), problem.operands
    began = time.perf_counter()
    coarse = isinstance(problem.pattern, VideoSparse)
    head = lambda x: np.asarray(x[0, :, problem.head], np.float64)  # noqa: E731
    if direction == "forward":
        forward = jax.jit(f).lower(*operands).compile()
        took = time.perf_counter() - began
        return Contestant(
            lambda: forward(*operands),
            jax.block_until_ready,
            lambda: [head(forward(*operands))],
            took,
            coarse,
        )
    pull = jax.jit(lambda *x: jax.vjp(f, *x)[1])(*operands)
    backward = jax.jit(lambda pull, dout: pull(dout)).lower(pull, problem.dout).compile()
    took = time.perf_counter() - began
    return Contestant(
        lambda: backward(pull, problem.dout),
        jax.block_until_ready,
        lambda: [head(x) for x in backward(pull, _only(problem.dout, problem.rows))[:3]],
        took,
        coarse,
    )


def _only(dout: jax.Array, rows: Sequence[np.ndarray]) -> jax.Array:
    """dout, zero but for these tokens."""
    kept = np.zeros(dout.shape[1], bool)
    kept[np.concatenate(rows)] = True
    return jnp.where(kept[None, :, None, None], dout, 0)


def implementations(problem: Problem, gpu: bool) -> Iterator[tuple[str, str | None]]:
    """(name, why it cannot run here or None) of ours to be timed."""
    if isinstance(problem.pattern, Dense):
        q = problem.operands[0]
        yield kernels.choose(q, q, q), None
        if gpu:
            yield "blocks", blocks.unsupported(q, q, q, True, here())
            yield FLASH, None if _installed(FLASH) else "it is not installed: pip install flash-attn3-jax"
        return
    slots = (1, problem.block * problem.lists.kv_sizes.size, problem.shape.heads, problem.shape.head_dim)
    x = jax.ShapeDtypeStruct(slots, problem.dout.dtype)
    for name in ("mosaic_gpu", "triton") if gpu else ("xla",):
        module = block_sparse.IMPLEMENTATIONS[name]
        yield name, module.unsupported(x, x, x, problem.block) or module.unavailable(here())


# ----------------------------------------------------------------------------------------------------------- rivals


def sdpa(problem: Problem, direction: str, device: str) -> Contestant:
    """PyTorch's own dense attention."""
    import torch

    attend = torch.nn.functional.scaled_dot_product_attention
    q, k, v = (_torch(x, device).transpose(1, 2).contiguous() for x in problem.operands[:3])
    return _torch_contestant(problem, direction, attend, (q, k, v), np.arange(q.shape[2]))


def flex(problem: Problem, direction: str, device: str) -> Contestant:
    """FlexAttention, compiled, with the block mask of the same tiles in physical blocks of up to 128 tokens."""
    import torch
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    if device == "cpu" and direction == "backward":
        raise SetupError("it has no backward pass on CPUs.")
    block = 128 if problem.block % 128 == 0 else problem.block
    lists = block_sparse.split(problem.lists, problem.block, block, block)
    q2k, count, size = (torch.from_numpy(np.array(x)).to(device) for x in (lists.q2k, lists.q2k_count, lists.kv_sizes))
    n = size.numel()
    place = torch.arange(q2k.shape[-1], device=device)
    target = torch.where(place < count[..., None], q2k, n).long()  # what does not count goes to a column of its own
    seen = torch.zeros(*q2k.shape[:3], n + 1, dtype=torch.bool, device=device).scatter_(3, target, True)[..., :n]

    def ordered(chosen: Any) -> tuple[Any, Any]:
        return chosen.sum(-1, dtype=torch.int32), torch.argsort(~chosen, dim=-1, stable=True).to(torch.int32)

    valid = (torch.arange(block, device=device) < size[:, None]).reshape(-1)
    mask = BlockMask.from_kv_blocks(
        *ordered(seen & (size < block)),
        *ordered(seen & (size == block)),
        BLOCK_SIZE=block,
        mask_mod=lambda b, h, i, j: valid[j],
    )
    sizes = (
        "BLOCK_M",
        "BLOCK_N",
        "BLOCK_M1",
        "BLOCK_N1",
        "BLOCK_M2",
        "BLOCK_N2",
    )  # by default up to 128, too large for 64
    options: Any = dict.fromkeys(sizes, block) if block < 128 and device == "cuda" else None
    torch.compiler.reset()  # beyond a number of shapes it would give up compiling, and without it ignores the blocks
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    operands = _tiled(problem, device)
    attend = lambda q, k, v: compiled(q, k, v, block_mask=mask, kernel_options=options)  # noqa: E731
    return _torch_contestant(problem, direction, attend, operands, problem.place)


def fastvideo(problem: Problem, direction: str, device: str) -> Contestant:
    """fastvideo-kernel's Triton kernel, which knows blocks of 64 tokens."""
    import torch

    os.environ["FASTVIDEO_VSA_TRITON"] = "1"
    from fastvideo_kernel.block_sparse_attn import block_sparse_attn_from_indices

    lists = block_sparse.split(problem.lists, problem.block, 64, 64)
    rows = (1, problem.shape.heads)
    q2k, count = (np.broadcast_to(x, (*rows, *x.shape[2:])) for x in lists[:2])
    arrays: Any = [torch.from_numpy(np.array(x)).to(device) for x in (q2k, count, lists.kv_sizes)]
    attend = lambda q, k, v: block_sparse_attn_from_indices(q, k, v, *arrays)[0]  # noqa: E731
    return _torch_contestant(problem, direction, attend, _tiled(problem, device), problem.place)


def _tiled(problem: Problem, device: str) -> tuple[Any, ...]:
    """q, k, v as torch's [1,N,n*V,K]."""
    return tuple(_in_tiles(problem, _torch(x, device)) for x in problem.operands[:3])


def _in_tiles(problem: Problem, x: Any) -> Any:
    import torch

    slots = problem.block * problem.lists.kv_sizes.size
    padded = torch.zeros(1, slots, *x.shape[2:], dtype=x.dtype, device=x.device)
    padded[:, torch.from_numpy(problem.place).to(x.device)] = x
    return padded.transpose(1, 2).contiguous()


def _torch(x: jax.Array, device: str) -> Any:
    import torch

    if device == "cuda":
        return torch.from_dlpack(x)
    return torch.from_numpy(np.array(x, np.float32)).to(getattr(torch, x.dtype.name))


def _torch_contestant(
    problem: Problem, direction: str, attend: Any, operands: tuple[Any, ...], place: np.ndarray
) -> Contestant:
    """`attend(q, k, v)` on torch's [1,N,slots,K]; `place`: the slot of each token."""
    import torch

    device = operands[0].device.type
    head = lambda x: x[0, problem.head].double().cpu().numpy()[place]  # noqa: E731
    wait = (lambda out: torch.cuda.synchronize()) if device == "cuda" else (lambda out: None)
    began = time.perf_counter()
    if direction == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return attend(*operands)

        wait(forward())
        return Contestant(forward, wait, lambda: [head(forward())], time.perf_counter() - began)
    operands = tuple(x.detach().requires_grad_() for x in operands)
    out = attend(*operands)

    def cotangent(dout: jax.Array) -> Any:
        x = _torch(dout, device)
        return x.transpose(1, 2).contiguous() if out.shape[2] == x.shape[1] else _in_tiles(problem, x)

    dout = cotangent(problem.dout)
    backward = lambda dout: torch.autograd.grad(out, operands, dout, retain_graph=True)  # noqa: E731
    wait(backward(dout))
    took = time.perf_counter() - began
    checked = lambda: [head(x) for x in backward(cotangent(_only(problem.dout, problem.rows)))]  # noqa: E731
    return Contestant(lambda: backward(dout), wait, checked, took)


def rivals(problem: Problem, device: str) -> list[tuple[str, Callable[[Problem, str, str], Contestant]]]:
    """Those at the same mask, by name."""
    if isinstance(problem.pattern, Dense):
        return [("torch sdpa", sdpa)]
    return [("flex attention", flex)] + ([("fastvideo triton", fastvideo)] if device == "cuda" else [])


# ---------------------------------------------------------------------------------------------------------- measure


def measure(
    problem: Problem,
    direction: str,
    dense: Problem,
    repeats: int,
    rival: str | None,
    peak: float,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """The rows of one shape, pattern and direction; `rival`: torch's device, or None."""
    gpu = jax.default_backend() == "gpu"
    own, others = {}, {}
    for name, reason in implementations(problem, gpu):
        if reason:
            say(f"{problem.shape.name}, {problem.name}: {name} cannot run here: {reason}")
        else:
            own[name] = partial(ours, problem, name, direction)
    if rival:
        others = {name: partial(make, problem, direction, rival) for name, make in rivals(problem, rival)}
    admitted = admit(problem, direction, own | others, say)
    if not admitted:
        return []
    contestants = {name: contestant for name, (contestant, _) in admitted.items()}
    if not isinstance(problem.pattern, Dense):
        contestants["dense"] = ours(dense, next(implementations(dense, gpu))[0], direction)
        if rival:
            contestants["torch sdpa"] = sdpa(dense, direction, rival)
    runs, times = zip(*map(_repeated, contestants.values()), strict=True)
    taken = {
        name: [s / n for s in each] for name, each, n in zip(contestants, in_turn(runs, repeats), times, strict=True)
    }
    median = {name: statistics.median(each) for name, each in taken.items()}
    baseline = median.get("dense", next(iter(median.values())))
    flops, shape = DIRECTIONS[direction] * problem.pairs * problem.shape.head_dim, problem.shape
    return [
        {
            "shape": shape.name,
            "tokens": int(np.prod(shape.grid)),
            "heads": shape.heads,
            "head_dim": shape.head_dim,
            "pattern": problem.name,
            "direction": direction,
            "implementation": name,
            "ours": name in own and name != FLASH,
            "kept": short(problem.pairs / (float(np.prod(shape.grid)) ** 2 * shape.heads)),
            "ms": short(median[name] * 1e3),
            "tflops_per_s": short(flops / median[name] / 1e12),
            "share_of_peak": short(flops / median[name] / peak),
            "x_dense": short(baseline / median[name]),
            "x_sdpa": short(median["torch sdpa"] / median[name]) if "torch sdpa" in median else None,
            "x_rivals": {r: short(median[r] / median[name]) for r in others if r in median and name in own},
            "difference": float(f"{difference:.1e}"),
            "compile_s": contestant.compile and short(contestant.compile),
            "all_ms": [short(s * 1e3) for s in taken[name]],
        }
        for name, (contestant, difference) in admitted.items()
    ]


def admit(
    problem: Problem, direction: str, makers: dict[str, Callable[[], Contestant]], say: Callable[[str], None]
) -> dict[str, tuple[Contestant, float]]:
    """Those that run and whose result is right, with its error."""
    admitted: dict[str, tuple[Contestant, float]] = {}
    answers: dict[bool, Any] = {}
    rows, what = np.concatenate(problem.rows), f"{problem.shape.name}, {problem.name}, {direction}"
    for name, make in makers.items():
        try:
            contestant = make()
            found = contestant.result()
        except Exception as error:  # one that fails must not cost the rest of a long run; it is said and recorded
            reason = (str(error).strip().splitlines() or [""])[0]
            say(f"{what}: {name} did not run: {type(error).__name__}: {reason:.200}")
            continue
        if contestant.coarse not in answers:
            answers[contestant.coarse] = expected(problem, contestant.coarse)
        out, grads = answers[contestant.coarse]
        wanted, parts = ([out], [found[0][rows]]) if direction == "forward" else (grads, [found[0][rows], *found[1:]])
        difference = max(float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in zip(parts, wanted, strict=True))
        if difference < WRONG:
            admitted[name] = contestant, difference
        else:
            say(f"{what}: {name} is wrong, by {difference:.0e}, and not timed")
    return admitted


def _repeated(contestant: Contestant) -> tuple[Callable[[], Any], int]:
    """A run long enough to be timed, and how many it holds: on a GPU short ones are queued."""
    contestant.wait(contestant.run())
    began = time.perf_counter()
    contestant.wait(contestant.run())
    took = time.perf_counter() - began
    times = int(np.clip(0.05 / took, 1, 50)) if jax.default_backend() == "gpu" else 1

    def run() -> None:
        out = None
        for _ in range(times):
            out = contestant.run()
        contestant.wait(out)

    return run, times


# ----------------------------------------------------------------------------------------------------------- report


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text; factors above 1 mean faster than what they name."""
    lines = [
        f"{'shape':<15}{'pattern':<26}{'':<10}{'implementation':<18}{'kept':>7}{'ms':>10}{'TFLOP/s':>9}{'of peak':>8}"
        f"{'x dense':>9}{'x SDPA':>8}{'x rival':>9}{'difference':>12}"
    ]
    for row in rows:
        rival = f"{min(row['x_rivals'].values()):.2f}" if row["x_rivals"] else "-"
        torch = f"{row['x_sdpa']:.2f}" if row["x_sdpa"] else "-"
        lines.append(
            f"{row['shape']:<15}{row['pattern']:<26}{row['direction']:<10}{row['implementation']:<18}{row['kept']:>7.1%}"
            f"{row['ms']:>10.4g}{row['tflops_per_s']:>9.3g}{row['share_of_peak']:>8.0%}{row['x_dense']:>9.2f}{torch:>8}{rival:>9}"
            f"{row['difference']:>12.0e}"
        )
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "gpu"], default=jax.default_backend())
    parser.add_argument("--only", default="", help="rows whose shape, pattern and direction contain this")
    parser.add_argument("--repeats", type=int, default=7, help="counted runs of each")
    parser.add_argument("--alone", action="store_true", help="do not run the rivals")
    parser.add_argument("--quick", action="store_true", help="a tiny shape and one run, to see that all works")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/attention_DEVICE.json")
    args = parser.parse_args(words)

    gpu = jax.default_backend() == "gpu"
    if args.device == "gpu" and not gpu:
        raise SetupError(f"--device gpu: JAX finds no GPU, its backend is {jax.default_backend()!r}.")
    notes: list[str] = []

    def say(note: str) -> None:
        notes.append(note)
        print(note, file=sys.stderr, flush=True)

    rival = _rival(args, gpu, say)
    dtype = jnp.bfloat16 if gpu else jnp.float32
    peak = matmul_peak(dtype=dtype) if gpu else matmul_peak(512 if args.quick else 2048, 2, dtype)
    shapes, patterns = QUICK if args.quick else PRODUCTION if gpu else CPU
    rows: list[dict[str, Any]] = []
    print(table([]), file=sys.stderr)
    for shape in shapes:
        dense = problem(shape, "dense", dtype)
        for name in patterns:
            todo = [d for d in DIRECTIONS if args.only in f"{shape.name}, {name}, {d}"]
            case = problem(shape, name, dtype) if todo else dense
            for direction in todo:
                new = measure(case, direction, dense, 1 if args.quick else args.repeats, rival, peak, say)
                print("\n".join(table(new).splitlines()[1:]), file=sys.stderr, flush=True)
                rows += new
                gc.collect()
                if rival == "cuda":
                    import torch

                    torch.cuda.empty_cache()
    print(table(rows))
    print(f"one {jnp.dtype(dtype).name} matrix product: {peak / 1e12:.3g} TFLOP/s, the peak above")

    output = args.output or (None if args.quick else RESULTS / f"attention_{args.device}.json")
    if output:
        rivals_at = {name: version(name) for name in ("torch", "fastvideo-kernel") if rival and _installed(name)}
        write(
            output,
            {
                "machine": describe() | rivals_at,
                "dtype": jnp.dtype(dtype).name,
                "matmul_tflops_per_s": short(peak / 1e12),
                "notes": notes,
                "rows": rows,
            },
        )
    return 0


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name.replace("-", "_")) is not None


def _rival(args: argparse.Namespace, gpu: bool, say: Callable[[str], None]) -> str | None:
    """Torch's device, or None where no rival runs."""
    if args.alone:
        return None
    if not _installed("torch"):
        say("torch is not installed: no rivals")
        return None
    import torch

    if gpu and not torch.cuda.is_available():
        say("this torch has no CUDA: no rivals")
        return None
    if not gpu:
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    return "cuda" if gpu else "cpu"


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the rivals need room on the same GPU
    if "--device=cpu" in sys.argv or "cpu" in sys.argv:
        jax.config.update("jax_platforms", "cpu")
    try:
        sys.exit(main())
    except JvdiffError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
