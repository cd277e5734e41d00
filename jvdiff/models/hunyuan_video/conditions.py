"""What steers a clip of this family: tokens as a request has them, and what the two text encoders make of them.

B batch · T latent frames · H W latent grid · C latent channels · S text tokens · D text width

Source: diffusers' HunyuanVideoPipeline (0.42).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jvdiff.models.family import Clip, Forward, Models, Request, Run, Stage
from jvdiff.models.hunyuan_video import prompts
from jvdiff.models.hunyuan_video.prompts import CLIP_LENGTH, CROP, TEXT_LENGTH, Tokens
from jvdiff.models.text import clip_text, llama
from jvdiff.sharding import Placement
from jvdiff.types import Array, Params


class Condition(NamedTuple):
    """What the transformer is given beside latents and timestep.

    text: [B,S,D], Llama's stream behind the template
    mask: bool [B,S], true where there is a token; the others come last
    pooled: [B,width of CLIP]
    guidance: float32 [B], that it is told, times 1000; None where it is told none
    """

    text: Array
    mask: Array
    pooled: Array
    guidance: Array | None


class Inputs(NamedTuple):
    """A request as arrays.

    tokens: of the prompts
    negative: of what true guidance leads away from, as many rows S: one text for all clips, or one each; None: there is
        no true guidance
    guidance: as in `Condition`
    """

    tokens: Tokens
    negative: Tokens | None
    guidance: Any


def inputs(models: Models, clip: Clip, request: Request) -> Inputs:
    """The arrays of a request, made once. A prompt that is not Unicode text raises UsageError."""
    clips = len(request.prompts)
    negative = (request.negative_prompts or [clip.settings.negative_prompt]) if clip.guided else []
    tokenizers = models.files["tokenizer"], models.files["tokenizer_2"]
    every = prompts.tokenize(*tokenizers, [*request.prompts, *negative])
    tokens, other = (Tokens(*(each[part] for each in every)) for part in (slice(clips), slice(clips, None)))
    told = np.full(clips, 1000 * clip.settings.guidance, np.float32)
    return Inputs(tokens, other if negative else None, told if models.configs["transformer"].guidance_embeds else None)


def longest(models: Models, clip: Clip, clips: int) -> Inputs:
    """The arrays of `clips` clips as ShapeDtypeStructs, with the longest text."""

    def tokens(count: int) -> Tokens:
        whole = count, CROP + TEXT_LENGTH
        kinds = ((whole, jnp.int32), (whole, jnp.bool_), ((count, CLIP_LENGTH), jnp.int32))
        return Tokens(*(jax.ShapeDtypeStruct(*kind) for kind in kinds))

    told = jax.ShapeDtypeStruct((clips,), jnp.float32) if models.configs["transformer"].guidance_embeds else None
    return Inputs(tokens(clips), tokens(1) if clip.guided else None, told)


def encode(
    models: Models, clip: Clip, forward: Forward, run: Run, inputs: Inputs
) -> tuple[Condition, Condition | None]:
    """The condition of the prompts, and that of the negative prompt, which is told the same guidance; None without."""
    tokens, other, guidance = inputs
    configs, placement = models.configs, forward.placement
    text = Stage("text", "text_encoder", _text_program(configs["text_encoder"], placement))
    pooled = Stage("pooled", "text_encoder_2", _pooled_program(configs["text_encoder_2"], placement))
    (states, mask), against = run(text, tokens[:2], None if other is None else other[:2])
    vectors, others = run(pooled, tokens.clip, None if other is None else other.clip)
    first = Condition(states, mask, vectors, guidance)
    return first, None if other is None else Condition(against[0], against[1], others, guidance)


def _apart(whole: Any, clips: int, placement: Placement | None) -> tuple[Any, Any]:
    """Arrays [B+n,...] of the texts of B clips and of n others, 0, 1 or B -> [B,...] of the first, and of the others or
    None; on every device."""
    whole = whole if placement is None else placement.replicate(whole)
    first = jax.tree.map(lambda x: x[:clips], whole)
    if len(jax.tree.leaves(whole)[0]) == clips:
        return first, None
    return first, jax.tree.map(lambda x: jnp.broadcast_to(x[clips:], (clips, *x.shape[1:])), whole)


def _together(one: Any, other: Any) -> Any:
    return one if other is None else jax.tree.map(lambda *each: jnp.concatenate(each), one, other)


@functools.lru_cache(maxsize=8)  # jit compiles once for each function object
def _text_program(cfg: llama.Config, placement: Placement | None) -> Any:
    """jitted (params, (ids, mask) of B texts, those of 1 or B others or None) -> (states [B,S,D], mask [B,S]) of the
    prompts alone, and the same of the others or None."""

    def text(params: Params, tokens: Any, others: Any) -> tuple[Any, Any]:
        ids, mask = _together(tokens, others)
        states = llama.encode(params, cfg, ids, mask, placement=placement)
        return _apart(prompts.crop(states, mask), len(tokens[0]), placement)

    return jax.jit(text)


@functools.lru_cache(maxsize=8)
def _pooled_program(cfg: clip_text.Config, placement: Placement | None) -> Any:
    """jitted (params, ids of B texts, those of 1 or B others or None) -> vectors [B,D], and [B,D] of the others or
    None."""

    def pooled(params: Params, ids: Array, others: Array | None) -> tuple[Array, Array | None]:
        vectors = clip_text.encode(params, cfg, _together(ids, others), placement=placement)
        return _apart(vectors, len(ids), placement)

    return jax.jit(pooled)
