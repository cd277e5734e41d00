"""Parts of `first_gpu_hour.py` that no other benchmark has; each is a process, and writes what it finds as it finds it.

    python benchmarks/first_gpu_parts.py step dense --output=out.json [--tiny]

B batch · L, S tokens of queries and keys · N heads · K head dim · V places in a block.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from machine import describe
from timing import in_turn, short

from jvdiff import kernels
from jvdiff.errors import SetupError
from jvdiff.kernels import block_sparse
from jvdiff.kernels.block_sparse import mosaic_gpu, triton
from jvdiff.kernels.patterns import read as read_pattern
from jvdiff.models import wan
from jvdiff.models.text import umt5
from jvdiff.models.wan import attention as text_attention
from jvdiff.runtime.files import atomic
from jvdiff.runtime.target import Target, here

# As the interpreted tests have them: B, query and key blocks, N, K, V, places in a row.
BLOCKS = {
    "one warpgroup": (2, 2, 3, 2, 128, 64, 3),
    "two warpgroups": (1, 2, 3, 1, 128, 128, 2),
    "two warpgroups, several parts": (1, 1, 2, 2, 64, 384, 2),
    "one warpgroup, several parts": (1, 2, 1, 1, 64, 192, 1),
    "a whole GPU": (1, 48, 48, 12, 128, 384, 20),
}
TILES = {  # ragged, read where they lie: the pattern, its grid
    "STA": ("sliding_tile:2x8x8:1x1x1", (3, 8, 12)),
    "VSA": ("video_sparse:3x3x8:0.5", (3, 3, 24)),
    "STA of 384": ("sliding_tile:6x8x8:3x3x3", (9, 14, 20)),
}
BOUNDS = {"out": 6e-3, "lse": 2e-3, "gradients": 1e-2}  # relative, of bfloat16, as in the tests
TINY: dict[str, Any] = dict(
    num_attention_heads=2, attention_head_dim=12, freq_dim=16, ffn_dim=32, num_layers=2, text_dim=16
)


class Told:
    """What a part has found, in a file that is whole at any time."""

    def __init__(self, path: Path):
        self.path, self.found = path, {}

    def __call__(self, **found: Any) -> None:
        self.found |= found
        with atomic(self.path) as part:
            part.write_text(json.dumps(self.found, indent=2) + "\n")


def machine(tell: Told, tiny: bool) -> None:
    """Device, driver, versions and the commit; SetupError where there is no GPU and it is no rehearsal."""
    target = here()
    if target.platform != "gpu" and not tiny:
        raise SetupError(f"JAX finds no GPU here, its backend is {target.platform!r}; --rehearse runs anywhere.")
    names = ("jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")
    found = {name: _version(name) for name in names}
    asked = ["nvidia-smi", "--query-gpu=driver_version,memory.total,clocks.max.sm,power.limit", "--format=csv,noheader"]
    said = _output(asked).splitlines()
    driver, *rest = (said[0] if said else "").split(", ")
    commit = _output(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]).strip()
    capability = target.capability and ".".join(map(str, target.capability))
    tell(**describe(), driver=driver or "none", gpu=rest, compute_capability=capability, devices=target.devices)
    tell(versions={name: version for name, version in found.items() if version}, commit=commit or "unknown")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(words: Sequence[str]) -> str:
    """What a command prints; nothing where there is none, or it fails."""
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


# ------------------------------------------------------------------------------------------------------- right results


def right(tell: Told, tiny: bool, name: str) -> None:
    """Forward and backward passes of a kernel against the reference in float32, and twice for the same bits."""
    if tiny and name == "mosaic_gpu" and jax.__version_info__ >= (0, 11):
        interpreter: Any = importlib.import_module("jax.experimental.pallas.mosaic_gpu")
        mosaic_gpu.INTERPRET = interpreter.InterpretGPUParams()
    triton.INTERPRET = tiny
    cases = _dense_cases(tiny) if name == "cudnn" else _sparse_cases(name, tiny)
    rows, wrong = {}, []
    for label, f, reference, shapes in cases:
        try:
            rows[label] = _compared(f, reference, shapes)
        except NotImplementedError as error:
            rows[label] = str(error)
        if isinstance(rows[label], dict) and not rows[label]["right"]:
            wrong.append(label)
        tell(cases=rows, wrong=wrong, tried=len(rows))
    if wrong:
        raise SystemExit(f"{name} is wrong: {', '.join(wrong)}")


def _sparse_cases(name: str, tiny: bool) -> Any:
    """(label, function, reference, shapes of q, k, v) of what the block-sparse kernels are asked for."""
    rng = np.random.default_rng(0)
    for label, (B, Nq, Nkv, N, K, block, places) in list(BLOCKS.items())[: 1 if tiny else None]:
        rows = [rng.permutation(Nkv)[:places] for _ in range(B * N * Nq)]
        q2k = np.stack(rows).reshape(B, N, Nq, places).astype(np.int32)
        count = rng.integers(0, places + 1, (B, N, Nq)).astype(np.int32)
        sizes = rng.integers(1, block + 1, Nkv).astype(np.int32)
        how = dict(block=block, return_lse=True)
        f, reference = (
            partial(_listed, (q2k, count, sizes), dict(how, implementation=each)) for each in (name, "reference")
        )
        yield label, f, reference, [(B, n * block, N, K) for n in (Nq, Nkv, Nkv)]
    for label, (text, grid) in list(TILES.items())[: 0 if tiny else None]:
        pattern = read_pattern(text, 2)
        f, reference = (
            lambda q, k, v, each=each, pattern=pattern, grid=grid: (
                pattern.attend(q, k, v, None, grid=grid, implementation=each),
            )
            for each in (name, "reference")
        )
        yield label, f, reference, [(1, int(np.prod(grid)), 2, 128)] * 3


def _listed(lists: Any, how: Any, q: Any, k: Any, v: Any) -> Any:
    return block_sparse.block_sparse_attention(q, k, v, *lists, **how)


def _dense(how: Any, q: Any, k: Any, v: Any) -> Any:
    found = kernels.attention(q, k, v, **how)
    return found if how["return_lse"] else (found,)


def _dense_cases(tiny: bool) -> Any:
    """The same of cuDNN's attention, in a rehearsal of XLA's: itself, to text, and to the keys that count."""
    name = "xla" if tiny else "cudnn"
    sizes = {"square": (333, 333), "to text": (1560, 65), "keys that count": (256, 512), "log-sum-exp": (333, 77)}
    for label, (L, S) in sizes.items():
        how = dict(kv_length=300 if label == "keys that count" else None, return_lse=label == "log-sum-exp")
        f, reference = (partial(_dense, how | {"implementation": each}) for each in (name, "reference"))
        yield label, f, reference, [(1, rows // (8 if tiny else 1), 2, 128) for rows in (L, S, S)]
        if tiny:
            return


def _compared(f: Callable[..., Any], reference: Callable[..., Any], shapes: Any) -> dict[str, Any]:
    """Relative differences of results and gradients, and whether they are within bounds and the same bits again."""
    keys = jax.random.split(jax.random.key(1), 4)
    operands = [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=False)]
    dout = jax.random.normal(keys[3], shapes[0], jnp.bfloat16)

    def both(f: Callable[..., Any], operands: Any) -> Any:
        out, pull = jax.vjp(f, *operands)
        return out, pull((dout.astype(out[0].dtype), *map(jnp.ones_like, out[1:])))

    run = jax.jit(partial(both, f))
    (out, grads), again = run(operands), run(operands)
    wanted, wanted_grads = jax.jit(partial(both, reference))([x.astype(jnp.float32) for x in operands])
    found = {"out": _difference(out[0], wanted[0])} | ({"lse": _difference(out[1], wanted[1])} if out[1:] else {})
    found["gradients"] = max(map(_difference, grads, wanted_grads))
    equal = jax.tree.map(lambda x, y: bool(jnp.array_equal(x, y, equal_nan=True)), (out, grads), again)
    same = all(jax.tree.leaves(equal))
    good = all(found[key] <= BOUNDS[key] for key in found)
    return {key: float(f"{value:.2g}") for key, value in found.items()} | {"same bits": same, "right": good and same}


def _difference(x: Any, y: Any) -> float:
    x, y = (np.where(np.isneginf(z), 0, z) for z in (np.asarray(x, np.float32), np.asarray(y, np.float32)))
    return float(np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30))


# --------------------------------------------------------------------------------------------------------------- times


def seconds_of(run: Callable[[], Any], repeats: int = 3) -> tuple[float, float]:
    """(seconds of the first run, with what it compiles; the median of the others)."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    first = time.perf_counter() - began
    return first, statistics.median(in_turn([lambda: jax.block_until_ready(run())], repeats)[0])


