"""Video without end, chunk by chunk: configurations, rollouts, and the VAE in them; see `jvdiff.streaming.rollout`."""

from jvdiff.streaming.codec import ImageEncoder, NullEncoder, StreamingVideoDecoder, StreamingVideoEncoder
from jvdiff.streaming.config import (
    DiffusionModelConfig,
    FlowMatchSchedulerConfig,
    StreamInferencePipelineConfig,
    TransformerConfig,
    UniPCSchedulerConfig,
)
from jvdiff.streaming.contracts import Decoder, Encoder, Reencoding, Scheduler, TextEncoder, Transformer, bind
from jvdiff.streaming.loading import config_from_json, config_of, decoding, load, override, register, rollout_of
from jvdiff.streaming.rollout import StreamInferencePipeline
from jvdiff.streaming.state import FinalState, StreamCache, copy, device_memory
from jvdiff.streaming.text import FamilyTextEncoder
from jvdiff.streaming.values import derive_config, to_json

__all__ = [
    "Decoder",
    "DiffusionModelConfig",
    "Encoder",
    "FamilyTextEncoder",
    "FinalState",
    "FlowMatchSchedulerConfig",
    "ImageEncoder",
    "NullEncoder",
    "Reencoding",
    "Scheduler",
    "StreamCache",
    "StreamInferencePipeline",
    "StreamInferencePipelineConfig",
    "StreamingVideoDecoder",
    "StreamingVideoEncoder",
    "TextEncoder",
    "Transformer",
    "TransformerConfig",
    "UniPCSchedulerConfig",
    "bind",
    "config_from_json",
    "config_of",
    "copy",
    "decoding",
    "derive_config",
    "device_memory",
    "load",
    "override",
    "register",
    "rollout_of",
    "to_json",
]
