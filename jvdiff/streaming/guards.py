"""What is refused before a rollout computes: calls out of turn, and caches, inputs and texts that do not fit it.

B rollouts · T latent frames of a chunk · H W latent grid · C latent channels · S text tokens · D text width
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvdiff.errors import UsageError
from jvdiff.models.text.tokenizer import check_prompt
from jvdiff.pipeline.settings import check_seed
from jvdiff.runtime import draws
from jvdiff.streaming.config import StreamInferencePipelineConfig
from jvdiff.streaming.contracts import Transformer
from jvdiff.streaming.state import FinalState, StreamCache


def check_key(key: Any) -> Any:
    """uint32 [2], the data of a key of jax.random, or of that of a seed. Raises UsageError for anything else."""
    if key is None or isinstance(key, int | np.integer):
        key = draws.key(check_seed(key))
    if not hasattr(key, "dtype"):
        raise UsageError(f"key is {key!r:.60}; expected one key of jax.random.key, or a seed.")
    data: Any = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    if data.shape != (2,) or data.dtype != jnp.uint32:
        raise UsageError(f"key is {key.dtype}{list(key.shape)}; expected one key of jax.random.key, or a seed.")
    return data


def check_cache(config: StreamInferencePipelineConfig, cache: StreamCache) -> None:
    """Raises UsageError for what is no cache, one of another configuration, and one whose memory was taken."""
    if not isinstance(cache, StreamCache):
        raise UsageError(f"cache is {cache!r:.60}; expected what initialize_cache, generate or finalize returned.")
    if cache.config != config.digest:
        raise UsageError(
            f"this cache is of another configuration ({cache.config}); expected one of {config.digest}, "
            f"{config.name}. Make it with initialize_cache of the same pipeline."
        )
    if any(x.is_deleted() for x in jax.tree.leaves(cache.past) if isinstance(x, jax.Array)):
        raise UsageError(
            "this cache was given to finalize, which took its memory; use the one that finalize returned, and "
            "streaming.copy(cache) beforehand where a rollout is to go on in two ways."
        )


def check_generate(config: StreamInferencePipelineConfig, index: int, cache: StreamCache, input: Any) -> None:
    """Raises UsageError unless `generate` may make the chunk `index` now, of this input."""
    _check_index(index)
    check_cache(config, cache)
    following, finalized = int(cache.generated), int(cache.finalized)
    if following != finalized:
        raise UsageError(f"chunk {finalized} was generated and is not finalized; finalize it before the next one.")
    if following != index:
        raise UsageError(f"generate was called for chunk {index}; expected {following}: chunks are made one by one.")
    if config.encoder is None:
        if input is not None:
            raise UsageError("generate was given an input, and this configuration has no encoder; leave it out.")
        return
    # A picture or video has the size of the frames; what else it must be, its encoder says.
    shape = config.diffusion_model.transformer.latent_shape
    expected = config.encoder.abstract_input(cache.rollouts, shape, index)
    if input is None or not isinstance(expected, jax.ShapeDtypeStruct) or len(expected.shape) < 4:
        return
    found, expected = np.shape(input), expected.shape
    if len(found) >= 4 and (found[0], *found[-3:-1]) != (expected[0], *expected[-3:-1]):
        raise UsageError(
            f"the input is {list(found)}; expected [{expected[0]},...,{','.join(map(str, expected[-3:]))}], the height "
            "and width of the frames."
        )


def check_finalize(config: StreamInferencePipelineConfig, index: int, cache: StreamCache, final: FinalState) -> None:
    """Raises UsageError unless `finalize` may make the chunk `index` a part of the past now."""
    _check_index(index)
    check_cache(config, cache)
    following, generated = int(cache.finalized), int(cache.generated)
    if following == generated:
        raise UsageError(
            f"finalize was called for chunk {index}, and all {generated} chunks that were generated are finalized."
        )
    if following != index:
        raise UsageError(f"finalize was called for chunk {index}; expected {following}, the last generated.")
    if not isinstance(final, FinalState):
        raise UsageError(f"finalize({index}) was given {final!r:.60}; expected the third value that generate returned.")
    if final.autoregressive_index != index:
        raise UsageError(f"finalize({index}) was given what generate({final.autoregressive_index}) made.")
    if final.latents.shape != (shape := (cache.rollouts, *config.diffusion_model.transformer.latent_shape)):
        raise UsageError(
            f"finalize({index}) was given a chunk of latents {list(final.latents.shape)}; expected {list(shape)}."
        )


def _check_index(index: Any) -> None:
    if isinstance(index, bool) or not isinstance(index, int | np.integer):
        raise UsageError(f"the chunk is {index!r:.60}; expected its number, counted from 0.")


def check_prompts(prompts: Any, negative_prompt: Any) -> list[str]:
    """The prompts as they are. Raises UsageError unless they are a list of at least one, each a text."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
        raise UsageError(f"prompts are {prompts!r:.60}; expected a list of at least one.")
    if not isinstance(negative_prompt, str):
        raise UsageError(f"negative_prompt is {negative_prompt!r:.60}; expected text.")
    return [check_prompt(prompt) for prompt in prompts]


def check_text(transformer: Transformer, text: Any) -> None:
    """Raises UsageError unless text rows are [B,S,D], or [2B,S,D] with guidance, and zeros from `text_shape`'s S on."""
    rows, width = transformer.text_shape
    batch = "2B" if transformer.guided else "B"
    if not hasattr(text, "dtype") or not jnp.issubdtype(text.dtype, jnp.floating):
        found = f"{text.dtype}{list(text.shape)}" if hasattr(text, "dtype") else f"{text!r:.60}"
        raise UsageError(f"text is {found}; expected rows of numbers [{batch},S,{width}].")
    if text.ndim != 3 or not len(text) or len(text) % (1 + transformer.guided) or text.shape[2] != width:
        raise UsageError(f"text is {list(text.shape)}; expected [{batch},S,{width}].")
    if text.shape[1] > rows and np.asarray(text[:, rows:]).any():
        raise UsageError(f"a prompt has more than {rows} tokens, which is text_rows; shorten it.")


def check_image(transformer: Transformer, image: Any, batch: int) -> None:
    """Raises UsageError unless image embeddings are those of B rollouts, for a transformer that takes them."""
    if transformer.image_shape is None:
        if image is not None:
            raise UsageError(f"{type(transformer).__name__} takes no image embeddings; leave image out.")
        return
    shape = (batch, *transformer.image_shape)
    if not hasattr(image, "dtype") or not jnp.issubdtype(image.dtype, jnp.floating) or image.shape != shape:
        found = f"{image.dtype}{list(image.shape)}" if hasattr(image, "dtype") else f"{image!r:.60}"
        raise UsageError(
            f"image is {found}; {type(transformer).__name__} takes image embeddings {list(shape)} beside the text."
        )
