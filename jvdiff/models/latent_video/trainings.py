"""The training that makes a model of this family: its fields, and where its program is. Without JAX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jvdiff.config import option
from jvdiff.training.options import Kind


@dataclass(frozen=True)
class Loss:
    """`loss`: what is dropped, which noise levels are seen, and how the gradient is computed."""

    drop_label: float = option(0.1, "the share of clips without a label, for guidance", low=0, high=1)
    timesteps: str = option("uniform", "how timesteps are drawn", choices=("uniform", "logit_normal"))
    remat: str | None = option(None, "dots: keep products alone and compute the rest again; none: keep all")


@dataclass(frozen=True)
class Fields:
    """Task latent_video."""

    clips: str = option(None, "a folder of class_name/clip.mp4, or a CSV with the columns path and label", path=True)
    num_frames: int = option(None, "of a clip")
    height: int = option(None, "pixels; as the width")
    width: int = option(None, "pixels")
    stride: int = option(None, "take every N-th frame of a file")
    workers: int = option(None, "threads that read ahead")
    most_bad: float = option(None, "the share of clips that may be unreadable", low=0, high=1)
    cache_latents: bool = option(None, "encode every clip once, instead of anew in every epoch, cut out elsewhere")
    vae: str | dict[str, Any] = option(
        None,
        "the folder of a trained VAE; or model, batch, loss, schedule and, if wanted, short_clips, to train one",
        path=True,
    )
    transformer: str | dict[str, Any] = option(None, "small, medium, large or xl; or fields of its config.json")
    prediction: str = option(None, "what the network predicts: epsilon, sample or v_prediction")
    noise_schedule: str = option(None, "linear or cosine")
    batch: int = option(None, "clips in a step")
    precision: str = option(None, "of matrices: float32 or bfloat16")
    loss: Loss = option(None, "labels, noise levels and gradient")
    fps: int = option(None, "of the samples, and the default of the result")
    steps: int = option(None, "of the samples, and the default of the result")
    guidance: float = option(None, "of the samples, and the default of the result")
    solver: str = option(None, "of the samples, and the default of the result")
    initial: str | None = option(None, "a repository to train on: its transformer, with its VAE as it is", path=True)
    plan: bool = option(False, "print what a step takes, without data, and exit")
    plan_target: str | None = option(None, "h200, a100, rtx_4090, ...: plan for that instead of the devices at hand")
    checkpoint: str | None = option(None, "for jvdiff sample alone; none: what the training made", path=True)
    class_label: int | str | tuple[Any, ...] | None = option(None, "for jvdiff sample alone: a class, or a tuple")
    output: str = option("out", "for jvdiff sample alone", path=True)
    save_arrays: bool = option(False, "for jvdiff sample alone")


_DECIDES_NOTHING = ("workers", "most_bad", "fps", "steps", "guidance", "solver", "checkpoint", "class_label", "output")
TASKS = {
    "latent_video": Kind(
        "a class-conditional model, from nothing, on a folder of labelled clips: its VAE, then its transformer",
        Fields,
        "jvdiff.models.latent_video.runs:train",
        programs="jvdiff.models.latent_video.runs:programs",
        free=(*_DECIDES_NOTHING, "save_arrays"),
    )
}
