"""What steers a clip of this family: tokens and pictures as a request has them, and what networks make of them.

B batch · T latent frames · H W latent grid · C latent channels · S text tokens · D text width ·
P different pictures, 1 or B · n pictures of a clip, 1 or 2 · I tokens of a clip's pictures · Y X pixel height, width.

A picture goes two ways, each from the original: squashed to the clip's size into the VAE, whose latents stand behind
the noisy ones in the network's input, or are its first frame; and the way of CLIP into an image encoder, whose tokens
stand beside the text.

Source: diffusers' WanImageToVideoPipeline (0.42).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jvdiff.errors import UsageError
from jvdiff.models import wan
from jvdiff.models.family import Clip, Forward, Models, Request, Run, Stage
from jvdiff.models.pixels import from_pixels
from jvdiff.models.text import tokenizer as tokenizers
from jvdiff.models.text import umt5
from jvdiff.models.vae_tiles import Tiles
from jvdiff.models.vision import clip as towers
from jvdiff.models.vision import pictures
from jvdiff.models.wan.config import expert
from jvdiff.models.wan.settings import EXPANDED
from jvdiff.sharding import Placement
from jvdiff.types import Array, Params

log = logging.getLogger("jvdiff")

TEXT_LENGTH = 512  # rows of text that the DiT attends to; those beyond the prompt are zeros (Wan pads, without a mask)
TEXT_BUCKETS = (32, 64, 128, 256, TEXT_LENGTH)


class Condition(NamedTuple):
    """What the transformer is given beside latents and timestep; None where a model or a request has no such thing.

    text: [B,S,D], zero beyond each prompt's end; the last row stands for all up to TEXT_LENGTH
    image: [B,I,width of the image encoder], what it made of the pictures
    latents: float32 [B,T,H,W,channels(vae)], behind the noisy latents in the network's input
    first: float32 [B,1,H,W,C], latents that the first frame has at every step
    """

    text: Array
    image: Array | None = None
    latents: Array | None = None
    first: Array | None = None


class Tokens(NamedTuple):
    """Tokens of texts.

    ids: int32 [B,S]
    mask: bool [B,S], true where there is a token
    """

    ids: Any
    mask: Any


class Inputs(NamedTuple):
    """A request as arrays.

    tokens: of the prompts
    negative: of what guidance leads away from, as many rows S: one text for all clips, or one each; None: no guidance
    pixels: uint8 [P,n,Y,X,3], the clips' pictures at their size
    seen: float32 [P,n,S,S,3], the same pictures as the image encoder takes them
    """

    tokens: Tokens
    negative: Tokens | None = None
    pixels: Any = None
    seen: Any = None


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> Tokens:
    """At the smallest bucket S that leaves a padding row, or at 512 rows.

    A longer prompt is cut after 512 tokens, the end token kept, and a warning says so.

    Raises:
        UsageError: a prompt that cannot be tokenised.
    """
    ids, mask, cut = tokenizers.tokenize(tokenizer, [tokenizers.clean(p) for p in prompts], TEXT_LENGTH)
    for prompt, tokens in zip(prompts, cut, strict=True):
        if tokens:
            whole = tokens + TEXT_LENGTH
            log.warning("prompt %.40r...: the last %d of its %d tokens are cut", prompt, tokens, whole)
    longest = int(mask.sum(axis=1).max())
    bucket = next(b for b in TEXT_BUCKETS if longest < b or b == TEXT_LENGTH)
    return Tokens(ids[:, :bucket], mask[:, :bucket])


def inputs(models: Models, clip: Clip, request: Request) -> Inputs:
    """The arrays of a request, made once. One picture that all clips share is there once.

    Raises:
        UsageError: a second picture for a network that attends to the tokens of one.
    """
    dit = expert(models.configs)
    if request.last_images is not None and dit.image_dim and not dit.pos_embed_seq_len:
        raise UsageError(
            "last_image is given, and these weights take one picture; leave it out, or take weights for two: "
            "Wan2.1-FLF2V-14B-720P or Wan2.2-I2V-A14B."
        )
    negative = (request.negative_prompts or [clip.settings.negative_prompt]) if clip.guided else []
    every, clips = tokenize(models.files["tokenizer"], [*request.prompts, *negative]), len(request.prompts)
    tokens = Tokens(every.ids[:clips], every.mask[:clips])
    other = Tokens(every.ids[clips:], every.mask[clips:]) if negative else None
    if request.images is None:
        return Inputs(tokens, other)
    shown = list(zip(*(each for each in (request.images, request.last_images) if each is not None), strict=True))
    if all(one is other for each in shown for one, other in zip(each, shown[0], strict=True)):
        shown = shown[:1]
    _, height, width = clip.frames
    pixels = np.stack([[pictures.squash(one, height, width) for one in each] for each in shown])
    if "image_encoder" not in models.configs:
        return Inputs(tokens, other, pixels)
    processor = models.files["image_processor"]
    seen = np.stack([[pictures.seen_by_clip(one, processor) for one in each] for each in shown])
    return Inputs(tokens, other, pixels, seen)


def longest(models: Models, clip: Clip, clips: int) -> Inputs:
    """The arrays of `clips` clips as ShapeDtypeStructs, with the longest text and pictures of their own each."""
    struct = jax.ShapeDtypeStruct
    texts = [Tokens(struct((n, TEXT_LENGTH), jnp.int32), struct((n, TEXT_LENGTH), jnp.bool_)) for n in (clips, 1)]
    tokens, other = texts[0], texts[1] if clip.guided else None
    dit, tower = expert(models.configs), models.configs.get("image_encoder")
    if dit.in_channels == dit.out_channels and not models.index.get(EXPANDED):
        return Inputs(tokens, other)
    count = 2 if dit.pos_embed_seq_len else 1
    pixels = struct((clips, count, *clip.frames[1:], 3), jnp.uint8)
    if tower is None:
        return Inputs(tokens, other, pixels)
    return Inputs(tokens, other, pixels, struct((clips, count, tower.image_size, tower.image_size, 3), jnp.float32))


def encode(
    models: Models, clip: Clip, forward: Forward, run: Run, inputs: Inputs
) -> tuple[Condition, Condition | None]:
    """The condition of the prompts and that of the negative prompt, None without guidance; pictures are of both.

    S of the text is a bucket, not 512: the last row, zero like the 512 - S that would follow, stands for all of them
    (`velocity(..., text_length=512)`).
    """
    placement, clips = forward.placement, len(inputs.tokens.ids)
    program = _text_program(models.configs["text_encoder"], placement)
    rows, other = run(Stage("text", "text_encoder", program), inputs.tokens, inputs.negative)
    image = latents = first = None
    if inputs.seen is not None:
        program = _image_program(models.configs["image_encoder"], placement, clips)
        image = run(Stage("image", "image_encoder", program), inputs.seen)
    if inputs.pixels is not None:
        frames = None if models.index.get(EXPANDED) else clip.latents[0]
        program = _picture_program(models.configs["vae"], placement, clips, frames, clip.vae_tiles)
        made = run(Stage("picture", "vae", program), inputs.pixels)
        first, latents = (made, None) if frames is None else (None, made)
    return Condition(rows, image, latents, first), other if other is None else Condition(other, image, latents, first)


def channels(vae: wan.VAEConfig) -> int:
    """Channels of `Condition.latents`: a mask over a latent frame's pixel frames, and latents."""
    return vae.temporal_factor + vae.z_dim


