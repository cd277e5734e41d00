"""What is refused before a rollout computes: calls out of turn, and caches, inputs and texts that do not fit it.

B rollouts · T latent frames of a chunk · H W latent grid · C latent channels · S text tokens · D text width
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jvdiff.errors import UsageError
from jvdiff.streaming.codec import NullEncoder
from jvdiff.streaming.config import StreamInferencePipelineConfig, TransformerConfig
from jvdiff.streaming.state import FinalState, StreamCache


def check_cache(config: StreamInferencePipelineConfig, cache: StreamCache) -> None:
    """Raises UsageError for a cache of another configuration, and for one whose memory was taken."""
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
    check_cache(config, cache)
    following, finalized = int(cache.generated), int(cache.finalized)
    if following != finalized:
        raise UsageError(f"chunk {finalized} was generated and is not finalized; finalize it before the next one.")
    if following != index:
        raise UsageError(f"generate was called for chunk {index}; expected {following}: chunks are made one by one.")
    encoder, cfg = config.encoder, config.diffusion_model.transformer
    if input is None or isinstance(encoder, NullEncoder):
        return
    if encoder is None:
        raise UsageError("generate was given an input, and this configuration has no encoder; leave it out.")
    # A picture or video has the size of the frames; what else it must be, its encoder says.
    ratio, shape = encoder.spatial_compression_ratio, np.shape(input)
    batch, size = len(cache.history), (cfg.height * ratio, cfg.width * ratio)
    if len(shape) >= 4 and (shape[0], *shape[-3:-1]) != (batch, *size):
        raise UsageError(
            f"the input is {list(shape)}; expected [{batch},...,{size[0]},{size[1]},3], the height and width "
            "of the frames."
        )


def check_finalize(config: StreamInferencePipelineConfig, index: int, cache: StreamCache, final: FinalState) -> None:
    """Raises UsageError unless `finalize` may make the chunk `index` a part of the past now."""
    check_cache(config, cache)
    following, generated = int(cache.finalized), int(cache.generated)
    if following == generated:
        raise UsageError(
            f"finalize was called for chunk {index}, and all {generated} chunks that were generated are finalized."
        )
    if following != index:
        raise UsageError(f"finalize was called for chunk {index}; expected {following}, the last generated.")
    if final.autoregressive_index != index:
        raise UsageError(f"finalize({index}) was given what generate({final.autoregressive_index}) made.")
    if final.latents.shape != (shape := chunk_shape(config, cache)):
        raise UsageError(
            f"finalize({index}) was given a chunk of latents {list(final.latents.shape)}; expected {list(shape)}."
        )


def check_payload(config: StreamInferencePipelineConfig, payload: Any, cache: StreamCache) -> None:
    """Raises UsageError unless what an encoder gave has latents of a chunk's shape."""
    shape = chunk_shape(config, cache)
    latent = payload["latent"] if isinstance(payload, Mapping) and "latent" in payload else None
    if latent is None or latent.shape != shape:
        content = "no latent" if latent is None else f"latents {list(latent.shape)}"
        raise UsageError(f"the encoder gives {content}; chunks of these rollouts are {list(shape)}.")


def check_text(cfg: TransformerConfig, text: Any) -> None:
    """Raises UsageError unless text rows are [B,S,D], or [2B,S,D] with guidance, and zeros from `text_rows` on."""
    branches = 1 + cfg.guided
    if text.ndim != 3 or len(text) % branches or text.shape[2] != cfg.network.text_dim:
        batch = "2B" if cfg.guided else "B"
        raise UsageError(f"text is {list(text.shape)}; expected [{batch},S,{cfg.network.text_dim}].")
    if text.shape[1] > cfg.text_rows and np.asarray(text[:, cfg.text_rows :]).any():
        raise UsageError(f"a prompt has more than {cfg.text_rows} tokens, which is text_rows; shorten it.")


def chunk_shape(config: StreamInferencePipelineConfig, cache: StreamCache) -> tuple[int, ...]:
    """(B,T,H,W,C) of the latents of a chunk."""
    cfg = config.diffusion_model.transformer
    return (len(cache.history), cfg.len_t, cfg.height, cfg.width, cfg.network.out_channels)
