"""The latent video model as a family: a class label becomes a clip.

B batch · T latent frames · H W latent grid · C latent channels · F pixel frames · Y X pixel height, width
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvdiff import config, kernels
from jvdiff.diffusion import samplers
from jvdiff.diffusion import variance_preserving as vp
from jvdiff.errors import CheckpointError, UsageError
from jvdiff.models import latent_video
from jvdiff.models.family import Clip, Family, Forward, Models, Part, Request, Run, Segment, Stage
from jvdiff.models.latent_video import places
from jvdiff.models.latent_video.settings import Settings, trained
from jvdiff.models.pixels import nonfinite_share, to_pixels
from jvdiff.sharding import MeshShape, Placement, Sizes
from jvdiff.sharding.rules import REPLICATED
from jvdiff.types import Array, Params

TRANSFORMER = Part(
    config=latent_video.DiTConfig,
    classes=("LatentVideoTransformer",),
    abstract=latent_video.abstract_params,
    places=places.DIT,
    names=None,
    precision="transformer",
    published=("jvdiff", lambda cfg: "LatentVideoTransformer"),
)
VAE = Part(
    config=latent_video.VAEConfig,
    classes=("LatentVideoVAE",),
    abstract=latent_video.abstract_params,
    places=REPLICATED,
    names=None,
    precision="vae",
    published=("jvdiff", lambda cfg: "LatentVideoVAE"),
    keeps_dtype=True,
)


def _misfits(models: Models) -> str | None:
    """What of a repository does not fit together."""
    dit, vae = models.configs["transformer"], models.configs["vae"]
    classes = _classes(models)
    if (dit.num_classes, dit.in_channels) != (len(classes), vae.latent_channels):
        return (
            f"the transformer takes {dit.num_classes} classes and {dit.in_channels} latent channels,\n"
            f"there are {len(classes)} and {vae.latent_channels}."
        )
    if (kind := _noise_schedule(models)) not in vp.NOISE_SCHEDULES:
        return f"its noise_schedule is {kind!r:.40}; expected one of {', '.join(vp.NOISE_SCHEDULES)}."
    try:
        config.replace(Settings(), trained(models.index))
    except UsageError as error:
        return f"the defaults in its model_index.json: {error}"
    return None


def _classes(models: Models) -> tuple[str, ...]:
    """The names of the labels, in order."""
    classes = models.index.get("classes")
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise CheckpointError(f"model_index.json: classes is {classes!r:.60}; expected the names of the labels.")
    return tuple(classes)


def _noise_schedule(models: Models) -> str:
    return models.index.get("noise_schedule", "cosine")


def _complete(models: Models, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The given values, else the repository's defaults, else the settings of the clips that it was trained on."""
    return {**trained(models.index), **defaults, **given}


def label(models: Models, value: Any) -> str:
    """The name of a class that is given by name, or by number from 0.

    Raises:
        UsageError: there is no such class; the nearest name is told.
    """
    classes = _classes(models)
    if isinstance(value, str) and value in classes:
        return value
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    decimal = isinstance(value, str) and value.isdecimal() and len(value) < 10
    number = int(value) if whole or decimal else -1
    if 0 <= number < len(classes):
        return classes[number]
    listed = ", ".join(f"{i} {name}" for i, name in enumerate(classes[:20])) + (", ..." if len(classes) > 20 else "")
    raise UsageError(
        f"class_label is {value!r:.60}{config.nearest(value, classes)}; expected a number from 0 to "
        f"{len(classes) - 1}, or a name: {listed}."
    )


def make_clip(models: Models, settings: Settings) -> Clip:
    """Derives everything that the settings mean; UsageError, with the nearest, for a size that these models lack."""
    dit, vae = models.configs["transformer"], models.configs["vae"]
    side = vae.spatial_factor * dit.patch_size
    for name, unit in (("num_frames", vae.temporal_factor), ("height", side), ("width", side)):
        config.multiple(name, getattr(settings, name), unit, unit, 2**20 * unit)
    size = settings.num_frames, settings.height, settings.width
    grid = settings.num_frames // vae.temporal_factor, *(n // vae.spatial_factor for n in size[1:])
    return Clip(
        settings=settings,
        frames=size,
        latents=(*grid, vae.latent_channels),
        tokens=grid[0] * latent_video.mesh_sizes(dit, (1, *grid)).tokens,
        sampler=samplers.VarianceSampler(settings.solver, settings.steps, _noise_schedule(models)),
        segments=(Segment(0, settings.steps, "transformer", settings.guidance),),
    )


def _mesh_sizes(models: Models, clip: Clip, clips: int, shape: MeshShape) -> Sizes:
    """What a mesh must divide to denoise `clips` clips at once; both branches of guidance are one batch."""
    return latent_video.mesh_sizes(models.configs["transformer"], (clips * (1 + clip.guided), *clip.latents[:3]))


# -------------------------------------------------------------------------------------------------------------- stages


