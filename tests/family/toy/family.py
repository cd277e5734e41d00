"""The toy as a family: prompt and picture become a clip, by two experts.

B batch · T latent frames · H W latent grid · C latent channels · S text tokens · D width · Y X pixel height, width
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvdiff.config import multiple
from jvdiff.diffusion import samplers
from jvdiff.errors import UsageError
from jvdiff.models.family import Clip, Family, Files, Forward, Models, Part, Request, Run, Segment, Stage
from jvdiff.models.layers import product
from jvdiff.models.pixels import nonfinite_share, to_pixels
from jvdiff.models.vision.pictures import squash
from jvdiff.sharding import MeshShape, Placement, Sizes
from jvdiff.sharding.rules import REPLICATED
from jvdiff.types import Array, Params
from jvdiff.weights.safetensors import read_json

from . import names, networks, places
from .settings import Settings
from .settings import defaults as defaults_of

TEXT_LENGTH = 8  # rows S of text
ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


# ---------------------------------------------------------------------------------------------------------- the folders


def _part(kind: str, rules: Any, precision: str, where: Any = REPLICATED, **more: Any) -> Part:
    return Part(
        config=networks.Config,
        classes=(kind,),
        abstract=networks.abstract_params,
        places=where,
        names=lambda cfg: rules,
        precision=precision,
        published=("transformers" if precision == "text_encoder" else "diffusers", lambda cfg: cfg.kind),
        **more,
    )


TRANSFORMER = _part(networks.TRANSFORMER, names.TRANSFORMER, "transformer", places.TRANSFORMER)
TEXT_ENCODER = _part(networks.TEXT, names.TEXT, "text_encoder", stem="model", ignored=lambda cfg: names.TEXT_IGNORED)
TOKENIZER = Files(("*.json",), lambda folder: _words(folder), ("transformers", lambda words: "ToyTokenizer"))


def _words(folder: Path) -> tuple[str, ...]:
    """The words of a tokenizer; the number of a word is its place, from 2."""
    return tuple(read_json(folder / "tokenizer.json")["words"])


def _misfits(models: Models) -> str | None:
    """What of a repository does not fit together."""
    sizes = {name: (cfg.channels, cfg.width) for name, cfg in models.configs.items()}
    if len(set(sizes.values())) > 1:
        return f"channels and width are {sizes}; expected the same everywhere."
    for encoder, tokenizer in ENCODERS.items():
        if (count := len(models.files[tokenizer]) + 2) > (rows := models.configs[encoder].words):
            return f"{tokenizer} has {count} words, {encoder} {rows}."
    defaults_of(models.index)
    return None


# -------------------------------------------------------------------------------------------------- what settings mean


def _complete(models: Models, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Both, with the boundary of model_index.json; a solver that lists its timesteps says how many steps there are."""
    values = {**defaults_of(models.index), "solver": Settings.solver, **defaults, **given}
    listed = samplers.own_steps(str(values["solver"]))
    return values | ({"steps": listed} if listed and "steps" not in given else {})


def _check_prompt(models: Models, prompt: Any) -> str:
    if not isinstance(prompt, str) or not prompt.strip():
        raise UsageError(f"prompt is {prompt!r:.80}; expected text.")
    return prompt


def make_clip(models: Models, settings: Settings) -> Clip:
    """Derives everything that the settings mean; UsageError for a size that the toy cannot make."""
    for name in ("height", "width"):
        multiple(name, getattr(settings, name), 2, 2, 256)
    sampler = samplers.read(settings.solver, settings.steps, settings.shift, "diffusers")
    assert settings.boundary is not None  # see `_complete`
    border = int(np.sum(sampler.schedule.timesteps >= 1000 * settings.boundary))
    second = settings.guidance if settings.guidance_2 is None else settings.guidance_2
    segments = (
        Segment(0, border, "transformer", settings.guidance),
        Segment(border, sampler.steps, "transformer_2", second),
    )
    grid = settings.num_frames, settings.height // 2, settings.width // 2
    return Clip(
        settings=settings,
        frames=(settings.num_frames, settings.height, settings.width),
        latents=(*grid, models.configs["vae"].channels),
        tokens=grid[0] * grid[1] * grid[2],
        sampler=sampler,
        segments=tuple(segment for segment in segments if segment.start < segment.stop),
    )


