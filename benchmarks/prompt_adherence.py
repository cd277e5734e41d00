"""Does the video show what the prompt says? Colour, direction and digit of generated moving-digit clips, counted.

    python benchmarks/prompt_adherence.py                                  # the judge alone, on real held-out clips
    python benchmarks/prompt_adherence.py --checkpoint checkpoints/digits  # and 200 clips generated from it
    python benchmarks/prompt_adherence.py --vae checkpoints/digits         # and the VAE's round trip of held-out clips
    python benchmarks/prompt_adherence.py --clips-from out                 # and the .mp4 files of a folder, or one .npz
    python benchmarks/prompt_adherence.py --stream checkpoints/digits-stream  # and streams that turn
    python benchmarks/prompt_adherence.py --pictures checkpoints/digits-image  # and clips that continue pictures
    python benchmarks/prompt_adherence.py --classes runs/latent_video_digits/repository  # and clips by class

The prompts are the 32 combinations that training never shows, in turn, each clip with a seed of its own. The judge is
trained first, without ever seeing the test glyphs, and its own error rate is printed beside every result: a digit
score can hardly be higher. An .npz holds `video` uint8 [B,F,64,64,3] and `prompts`; an .mp4 names its prompt itself.

B batch · F pixel frames · Y X pixel height, width.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import class_adherence
import jax
import jax.numpy as jnp
import numpy as np
import picture_adherence
import stream_adherence
from machine import describe

from jvdiff.digits import clips as digits
from jvdiff.digits import judge as digits_judge
from jvdiff.digits.clips import Combo
from jvdiff.errors import JvdiffError, UsageError
from jvdiff.media import video
from jvdiff.runtime.files import atomic
from jvdiff.types import Params

RESULTS = Path(__file__).parent / "results"
Clips = tuple[np.ndarray, list[Combo]]  # uint8 [B,F,Y,X,3] and what each should show


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="generate clips from this Hugging Face folder or Orbax directory")
    parser.add_argument("--vae", help="measure the round trip through the VAE of this folder")
    parser.add_argument("--clips-from", help="judge the .mp4 files of this folder, or this .npz")
    parser.add_argument("--stream", help="generate streams from this checkpoint of a causal model")
    parser.add_argument("--rollouts", type=int, default=64, help="how many streams to generate")
    parser.add_argument("--chunks", type=int, default=stream_adherence.LATE, help="of each stream, 40 or more")
    parser.add_argument("--straight", action="store_true", help="streams whose prompts never change")
    parser.add_argument("--context-noise", type=float, help="of streams; default: the checkpoint's")
    parser.add_argument("--sink-noise", type=float, help="of streams; default: the checkpoint's")
    parser.add_argument("--pictures", help="generate clips that continue pictures from this folder of a model that can")
    parser.add_argument("--classes", help="generate clips of each class from this folder of a class-conditional model")
    parser.add_argument(
        "--guidances", type=float, nargs="+", default=[1, 3.5, 7.5, 15], help="which --classes compares"
    )
    parser.add_argument("--clips", type=int, default=200, help="how many to generate or send through the VAE")
    parser.add_argument("--combos", choices=["held_out", "train", "all"], default="held_out")
    parser.add_argument("--seed", type=int, default=1000, help="of the first clip; clip i has seed + i")
    parser.add_argument("--batch", type=int, help="clips (default: 10) or streams (default: 16) generated at a time")
    parser.add_argument("--steps", type=int, help="default: the checkpoint's")
    parser.add_argument("--guidance", type=float, help="default: the checkpoint's")
    parser.add_argument("--save", help="write the generated clips, or 40 chunks of streams, to this .npz")
    parser.add_argument("--output", type=Path, default=RESULTS / "prompt_adherence.json")
    args = parser.parse_args()

    began = time.perf_counter()
    judge = digits_judge.train()
    real, shown = digits_judge.real_clips(1000)
    calibration = digits_judge.score(digits_judge.look(judge, real), shown)
    report: dict[str, Any] = {}
    common = {"machine": describe(), "judge_on_real_clips": calibration}
    print(f"judge trained and calibrated in {time.perf_counter() - began:.0f} s")
    _print("real held-out clips", calibration)

    if args.vae:
        vae = round_trip(judge, args.vae, (real[: args.clips], shown[: args.clips]))
        report["vae"] = {"checkpoint": Path(args.vae).name} | vae | common
        _print("before the VAE", vae["before"])
        _print("after the VAE", vae["after"])
        lost = vae["before"]["digit"]["percent"] - vae["after"]["digit"]["percent"]
        psnr = vae["psnr_db"]
        print(f"VAE: {psnr['mean']} dB PSNR (lowest clip {psnr['lowest']}), {lost:.1f} points of digit accuracy lost")
        streams = report["vae"]["streams"] = stream_round_trip(judge, args.vae)
        print(f"VAE, streams of {streams['chunks']} chunks: {streams['psnr_db']['mean']} dB PSNR")
        stream_adherence.show("streams through the VAE", {k: streams[k] for k in ("before", "after")})
    if args.checkpoint:
        began = time.perf_counter()
        clips, wanted = generate(args)
        report["generated"] = (
            {
                "checkpoint": Path(args.checkpoint).name,
                "combos": args.combos,
                "first_seed": args.seed,
                "steps": args.steps or "default",
                "guidance": args.guidance or "default",
                "seconds": round(time.perf_counter() - began, 1),
            }
            | judged(judge, (clips, wanted))
            | common
        )
        _print("generated clips", report["generated"])
        if args.save:
            np.savez_compressed(args.save, video=clips, prompts=[digits.prompt(*w) for w in wanted])
    if args.stream:
        from jvdiff import streaming

        noise = {"context_noise": args.context_noise, "sink_noise": args.sink_noise}
        noise = {name: value for name, value in noise.items() if value is not None}
        chosen = streaming.derive_config(streaming.config_of(args.stream), diffusion_model=noise)
        pipe = streaming.load(args.stream, config=chosen)
        found, videos = stream_adherence.measure(
            judge, pipe, args.rollouts, args.batch or 16, args.seed, args.chunks, args.straight
        )
        report["stream_straight" if args.straight else "stream"] = (
            {"checkpoint": Path(args.stream).name} | noise | found | common
        )
        stream_adherence.show("real streams", found["judge_on_real_streams"])
        stream_adherence.show("generated streams", found["generated"])
        stream_adherence.show_held(found["rollouts_at"])
        print("goals: " + ", ".join(f"{name} {'met' if met else 'missed'}" for name, met in found["met"].items()))
        if args.save:
            np.savez_compressed(args.save, video=videos)
    if args.pictures:
        import jvdiff

        pipe = jvdiff.load(args.pictures)
        found, pictures, videos = picture_adherence.measure(judge, pipe, args.clips, args.batch or 10, args.seed)
        report["pictures"] = {"checkpoint": Path(args.pictures).name} | found | common
        picture_adherence.show(found)
        picture = picture_adherence.sheet(pictures[:3], videos[:3])
        print(f"written to {video.write_png(args.output.with_suffix('.png'), picture)}")
        if args.save:
            np.savez_compressed(args.save, video=videos)
    if args.classes:
        import jvdiff

        pipe = jvdiff.load(args.classes)
        found, picture = class_adherence.measure(
            judge, pipe, args.guidances, args.clips, args.batch or 10, args.seed, args.steps
        )
        report["classes"] = {"checkpoint": Path(args.classes).name} | found | common
        class_adherence.show(found)
        print(f"written to {video.write_png(args.output.with_suffix('.png'), picture)}")
    if args.clips_from:
        report["clips"] = judged(judge, read_clips(Path(args.clips_from))) | common
        _print(args.clips_from, report["clips"])

    if report:  # sections of earlier runs stay: each says where and with what it was measured
        old = json.loads(args.output.read_text()) if args.output.exists() else {}
        with atomic(args.output) as part:
            part.write_text(json.dumps(old | report, indent=2) + "\n")
        print(f"written to {args.output}")
    return 0


def judged(judge: Params, clips: Clips) -> dict[str, Any]:
    """digits_judge.score, and every clip that is not as wanted: what was asked and what is seen."""
    videos, wanted = clips
    seen = digits_judge.look(judge, videos)
    wrong = [
        {"clip": i, "prompt": digits.prompt(*w), "seen": list(s)}
        for i, (s, w) in enumerate(zip(seen, wanted, strict=True))
        if tuple(s) != tuple(w)
    ]
    return digits_judge.score(seen, wanted) | {"wrong": wrong}


def prompts_for(count: int, combos: digits.Combos, seed: int = 0) -> list[Combo]:
    """`count` combinations, each as often as the others (to one), in a fixed random order."""
    pool = digits.combinations(combos)
    rng = np.random.default_rng(seed)
    rounds = [rng.permutation(len(pool)) for _ in range(-(-count // len(pool)))]
    return [pool[i] for i in np.concatenate(rounds)[:count]]


def generate(args: argparse.Namespace) -> Clips:
    """The clips that a checkpoint makes of the prompts."""
    import jvdiff

    pipe = jvdiff.load(args.checkpoint)
    wanted = prompts_for(args.clips, args.combos)
    batch: int = args.batch or 10
    videos = []
    for start in range(0, args.clips, batch):
        part = wanted[start : start + batch]
        # The last batch is filled up, so that one compiled program serves them all.
        prompts = [digits.prompt(*w) for w in part + part[:1] * (batch - len(part))]
        out = jvdiff.generate(
            pipe,
            prompts,
            seed=args.seed + start,
            num_frames=17,
            height=digits.SIZE,
            width=digits.SIZE,
            steps=args.steps,
            guidance=args.guidance,
        )
        videos.append(np.asarray(out.video)[: len(part)])
        print(f"generated {start + len(part)} of {args.clips}", file=sys.stderr)
    return np.concatenate(videos), wanted


def read_clips(path: Path) -> Clips:
    """Clips with their prompts from a folder of .mp4 files, or from one .npz."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["video"], [digits.parse_prompt(str(p)) for p in arrays["prompts"]]
    files = sorted(path.glob("*.mp4"))
    if not files:
        raise UsageError(f"{path} holds no .mp4 files")
    wanted = [digits.parse_prompt(str(video.read_metadata(f).get("prompt", ""))) for f in files]
    return np.stack([video.read_video(f) for f in files]), wanted