def _inputs(models: Models, clip: Clip, request: Request) -> np.ndarray:
    """Labels int32 [B]."""
    classes = _classes(models)
    return np.array([classes.index(label(models, value)) for value in request.labels], np.int32)


def _longest(models: Models, clip: Clip, clips: int) -> Any:
    return jax.ShapeDtypeStruct((clips,), jnp.int32)


def _encode(models: Models, clip: Clip, forward: Forward, run: Run, labels: Any) -> tuple[Any, Any]:
    """Labels int32 [B], and that of no class, which guidance leads away from."""
    if not clip.guided:
        return labels, None
    return labels, np.full(labels.shape, models.configs["transformer"].null_class, np.int32)


def _network(models: Models, segment: Segment, forward: Forward) -> Callable[..., Array]:
    return _velocity(models.configs[segment.part], _noise_schedule(models), forward)


@functools.lru_cache(maxsize=8)  # jit compiles once for each function object
def _velocity(cfg: latent_video.DiTConfig, noise_schedule: str, forward: Forward) -> Callable[..., Array]:
    abar = vp.alphas_cumprod(noise_schedule)
    how: Any = {name: getattr(forward, name) for name in ("implementation", "placement", "dtype")}

    def network(params: Params, x: Array, t: Array, labels: Array) -> Array:
        def predict(x: Array, t: Array) -> Array:
            return latent_video.denoise(params, cfg, x, t, labels, **how)

        return vp.velocity(predict, cfg.prediction, abar)(x, t)

    return network


def _attention(models: Models, clip: Clip, forward: Forward, inputs: Any) -> Mapping[str, str]:
    dit, (frames, height, width, _) = models.configs["transformer"], clip.latents
    cells, heads = height * width // dit.patch_size**2, (dit.num_heads, dit.hidden_size // dit.num_heads)

    def choice(length: int) -> str:
        operand = jax.ShapeDtypeStruct((1, length, *heads), jnp.dtype(forward.dtype))
        how: Any = dict(implementation=forward.implementation, target=forward.target)
        return kernels.choose(operand, operand, operand, **how)

    return {"spatial": choice(cells), "temporal": choice(frames)}


def _decode(
    models: Models, clip: Clip, forward: Forward, run: Run, latents: Array
) -> Iterator[tuple[Array, Array, int]]:
    """The whole clip at once: this VAE is not causal."""
    pixels, bad = run(Stage("decode", "vae", _decode_program(models.configs["vae"], forward.placement)), latents)
    yield pixels, bad, clip.latents[0]


@functools.lru_cache(maxsize=8)
def _decode_program(cfg: latent_video.VAEConfig, placement: Placement | None) -> Any:
    """jitted (params, normalised latents [1,T,H,W,C]) -> (uint8 [1,F,Y,X,3], non-finite share)."""

    def decode(params: Params, latents: Array) -> tuple[Array, Array]:
        frames = latent_video.decode(params, cfg, latent_video.denormalize_latents(cfg, latents))
        result = to_pixels(frames), nonfinite_share(frames)
        return result if placement is None else placement.replicate(result)

    return jax.jit(decode)


def _preview(models: Models, forward: Forward) -> Stage:
    return Stage("preview", "vae", _first_frames(models.configs["vae"], forward.placement))


@functools.lru_cache(maxsize=8)
def _first_frames(cfg: latent_video.VAEConfig, placement: Placement | None) -> Any:
    """jitted (params, normalised latents [B,1,H,W,C]) -> float32 first frames [B,1,Y,X,3] in -1..1, for previews."""

    def first(params: Params, latents: Array) -> Array:
        frames = latent_video.decode(params, cfg, latent_video.denormalize_latents(cfg, latents))[:, :1]
        return frames if placement is None else placement.replicate(frames)

    return jax.jit(first)


# ------------------------------------------------------------------------------------------------- the VAE in training


@functools.lru_cache(maxsize=8)
def encode_program(cfg: latent_video.VAEConfig) -> Any:
    """jitted (params, uint8 [B,F,Y,X,3]) -> normalised means of the latents float32 [B,T,H,W,C]."""

    def encode(params: Params, video: Array) -> Array:
        mean, _ = latent_video.encode(params, cfg, video.astype(jnp.float32) / 127.5 - 1.0)
        return latent_video.normalize_latents(cfg, mean)

    return jax.jit(encode)


CLASS_CONDITIONAL = Family(
    name="latent video, by class",
    pipeline="LatentVideoPipeline",
    parts={"transformer": TRANSFORMER, "vae": VAE},
    files={},
    misfits=_misfits,
    # what is asked for
    subject="labels",
    facts=("class_name",),
    check_subject=label,
    describe=lambda models, name: {"class_name": name, "class_label": _classes(models).index(name)},
    settings=Settings,
    complete=_complete,
    clip=make_clip,
    # how it is made
    inputs=_inputs,
    encode=_encode,
    network=_network,
    decode=_decode,
    # what is told of it
    longest=_longest,
    mesh_sizes=_mesh_sizes,
    attention=_attention,
    preview=_preview,
)
