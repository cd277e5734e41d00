"""Wan 2.1 as families: text-to-video at once, and chunk by chunk (Self-Forcing).

    B batch · T latent frames · H W latent grid · C latent channels · S text tokens · D text width

Source: the published repositories Wan-AI/Wan2.1-T2V-*-Diffusers as diffusers' WanPipeline runs them, and
wlsaidhi/SFWan2.1-T2V-1.3B-Diffusers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jvdiff.config import known_fields, multiple
from jvdiff.diffusion import samplers
from jvdiff.errors import UsageError
from jvdiff.kernels.patterns import Pattern, WindowTable
from jvdiff.kernels.patterns import read as read_pattern
from jvdiff.kernels.tiles import Grid
from jvdiff.models import wan
from jvdiff.models.family import Clip, Family, Files, Forward, Models, Part, Run, Segment, Stage
from jvdiff.models.pixels import nonfinite_share, to_pixels
from jvdiff.models.text import tokenizer as tokenizers
from jvdiff.models.text import umt5, umt5_names
from jvdiff.models.vision import clip, clip_names, pictures
from jvdiff.models.wan import conditions, names, places
from jvdiff.models.wan.conditions import TEXT_LENGTH, Condition, Inputs
from jvdiff.models.wan.settings import Settings, scheduled
from jvdiff.sharding import MeshShape, Placement, Sizes
from jvdiff.sharding.rules import REPLICATED
from jvdiff.types import Array, Params
from jvdiff.weights.safetensors import read_json

GRIDS = {"diffusers": "diffusers", "wan": "training"}  # the setting `grid`: what `diffusion.schedules` calls it
_PIPELINE_OPTIONS = ("boundary_ratio", "expand_timesteps")  # of Wan 2.2; diffusers writes that they are off
_CAUSAL_SCHEDULERS = ("SelfForcingFlowMatchScheduler", "UniPCMultistepScheduler")


# ---------------------------------------------------------------------------------------------------------- the folders


def _with_fields(config: Mapping[str, Any], tensors: Any) -> Mapping[str, Any]:
    """Files do not say in config.json whether the blocks have the gate of video sparse attention, or the norm that
    nobody uses; their tensors do."""
    shown = {"gate_compress": f"{names.GATE}.weight", "image_q_norm": names.IMAGE_Q_NORM}
    return {**{field: True for field, name in shown.items() if name.format(layer=0) in tensors}, **config}


TRANSFORMER = Part(
    config=wan.DiTConfig,
    classes=("WanTransformer3DModel", "CausalWanTransformer3DModel"),
    abstract=wan.abstract_params,
    places=places.DIT,
    names=names.transformer,
    precision="transformer",
    published=("diffusers", lambda cfg: cfg.to_json()["_class_name"]),
    complete=_with_fields,
)
VAE = Part(
    config=wan.VAEConfig,
    classes=("AutoencoderKLWan",),
    abstract=wan.abstract_params,
    places=REPLICATED,
    names=names.vae,
    precision="vae",
    published=("diffusers", lambda cfg: "AutoencoderKLWan"),
    keeps_dtype=True,
)
TEXT_ENCODER = Part(
    config=umt5.Config,
    classes=("umt5",),
    abstract=umt5.abstract_params,
    places=umt5.PLACES,
    names=lambda cfg: umt5_names.RULES,
    precision="text_encoder",
    published=("transformers", lambda cfg: "UMT5EncoderModel"),
    stem="model",
)
IMAGE_ENCODER = Part(
    config=clip.Config,
    classes=("clip_vision_model",),
    abstract=clip.abstract_params,
    places=clip.PLACES,
    names=clip_names.rules,
    precision="image_encoder",
    published=("transformers", clip.class_of),
    stem="model",
    ignored=lambda cfg: clip_names.IGNORED,
    complete=clip.complete,
    optional=True,
)
IMAGE_PROCESSOR = Files(
    (pictures.FILE,), pictures.read_processor, ("transformers", lambda processor: "CLIPImageProcessor"), optional=True
)
TOKENIZER = Files(
    ("*.json", "*.model", "*.txt"),
    tokenizers.load,
    ("transformers", lambda tokenizer: "T5TokenizerFast"),
    opened=tokenizers.FILES,
)
SCHEDULER = Files(
    ("scheduler_config.json",),
    lambda folder: read_json(folder / "scheduler_config.json"),
    ("diffusers", lambda config: config["_class_name"]),
)


def _misfits(models: Models) -> str | None:
    """What of a repository does not fit together."""
    dit, vae, text = (models.configs[name] for name in ("transformer", "vae", "text_encoder"))
    conditioned = models.index.get("_class_name") == "WanImageToVideoPipeline"
    channels = vae.z_dim + (conditions.channels(vae) if conditioned else 0)
    if (dit.in_channels, dit.out_channels, dit.text_dim) != (channels, vae.z_dim, text.d_model):
        return (
            f"the transformer takes {dit.in_channels} latent channels, gives {dit.out_channels}, and takes text of "
            f"width {dit.text_dim};\nexpected {channels} and {vae.z_dim} with this VAE, and text of {text.d_model}."
        )
    if (problem := _image_misfits(models, dit)) is not None:
        return problem
    pipeline, expected = models.index.get("_class_name"), _pipeline_of(dit)
    if pipeline != expected:
        return (
            f"model_index.json describes a {pipeline}, transformer/config.json a {dit.to_json()['_class_name']}; "
            f"expected {expected} with that."
        )
    values = {name: value for name, value in models.index.items() if not isinstance(value, list)}
    off = [name for name in _PIPELINE_OPTIONS if values.get(name) in (None, False)]
    known_fields("model_index.json", values, ("_class_name", *off))
    if "tokenizer" in models.files:
        tokenizers.check_vocabulary(models.files["tokenizer"], text.vocab_size)
    scheduler = models.files.get("scheduler")
    if dit.causal and scheduler is not None and scheduler.get("_class_name") not in _CAUSAL_SCHEDULERS:
        return (
            f"the scheduler is a {scheduler.get('_class_name')}; a causal transformer needs one of "
            f"{', '.join(_CAUSAL_SCHEDULERS)}."
        )
    return None


def _image_misfits(models: Models, dit: wan.DiTConfig) -> str | None:
    """What does not fit together of the transformer and the image encoder, if there is one."""
    encoder, processor = models.configs.get("image_encoder"), models.files.get("image_processor")
    if dit.image_dim is None and encoder is None:
        return None
    if encoder is None or dit.image_dim != encoder.hidden_size:
        given = "there is none" if encoder is None else f"the one that is there gives {encoder.hidden_size}"
        return f"the transformer's image_dim is {dit.image_dim}: what its image encoder gives; {given}."
    if dit.pos_embed_seq_len not in (None, 2 * encoder.tokens):
        return (
            f"the transformer has places for {dit.pos_embed_seq_len} picture tokens (pos_embed_seq_len); the image "
            f"encoder makes {encoder.tokens} of each of two pictures."
        )
    if models.files and getattr(processor, "side", None) != encoder.image_size:
        made = "there is no image processor" if processor is None else f"the image processor makes {processor.side}"
        return f"the image encoder takes pictures of {encoder.image_size} pixels a side; {made}."
    return None


def _pipeline_of(dit: wan.DiTConfig) -> str:
    if dit.causal:
        return "WanCausalDMDPipeline"
    return "WanPipeline" if dit.in_channels == dit.out_channels else "WanImageToVideoPipeline"


# ------------------------------------------------------------------------------------------------- what settings mean


def _complete(models: Models, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The repository's defaults and the given values; solver, shift and grid come from scheduler_config.json where
    neither has them.

    A solver that lists its own timesteps says how many steps there are, unless `steps` is given too.
    """
    values, scheduler = {**defaults, **given}, models.files.get("scheduler")
    if scheduler is not None and not {"solver", "shift", "grid"} <= values.keys():
        values = {**scheduled(scheduler), **values}
    listed = samplers.own_steps(str(values.get("solver")))
    return values | ({"steps": listed} if listed and "steps" not in given else {})


