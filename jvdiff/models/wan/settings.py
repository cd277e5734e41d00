"""What a user may set of a clip of this family, and which repositories are of it. Without JAX."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jvdiff.config import option
from jvdiff.errors import CheckpointError
from jvdiff.models import options
from jvdiff.weights.safetensors import read_json

PIPELINES = {  # _class_name: names in family.py
    "WanPipeline": ("TEXT_TO_VIDEO",),
    "WanImageToVideoPipeline": ("IMAGE_TO_VIDEO", "FIRST_LAST_FRAME"),
    "WanCausalDMDPipeline": ("CAUSAL",),
}


@dataclass(frozen=True)
class Settings:
    """Everything besides prompt, seed and weights that decides what a clip looks like."""

    num_frames: int = option(81, "pixel frames, 1 + 4k")
    height: int = option(480, "pixels, a multiple of 16")
    width: int = option(832, "pixels, a multiple of 16")
    fps: int = options.fps(16)
    steps: int = options.steps(50)
    guidance: float = options.guidance(5.0)
    negative_prompt: str = option("", "what guidance leads away from", prose=True)
    shift: float = option(3.0, "how much the noise levels lean towards noise", low=0.01, high=100.0)
    solver: str = option("unipc", "unipc, euler, or renoise:1000,750,500,250 (timesteps of a distilled model)")
    grid: str = option(
        "diffusers", "whose noise levels: diffusers, or wan (the authors' programs)", choices=("diffusers", "wan")
    )
    pattern: str = option(
        "dense",
        "which tokens see each other: dense, sliding_tile:6x8x8:3x3x3 (tile, window), video_sparse:4x4x4:0.9, or "
        "windows:FILE (docs/sparse_attention.md)",
    )
    dense_steps: int | None = option(None, "first steps in which all tokens see each other; none: 0", low=0, high=999)
    attention: str | Callable[..., Any] | None = option(
        None, "implementation of self-attention in jvdiff.kernels (in Python also a function); none: the best that can"
    )


# Files of the authors' own program, and a tensor of their naming.
_AUTHORS = ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth")
_TENSOR = b'"blocks.0.self_attn.q.weight"'
_WIDTHS = {1536: "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 5120: "Wan-AI/Wan2.1-T2V-14B-Diffusers"}


def foreign(path: Path, names: Sequence[str]) -> str | None:
    """What to say of a folder in the layout of the Wan authors' program (Wan-AI/Wan2.1-T2V-1.3B for one); else None."""
    config: Mapping[str, Any] = {}
    with contextlib.suppress(CheckpointError):
        config = read_json(path / "config.json") if "config.json" in names else {}
    weights = [path / name for name in names if name.startswith("diffusion_pytorch_model") and name.endswith("tensors")]
    if not ({*_AUTHORS} & {*names} or config.get("_class_name") == "WanModel" or any(map(_of_authors, weights))):
        return None
    known = _WIDTHS.get(config.get("dim", 0), " or ".join(_WIDTHS.values()))
    return (
        "the layout of the Wan authors' own program; expected that of diffusers.\n"
        f"The same weights are published so: {known}.\n"
        "Give that name, or what `hf download NAME --local-dir FOLDER` makes of it."
    )


def _of_authors(file: Path) -> bool:
    """Whether a file of weights has the authors' names of tensors; its header alone is looked at."""
    try:
        with open(file, "rb") as data:
            return _TENSOR in data.read(2**20)
    except OSError:
        return False


def select(index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The value in family.py that a repository is made for; None where it is of another family.

    Args:
        index: the content of model_index.json. configs: of the components' config.json, by folder.

    Raises:
        CheckpointError: it is of this family, and jvdiff does not run it.
    """
    name = str(index.get("_class_name"))
    second = index.get("transformer_2")
    if isinstance(second, list) and second[:1] not in ([], [None]) and name.startswith("Wan"):
        raise CheckpointError(
            "holds two transformers (Wan 2.2 A14B), which jvdiff does not run yet.\n"
            "Use a Wan 2.1 text-to-video repository."
        )
    names = PIPELINES.get(name, (None,))
    # Of the image-to-video models those have learned places for their picture tokens that take two pictures.
    return names[-1] if configs.get("transformer", {}).get("pos_embed_seq_len") else names[0]


def defaults(index: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """The settings that a repository's own files ask for: solver, shift and grid of its scheduler.

    Raises:
        CheckpointError: jvdiff has no equivalent of the scheduler.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    return scheduled(read_json(file)) if file.is_file() else {}


def scheduled(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings that a scheduler_config.json asks for; raises as `defaults`."""
    from jvdiff.diffusion import schedules  # has numpy, which no other page of help needs

    return schedules.from_scheduler_config(config)._asdict()
