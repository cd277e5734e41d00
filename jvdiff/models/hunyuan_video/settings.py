"""What a user may set of a clip of this family, and which repositories are of it. Without JAX."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jvdiff.config import option
from jvdiff.errors import CheckpointError, UsageError
from jvdiff.models import options
from jvdiff.weights.safetensors import read_json

PIPELINES = {"HunyuanVideoPipeline": ("TEXT_TO_VIDEO",)}  # _class_name: names in family.py
CONFIGURATIONS = {  # published repositories, whose files do not say all that their authors do: of `configs/`
    "HunyuanVideo": "hunyuan_video",
    "FastHunyuan-diffusers": "fast_hunyuan",
}
LICENCE = (
    "The weights are under the Tencent Hunyuan Community License Agreement, which is not Apache's: it does not hold in "
    "the European Union, the United Kingdom and South Korea, and has rules for what is made with them."
)
_GRIDS = ("linear", "diffusers", "training", "karras", "exponential", "beta", "sigmas", "timesteps")


def _check_grid(name: str, value: str) -> None:
    if value.partition(":")[0] not in _GRIDS:
        raise UsageError(f"{name} is {value!r:.80}; expected one of {', '.join(_GRIDS)}, the last two with numbers.")


@dataclass(frozen=True)
class Settings:
    """Everything besides prompt, seed and weights that decides what a clip looks like."""

    num_frames: int = option(129, "pixel frames, 1 + 4k")
    height: int = option(720, "pixels, a multiple of 16")
    width: int = option(1280, "pixels, a multiple of 16")
    fps: int = options.fps(24)
    steps: int = options.steps(50)
    guidance: float = option(
        6.0, "guidance that the transformer is told, and was distilled for; never a second pass", low=0.0, high=100.0
    )
    true_guidance: float = option(
        1.0,
        "weight of classifier-free guidance, where there is a negative prompt; 1: none, and half the work",
        low=1.0,
        high=100.0,
        note="1 means without it",
    )
    negative_prompt: str | None = option(
        None, "what true_guidance steers away from; may be empty; none: no true guidance", prose=True
    )
    shift: float = option(7.0, "how much the noise levels lean towards noise", low=0.01, high=100.0)
    solver: str = option(
        "euler", "euler, unipc (unipc:1, unipc:3: of that order), renoise, or renoise:1000,750,500,250 (timesteps)"
    )
    grid: str = option(
        "linear",
        "which noise levels: linear (as diffusers' pipeline gives them), diffusers (the scheduler's own), training, "
        "karras, exponential, beta, or a list: sigmas:1,0.9,0.75,0.5 (before the shift), timesteps:1000,750,500,250",
        check=_check_grid,
    )
    shift_terminal: float | None = option(
        None, "the last noise level above 0, to which the others are stretched; none: as it is", low=1e-6, high=0.999999
    )
    pattern: str = option(
        "dense",
        "which tokens see each other: dense, sliding_tile:6x8x8:3x3x3 (tile, window), video_sparse:4x4x4:0.9, or "
        "windows:FILE (docs/sparse_attention.md); text sees all, and is seen by all",
    )
    dense_steps: int | None = option(None, "first steps in which all tokens see each other; none: 0", low=0, high=999)
    vae_windows: bool = option(
        True, "the VAE in windows of 16 frames that are blended, as published; false: in one piece, with other frames"
    )
    vae_tiles: str | None = option(
        None,
        "the VAE in tiles, 256x256:192x192 (height x width of a tile, then of the stride, in pixels), which takes less "
        "memory and gives other frames; off: never; none: where nothing else fits",
    )
    attention: str | Callable[..., Any] | None = option(
        None, "implementation of self-attention in jvdiff.kernels (in Python also a function); none: the best that can"
    )


_OTHERS = {  # pipelines whose networks look like these and are others
    "HunyuanVideoImageToVideoPipeline": "image-to-video, whose text encoder looks at a picture (LLaVA)",
    "HunyuanSkyreelsImageToVideoPipeline": "SkyReels, image-to-video with a transformer of its own",
    "HunyuanVideoFramepackPipeline": "FramePack, which makes a video section by section with a packed past",
    "HunyuanVideo15Pipeline": "HunyuanVideo 1.5, another transformer, VAE and text encoder",
    "HunyuanVideo15ImageToVideoPipeline": "HunyuanVideo 1.5, another transformer, VAE and text encoder",
}
_TRANSFORMERS = {  # the same by the class of the transformer, or by what its config.json says
    "HunyuanVideoFramepackTransformer3DModel": _OTHERS["HunyuanVideoFramepackPipeline"],
    "HunyuanVideo15Transformer3DModel": _OTHERS["HunyuanVideo15Pipeline"],
}
_INSTEAD = "Use a text-to-video repository (HunyuanVideoPipeline), hunyuanvideo-community/HunyuanVideo for instance."


def select(index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The value in family.py that a repository is made for; None where it is of another family.

    Args:
        index: the content of model_index.json. configs: of the components' config.json, by folder.

    Raises:
        CheckpointError: it is of this family, and jvdiff does not run it.
    """
    name, transformer = str(index.get("_class_name")), configs.get("transformer", {})
    other = _OTHERS.get(name)
    if name in PIPELINES:
        other = _TRANSFORMERS.get(str(transformer.get("_class_name")))
        if other is None and transformer.get("image_condition_type") is not None:
            other = _OTHERS["HunyuanVideoImageToVideoPipeline"]
    elif name.startswith(("HunyuanVideo", "HunyuanSkyreels")) and other is None:
        other = "a model that jvdiff does not know"
    if other is not None:
        raise CheckpointError(f"describes a {name}: {other}; jvdiff does not run it.\n{_INSTEAD}")
    return PIPELINES.get(name, (None,))[0]


def defaults(index: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """The settings that a repository's own files ask for: solver, noise levels and shift of its scheduler.

    Raises:
        CheckpointError: jvdiff has no equivalent of the scheduler.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    return scheduled(read_json(file)) if file.is_file() else {}


def scheduled(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings that a scheduler_config.json asks for, on the pipeline's levels; raises as `defaults`."""
    from jvdiff.diffusion import schedules  # has numpy, which no other page of help needs

    asked = schedules.from_scheduler_config(config)
    if asked.grid != "diffusers":
        raise CheckpointError(
            f"scheduler_config.json: asks for the noise levels {asked.grid.partition(':')[0]}, between ends that this "
            "model's pipeline gives; jvdiff does not make these.\n"
            "Use a repository with plain levels, or give solver, shift and grid yourself."
        )
    return asked._replace(grid="linear")._asdict()


# Files of the authors' own program, Tencent's or FastVideo's.
_AUTHORS = ("hunyuan-video-t2v-720p", "hunyuan-video-i2v-720p", "mp_rank_00_model_states.pt")


def foreign(path: Path, names: Sequence[str]) -> str | None:
    """What to say of a folder in the layout of the authors' program (tencent/HunyuanVideo for one); else None."""
    if not {*_AUTHORS} & {*names}:
        return None
    if "hunyuan-video-i2v-720p" in names:
        return f"the layout of the authors' own program, and {_OTHERS['HunyuanVideoImageToVideoPipeline']}.\n{_INSTEAD}"
    return (
        "the layout of the authors' own program; expected that of diffusers.\n"
        "The same weights are published so: hunyuanvideo-community/HunyuanVideo, FastVideo/FastHunyuan-diffusers.\n"
        "Give that name, or what `hf download NAME --local-dir FOLDER` makes of it."
    )