def _check_prompt(models: Models, prompt: Any) -> str:
    return tokenizers.check_prompt(prompt)


def make_clip(models: Models, settings: Settings) -> Clip:
    """Derives everything that the settings mean.

    Raises:
        UsageError: a size that the models cannot make (with the nearest), a pattern or an implementation they lack.
    """
    dit, vae = models.configs["transformer"], models.configs["vae"]
    _check_sizes(settings, dit, vae)
    pattern = read_pattern(settings.pattern, dit.num_attention_heads, dit.num_layers)
    if isinstance(settings.attention, str) and settings.attention not in pattern.implementations:
        expected = ", ".join(pattern.implementations)
        raise UsageError(f"attention is {settings.attention!r}; expected one of {expected}.")
    if settings.negative_prompt:
        tokenizers.check_prompt(settings.negative_prompt, "negative_prompt")
    sampler = samplers.read(settings.solver, settings.steps, settings.shift, GRIDS[settings.grid])
    frames = 1 + (settings.num_frames - 1) // vae.temporal_factor
    grid = frames, settings.height // vae.spatial_factor, settings.width // vae.spatial_factor
    if isinstance(pattern, WindowTable):
        t, h, w = (n // p for n, p in zip(grid, dit.patch_size, strict=True))
        pattern = pattern.at(sampler.make().timesteps.tolist(), (t, h, w))
    return Clip(
        settings=settings,
        frames=(settings.num_frames, settings.height, settings.width),
        latents=(*grid, vae.z_dim),
        tokens=wan.mesh_sizes(dit, grid, 1, pattern).tokens,
        sampler=sampler,
        segments=_segments(settings, sampler.steps, pattern, dit.gate_compress),
        attention=settings.attention,
    )


def _segments(settings: Settings, steps: int, pattern: Pattern, gated: bool) -> tuple[Segment, ...]:
    """The first `dense_steps`, under the pattern that leaves nothing out, and the others; one if both are the same."""
    full, border = pattern.full(gated), settings.dense_steps or 0
    if pattern == full:
        border = 0
    if border >= steps:
        raise UsageError(
            f"dense_steps is {border} of {steps} steps, which leaves none for the pattern {settings.pattern:.80}; "
            f"expected 0 to {steps - 1}, or pattern=dense."
        )
    spans = ((0, border, full), (border, steps, pattern))
    return tuple(Segment(a, b, "transformer", settings.guidance, each) for a, b, each in spans if a < b)


def _check_sizes(settings: Settings, dit: wan.DiTConfig, vae: wan.VAEConfig) -> None:
    most, time = dit.rope_max_seq_len, vae.temporal_factor
    multiple("num_frames", settings.num_frames, time, 1, (most - 1) * time + 1, extra=1)
    for name, patch in zip(("height", "width"), dit.patch_size[1:], strict=True):
        unit = vae.spatial_factor * patch
        multiple(name, getattr(settings, name), unit, unit, most * unit)


def _mesh_sizes(models: Models, clip: Clip, clips: int, shape: MeshShape) -> Sizes:
    """What a mesh must divide to denoise `clips` clips at once."""
    return _sizes(models, clip, clips, shape, clip.segments[-1].pattern)  # the first ones are no more particular


def _sizes(models: Models, clip: Clip, clips: int, shape: MeshShape, pattern: Pattern) -> Sizes:
    branches = 2 if clip.guided and clip.batched(clips, shape) else 1
    return wan.mesh_sizes(models.configs["transformer"], clip.latents[:3], clips * branches, pattern)


# ------------------------------------------------------------------------------------------------------- transformer


def _network(models: Models, segment: Segment, forward: Forward) -> Callable[..., Array]:
    return _velocity(models.configs[segment.part], forward)


@functools.lru_cache(maxsize=8)  # jit compiles once for each function object
def _velocity(cfg: wan.DiTConfig, forward: Forward) -> Callable[..., Array]:
    how: Any = {name: getattr(forward, name) for name in ("pattern", "implementation", "placement", "dtype")}

    def network(params: Params, x: Array, t: Array, condition: Condition) -> Array:
        x, text, image = conditions.network_input(condition, x), condition.text, condition.image
        return wan.velocity(params, cfg, x, t, text, image=image, text_length=TEXT_LENGTH, **how)

    return network


def _window_losses(models: Models, part: str, forward: Forward, tile: Grid, candidates: Sequence[Grid]) -> Any:
    how: Any = dict(tile=tile, candidates=tuple(candidates), text_length=TEXT_LENGTH, dtype=forward.dtype)

    def network(params: Params, x: Array, t: Array, condition: Condition) -> tuple[Array, Array]:
        x, image = conditions.network_input(condition, x), condition.image
        return wan.window_losses(params, models.configs[part], x, t, condition.text, image=image, **how)

    return network


def _attention(models: Models, clip: Clip, forward: Forward, inputs: Inputs) -> Mapping[str, str]:
    dit, placement = models.configs["transformer"], forward.placement
    shape = placement and placement.shape
    choices = wan.attention_choice(
        dit,
        clip.latents[:3],
        pattern=forward.pattern,
        text_rows=inputs.tokens.ids.shape[1],
        dtype=jnp.dtype(forward.dtype),
        implementation=forward.implementation,
        ring=shape is not None and _sizes(models, clip, 1, shape, forward.pattern).ring(shape) > 1,
        target=forward.target,
    )
    if reason := forward.pattern.unavailable(choices["self"], forward.target):
        raise NotImplementedError(reason)
    return choices


# --------------------------------------------------------------------------------------------------------------- VAE


def _decode(
    models: Models, clip: Clip, forward: Forward, run: Run, latents: Array
) -> Iterator[tuple[Array, Array, int]]:
    """One latent frame at a time: device memory does not depend on T."""
    program, cache = _decode_program(models.configs["vae"], forward.placement, forward.decode), None
    for t in range(clip.latents[0]):
        stage = Stage("decode next" if t else "decode first", "vae", program, pictures=clip.latents[1:3])
        pixels, bad, cache = run(stage, latents[:, t : t + 1], cache)  # [1,1,H,W,C] -> [1,F,Y,X,3]
        yield pixels, bad, t + 1


@functools.lru_cache(maxsize=8)
def _decode_program(cfg: wan.VAEConfig, placement: Placement | None, arithmetic: str | None) -> Any:
    """jitted (params, normalised latents [1,1,H,W,C], cache or None) -> (uint8 [1,F,Y,X,3], non-finite share, cache).

    F is 1 without a cache and 4 with one; the cache is donated.
    """

    def decode(params: Params, latents: Array, cache: Any) -> tuple[Array, Array, Any]:
        latents = wan.denormalize_latents(cfg, latents)
        frames, cache = wan.decode_chunk(params, cfg, latents, cache, placement=placement, arithmetic=arithmetic)
        pixels, bad = to_pixels(frames), nonfinite_share(frames)
        if placement is not None:
            pixels, bad = placement.replicate((pixels, bad))
        return pixels, bad, cache

    return jax.jit(decode, donate_argnums=2)


def _preview(models: Models, forward: Forward) -> Stage:
    return Stage("preview", "vae", _first_frames(models.configs["vae"], forward.placement, forward.decode))


@functools.lru_cache(maxsize=8)
def _first_frames(cfg: wan.VAEConfig, placement: Placement | None, arithmetic: str | None) -> Any:
    """jitted (params, normalised latents [B,1,H,W,C]) -> float32 first frames [B,1,Y,X,3] in -1..1, for previews."""

    def first(params: Params, latents: Array) -> Array:
        latents = wan.denormalize_latents(cfg, latents)
        frames, _ = wan.decode_chunk(params, cfg, latents, None, placement=placement, arithmetic=arithmetic)
        return frames if placement is None else placement.replicate(frames)

    return jax.jit(first)


# ------------------------------------------------------------------------------------------------------------- values


def _published(dit: wan.DiTConfig, **more: Any) -> Models:
    """What a published repository says of itself."""
    return Models({"transformer": dit, "vae": wan.WAN_2_1_VAE, "text_encoder": umt5.UMT5_XXL, **more}, {}, {})


TEXT_TO_VIDEO = Family(
    name="Wan 2.1 text-to-video",
    pipeline="WanPipeline",
    parts={"transformer": TRANSFORMER, "vae": VAE, "text_encoder": TEXT_ENCODER},
    files={"scheduler": SCHEDULER, "tokenizer": TOKENIZER},
    settings=Settings,
    subject="prompts",
    misfits=_misfits,
    complete=_complete,
    check_subject=_check_prompt,
    clip=make_clip,
    mesh_sizes=_mesh_sizes,
    inputs=conditions.inputs,
    longest=conditions.longest,
    encode=conditions.encode,
    network=_network,
    decode=_decode,
    preview=_preview,
    attention=_attention,
    window_losses=_window_losses,
    describe=lambda models, prompt: {"prompt": prompt},
    published={
        "Wan2.1-T2V-1.3B-Diffusers": _published(wan.WAN_2_1_T2V_1_3B),
        "Wan2.1-T2V-14B-Diffusers": _published(wan.WAN_2_1_T2V_14B),
    },
)
IMAGE_TO_VIDEO = dataclasses.replace(
    TEXT_TO_VIDEO,
    name="Wan image-to-video",
    pipeline="WanImageToVideoPipeline",
    parts={**TEXT_TO_VIDEO.parts, "image_encoder": IMAGE_ENCODER},
    files={**TEXT_TO_VIDEO.files, "image_processor": IMAGE_PROCESSOR},
    takes=("image", "last_image"),  # the second where the network has no picture tokens, see `conditions.inputs`
    needs=("image",),
    unit=lambda models: models.configs["vae"].spatial_factor * models.configs["transformer"].patch_size[1],
    published={
        "Wan2.1-I2V-14B-480P-Diffusers": _published(wan.WAN_2_1_I2V_14B, image_encoder=clip.VIT_H_14),
        "Wan2.1-I2V-14B-720P-Diffusers": _published(wan.WAN_2_1_I2V_14B, image_encoder=clip.VIT_H_14),
    },
)
FIRST_LAST_FRAME = dataclasses.replace(
    IMAGE_TO_VIDEO,
    name="Wan first-last-frame to video",
    needs=("image", "last_image"),
    published={"Wan2.1-FLF2V-14B-720P-Diffusers": _published(wan.WAN_2_1_FLF2V_14B, image_encoder=clip.VIT_H_14)},
)
CAUSAL = dataclasses.replace(
    TEXT_TO_VIDEO, name="causal Wan 2.1 text-to-video", pipeline="WanCausalDMDPipeline", published={}, at_once=False
)
