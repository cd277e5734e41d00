"""How far the three ways to decode frames are apart, in dB: exact, tf32 and bf16 (`--vae_decode`).

    python benchmarks/vae_precision.py

Real frames: clips of moving digits that training never saw, through the encoder of checkpoints/digits in float32 and
its decoder in each way. Random wide VAEs: the published width (96, 192, 384) with normal weights in every tap, small
frames, normal latents. Without a GPU TF32 is emulated: operands of every product are rounded to 10 bits of mantissa,
attention's weights apart.

PSNR is 20 log10(peak / root mean square of the difference) over all frames, not clipped. The peak is 2, from -1 to 1,
for real frames, and the range of the exact frames for random VAEs. `levels` is the greatest difference of one pixel, in
steps of 8 bits of that range.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from machine import describe
from timing import RESULTS, write

import jvdiff
from jvdiff.digits import clips as digits
from jvdiff.models import wan
from jvdiff.precision import DECODING
from jvdiff.types import Params

decode = jax.jit(wan.decode, static_argnums=1, static_argnames=("arithmetic", "clip"))


def distances(
    params: Params, cfg: wan.VAEConfig, latents: Any, peak: float | None
) -> tuple[dict[str, Any], np.ndarray]:
    """The distances of each pair of ways, and the exact frames [B,F,Y,X,3]. Latents are not normalised."""
    frames = {name: np.asarray(decode(params, cfg, latents, arithmetic=name, clip=False)) for name in DECODING}
    peak = float(np.ptp(frames["exact"])) if peak is None else peak
    found = {
        f"{one} to {other}": {
            "psnr_db": round(psnr(frames[one], frames[other], peak), 1),
            "levels": round(float(np.abs(frames[one] - frames[other]).max()) / peak * 255, 2),
        }
        for one, other in itertools.combinations(DECODING, 2)
    }
    return found, frames["exact"]


def psnr(one: np.ndarray, other: np.ndarray, peak: float) -> float:
    """In dB."""
    return float(20 * np.log10(peak / np.sqrt(np.mean((one.astype(np.float64) - other) ** 2))))


def real(checkpoint: str, clips: int) -> dict[str, Any]:
    """Clips of digits through a VAE that was trained on such."""
    pipe = jvdiff.load(checkpoint)
    cfg, params = pipe.models.configs["vae"], pipe.weights["vae"]
    rng = np.random.default_rng(0)
    video = np.stack([digits.sample(rng, split="test", frames=17)[0] for _ in range(clips)])
    video = video.astype(np.float32) / 127.5 - 1.0  # [B,F,Y,X,3]
    latents = jax.jit(wan.encode, static_argnums=1)(params, cfg, video)
    found, frames = distances(params, cfg, latents, peak=2.0)
    return {
        "frames": list(video.shape[:-1]),
        "pairs": found,
        "the VAE itself, psnr_db": round(psnr(frames, video, 2), 1),
    }


def random_params(cfg: wan.VAEConfig, seed: int) -> Params:
    """Normal weights that keep the scale of what they multiply, numpy."""
    rng = np.random.default_rng(seed)

    def leaf(path: Any, x: Any) -> np.ndarray:
        kind = path[-1].key
        if kind == "scale":
            return np.ones(x.shape, np.float32)
        spread = np.prod(x.shape[:-1]) ** -0.5 if kind == "kernel" else 0.1
        return (rng.standard_normal(x.shape) * spread).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, wan.abstract_params(cfg))


def random_wide(seed: int, size: int) -> dict[str, Any]:
    """A random VAE of the published width: 9 frames of `size` pixels a side."""
    cfg = wan.WAN_2_1_VAE
    side = size // cfg.spatial_factor
    latents = np.random.default_rng([seed, 1]).standard_normal((1, 3, side, side, cfg.z_dim)).astype(np.float32)
    found, frames = distances(random_params(cfg, seed), cfg, latents, peak=None)
    return {"seed": seed, "frames": list(frames.shape[:-1]), "pairs": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/digits")
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--size", type=int, default=64, help="pixels a side of the frames of the random VAEs")
    parser.add_argument("--seeds", type=int, default=3, help="random VAEs")
    parser.add_argument("--output", type=Path, default=RESULTS / "vae_precision.json")
    args = parser.parse_args()
    result = {
        "command": f"python benchmarks/vae_precision.py --clips {args.clips} --size {args.size} --seeds {args.seeds}",
        "machine": describe(),
        "tf32": "computed" if jax.default_backend() == "gpu" else "emulated",
        "digits": real(args.checkpoint, args.clips),
        "random_wide": [random_wide(seed, args.size) for seed in range(args.seeds)],
    }
    for name, one in (("digits", result["digits"]), *((f"random {x['seed']}", x) for x in result["random_wide"])):
        for pair, x in one["pairs"].items():
            print(f"{name:<10}{pair:<16}{x['psnr_db']:>7.1f} dB{x['levels']:>8.2f} levels")
    write(args.output, result)


if __name__ == "__main__":
    main()