def _mesh_sizes(models: Models, clip: Clip, clips: int, shape: MeshShape) -> Sizes:
    """What a mesh must divide to denoise `clips` clips at once, in every segment."""
    both = all(segment.guidance != 1 for segment in clip.segments) and clip.batched(clips, shape)
    return networks.mesh_sizes(models.configs["transformer"], clip.latents[:3], clips * (1 + both))


# ----------------------------------------------------------------------------------------------------------- conditions


def _ids(words: tuple[str, ...], prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(ids int32 [B,S], mask bool [B,S]); 0 beyond the end, 1 for a word that is not known."""
    ids = np.zeros((len(prompts), TEXT_LENGTH), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        known = [words.index(word) + 2 if word in words else 1 for word in prompt.lower().split()[:TEXT_LENGTH]]
        row[: len(known)] = known
    return ids, ids > 0


def _inputs(models: Models, clip: Clip, request: Request) -> dict[str, Any]:
    """Tokens of each encoder, the empty prompt last; the guidance to embed [B]; pictures uint8 [B,Y,X,3], if any."""
    texts = [*request.prompts, *([""] if clip.guided else [])]
    clips = len(request.prompts)
    shown = {"image": request.images, "last_image": request.last_images}
    pictures = {
        name: np.stack([squash(one, *clip.frames[1:]) for one in every]) for name, every in shown.items() if every
    }
    tokens = {encoder: _ids(models.files[tokenizer], texts) for encoder, tokenizer in ENCODERS.items()}
    return {**tokens, **pictures, "guidance": np.full(clips, clip.settings.embedded_guidance, np.float32)}


def _longest(models: Models, clip: Clip, clips: int) -> dict[str, Any]:
    shape, struct = (clips + clip.guided, TEXT_LENGTH), jax.ShapeDtypeStruct
    tokens = {encoder: (struct(shape, jnp.int32), struct(shape, jnp.bool_)) for encoder in ENCODERS}
    image = struct((clips, *clip.frames[1:], 3), jnp.uint8)
    return {**tokens, "image": image, "guidance": struct((clips,), jnp.float32)}


def _encode(models: Models, clip: Clip, forward: Forward, run: Run, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """What `networks.velocity` takes as its condition, and the same without the prompt."""
    common, placement = {"guidance": inputs["guidance"]}, forward.placement
    if "image" in inputs:
        common["first"] = run(Stage("picture", "vae", _first(placement)), inputs["image"])
        if "last_image" in inputs:
            common["last"] = run(Stage("picture", "vae", _first(placement)), inputs["last_image"])
        if "image_encoder" in models.configs:
            common["look"] = run(Stage("look", "image_encoder", _look(placement)), inputs["image"])
    text = [run(Stage(name, name, _text(clip.guided, name[-1] == "2", placement)), *inputs[name]) for name in ENCODERS]
    conditions = [{**common, "text": rows, "pooled": pooled} for rows, pooled in zip(*text, strict=True)]
    return conditions[0], conditions[1] if clip.guided else None


@functools.lru_cache(maxsize=8)  # jit compiles once for each function object
def _text(guided: bool, pooled: bool, placement: Placement | None) -> Any:
    """jitted (params, ids [B+guided,S], mask) -> rows [B,S,D], or pooled [B,D]: of the prompts, of the last text."""

    def text(params: Params, ids: Array, mask: Array) -> tuple[Array, Array | None]:
        rows = networks.encode_text(params, ids, mask)
        rows = rows.max(axis=1) if pooled else rows  # [B,S,D] -> [B,D]
        rows = rows if placement is None else placement.replicate(rows)
        if not guided:
            return rows, None
        return rows[:-1], jnp.broadcast_to(rows[-1:], rows[:-1].shape)  # [B+1,...] -> [B,...] twice

    return jax.jit(text)


@functools.lru_cache(maxsize=8)
def _first(placement: Placement | None) -> Any:
    """jitted (params of the VAE, uint8 [B,Y,X,3]) -> the latent frame of a picture, float32 [B,1,H,W,C]."""
    return jax.jit(lambda params, image: _everywhere(networks.encode(params, image), placement))


@functools.lru_cache(maxsize=8)
def _look(placement: Placement | None) -> Any:
    """jitted (params of the picture encoder, uint8 [B,Y,X,3]) -> float32 [B,D]."""

    def look(params: Params, image: Array) -> Array:
        mean = image.astype(jnp.float32).mean(axis=(1, 2)) / 255  # [B,Y,X,3] -> [B,3]
        return _everywhere(product(mean, params["embed"]["kernel"], jnp.float32), placement)

    return jax.jit(look)


def _everywhere(tree: Any, placement: Placement | None) -> Any:
    return tree if placement is None else placement.replicate(tree)


# -------------------------------------------------------------------------------------------------- transformer and VAE


def _network(models: Models, segment: Segment, forward: Forward) -> Callable[..., Array]:
    return _velocity(models.configs[segment.part], forward.placement)


@functools.lru_cache(maxsize=8)
def _velocity(cfg: networks.Config, placement: Placement | None) -> Callable[..., Array]:
    return lambda params, x, t, condition: networks.velocity(params, cfg, x, t, condition, placement)


def _finish(clip: Clip, inputs: Any, conditions: tuple[Any, Any], latents: Array) -> Array:
    """The pictures' own latents in the place of the first and the last frame, whatever the steps made of them."""
    if "last" in conditions[0]:
        latents = jnp.concatenate([latents[:, :-1], conditions[0]["last"]], axis=1)
    return jnp.concatenate([conditions[0]["first"], latents[:, 1:]], axis=1) if "first" in conditions[0] else latents


def _decode(
    models: Models, clip: Clip, forward: Forward, run: Run, latents: Array
) -> Iterator[tuple[Array, Array, int]]:
    """One latent frame at a time."""
    for t in range(clip.latents[0]):
        pixels, bad = run(Stage("decode", "vae", _frame(forward.placement)), latents[:, t : t + 1])
        yield pixels, bad, t + 1


@functools.lru_cache(maxsize=8)
def _frame(placement: Placement | None) -> Any:
    """jitted (params, latents [1,1,H,W,C]) -> (uint8 [1,1,Y,X,3], non-finite share)."""

    def frame(params: Params, latents: Array) -> tuple[Array, Array]:
        frames = networks.decode(params, latents)
        return _everywhere((to_pixels(frames), nonfinite_share(frames)), placement)

    return jax.jit(frame)


def _preview(models: Models, forward: Forward) -> Stage:
    return Stage("preview", "vae", _rough(forward.placement))


@functools.lru_cache(maxsize=8)
def _rough(placement: Placement | None) -> Any:
    return jax.jit(lambda params, latents: _everywhere(networks.decode(params, latents), placement))


PARTS = {
    "transformer": TRANSFORMER,
    "transformer_2": TRANSFORMER,
    "vae": _part(networks.VAE, names.VAE, "vae", keeps_dtype=True),
    "text_encoder": TEXT_ENCODER,
    "text_encoder_2": TEXT_ENCODER,
    "image_encoder": _part(networks.PICTURE, names.PICTURE, "vae", optional=True),
}
TOY = Family(
    name="the toy",
    pipeline="ToyPipeline",
    parts=PARTS,
    files=dict.fromkeys(ENCODERS.values(), TOKENIZER),
    settings=Settings,
    subject="prompts",
    takes=("image", "last_image"),
    unit=lambda models: 2,
    misfits=_misfits,
    complete=_complete,
    check_subject=_check_prompt,
    clip=make_clip,
    mesh_sizes=_mesh_sizes,
    inputs=_inputs,
    longest=_longest,
    encode=_encode,
    network=_network,
    finish=_finish,
    decode=_decode,
    preview=_preview,
    attention=lambda models, clip, forward, inputs: {},
    describe=lambda models, prompt: {"prompt": prompt},
    published={
        "Toy-1": Models(
            {name: networks.Config(part.classes[0]) for name, part in PARTS.items()}, {}, {"boundary_ratio": 0.9}
        )
    },
)
