"""Wan as families: text-to-video at once, with one transformer or two, with a picture or without, in few steps
(FastWan), and chunk by chunk (Self-Forcing).

    B batch · T latent frames · H W latent grid · C latent channels · S text tokens · D text width

Source: the published repositories Wan-AI/Wan2.1-T2V-*-Diffusers, Wan2.2-T2V-A14B-Diffusers and Wan2.2-TI2V-5B-Diffusers
as diffusers' WanPipeline runs them, Wan2.1-I2V-*, Wan2.1-FLF2V-* and Wan2.2-I2V-A14B-Diffusers as its
WanImageToVideoPipeline does, FastVideo/FastWan2.*-Diffusers as FastVideo's WanDMDPipeline does, and
wlsaidhi/SFWan2.1-T2V-1.3B-Diffusers.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jvdiff.config import known_fields, multiple
from jvdiff.diffusion import samplers
from jvdiff.diffusion.samplers import Sampler
from jvdiff.errors import UsageError
from jvdiff.kernels.patterns import Pattern, WindowTable
from jvdiff.kernels.patterns import read as read_pattern
from jvdiff.kernels.tiles import Grid
from jvdiff.models import vae_tiles, wan
from jvdiff.models.family import Clip, Embedding, Family, Files, Forward, Models, Part, Segment
from jvdiff.models.text import tokenizer as tokenizers
from jvdiff.models.text import umt5, umt5_names
from jvdiff.models.vae_tiles import Tiles
from jvdiff.models.vision import clip, clip_names, pictures
from jvdiff.models.wan import conditions, decoding, embeddings, names, places
from jvdiff.models.wan.conditions import TEXT_LENGTH, Condition, Inputs
from jvdiff.models.wan.config import EXPERTS, expert
from jvdiff.models.wan.settings import EXPANDED, Settings, boundary, few_steps, kind_defaults, scheduled, with_fields
from jvdiff.sharding import MeshShape, Sizes
from jvdiff.sharding.rules import REPLICATED
from jvdiff.types import Array, Params
from jvdiff.weights.safetensors import read_json

_CAUSAL_SCHEDULERS = ("SelfForcingFlowMatchScheduler", "UniPCMultistepScheduler")


# ---------------------------------------------------------------------------------------------------------- the folders


TRANSFORMER = Part(
    config=wan.DiTConfig,
    classes=("WanTransformer3DModel", "CausalWanTransformer3DModel"),
    abstract=wan.abstract_params,
    places=places.DIT,
    names=names.transformer,
    precision="transformer",
    published=("diffusers", lambda cfg: cfg.to_json()["_class_name"]),
    complete=with_fields,
    optional=True,  # one of EXPERTS may be missing, which `_misfits` knows
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
    experts = [models.configs[name] for name in EXPERTS if name in models.configs]
    if not experts:
        return "there is no transformer."
    dit, vae, text = experts[0], models.configs["vae"], models.configs["text_encoder"]
    if len({_interface(expert) for expert in experts}) > 1:
        return f"transformer and transformer_2 differ in what they take and give: {experts[0]}, {experts[1]}."
    pipeline, expected = models.index.get("_class_name"), _pipelines_of(dit, models.index)
    concatenated = pipeline == "WanImageToVideoPipeline" and not models.index.get(EXPANDED)
    channels = vae.z_dim + (conditions.channels(vae) if concatenated else 0)
    if (dit.in_channels, dit.out_channels, dit.text_dim) != (channels, vae.z_dim, text.d_model):
        return (
            f"the transformer takes {dit.in_channels} latent channels, gives {dit.out_channels}, and takes text of "
            f"width {dit.text_dim};\nexpected {channels} and {vae.z_dim} with this VAE, and text of {text.d_model}."
        )
    if (problem := _image_misfits(models, dit)) is not None:
        return problem
    if pipeline not in expected:
        return (
            f"model_index.json describes a {pipeline}, transformer/config.json a {dit.to_json()['_class_name']}; "
            f"expected {' or '.join(expected)} with that."
        )
    values = {name: value for name, value in models.index.items() if not isinstance(value, list)}
    known_fields("model_index.json", values, ("_class_name", EXPANDED, "boundary_ratio"))
    boundary(models.index)
    if "tokenizer" in models.files:
        tokenizers.check_vocabulary(models.files["tokenizer"], text.vocab_size)
    scheduler = models.files.get("scheduler")
    if dit.causal and scheduler is not None and scheduler.get("_class_name") not in _CAUSAL_SCHEDULERS:
        return (
            f"the scheduler is a {scheduler.get('_class_name')}; a causal transformer needs one of "
            f"{', '.join(_CAUSAL_SCHEDULERS)}."
        )
    return None


def _interface(dit: wan.DiTConfig) -> tuple[Any, ...]:
    """What two transformers of one clip have in common."""
    return dit.patch_size, dit.in_channels, dit.out_channels, dit.text_dim, dit.image_dim, dit.causal


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


def _pipelines_of(dit: wan.DiTConfig, index: Mapping[str, Any]) -> tuple[str, ...]:
    if dit.causal:
        return ("WanCausalDMDPipeline",)
    if dit.in_channels != dit.out_channels:
        return ("WanImageToVideoPipeline",)
    return ("WanPipeline", "WanDMDPipeline", *(["WanImageToVideoPipeline"] if index.get(EXPANDED) else []))


# ------------------------------------------------------------------------------------------------- what settings mean


def _complete(models: Models, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The repository's defaults and the given values; solver, shift and noise levels come from scheduler_config.json
    where neither has them, and the boundary between two transformers from model_index.json.

    A solver or a grid that is a list says how many steps there are, unless `steps` is given too. A boundary that is
    given, in either way, is the only one; a guidance that is given is that of both transformers.
    """
    second = models.configs.get("transformer_2")
    kind = dict(kind_defaults(models.configs["vae"].z_dim, second and second.in_channels))
    if "guidance" in {**defaults, **given}:
        kind.pop("guidance_2", None)
    values = {**kind, **defaults, **given}
    scheduler = models.files.get("scheduler")
    if not {"boundary", "boundary_step"} & values.keys():
        values |= boundary(models.index)
    elif "boundary_step" in given and "boundary" not in given:
        values.pop("boundary", None)
    if scheduler is not None and not {"solver", "shift", "grid"} <= values.keys():
        asked = scheduled(scheduler)
        if samplers.own_steps(str(values.get("solver"))):  # timesteps of a training table, which no file bends
            asked = {name: asked[name] for name in ("solver", "shift")}
        values = {**asked, **values}
    if isinstance(tiles := values.get("vae_tiles"), Tiles):
        values["vae_tiles"] = str(tiles)
    listed = samplers.own_steps(str(values.get("solver")), str(values.get("grid")))
    return values | ({"steps": listed} if listed and "steps" not in given else {})


