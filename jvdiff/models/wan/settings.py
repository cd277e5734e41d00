"""What a user may set of a clip of this family, and which repositories are of it. Without JAX."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jvdiff.config import option
from jvdiff.errors import CheckpointError, UsageError
from jvdiff.models import options
from jvdiff.weights.safetensors import STEM, read_json, tensor_names

PIPELINES = {  # _class_name: names in family.py
    "WanPipeline": ("TEXT_TO_VIDEO", "TEXT_AND_IMAGE_TO_VIDEO"),
    "WanImageToVideoPipeline": ("IMAGE_TO_VIDEO", "FIRST_LAST_FRAME", "TEXT_AND_IMAGE_TO_VIDEO"),
    "WanDMDPipeline": ("FEW_STEPS",),
    "WanCausalDMDPipeline": ("CAUSAL",),
}
CONFIGURATIONS = {  # published repositories, whose files do not say all that their authors do: of `configs/`
    "Wan2.1-T2V-1.3B-Diffusers": "wan2_1_t2v_1_3b",
    "Wan2.1-T2V-14B-Diffusers": "wan2_1_t2v_14b",
    "Wan2.1-I2V-14B-480P-Diffusers": "wan2_1_i2v_14b_480p",
    "Wan2.1-I2V-14B-720P-Diffusers": "wan2_1_i2v_14b_720p",
    "Wan2.1-FLF2V-14B-720P-diffusers": "wan2_1_flf2v_14b",
    "Wan2.2-T2V-A14B-Diffusers": "wan2_2_t2v_a14b",
    "Wan2.2-I2V-A14B-Diffusers": "wan2_2_i2v_a14b",
    "Wan2.2-TI2V-5B-Diffusers": "wan2_2_ti2v_5b",
    "FastWan2.1-T2V-1.3B-Diffusers": "fastwan2_1_t2v_1_3b",
    "FastWan2.1-T2V-14B-Diffusers": "fastwan2_1_t2v_14b",
    "FastWan2.2-TI2V-5B-FullAttn-Diffusers": "fastwan2_2_ti2v_5b",
}
EXPANDED = "expand_timesteps"  # in model_index.json: a picture is the first frame, and that has a timestep of its own
_GRIDS = ("diffusers", "wan", "karras", "exponential", "beta", "sigmas", "timesteps")


def _check_grid(name: str, value: str) -> None:
    if value.partition(":")[0] not in _GRIDS:
        raise UsageError(f"{name} is {value!r:.80}; expected one of {', '.join(_GRIDS)}, the last two with numbers.")


@dataclass(frozen=True)
class Settings:
    """Everything besides prompt, seed and weights that decides what a clip looks like."""

    num_frames: int = option(81, "pixel frames, 1 + 4k")
    height: int = option(480, "pixels, a multiple of 16; of 32 where latents have 48 channels")
    width: int = option(832, "pixels, as height")
    fps: int = options.fps(16)
    steps: int = options.steps(50)
    guidance: float = options.guidance(5.0)
    guidance_2: float | None = option(
        None, "guidance of the second transformer, where there are two; none: guidance", low=0.0, high=100.0
    )
    boundary: float | None = option(
        None,
        "where there are two transformers: the first has the steps whose timestep is at least this share of 1000; "
        "none: as model_index.json says",
        low=0.0,
        high=1.0,
    )
    boundary_step: int | None = option(
        None, "in place of boundary: how many of the steps, from 0, the first transformer has", low=0, high=1000
    )
    negative_prompt: str = option("", "what guidance leads away from", prose=True)
    shift: float = option(3.0, "how much the noise levels lean towards noise", low=0.01, high=100.0)
    solver: str = option(
        "unipc",
        "unipc (unipc:1, unipc:3: of that order), euler, renoise, or renoise:1000,750,500,250 and dmd:1000,757,522 "
        "(timesteps of a distilled model)",
    )
    grid: str = option(
        "diffusers",
        "which noise levels: diffusers, wan (the authors' programs), karras, exponential, beta, or a list: "
        "sigmas:1,0.9,0.75,0.5 (before the shift), timesteps:1000,750,500,250",
        check=_check_grid,
    )
    shift_terminal: float | None = option(
        None, "the last noise level above 0, to which the others are stretched; none: as it is", low=1e-6, high=0.999999
    )
    pattern: str = option(
        "dense",
        "which tokens see each other: dense, sliding_tile:6x8x8:3x3x3 (tile, window), video_sparse:4x4x4:0.9, or "
        "windows:FILE (docs/sparse_attention.md)",
    )
    dense_steps: int | None = option(None, "first steps in which all tokens see each other; none: 0", low=0, high=999)
    vae_tiles: str | None = option(
        None,
        "the VAE in tiles, 256x256:192x192 (height x width of a tile, then of the stride, in pixels), which takes less "
        "memory and gives other frames; off: never; none: where nothing else fits",
    )
    attention: str | Callable[..., Any] | None = option(
        None, "implementation of self-attention in jvdiff.kernels (in Python also a function); none: the best that can"
    )


# Files of the authors' own program, and a tensor of their naming.
_AUTHORS = ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth")
_TENSOR = b'"blocks.0.self_attn.q.weight"'
_KINDS = {  # (model_type, dim) of the authors' config.json: the same weights as diffusers has them
    ("t2v", 1536): "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    ("t2v", 5120): "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    ("i2v", 5120): "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers or Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
    ("flf2v", 5120): "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers",
    ("ti2v", 3072): "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
}
_EXPERTS = "Wan-AI/Wan2.2-T2V-A14B-Diffusers or Wan-AI/Wan2.2-I2V-A14B-Diffusers"
_OTHERS = {  # kinds of model that are none of these, by a word in the names of their classes
    "VACE": "VACE, which is told what to make by a video and a mask",
    "Animate": "Animate, which moves a figure as another video does",
    "S2V": "speech-to-video",
    "SpeechToVideo": "speech-to-video",
    "Fun": "Fun, which is told what to make by a video",
    "VideoToVideo": "video-to-video, which starts from a video",
    "SkyReels": "SkyReels, whose transformer takes frame rates and a noise level for each frame",
}
_INSTEAD = (
    "Use a text-to-video repository (WanPipeline), or an image-to-video one (WanImageToVideoPipeline), such as "
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers."
)


def foreign(path: Path, names: Sequence[str]) -> str | None:
    """What to say of a folder in the layout of the Wan authors' program (Wan-AI/Wan2.1-T2V-1.3B for one); else None."""
    config: Mapping[str, Any] = {}
    with contextlib.suppress(CheckpointError):
        config = read_json(path / "config.json") if "config.json" in names else {}
    weights = [path / name for name in names if name.startswith("diffusion_pytorch_model") and name.endswith("tensors")]
    if not ({*_AUTHORS} & {*names} or config.get("_class_name") == "WanModel" or any(map(_of_authors, weights))):
        return None
    kind = str(config.get("model_type", "t2v"))
    if other := _OTHERS.get({"vace": "VACE", "animate": "Animate", "s2v": "S2V"}.get(kind, "")):
        return f"the layout of the Wan authors' own program, and {other}; jvdiff does not run it.\n{_INSTEAD}"
    known = _EXPERTS if "high_noise_model" in names else _KINDS.get((kind, config.get("dim", 0)))
    return (
        "the layout of the Wan authors' own program; expected that of diffusers.\n"
        f"The same weights are published so: {known or ' or '.join(dict.fromkeys(_KINDS.values()))}.\n"
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
    if other := _other(name, configs.get("transformer", {})):
        raise CheckpointError(f"is {other}; jvdiff does not run it.\n{_INSTEAD}")
    if name == "WanCausalDMDPipeline" and two_experts(index):
        raise CheckpointError(
            "holds two causal transformers (Self-Forcing of Wan 2.2), which jvdiff does not run.\n"
            "Use a causal repository with one, wlsaidhi/SFWan2.1-T2V-1.3B-Diffusers for instance."
        )
    expanded = index.get(EXPANDED)
    if expanded not in (None, False, True):
        raise CheckpointError(f"model_index.json: {EXPANDED} is {expanded!r:.40}; expected true or false.")
    names = PIPELINES.get(name, (None,))
    if "FIRST_LAST_FRAME" in names and configs.get("transformer", {}).get("pos_embed_seq_len"):
        return "FIRST_LAST_FRAME"  # each token of two pictures has a place of its own
    return names[-1] if expanded else names[0]


def _other(pipeline: str, transformer: Mapping[str, Any]) -> str | None:
    """What a repository is whose networks look like these and are others; None where it is none of them."""
    classes = f"{pipeline} {transformer.get('_class_name')}"
    if not re.search(r"\b(Wan|SkyReels)", classes):
        return None
    return next((what for word, what in _OTHERS.items() if word in classes), None)


def defaults(index: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """The settings that a repository's own files ask for: solver, noise levels and shift of its scheduler, the boundary
    between two transformers, and the sizes that its kind of VAE shows.

    Raises:
        CheckpointError: jvdiff has no equivalent of the scheduler, or the boundary is not a share.
    """
    if index.get("_class_name") == "WanDMDPipeline":
        config = with_fields(
            read_json(folder / "transformer" / "config.json"), tensor_names(folder / "transformer", STEM)
        )
        return few_steps(config.get("in_channels", 16), config.get("gate_compress", False))
    file = folder / "scheduler" / "scheduler_config.json"
    vae, second = folder / "vae" / "config.json", folder / "transformer_2" / "config.json"
    channels = read_json(second).get("in_channels") if two_experts(index) and second.is_file() else None
    kind = kind_defaults(read_json(vae).get("z_dim"), channels) if vae.is_file() else {}
    return {**kind, **(scheduled(read_json(file)) if file.is_file() else {}), **boundary(index)}


def two_experts(index: Mapping[str, Any]) -> bool:
    """Whether a model_index.json names a second transformer."""
    second = index.get("transformer_2")
    return isinstance(second, list) and second[:1] not in ([], [None])


def kind_defaults(channels: Any, second: Any = None) -> Mapping[str, Any]:
    """What a kind of model is run with that its files do not say; {} for Wan 2.1.

    Args:
        channels: of the latents; 48 are Wan 2.2's 5B.
        second: channels that a second transformer takes, which Wan 2.2's A14B has; more than those of the latents are
            those of the model for pictures. None: there is none.
    """
    if channels == 48:
        return {"num_frames": 121, "height": 704, "width": 1280, "fps": 24}
    if second is None:
        return {}
    guidance = (4.0, 3.0) if second == channels else (3.5, 3.5)
    return {"height": 720, "width": 1280, "steps": 40, **dict(zip(("guidance", "guidance_2"), guidance, strict=True))}


def boundary(index: Mapping[str, Any]) -> Mapping[str, Any]:
    """The setting `boundary` that a model_index.json has; raises as `defaults`."""
    ratio = index.get("boundary_ratio")
    if ratio is None:
        return {}
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
        raise CheckpointError(
            f"model_index.json: boundary_ratio is {ratio!r:.40}; expected a number from 0 to 1, or null.\n"
            "Copy the file again from the repository that it came from."
        )
    return {"boundary": float(ratio)}


def scheduled(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings that a scheduler_config.json asks for; raises as `defaults`."""
    from jvdiff.diffusion import schedules  # has numpy, which no other page of help needs

    return schedules.from_scheduler_config(config)._asdict()


def few_steps(channels: int, gated: bool) -> Mapping[str, Any]:
    """The settings of FastWan, which none of its files has: FastVideo's sampler of three steps, whose shift is 8 for
    every model and which does without guidance, at the size of the training. The scheduler's file is not used.

    Args:
        channels: of the latents, 48 for Wan 2.2's 5B. gated: whether it was trained with video sparse attention.
    """
    size = {"num_frames": 61, "height": 448, "width": 832, "fps": 16, **kind_defaults(channels)}
    sampler = {"solver": "dmd:1000,757,522", "steps": 3, "shift": 8.0, "grid": "diffusers", "guidance": 1.0}
    return {**size, **sampler, "pattern": "video_sparse:4x4x4:0.8" if gated else "dense"}


def with_fields(config: Mapping[str, Any], tensors: Collection[str]) -> Mapping[str, Any]:
    """A transformer's config.json with what only its tensors say: whether the blocks have the gate of video sparse
    attention, and whether they have the norm that nobody uses."""
    shown = {"gate_compress": "to_gate_compress.weight", "image_q_norm": "attn2.norm_added_q.weight"}
    return {**{field: True for field, name in shown.items() if f"blocks.0.{name}" in tensors}, **config}
