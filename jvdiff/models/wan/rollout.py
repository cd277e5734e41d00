"""Wan chunk by chunk: what `jvdiff.streaming` needs of a causal model, and Self-Forcing's published one."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jvdiff.diffusion import schedules
from jvdiff.errors import CheckpointError, UsageError
from jvdiff.kernels import patterns
from jvdiff.models import wan
from jvdiff.models.family import Models, Rollout
from jvdiff.models.text import umt5
from jvdiff.models.wan import conditions
from jvdiff.sharding import Placement
from jvdiff.streaming.codec import StreamingVideoDecoder
from jvdiff.streaming.config import (
    DiffusionModelConfig,
    FlowMatchSchedulerConfig,
    StreamInferencePipelineConfig,
    TransformerConfig,
    UniPCSchedulerConfig,
)
from jvdiff.types import Array, Params


@functools.lru_cache(maxsize=8)
def _text_program(cfg: umt5.Config, placement: Placement | None) -> Any:
    """jitted (params, ids int32 [B,S], mask bool [B,S]) -> rows [B,S,D], zero where the mask is false."""
    return jax.jit(lambda params, ids, mask: conditions.encode_text(params, cfg, ids, mask, placement))


def _encode_texts(
    cfg: umt5.Config, params: Params, tokenizer: Any, texts: Sequence[str], placement: Placement | None = None
) -> Array:
    ids, mask = conditions.tokenize(tokenizer, texts)
    if placement is not None:
        ids, mask = jax.device_put((ids, mask), placement.everywhere)
    return _text_program(cfg, placement)(params, ids, mask)


def _token_counts(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    return np.asarray(conditions.tokenize(tokenizer, texts).mask).sum(axis=1).tolist()


def _span(chunk: int, window: int, sink: int, relative: bool, pattern: str = "dense") -> wan.Span:
    near = patterns.read(pattern)
    if isinstance(near, patterns.Dense):
        near = None
    elif not isinstance(near, patterns.SlidingTile):
        raise UsageError(
            f"pattern of a stream is {pattern!r:.80}; expected dense, or sliding_tile:3x8x8:13x3x3 (tile, window).\n"
            "Video sparse attention is for weights that were trained with it, and no causal ones are published; a\n"
            "table of windows is of whole clips."
        )
    return wan.Span(chunk, window, sink, relative, near)


# At the size of the published models, 480x832, with all rows of text.
_transformer = functools.partial(
    TransformerConfig, height=60, width=104, text_length=conditions.TEXT_LENGTH, text_rows=conditions.TEXT_LENGTH
)


def _config(name: str, models: Models) -> StreamInferencePipelineConfig:
    """A causal repository's networks, and the scheduler of its scheduler_config.json; the rest is Self-Forcing's."""
    configs, published = models.configs, models.files["scheduler"]
    scheduler: Any
    if published.get("_class_name") == "SelfForcingFlowMatchScheduler":
        scheduler = FlowMatchSchedulerConfig(**schedules.from_self_forcing_config(published))
    else:
        found = schedules.from_scheduler_config(published)
        if found != ("unipc", found.shift, "diffusers", None):
            raise CheckpointError(
                f"{name}: scheduler_config.json asks for {found.solver}, {found.grid}, shift_terminal "
                f"{found.shift_terminal}.\nA causal model takes UniPC of order 2 without spacings of its noise levels."
            )
        scheduler = UniPCSchedulerConfig(shift=found.shift)
    transformer = _transformer(configs["transformer"], configs["text_encoder"])
    decoder = StreamingVideoDecoder(configs["vae"])
    return StreamInferencePipelineConfig(name, DiffusionModelConfig(transformer, scheduler), decoder=decoder)


def _picture_shape(cache: Any) -> tuple[int, ...]:
    """[B,2,Y,X,3]: the first convolution remembers two frames of its input, whose channels are those of a patch."""
    batch, frames, height, width, channels = cache["conv_in"].shape
    side = math.isqrt(channels // 3)
    return batch, frames, height * side, width * side, 3


ROLLOUT = Rollout(
    configs=(wan.DiTConfig, wan.VAEConfig, umt5.Config),
    config=_config,
    dtype_of=lambda params: params["blocks"]["self_attn"]["k"]["kernel"].dtype,
    span=_span,
    encode_texts=_encode_texts,
    token_counts=_token_counts,
    text_keys=wan.text_keys,
    init_kv_cache=wan.init_kv_cache,
    chunk_velocity=wan.chunk_velocity,
    remembered=wan.remembered,
    extend=wan.extend,
    reencode=wan.reencode,
    mesh_sizes=wan.mesh_sizes,
    encode_chunk=wan.encode_chunk,
    decode_chunk=wan.decode_chunk,
    normalize_latents=wan.normalize_latents,
    denormalize_latents=wan.denormalize_latents,
    picture_shape=_picture_shape,
)

CAUSAL_WAN_2_1_T2V_1_3B = dataclasses.replace(wan.WAN_2_1_T2V_1_3B, causal=True)

# Self-Forcing's published model (arXiv 2506.08009), at 480x832.
SELF_FORCING_WAN_2_1_T2V_1_3B = StreamInferencePipelineConfig(
    "self-forcing-wan2.1-t2v-1.3b",
    DiffusionModelConfig(_transformer(CAUSAL_WAN_2_1_T2V_1_3B, umt5.UMT5_XXL), FlowMatchSchedulerConfig(shift=5.0)),
    decoder=StreamingVideoDecoder(wan.WAN_2_1_VAE),
)
