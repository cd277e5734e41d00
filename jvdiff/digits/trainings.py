"""The trainings that make the digits models: their fields, and where their programs are. Without JAX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jvdiff.config import option
from jvdiff.training.options import Kind


@dataclass(frozen=True)
class AutoencoderLoss:
    """`loss`: weights of the reconstruction's errors."""

    foreground_weight: float = option(9.0, "of pixels that are not black, against 1")
    latent_noise: float = option(0.05, "that the decoder has to bear, in deviations of each latent channel")
    l1: float = option(1.0, "weight of the L1 error against 1 of L2")


@dataclass(frozen=True)
class Autoencoder:
    """Task vae."""

    vae: dict[str, Any] = option(None, "fields of the VAE's config.json")
    stages: tuple[tuple[int, ...], ...] = option(None, "((until step, batch, frames, crop in pixels), ...)")
    loss: AutoencoderLoss = option(None, "weights of the errors")
    decoder_of: str | None = option(None, "the folder of a trained VAE whose decoder alone is trained on", path=True)
    endless: bool = option(False, "digits move on across the border")


@dataclass(frozen=True)
class FlowLoss:
    """`loss`: which noise levels are seen, and how the gradient is computed."""

    shift: float = option(3.0, "how much the noise levels lean towards noise")
    text_length: int = option(512, "rows of text that the transformer is given")
    remat: bool = option(False, "compute activations again for the gradient, to save memory")


@dataclass(frozen=True)
class PictureLoss(FlowLoss):
    """`loss`: which noise levels are seen, how often a picture is given, and how the gradient is computed."""

    pictures: float = option(0.0, "the share of clips whose first latent frame is given", low=0, high=1)


@dataclass(frozen=True)
class OnLatents:
    """What both trainings on the VAE's latents have."""

    vae: str = option(None, "the folder of a trained VAE", path=True)
    clips: int = option(None, "clips to train on")
    batch: int = option(None, "clips in a step")
    tokens: int = option(None, "text tokens in a batch; a prompt has six")
    drop_text: float = option(None, "the share of prompts that are dropped, for guidance", low=0, high=1)
    transformer: dict[str, Any] = option(None, "fields of the transformer's config.json")
    text_encoder: dict[str, Any] = option(None, "fields of the text encoder's config.json")
    scheduler: dict[str, Any] = option(None, "the scheduler_config.json of the result")
    defaults: dict[str, Any] = option(None, "the jvdiff_defaults.json of the result")
    initial: str | None = option(None, "a repository whose transformer and text encoder are trained on", path=True)


@dataclass(frozen=True)
class TextToVideo(OnLatents):
    """Task text_to_video."""

    loss: PictureLoss = option(None, "noise levels, pictures and gradient")
    pattern: str | None = option(None, "which tokens see each other, for instance video_sparse:1x2x2:0.75")
    sparsity_warmup: dict[str, Any] | None = option(None, "rate and interval: the sparsity rises so much, so often")


@dataclass(frozen=True)
class TeacherForcingLoss(FlowLoss):
    """`loss`: which noise levels are seen, what the past is, and how the gradient is computed."""

    context_noise: float = option(0.0, "the highest noise level of the past", low=0, high=1)
    resample: float = option(0.0, "the share of clips whose past is the model's own", low=0, high=1)


@dataclass(frozen=True)
class Reach:
    """`pattern`: how far a chunk sees, in latent frames."""

    chunk: int = option(3, "latent frames that are made together")
    window: int | None = option(None, "latent frames that they see, themselves included; none: all before them")
    sink: int = option(0, "latent frames at the beginning of the video that are always seen")


@dataclass(frozen=True)
class First:
    """`first`: every other step is of first chunks alone."""

    clips: int = option(None, "how many there are")
    batch: int = option(None, "of them in a step")


@dataclass(frozen=True)
class Stream(OnLatents):
    """Task stream."""

    loss: TeacherForcingLoss = option(None, "noise levels, past and gradient")
    chunks: int = option(None, "of a clip")
    gap: int = option(None, "chunks, at most, that are left out behind the first")
    change: float = option(None, "how probable another direction is at each chunk", low=0, high=1)
    pattern: Reach = option(None, "how far a chunk sees")
    first: First | None = option(None, "every other step is of first chunks alone")


_DECIDES_NOTHING = ("defaults", "scheduler")  # of the training: only the result's own files
TASKS = {
    "vae": Kind("the causal VAE of the moving digits", Autoencoder, "jvdiff.digits.runs:train_vae"),
    "text_to_video": Kind(
        "the digits' transformer and text encoder, on latents of that VAE",
        TextToVideo,
        "jvdiff.digits.runs:train_text_to_video",
        free=_DECIDES_NOTHING,
    ),
    "stream": Kind(
        "their causal sibling, which makes a video chunk by chunk",
        Stream,
        "jvdiff.digits.runs:train_stream",
        free=_DECIDES_NOTHING,
    ),
}
