"""Video without end, chunk by chunk: configurations, rollouts, and the VAE in them; see `jvdiff.streaming.rollout`."""

from jvdiff.streaming.codec import ImageEncoder, NullEncoder, StreamingVideoDecoder, StreamingVideoEncoder
from jvdiff.streaming.config import (
    DiffusionModelConfig,
    FlowMatchSchedulerConfig,
    TransformerConfig,
    UniPCSchedulerConfig,
    derive_config,
    to_json,
)
from jvdiff.streaming.rollout import (
    SELF_FORCING_WAN_2_1_T2V_1_3B,
    FinalState,
    StreamCache,
    StreamInferencePipeline,
    StreamInferencePipelineConfig,
    config_from_json,
    config_of,
    copy,
    device_memory,
    load,
    override,
)

__all__ = [
    "SELF_FORCING_WAN_2_1_T2V_1_3B",
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
    "to_json",
]
