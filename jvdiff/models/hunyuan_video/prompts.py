"""Prompts as HunyuanVideo's two text encoders take them: within a template for Llama, as they are for CLIP.

B batch · S text tokens · D text width.

Prompts are not cleaned. Source: diffusers' HunyuanVideoPipeline (0.42).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from jvdiff.config import tell_once
from jvdiff.models.text import byte_pairs
from jvdiff.models.text.tokenizer import tokenize as ids_of
from jvdiff.models.text.tokenizer import unicode
from jvdiff.types import Array

log = logging.getLogger("jvdiff")

TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\n"
    "Describe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)
CROP = 95  # tokens of Llama 3 in front of a prompt: <|begin_of_text|> and the template
TEXT_LENGTH = 256  # the most tokens of a prompt, <|eot_id|> included
TEXT_BUCKETS = (32, 64, 128, TEXT_LENGTH)
CLIP_LENGTH = 77


class Tokens(NamedTuple):
    """Tokens of texts.

    ids: int32 [B,CROP+S], for Llama
    mask: bool [B,CROP+S], true where there is a token
    clip: int32 [B,CLIP_LENGTH], for CLIP
    """

    ids: Any
    mask: Any
    clip: Any


def tokenize(llama: Any, clip: Any, prompts: Sequence[str]) -> Tokens:
    """At the smallest bucket S that holds the longest prompt: the transformer masks what it leaves out.

    Of a longer prompt Llama gets the first 256 tokens, without <|eot_id|>, and CLIP the first 75; a warning says so.

    Args:
        llama: of `byte_pairs.load`. clip: of `byte_pairs.load_clip`.

    Raises:
        UsageError: a prompt that is not Unicode text.
    """
    prompts = [unicode(prompt) for prompt in prompts]
    before, after = TEMPLATE.split("{}")
    pad, end = llama.token_to_id("<pad>") or 0, clip.token_to_id(byte_pairs.END)
    texts = [before + prompt + after for prompt in prompts]
    ids, mask, cut = ids_of(llama, texts, CROP + TEXT_LENGTH, end=None, pad=pad)
    pooled, _, clip_cut = ids_of(clip, prompts, CLIP_LENGTH, end=end, pad=end)
    for prompt, tokens, others in zip(prompts, cut, clip_cut, strict=True):
        if tokens > 1:  # one would be <|eot_id|>
            log.warning("prompt %.40r...: the last %d of its tokens are cut", prompt, tokens - 1)
        elif others:
            log.warning("prompt %.40r...: CLIP, which sets its tone, does not see the last %d tokens", prompt, others)
    longest = int(mask.sum(axis=1).max())
    bucket = CROP + next(size for size in TEXT_BUCKETS if longest <= CROP + size)
    return Tokens(ids[:, :bucket], mask[:, :bucket], pooled)


def crop(states: Array, mask: Array) -> tuple[Array, Array]:
    """What the transformer gets of Llama's states [B,CROP+S,D] and their mask [B,CROP+S]: [B,S,D] and [B,S]."""
    return states[:, CROP:], mask[:, CROP:]


def misfit(llama: Any) -> str | None:
    """What is wrong with a tokenizer for Llama: of CROP tokens in front of a prompt none may be the prompt's.

    Where the template has more, the rest of it counts as text, as in diffusers, and a line says so.
    """
    found = len(llama.encode(TEMPLATE.split("{}")[0]).ids)
    told = f"the tokenizer makes {found} tokens of the template before a prompt, of which {CROP} are cut away"
    if found < CROP:
        return f"{told}, with the beginning of the prompt;\nexpected the tokenizer.json of Llama 3."
    if found > CROP:
        tell_once(f"{told}: the others count as the prompt's. That of Llama 3 makes {CROP}")
    return None