TEXT_ROWS = 64  # of a prompt
# What a step gains by each of three changes is found out without it.
WITHOUT = {
    "GELU in the product's kernel": lambda: mock.patch.object(Target, "epilogues", False),
    "the barrier between norm and rotation": lambda: mock.patch.object(lax, "optimization_barrier", lambda x: x),
    "attention to the text's own rows": lambda: mock.patch.object(
        text_attention, "_attend_merged", text_attention._attend_padded
    ),
}


def without(tell: Told, tiny: bool) -> None:
    """`step` of dense attention, without each of three changes in turn."""
    for name, left_out in WITHOUT.items():
        with left_out():
            tell(**{name: _step(tiny, "dense")})


def step(tell: Told, tiny: bool, pattern: str) -> None:
    """A step of Wan 1.3B at 480p, 81 frames, both branches in turn, random weights, a prompt of 64 rows."""
    began = time.perf_counter()
    tell(seconds=_step(tiny, pattern))
    tell(all_s=short(time.perf_counter() - began))


def _step(tiny: bool, pattern: str) -> float:
    import compile_gpu

    cfg, height, width = compile_gpu.STEPS["Wan 1.3B 480p"]
    if tiny:
        cfg, height, width = wan.DiTConfig(in_channels=4, out_channels=4, **TINY), 32, 32
        pattern = {"d": "dense", "s": "sliding_tile:6x2x2:1x1x1", "v": "video_sparse:6x2x2:0.5"}[pattern[0]]
    pattern_of = read_pattern(pattern, cfg.num_attention_heads)
    return short(compile_gpu.measure(cfg, height, width, pattern_of, TEXT_ROWS))