def _complete_few_steps(models: Models, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> Mapping[str, Any]:
    dit = expert(models.configs)
    return _complete(models, {**few_steps(dit.in_channels, dit.gate_compress), **defaults}, given)


def _check_prompt(models: Models, prompt: Any) -> str:
    return tokenizers.check_prompt(prompt)


def make_clip(models: Models, settings: Settings) -> Clip:
    """Derives everything that the settings mean.

    Raises:
        UsageError: a size that the models cannot make (with the nearest), a pattern or an implementation they lack.
    """
    dit, vae = expert(models.configs), models.configs["vae"]
    _check_sizes(settings, dit, vae)
    pattern = read_pattern(settings.pattern, dit.num_attention_heads, dit.num_layers)
    if isinstance(settings.attention, str) and settings.attention not in pattern.implementations:
        expected = ", ".join(pattern.implementations)
        raise UsageError(f"attention is {settings.attention!r}; expected one of {expected}.")
    if settings.negative_prompt:
        tokenizers.check_prompt(settings.negative_prompt, "negative_prompt")
    levels = "training" if settings.grid == "wan" else settings.grid
    sampler = samplers.read(settings.solver, settings.steps, settings.shift, levels, settings.shift_terminal)
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
        segments=_segments(models, settings, sampler, pattern),
        attention=settings.attention,
        vae_tiles=_tiles(settings, vae),
    )


def _tiles(settings: Settings, vae: wan.VAEConfig) -> Tiles | None:
    tiles = vae_tiles.read(settings.vae_tiles)
    if tiles is not None:
        tiles.check(vae.spatial_factor)
    return tiles


def _segments(models: Models, settings: Settings, sampler: Sampler, pattern: Pattern) -> tuple[Segment, ...]:
    """Steps under one transformer and one pattern each: cut at the boundary, and behind the first `dense_steps`, which
    are under the pattern that leaves nothing out.

    Whether there is guidance at all is what `guidance` says, of both transformers.
    """
    full, dense = pattern.full(expert(models.configs).gate_compress), settings.dense_steps or 0
    if pattern == full:
        dense = 0
    if dense >= sampler.steps:
        raise UsageError(
            f"dense_steps is {dense} of {sampler.steps} steps, which leaves none for the pattern "
            f"{settings.pattern:.80}; expected 0 to {sampler.steps - 1}, or pattern=dense."
        )
    border = _border(models, settings, sampler)
    second = settings.guidance if settings.guidance_2 is None or settings.guidance <= 1 else settings.guidance_2
    cuts = sorted({0, dense, border, sampler.steps})
    return tuple(
        Segment(a, b, EXPERTS[a >= border], (settings.guidance, second)[a >= border], full if a < dense else pattern)
        for a, b in itertools.pairwise(cuts)
    )