def network_input(condition: Condition, x: Array) -> Array:
    """Noisy latents [B,T,H,W,C] with what a condition puts behind them."""
    return x if condition.latents is None else jnp.concatenate([x, condition.latents], axis=-1)


@functools.lru_cache(maxsize=8)
def _image_program(cfg: towers.Config, placement: Placement | None, clips: int) -> Any:
    """jitted (params, float32 [P,n,S,S,3]) -> picture tokens [B,I,D], those of a clip's pictures behind one another."""

    def image(params: Params, seen: Array) -> Array:
        rows = towers.encode(params, cfg, seen.reshape(-1, *seen.shape[2:]), placement=placement)
        rows = rows.reshape(len(seen), -1, rows.shape[-1])  # [P*n,257,D] -> [P,I,D]
        rows = jnp.broadcast_to(rows, (clips, *rows.shape[1:]))
        return rows if placement is None else placement.replicate(rows)

    return jax.jit(image)


@functools.lru_cache(maxsize=8)
def _picture_program(
    cfg: wan.VAEConfig, placement: Placement | None, clips: int, frames: int | None, tiles: Tiles | None
) -> Any:
    """jitted (params, uint8 [P,n,Y,X,3]) -> `Condition.latents` of clips of this many latent frames; None: `first`."""

    def picture(params: Params, pixels: Array) -> Array:
        latents = wan.encode_shown(params, cfg, from_pixels(pixels), frames or 1, placement=placement, tiles=tiles)
        latents = wan.normalize_latents(cfg, latents)
        if frames is not None:
            mask = np.zeros((frames, cfg.temporal_factor), np.float32)
            mask[0] = 1  # one pixel frame, which counts as often as other latent frames have some
            if pixels.shape[1] == 2:
                mask[-1, -1] = 1
            mask = jnp.broadcast_to(mask[None, :, None, None], (*latents.shape[:-1], mask.shape[1]))  # [P,T,H,W,4]
            latents = jnp.concatenate([mask, latents], axis=-1)
        latents = jnp.broadcast_to(latents, (clips, *latents.shape[1:]))  # [P,T,H,W,..] -> [B,T,H,W,..]
        return latents if placement is None else placement.replicate(latents)

    return jax.jit(picture)


@functools.lru_cache(maxsize=8)
def _text_program(cfg: umt5.Config, placement: Placement | None) -> Any:
    """jitted (params, tokens of B texts, those of 1 or B others or None) -> rows [B,S,D], and [B,S,D] of the others or
    None."""

    def text(params: Params, tokens: Tokens, others: Tokens | None) -> tuple[Array, Array | None]:
        clips = len(tokens.ids)
        both = tokens if others is None else jax.tree.map(lambda *each: jnp.concatenate(each), tokens, others)
        rows = encode_text(params, cfg, both.ids, both.mask, placement)
        rows = rows if placement is None else placement.replicate(rows)
        if others is None:
            return rows, None
        return rows[:clips], jnp.broadcast_to(rows[clips:], (clips, *rows.shape[1:]))  # [1 or B,S,D] -> [B,S,D]

    return jax.jit(text)


encode_pictures = towers.encode  # by the name under which `jvdiff.models.wan` has it


def encode_text(params: Params, cfg: umt5.Config, ids: Array, mask: Array, placement: Placement | None = None) -> Array:
    """Tokens of `tokenize` -> text rows [B,S,D] as the transformer takes them, zero where the mask is false.

    Args:
        params: tree of `umt5.abstract_params`; their dtype is that of the products.
        ids: int32 [B,S]. mask: bool [B,S].
        placement: the devices to work on; None: one.
    """
    rows = umt5.encode(params, cfg, ids, mask, placement=placement)
    return jnp.where(mask[:, :, None], rows, jnp.zeros((), rows.dtype))
