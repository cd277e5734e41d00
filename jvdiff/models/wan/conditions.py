"""What steers a clip of this family: tokens and pictures as a request has them, and what networks make of them.

B batch · T latent frames · H W latent grid · C latent channels · S text tokens · D text width
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jvdiff.models import wan
from jvdiff.models.family import Clip, Forward, Models, Request, Run, Stage
from jvdiff.models.pixels import from_pixels
from jvdiff.models.text import tokenizer as tokenizers
from jvdiff.models.text import umt5
from jvdiff.models.vae_tiles import Tiles
from jvdiff.models.vision.pictures import squash
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
    latents: float32 [B,T,H,W,channels], behind the noisy latents in the network's input
    first: float32 [B,1,H,W,C], latents that the first frame has at every step
    """

    text: Array
    image: Array | None = None
    latents: Array | None = None
    first: Array | None = None


class Tokens(NamedTuple):
    """Tokens of prompts, the negative prompt last.

    ids: int32 [B,S]
    mask: bool [B,S], true where there is a token
    """

    ids: Any
    mask: Any


class Inputs(NamedTuple):
    """A request as arrays.

    tokens: of the prompts
    first: uint8 [B,Y,X,3], what the first frame is to show, in the clip's size; None: nothing is given
    """

    tokens: Tokens
    first: Any = None


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
    """The arrays of a request, made once."""
    negative = [clip.settings.negative_prompt] if clip.guided else []
    tokens = tokenize(models.files["tokenizer"], [*request.prompts, *negative])
    if request.images is None:
        return Inputs(tokens)
    return Inputs(tokens, np.stack([squash(image, *clip.frames[1:]) for image in request.images]))


def longest(models: Models, clip: Clip, clips: int) -> Inputs:
    """The arrays of `clips` clips as ShapeDtypeStructs, with the longest text, and a picture where one is taken."""
    shape = (clips + clip.guided, TEXT_LENGTH)
    tokens = Tokens(jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool_))
    if not models.index.get(EXPANDED):
        return Inputs(tokens)
    return Inputs(tokens, jax.ShapeDtypeStruct((clips, *clip.frames[1:], 3), jnp.uint8))


def encode(
    models: Models, clip: Clip, forward: Forward, run: Run, inputs: Inputs
) -> tuple[Condition, Condition | None]:
    """The condition of the prompts and that of the negative prompt, None without guidance.

    S of the text is a bucket, not 512: the last row, zero like the 512 - S that would follow, stands for all of them
    (`velocity(..., text_length=512)`). A picture is the same for both.
    """
    program = _text_program(models.configs["text_encoder"], forward.placement, clip.guided)
    rows, other = run(Stage("text", "text_encoder", program), *inputs.tokens)
    first = None
    if inputs.first is not None:
        program = _first_program(models.configs["vae"], forward.placement, clip.vae_tiles)
        first = run(Stage("picture", "vae", program), inputs.first)
    return Condition(rows, first=first), None if other is None else Condition(other, first=first)


@functools.lru_cache(maxsize=8)
def _first_program(cfg: wan.VAEConfig, placement: Placement | None, tiles: Tiles | None) -> Any:
    """jitted (params, uint8 [B,Y,X,3]) -> normalised latents float32 [B,1,H,W,C] of a clip of one frame."""

    def first(params: Params, pictures: Array) -> Array:
        latents = wan.encode(params, cfg, from_pixels(pictures)[:, None], placement=placement, tiles=tiles)
        latents = wan.normalize_latents(cfg, latents)
        return latents if placement is None else placement.replicate(latents)

    return jax.jit(first)


@functools.lru_cache(maxsize=8)
def _text_program(cfg: umt5.Config, placement: Placement | None, guided: bool) -> Any:
    """jitted (params, ids int32 [B+guided,S], mask) -> rows [B,S,D], and [B,S,D] of the last text or None."""

    def text(params: Params, ids: Array, mask: Array) -> tuple[Array, Array | None]:
        rows = encode_text(params, cfg, ids, mask, placement)
        rows = rows if placement is None else placement.replicate(rows)
        if not guided:
            return rows, None
        wanted = rows[:-1]  # [B+1,S,D] -> [B,S,D]
        return wanted, jnp.broadcast_to(rows[-1:], wanted.shape)  # [1,S,D] -> [B,S,D]

    return jax.jit(text)


def encode_text(params: Params, cfg: umt5.Config, ids: Array, mask: Array, placement: Placement | None = None) -> Array:
    """ids int32 [B,S], mask bool [B,S] -> text rows [B,S,D], zero where the mask is false."""
    rows = umt5.encode(params, cfg, ids, mask, placement=placement)
    return jnp.where(mask[:, :, None], rows, jnp.zeros((), rows.dtype))
