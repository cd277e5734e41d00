"""HunyuanVideo as a family: text-to-video with a guidance that the transformer is told.

    B batch · T latent frames · H W latent grid · C latent channels

Source: the published repository hunyuanvideo-community/HunyuanVideo as diffusers' HunyuanVideoPipeline runs it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jvdiff.config import known_fields, multiple, tell_once
from jvdiff.diffusion import samplers
from jvdiff.errors import UsageError
from jvdiff.kernels.patterns import WindowTable
from jvdiff.kernels.patterns import read as read_pattern
from jvdiff.models import vae_tiles
from jvdiff.models.family import Clip, Family, Files, Forward, Models, Part, Segment
from jvdiff.models.hunyuan_video import (
    conditions,
    config,
    decoding,
    dit,
    names,
    original,
    places,
    plan,
    prompts,
    vae,
    vae_config,
    vae_names,
)
from jvdiff.models.hunyuan_video.conditions import Condition, Inputs
from jvdiff.models.hunyuan_video.settings import Settings, scheduled
from jvdiff.models.text import byte_pairs, clip_text, clip_text_names, llama, llama_names
from jvdiff.models.text import tokenizer as tokenizers
from jvdiff.sharding import MeshShape, Sizes
from jvdiff.sharding.rules import REPLICATED
from jvdiff.types import Array, Params
from jvdiff.weights.safetensors import read_json

# ---------------------------------------------------------------------------------------------------------- the folders


TRANSFORMER = Part(
    config=config.DiTConfig,
    classes=("HunyuanVideoTransformer3DModel",),
    abstract=dit.abstract_params,
    places=places.DIT,
    names=names.transformer,
    renamed=original.renamed,
    precision="transformer",
    published=("diffusers", lambda cfg: "HunyuanVideoTransformer3DModel"),
)
VAE = Part(
    config=vae_config.VAEConfig,
    classes=("AutoencoderKLHunyuanVideo",),
    abstract=vae.abstract_params,
    places=REPLICATED,
    names=vae_names.vae,
    precision="vae",
    published=("diffusers", lambda cfg: "AutoencoderKLHunyuanVideo"),
    keeps_dtype=True,
)
TEXT_ENCODER = Part(
    config=llama.Config,
    classes=("llama",),
    abstract=llama.abstract_params,
    places=llama.PLACES,
    names=lambda cfg: llama_names.RULES,
    precision="text_encoder",
    published=("transformers", lambda cfg: "LlamaModel"),
    stem="model",
    ignored=llama_names.ignored,
)
TEXT_ENCODER_2 = Part(
    config=clip_text.Config,
    classes=("clip_text_model",),
    abstract=clip_text.abstract_params,
    places=clip_text.PLACES,
    names=lambda cfg: clip_text_names.RULES,
    precision="text_encoder",
    published=("transformers", lambda cfg: "CLIPTextModel"),
    stem="model",
    ignored=lambda cfg: clip_text_names.IGNORED,
)
TOKENIZER = Files(
    ("*.json",),
    byte_pairs.load,
    ("transformers", lambda tokenizer: "LlamaTokenizerFast"),
    opened=("tokenizer.json",),
)
TOKENIZER_2 = Files(("*.json", "*.txt"), byte_pairs.load_clip, ("transformers", lambda tokenizer: "CLIPTokenizer"))
SCHEDULER = Files(
    ("scheduler_config.json",),
    lambda folder: read_json(folder / "scheduler_config.json"),
    ("diffusers", lambda config: config["_class_name"]),
)


def _misfits(models: Models) -> str | None:
    """What of a repository does not fit together."""
    transformer, encoder, pooled = (models.configs[name] for name in ("transformer", "text_encoder", "text_encoder_2"))
    takes = transformer.in_channels, transformer.out_channels, transformer.text_embed_dim
    channels = models.configs["vae"].latent_channels
    if takes != (channels, channels, encoder.hidden_size):
        return (
            f"the transformer takes {takes[0]} latent channels, gives {takes[1]}, and takes text of width {takes[2]};\n"
            f"expected {channels} and {channels} with this VAE, and text of {encoder.hidden_size}."
        )
    if transformer.pooled_projection_dim != pooled.hidden_size:
        return (
            f"the transformer takes a pooled text of width {transformer.pooled_projection_dim}; text_encoder_2 gives "
            f"{pooled.hidden_size}."
        )
    known_fields("model_index.json", {k: v for k, v in models.index.items() if not isinstance(v, list)}, ())
    if not models.files:
        return None
    tokenizers.check_vocabulary(models.files["tokenizer"], encoder.vocab_size)
    tokenizers.check_vocabulary(models.files["tokenizer_2"], pooled.vocab_size)
    return prompts.misfit(models.files["tokenizer"])


# ------------------------------------------------------------------------------------------------- what settings mean


def _complete(models: Models, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The repository's defaults and the given values; solver, shift and noise levels come from scheduler_config.json
    where neither has them. A solver or a grid that is a list says how many steps there are, unless `steps` is given.
    """
    values, scheduler = {**defaults, **given}, models.files.get("scheduler")
    if scheduler is not None and not {"solver", "shift", "grid"} <= values.keys():
        asked = scheduled(scheduler)
        if samplers.own_steps(str(values.get("solver"))):  # timesteps of a training table, which no file bends
            asked = {name: asked[name] for name in ("solver", "shift")}
        values = {**asked, **values}
    if isinstance(tiles := values.get("vae_tiles"), vae_tiles.Tiles):
        values["vae_tiles"] = str(tiles)
    listed = samplers.own_steps(str(values.get("solver")), str(values.get("grid")))
    return values | ({"steps": listed} if listed and "steps" not in given else {})