def _border(models: Models, settings: Settings, sampler: Sampler) -> int:
    """The step with which the second transformer begins; all of them where there is only the first.

    Timesteps are compared as float32, which is how torch compares its integers with a boundary.

    Raises:
        UsageError: two boundaries, one for a single transformer, or steps of a transformer that is not there.
    """
    steps, ratio, step = sampler.steps, settings.boundary, settings.boundary_step
    if ratio is not None and step is not None:
        raise UsageError(f"boundary is {ratio} and boundary_step is {step}; leave one of them out.")
    if settings.guidance_2 is not None and "transformer_2" not in models.configs:
        raise UsageError(
            f"guidance_2 is {settings.guidance_2}, and these weights have no second transformer; leave it out."
        )
    if step is not None:
        border, where = min(step, steps), f"boundary_step {step}"
    elif ratio is not None:
        timesteps = np.asarray(sampler.schedule.timesteps, np.float32)
        border, where = int(np.sum(timesteps >= np.float32(1000 * ratio))), f"boundary {ratio}"
    else:
        border, where = steps, "no boundary"
    for name, first, last, other in zip(EXPERTS, (1, border + 1), (border, steps), ("=0", f"={steps}"), strict=True):
        if first <= last and name not in models.configs:
            raise UsageError(
                f"with {where}, steps {first} to {last} of {steps} are those of {name}, which these weights lack; "
                f"all are those of {next(iter({*EXPERTS} & models.configs.keys()))} with --boundary_step{other}."
            )
    return border


def _unit(models: Models) -> int:
    return models.configs["vae"].spatial_factor * expert(models.configs).patch_size[1]


def _check_sizes(settings: Settings, dit: wan.DiTConfig, vae: wan.VAEConfig) -> None:
    most, time = dit.rope_max_seq_len, vae.temporal_factor
    multiple("num_frames", settings.num_frames, time, 1, (most - 1) * time + 1, extra=1)
    for name, patch in zip(("height", "width"), dit.patch_size[1:], strict=True):
        unit = vae.spatial_factor * patch
        multiple(name, getattr(settings, name), unit, unit, most * unit)


def _mesh_sizes(models: Models, clip: Clip, clips: int, shape: MeshShape) -> Sizes:
    """What a mesh must divide to denoise `clips` clips at once, in every segment."""
    return _sizes(models, clip, clips, shape, clip.segments[-1].pattern)  # the first ones are no more particular


def _sizes(models: Models, clip: Clip, clips: int, shape: MeshShape, pattern: Pattern) -> Sizes:
    guided = all(segment.guidance != 1 for segment in clip.segments)
    branches = 2 if guided and clip.batched(clips, shape) else 1
    return wan.mesh_sizes(expert(models.configs), clip.latents[:3], clips * branches, pattern)


# ------------------------------------------------------------------------------------------------------- transformer


def _network(models: Models, segment: Segment, forward: Forward) -> Callable[..., Array]:
    return _velocity(models.configs[segment.part], forward)


@functools.lru_cache(maxsize=8)  # jit compiles once for each function object
def _velocity(cfg: wan.DiTConfig, forward: Forward) -> Callable[..., Array]:
    how: Any = {name: getattr(forward, name) for name in ("pattern", "implementation", "placement", "dtype")}

    def network(params: Params, x: Array, t: Array, condition: Condition) -> Array:
        if (first := condition.first) is not None:
            x = jnp.concatenate([first, x[:, 1:]], axis=1)  # [B,T,H,W,C], its first frame as given at every step
            t = jnp.stack([jnp.zeros_like(t), t], axis=1)  # [B] -> [B,2]
        x, text, image = conditions.network_input(condition, x), condition.text, condition.image
        return wan.velocity(params, cfg, x, t, text, image=image, text_length=TEXT_LENGTH, **how)

    return network


def _finish(clip: Clip, inputs: Inputs, both: tuple[Condition, Condition | None], latents: Array) -> Array:
    """The first frame as it was given; what the solver made of it is of no account."""
    first = both[0].first
    return latents if first is None else jnp.concatenate([first, latents[:, 1:]], axis=1)


def _window_losses(models: Models, part: str, forward: Forward, tile: Grid, candidates: Sequence[Grid]) -> Any:
    how: Any = dict(tile=tile, candidates=tuple(candidates), text_length=TEXT_LENGTH, dtype=forward.dtype)

    def network(params: Params, x: Array, t: Array, condition: Condition) -> tuple[Array, Array]:
        x, image = conditions.network_input(condition, x), condition.image
        return wan.window_losses(params, models.configs[part], x, t, condition.text, image=image, **how)

    return network


