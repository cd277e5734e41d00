"""Video without end, chunk by chunk: configurations, rollouts, and the VAE in them; see `jvdiff.streaming.rollout`."""

from jvdiff.streaming.codec import ImageEncoder, NullEncoder, StreamingVideoDecoder, StreamingVideoEncoder
from jvdiff.streaming.config import (
    DiffusionModelConfig,
    FlowMatchSchedulerConfig,
    StreamInferencePipelineConfig,
    TransformerConfig,
    UniPCSchedulerConfig,
    derive_config,
    to_json,
)
from jvdiff.streaming.loading import config_from_json, config_of, load, override, rollout_of
from jvdiff.streaming.rollout import StreamInferencePipeline
from jvdiff.streaming.state import FinalState, StreamCache, copy, device_memory

__all__ = [
    "DiffusionModelConfig",
    "FinalState",
    "FlowMatchSchedulerConfig",
    "ImageEncoder",
    "NullEncoder",
    "StreamCache",
    "StreamInferencePipeline",
    "StreamInferencePipelineConfig",
    "StreamingVideoDecoder",
    "StreamingVideoEncoder",
    "TransformerConfig",
    "UniPCSchedulerConfig",
    "config_from_json",
    "config_of",
    "copy",
    "derive_config",
    "device_memory",
    "load",
    "override",
    "rollout_of",
    "to_json",
]