def _check_prompt(models: Models, prompt: Any) -> str:
    return tokenizers.check_prompt(prompt)


def make_clip(models: Models, settings: Settings) -> Clip:
    """Derives everything that the settings mean.

    Raises:
        UsageError: a size that the models cannot make (with the nearest), a pattern or an implementation they lack.
    """
    transformer, vae = models.configs["transformer"], models.configs["vae"]
    grid = _grid(models, settings)
    pattern = read_pattern(settings.pattern, transformer.num_attention_heads, transformer.layers)
    if isinstance(settings.attention, str) and settings.attention not in pattern.implementations:
        expected = ", ".join(pattern.implementations)
        raise UsageError(f"attention is {settings.attention!r}; expected one of {expected}.")
    if settings.negative_prompt and settings.negative_prompt.strip():
        tokenizers.check_prompt(settings.negative_prompt, "negative_prompt")
    sampler = samplers.read(settings.solver, settings.steps, settings.shift, settings.grid, settings.shift_terminal)
    if isinstance(pattern, WindowTable):
        t, h, w = (n // p for n, p in zip(grid, transformer.patch, strict=True))
        pattern = pattern.at(sampler.make().timesteps.tolist(), (t, h, w))
    tiles = vae_tiles.read(settings.vae_tiles)
    if tiles is not None:
        tiles.check(vae.spatial_factor)
    return Clip(
        settings=settings,
        frames=(settings.num_frames, settings.height, settings.width),
        latents=(*grid, vae.latent_channels),
        tokens=plan.mesh_sizes(transformer, grid, 1, pattern).tokens,
        sampler=sampler,
        segments=_segments(settings, sampler, pattern, pattern.full(False)),
        attention=settings.attention,
        vae_tiles=tiles,
    )


def _grid(models: Models, settings: Settings) -> tuple[int, int, int]:
    """(T,H,W) of a clip's latents; an invalid size raises UsageError, with the nearest valid one."""
    vae, (time, height, width) = models.configs["vae"], models.configs["transformer"].patch
    multiple("num_frames", settings.num_frames, time * vae.temporal_factor, 1, 2**16, extra=1)
    for name, patch in (("height", height), ("width", width)):
        unit = vae.spatial_factor * patch
        multiple(name, getattr(settings, name), unit, unit, 2**10 * unit)
    frames = 1 + (settings.num_frames - 1) // vae.temporal_factor
    return frames, settings.height // vae.spatial_factor, settings.width // vae.spatial_factor


def _segments(settings: Settings, sampler: samplers.Sampler, pattern: Any, full: Any) -> tuple[Segment, ...]:
    """Steps under one pattern each: the first `dense_steps` are under the one that leaves nothing out.

    A second pass is made where `true_guidance` is above 1 and there is a negative prompt, which may be empty; what
    either does without the other is nothing, as in diffusers, and is told.
    """
    against = settings.negative_prompt is not None
    if against != (settings.true_guidance > 1):
        there, lacks = ("negative_prompt", "true_guidance above 1") if against else ("true_guidance", "negative_prompt")
        tell_once(f"{there} is given without {lacks}, and does nothing")
    guidance = settings.true_guidance if against else 1.0
    dense = 0 if pattern == full else settings.dense_steps or 0
    if dense >= sampler.steps:
        raise UsageError(
            f"dense_steps is {dense} of {sampler.steps} steps, which leaves none for the pattern "
            f"{settings.pattern:.80}; expected 0 to {sampler.steps - 1}, or pattern=dense."
        )
    cuts = sorted({0, dense, sampler.steps})
    return tuple(
        Segment(a, b, "transformer", guidance, full if a < dense else pattern) for a, b in itertools.pairwise(cuts)
    )


def _unit(models: Models) -> int:
    return models.configs["vae"].spatial_factor * models.configs["transformer"].patch_size


def _mesh_sizes(models: Models, clip: Clip, clips: int, shape: MeshShape) -> Sizes:
    """What a mesh must divide to denoise `clips` clips at once, in every segment."""
    return _sizes(models, clip, clips, shape, clip.segments[-1].pattern)  # the first ones are no more particular


def _sizes(models: Models, clip: Clip, clips: int, shape: MeshShape, pattern: Any) -> Sizes:
    branches = 2 if clip.guided and clip.batched(clips, shape) else 1
    return plan.mesh_sizes(models.configs["transformer"], clip.latents[:3], clips * branches, pattern)


# ------------------------------------------------------------------------------------------------------- transformer


def _network(models: Models, segment: Segment, forward: Forward) -> Callable[..., Array]:
    return _velocity(models.configs[segment.part], forward)


@functools.lru_cache(maxsize=8)  # jit compiles once for each function object
def _velocity(cfg: config.DiTConfig, forward: Forward) -> Callable[..., Array]:
    how: Any = {name: getattr(forward, name) for name in ("pattern", "implementation", "placement", "dtype")}

    def network(params: Params, x: Array, t: Array, condition: Condition) -> Array:
        text, mask, pooled, guidance = condition
        return dit.velocity(params, cfg, x, t, text, mask, pooled, guidance, **how)

    return network


def _attention(models: Models, clip: Clip, forward: Forward, inputs: Inputs) -> Mapping[str, str]:
    """One kind: of video and text together."""
    transformer, (t, h, w) = models.configs["transformer"], clip.latents[:3]
    grid = tuple(n // p for n, p in zip((t, h, w), transformer.patch, strict=True))
    rows = clip.tokens + inputs.tokens.ids.shape[1] - prompts.CROP
    shape = 1, rows, transformer.num_attention_heads, transformer.attention_head_dim
    tokens = jax.ShapeDtypeStruct(shape, jnp.dtype(forward.dtype))
    chosen = forward.pattern.choose(tokens, grid, implementation=forward.implementation, target=forward.target)
    if reason := forward.pattern.unavailable(chosen, forward.target):
        raise NotImplementedError(reason)
    return {"self": chosen}


# ------------------------------------------------------------------------------------------------------------- values


_PUBLISHED = Models(
    {
        "transformer": config.HUNYUAN_VIDEO,
        "vae": vae_config.HUNYUAN_VIDEO_VAE,
        "text_encoder": llama.LLAMA_3_8B,
        "text_encoder_2": clip_text.CLIP_L,
    },
    {},
    {},
)
TEXT_TO_VIDEO = Family(
    name="HunyuanVideo text-to-video",
    pipeline="HunyuanVideoPipeline",
    parts={"transformer": TRANSFORMER, "vae": VAE, "text_encoder": TEXT_ENCODER, "text_encoder_2": TEXT_ENCODER_2},
    files={"scheduler": SCHEDULER, "tokenizer": TOKENIZER, "tokenizer_2": TOKENIZER_2},
    settings=Settings,
    subject="prompts",
    unit=_unit,
    misfits=_misfits,
    complete=_complete,
    check_subject=_check_prompt,
    clip=make_clip,
    mesh_sizes=_mesh_sizes,
    inputs=conditions.inputs,
    longest=conditions.longest,
    encode=conditions.encode,
    network=_network,
    decode=decoding.decode,
    preview=decoding.preview,
    attention=_attention,
    describe=lambda models, prompt: {"prompt": prompt},
    published=dict.fromkeys(("HunyuanVideo", "FastHunyuan-diffusers"), _PUBLISHED),
)