def round_trip(judge: Params, path: str, clips: Clips) -> dict[str, Any]:
    """What encoding and decoding does to real clips: PSNR over whole clips, and the judge before and after."""
    real, shown = clips
    back = _through_vae(path, real)
    return {
        "psnr_db": _psnr(real, back),
        "before": digits_judge.score(digits_judge.look(judge, real), shown),
        "after": digits_judge.score(digits_judge.look(judge, back), shown),
    }


def stream_round_trip(judge: Params, path: str, count: int = 40, chunks: int = 5) -> dict[str, Any]:
    """What encoding and decoding does to real streams, each encoded and decoded as one clip."""
    real, wanted = stream_adherence.streams(count, chunks, seed=0)
    back = _through_vae(path, real)
    before, after = (
        stream_adherence.score(stream_adherence.seen_in(judge, v), wanted, range(1, chunks + 1)) for v in (real, back)
    )
    return {"streams": count, "chunks": chunks, "psnr_db": _psnr(real, back), "before": before, "after": after}


def _through_vae(path: str, clips: np.ndarray) -> np.ndarray:
    """uint8 [B,F,Y,X,3], encoded and decoded by the VAE of a repository."""
    from jvdiff import pipeline
    from jvdiff.models import wan
    from jvdiff.models.family import read_weights

    repository = pipeline.inspect(path)
    cfg = repository.models.configs["vae"]
    params = read_weights(repository.path / "vae", repository.family.parts["vae"], cfg, jnp.float32)
    program = jax.jit(lambda p, x: wan.decode(p, cfg, wan.encode(p, cfg, x)))
    return np.concatenate(list(_through(program, params, clips)))


def _psnr(real: np.ndarray, back: np.ndarray) -> dict[str, float]:
    errors = np.square(back.astype(np.float32) - real.astype(np.float32)).mean((1, 2, 3, 4))
    psnr = 10 * np.log10(255.0**2 / np.maximum(errors, 1e-9))
    return {"mean": round(float(psnr.mean()), 2), "lowest": round(float(psnr.min()), 2)}


def _through(program: Any, params: Params, clips: np.ndarray, size: int = 10) -> Iterator[np.ndarray]:
    for start in range(0, len(clips), size):
        part = clips[start : start + size]
        full = np.concatenate([part, part[:1].repeat(size - len(part), 0)])
        levels = program(params, jnp.asarray(full, jnp.float32) / 127.5 - 1.0)[: len(part)]
        yield np.rint(np.clip((np.asarray(levels) + 1.0) * 127.5, 0, 255)).astype(np.uint8)


def _print(what: str, score: dict[str, Any]) -> None:
    parts = [
        f"{k} {score[k]['right']}/{score['clips']} = {score[k]['percent']:.1f} %"
        for k in ("colour", "direction", "digit", "all")
    ]
    print(f"{what}: {', '.join(parts)}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except JvdiffError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