def decode(tell: Told, tiny: bool) -> None:
    """81 frames at 480x832, random weights and latents, in each way: frames to the host one latent frame behind."""
    import vae_precision

    frames, height, width = (3, 4, 4) if tiny else (21, 60, 104)
    cfg = wan.VAEConfig(base_dim=4) if tiny else wan.WAN_2_1_VAE
    params = jax.tree.map(jnp.asarray, vae_precision.random_params(cfg, 0))
    latents = jax.random.normal(jax.random.key(0), (1, frames, height, width, cfg.z_dim))
    for name in ("bf16", "tf32", "exact"):
        program = jax.jit(_pixels, static_argnums=1, static_argnames="arithmetic", donate_argnums=3)

        def clip(program: Any = program, name: str = name) -> None:
            cache, before = None, None
            for t in range(frames):
                pixels, cache = program(params, cfg, latents[:, t : t + 1], cache, arithmetic=name)
                before, _ = pixels, before is None or np.asarray(before)
            np.asarray(before)

        first, seconds = seconds_of(clip, 2)
        tell(**{name: {"seconds": short(seconds), "first_s": short(first)}})
    if not tiny:  # here TF32 is computed, not emulated
        tell(distances=vae_precision.random_wide(0, 64)["pairs"])


def _pixels(params: Any, cfg: Any, latents: Any, cache: Any, arithmetic: str) -> Any:
    frames, cache = wan.decode_chunk(params, cfg, latents, cache, arithmetic=arithmetic)
    return ((frames + 1) * 127.5).astype(jnp.uint8), cache


def side_by_side(tell: Told, tiny: bool) -> None:
    """Dense attention forwards: cuDNN, the block-sparse kernel with every block listed, and flash-attn3-jax."""
    import attention

    if not importlib.util.find_spec("flash_attn3_jax"):
        tell(flash_attn3_jax="not installed: pip install flash-attn3-jax (Hopper, head dim 128) and run this again")
    shapes = ((32_760, 12), (75_600, 12), (32_760, 40), (75_600, 40))
    grids = {32_760: (21, 30, 52), 75_600: (21, 45, 80)}
    every = [attention.Shape(f"{L} tokens, {N} heads", grids[L], N) for L, N in shapes]
    every = [attention.Shape("tiny", (3, 8, 8), 2, 64)] if tiny else every
    rows: list[Any] = []
    for shape in every:
        case = attention.problem(shape, "dense", jnp.float32 if tiny else jnp.bfloat16)
        said: list[str] = []
        rows += attention.measure(case, "forward", case, 3, None, 1e15, said.append)
        tell(rows=[{k: v for k, v in row.items() if k not in ("all_ms", "share_of_peak")} for row in rows])
        tell(notes=[*tell.found.get("notes", []), *said])


