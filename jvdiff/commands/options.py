"""What a user may set, command by command, in groups: a group's docstring is its title. Without JAX."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jvdiff.config import option
from jvdiff.models.options import family, follow_symlinks, profile
from jvdiff.runtime.peers import Processes

DTYPES = ("float32", "float16", "bfloat16")


def _vae_decode() -> Any:
    meaning = "how frames are decoded; none: bf16 on a GPU (tf32 with precision=float32), exact elsewhere"
    return option(None, meaning, choices=("exact", "tf32", "bf16"))


# ------------------------------------------------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class Content:
    """what to make"""

    prompt: str | tuple[str, ...] | None = option(None, "a text, or a tuple of them: ('one', 'two')", prose=True)
    prompts: str | None = option(
        None,
        "a file of them: text, JSONL, a JSON array or CSV, with id, seed and settings (docs/sampling.md)",
        path=True,
    )
    class_label: int | str | tuple[Any, ...] | None = option(None, "a class by name or number, or a tuple of them")
    image: str | None = option(None, "a picture's file: what the first frame shows, for models that take it", path=True)
    last_image: str | None = option(None, "the picture that the last frame shows, a file as image is", path=True)
    seed: int | None = option(None, "video i gets seed + i; none draws one and prints it")
    seeds: str | None = option(None, "in place of seed: 0:16 makes sixteen videos of each prompt; or a list, 3,5,8")
    part: str | None = option(None, "3/16 makes the third of sixteen equal parts of the videos")


@dataclass(frozen=True)
class Weights:
    """weights and devices"""

    checkpoint: str | None = option(
        None, "a Hugging Face (diffusers) folder, what `convert` made of one, or the name of one that ships", path=True
    )
    family: str | None = family()
    precision: str | None = option(None, "none: what the device is good at", choices=("float32", "bfloat16"))
    vae_decode: str | None = _vae_decode()
    mesh: str | dict[str, int] | None = option(
        None, "several devices: sequence=4,tensor=2, or auto (the smallest that fits); none: one"
    )
    in_turn: str | None = option(
        None,
        "parts whose weights are on the device only while they work: text_encoder,transformer, or all, or off; none: "
        "as few as memory asks for",
    )
    compile_cache: str | None = option(
        None, 'a folder of your own, or "off"; none: the user\'s cache folder', path=True
    )
    follow_symlinks: bool = follow_symlinks()


@dataclass(frozen=True)
class Output:
    """output"""

    output: str = option("out", "the folder of the files", path=True)
    save_arrays: bool = option(False, "NAME.npz too: latents float32 [T,H,W,C] and video uint8 [F,Y,X,3]")
    resume: str | None = option(None, "a .state folder, to go on with", path=True)
    stop_at: int | None = option(None, "stop after this step and save the state", low=1)
    preview_every: int = option(0, "write NAME.preview.png, a rough strip of all latent frames, every N steps", low=0)
    profile: str | None = profile()  # of the first video


@dataclass(frozen=True)
class Plan:
    """plan"""

    plan: bool = option(False, "print what it would take, without weights, and exit")
    plan_target: str | None = option(
        None, "h200, h100, b200, a100, rtx_4090, rtx_5090: plan for that, or a mesh of those, not for what is here"
    )


BEFORE, AFTER = (Content,), (Weights, Output, Plan, Processes)  # the settings of the family stand between them


# ------------------------------------------------------------------------------------------------------------ streaming


@dataclass(frozen=True)
class StreamContent:
    """what to make"""

    prompt: str | None = option(None, "of chunk 0 and those that follow", prose=True)
    then: dict[int, str] | None = option(
        None, "prompts by the chunk from which they hold: --then.10=TEXT; with --prompt, the file's are put aside"
    )
    negative_prompt: str | None = option(None, "what guidance leads away from", prose=True)
    reencode: bool = option(False, "at a change of the prompt, see the past as if it had been made under the new one")
    image: str | None = option(None, "a picture's file to begin with, for a pipeline with an ImageEncoder", path=True)
    seed: int | None = option(None, "none draws one and prints it")
    chunks: int = option(0, "how many in all; 0: until Ctrl-C", low=0)
    fps: int | None = option(None, "frames a second; only written into the file", low=1, high=240)


@dataclass(frozen=True)
class StreamModel:
    """pipeline, weights and devices"""

    checkpoint: str | None = option(
        None,
        "a causal repository: a Hugging Face folder, what `convert` made of one, or the name of one that ships",
        path=True,
    )
    family: str | None = family()
    pipeline: dict[str, Any] | None = option(
        None,
        "other values of the repository's StreamInferencePipelineConfig: --pipeline.PATH=VALUE, for instance PATH "
        "diffusion_model.transformer.window_size_t (docs/streaming.md)",
    )
    precision: str | None = option(None, "none: what the device is good at", choices=("float32", "bfloat16"))
    vae_decode: str | None = _vae_decode()
    mesh: str | dict[str, int] | None = option(None, "several devices: sequence=4,tensor=2; none: one")
    timed: bool = option(True, "milliseconds of each stage, for which each is waited for; false: a little faster")
    compile_cache: str | None = option(
        None, 'a folder of your own, or "off"; none: the user\'s cache folder', path=True
    )
    follow_symlinks: bool = follow_symlinks()


@dataclass(frozen=True)
class StreamOutput:
    """output"""

    output: str = option("out", "the folder of the files", path=True)
    name: str | None = option(None, "of the files; none: from prompt and seed")
    resume: str | None = option(None, "a .state folder; goes on in its video, up to `chunks` in all", path=True)
    save_every: int = option(0, "save the state every N chunks and at the end; 0: when interrupted only", low=0)
    profile: str | None = profile()  # of the first chunks


STREAM = (StreamContent, StreamModel, StreamOutput)


# ------------------------------------------------------------------------------------------------------- other commands


@dataclass(frozen=True)
class Windows:
    """the table"""

    table: str = option("windows.json", "the file to write", path=True)
    tile: str = option("6x8x8", "tokens of a tile: frames x height x width")
    candidates: str | None = option(None, "windows in tiles to choose among, of about the same size: 3x3x3,1x5x7,3x1x9")
    mask_strategy: str | None = option(None, "a file of FastVideo's to make the table of, without a model", path=True)
    canvas: str | None = option(None, "with mask_strategy: tokens of its video, as 18x48x80")


@dataclass(frozen=True)
class Convert:
    """what to convert"""

    source: str | None = option(None, "a Diffusers folder, or a repository on the hub (OWNER/NAME)", path=True)
    revision: str | None = option(None, "branch, tag or commit of a repository on the hub")
    target: Path = option(None, "the Orbax directory to write")
    dtype: str | None = option(None, "of the large parts; none: as stored", choices=DTYPES)
    overwrite: bool = option(False, "replace a directory that was converted before")
    verify: bool = option(False, "read the target again; without a source that alone")
    allow_nonfinite: bool = option(False, "keep NaN and infinity in the weights")
    follow_symlinks: bool = follow_symlinks()
    family: str | None = family()


@dataclass(frozen=True)
class Verify:
    """how repositories are read"""

    follow_symlinks: bool = option(False, "allow links to files elsewhere")
    family: str | None = family()


@dataclass(frozen=True)
class Doctor:
    """what must be there"""

    devices: int | None = option(None, "GPUs; fewer are exit status 7", low=1)
    limit: float = option(120.0, "seconds for each examination", low=1)


@dataclass(frozen=True)
class Tune:
    """what to time"""

    seconds: int = option(180, "how long it may take; the most valuable shapes come first", low=1)
    only: str = option("", 'shapes and kernels whose line contains this: "STA", "480p", "forward"')
    output: Path | None = option(None, "the file of cuts; none: this machine's own, ~/.cache/jvdiff/tuned.json")
    target: str | None = option(None, "no GPU: compile every cut for this one, and print what it takes of it (h200)")


@dataclass(frozen=True)
class ToHf:
    """what to export"""

    source: Path = option(None, "an Orbax directory with all components: converted, or trained")
    target: Path = option(None, "the folder to write")
    dtype: str | None = option(None, "of all weights; none: as stored", choices=DTYPES)
    vae: Path | None = option(None, "a trained VAE that takes the place of the source's")
    follow_symlinks: bool = follow_symlinks()
    family: str | None = family()


@dataclass(frozen=True)
class Digits:
    """what to draw"""

    output: Path = option(None, "a folder that does not exist yet")
    clips: int = option(None, "how many")
    frames: int = option(17, "of each clip, at most 29")
    seed: int = option(0, "of what is drawn")


@dataclass(frozen=True)
class Sharding:
    """what to print"""

    leaves: bool = option(False, "a line for each leaf too: path, shape, dtype, PartitionSpec, bytes")