def _attention(models: Models, clip: Clip, forward: Forward, inputs: Inputs) -> Mapping[str, str]:
    dit, placement = expert(models.configs), forward.placement
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


# ------------------------------------------------------------------------------------------------------------- values


def _published(*experts: wan.DiTConfig, vae: wan.VAEConfig = wan.WAN_2_1_VAE, **index: Any) -> Models:
    """What a published repository says of itself."""
    configs: dict[str, Any] = {**dict(zip(EXPERTS, experts, strict=False)), "vae": vae, "text_encoder": umt5.UMT5_XXL}
    if experts[0].image_dim:
        configs["image_encoder"] = clip.VIT_H_14
    return Models(configs, {}, index)


TEXT_TO_VIDEO = Family(
    name="Wan text-to-video",
    pipeline="WanPipeline",
    parts={**dict.fromkeys(EXPERTS, TRANSFORMER), "vae": VAE, "text_encoder": TEXT_ENCODER},
    files={"scheduler": SCHEDULER, "tokenizer": TOKENIZER},
    settings=Settings,
    subject="prompts",
    instead={
        "image": "Wan2.2-TI2V-5B, Wan2.2-I2V-A14B, Wan2.1-I2V-14B-480P or -720P",
        "last_image": conditions.TWO_PICTURES,
    },
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
    window_losses=_window_losses,
    describe=lambda models, prompt: {"prompt": prompt},
    embeddings={"text_embeddings": Embedding("text_encoder", embeddings.text)},
    published={
        "Wan2.1-T2V-1.3B-Diffusers": _published(wan.WAN_2_1_T2V_1_3B),
        "Wan2.1-T2V-14B-Diffusers": _published(wan.WAN_2_1_T2V_14B),
        "Wan2.2-T2V-A14B-Diffusers": _published(wan.WAN_2_1_T2V_14B, wan.WAN_2_1_T2V_14B, boundary_ratio=0.875),
    },
)
TEXT_AND_IMAGE_TO_VIDEO = dataclasses.replace(
    TEXT_TO_VIDEO,
    name="Wan 2.2 text- and image-to-video",
    takes=("image",),
    finish=_finish,
    published={
        "Wan2.2-TI2V-5B-Diffusers": _published(wan.WAN_2_2_TI2V_5B, vae=wan.WAN_2_2_VAE, **{EXPANDED: True}),
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
    embeddings={**TEXT_TO_VIDEO.embeddings, "image_embeddings": Embedding("image_encoder", embeddings.image)},
    published={
        "Wan2.1-I2V-14B-480P-Diffusers": _published(wan.WAN_2_1_I2V_14B),
        "Wan2.1-I2V-14B-720P-Diffusers": _published(wan.WAN_2_1_I2V_14B),
        "Wan2.2-I2V-A14B-Diffusers": _published(*[wan.WAN_2_2_I2V_A14B] * 2, boundary_ratio=0.9),
    },
)
FIRST_LAST_FRAME = dataclasses.replace(
    IMAGE_TO_VIDEO,
    name="Wan first-last-frame to video",
    needs=("image", "last_image"),
    published={"Wan2.1-FLF2V-14B-720P-diffusers": _published(wan.WAN_2_1_FLF2V_14B)},
)
_GATED = (dataclasses.replace(cfg, gate_compress=True) for cfg in (wan.WAN_2_1_T2V_1_3B, wan.WAN_2_1_T2V_14B))
FEW_STEPS = dataclasses.replace(
    TEXT_TO_VIDEO,
    name="FastWan",
    pipeline="WanDMDPipeline",
    complete=_complete_few_steps,
    published={
        name: _published(dit, vae=vae)
        for name, dit, vae in zip(
            ("FastWan2.1-T2V-1.3B-Diffusers", "FastWan2.1-T2V-14B-Diffusers", "FastWan2.2-TI2V-5B-FullAttn-Diffusers"),
            (*_GATED, wan.WAN_2_2_TI2V_5B),
            (wan.WAN_2_1_VAE, wan.WAN_2_1_VAE, wan.WAN_2_2_VAE),
            strict=True,
        )
    },
)
CAUSAL = dataclasses.replace(
    TEXT_TO_VIDEO,
    name="causal Wan 2.1 text-to-video",
    pipeline="WanCausalDMDPipeline",
    parts={"transformer": dataclasses.replace(TRANSFORMER, optional=False), "vae": VAE, "text_encoder": TEXT_ENCODER},
    published={},
    at_once=False,
)