def top_k(tell: Told, tiny: bool) -> None:
    """VSA's choice of tiles alone, by search and by XLA's sort, and whether they choose the same."""
    from jvdiff.kernels.best import chosen

    sizes = {"1.3B 480p": (12, 624, 63), "14B 720p": (40, 1440, 144)}
    for name, (N, n, k) in ({"tiny": (2, 70, 7)} if tiny else sizes).items():
        scores = jax.random.normal(jax.random.key(0), (1, N, n, n))
        runs = {"search": jax.jit(lambda x, k=k: chosen(x, k)), "sort": jax.jit(lambda x, k=k: lax.top_k(x, k)[1])}
        same = bool(jnp.array_equal(runs["search"](scores), jnp.sort(runs["sort"](scores), axis=-1)))
        ms = {each: short(1e3 * seconds_of(partial(run, scores), 20)[1]) for each, run in runs.items()}
        tell(**{name: ms | {"the same": same}})


def cold(tell: Told, tiny: bool) -> None:
    """Seconds to compile the programs of a clip of Wan 1.3B at 480p, all at once, nothing kept, autotuned here."""
    jax.config.update("jax_enable_compilation_cache", False)
    like = jax.ShapeDtypeStruct
    dit = wan.DiTConfig(in_channels=4, out_channels=4, **TINY) if tiny else wan.WAN_2_1_T2V_1_3B
    vae = wan.VAEConfig(base_dim=4) if tiny else wan.WAN_2_1_VAE
    words = umt5.Config(vocab_size=64, d_model=16, d_ff=32, num_layers=1, num_heads=2) if tiny else umt5.UMT5_XXL
    T, H, W = (3, 4, 4) if tiny else (21, 60, 104)
    S = 16 if tiny else 512
    half = jnp.bfloat16
    weights = wan.abstract_params(dit, half), wan.abstract_params(vae), umt5.abstract_params(words, half)
    chunk = like((1, 1, H, W, vae.z_dim), jnp.float32)
    pixels = partial(_pixels, arithmetic="bf16")
    after = jax.eval_shape(lambda params, z: pixels(params, vae, z, None)[1], weights[1], chunk)
    jobs: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "text": (
            lambda params, ids, mask: umt5.encode(params, words, ids, mask, dtype=jnp.bfloat16),
            (weights[2], like((2, S), jnp.int32), like((2, S), jnp.int32)),
        ),
        "denoise": (
            lambda params, x, t, text: wan.velocity(params, dit, x, t, text),
            (
                weights[0],
                like((1, T, H, W, dit.in_channels), jnp.float32),
                like((1,), jnp.float32),
                like((1, S, dit.text_dim), jnp.bfloat16),
            ),
        ),
        "decode first": (lambda params, z: pixels(params, vae, z, None), (weights[1], chunk)),
        "decode next": (lambda params, z, cache: pixels(params, vae, z, cache), (weights[1], chunk, after)),
    }

    def compile_one(name: str) -> None:
        began, (f, operands) = time.perf_counter(), jobs[name]
        jax.jit(f).lower(*operands).compile()
        tell(**{name: short(time.perf_counter() - began)})

    began = time.perf_counter()
    with ThreadPoolExecutor(len(jobs)) as pool:
        list(pool.map(compile_one, jobs))
    tell(all_s=short(time.perf_counter() - began))


FUNCTIONS = {f.__name__: f for f in (machine, right, step, without, decode, side_by_side, top_k, cold)}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=FUNCTIONS)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(words)
    FUNCTIONS[args.part](Told(args.output), args.tiny, *args.words)
    return 0


if __name__ == "__main__":
    sys.exit(main())
