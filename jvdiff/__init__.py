"""Video diffusion in JAX. This list is the product; each name is imported when it is first used.

load(path) -> Pipeline                 a Hugging Face folder or a converted repository
generate(pipe, prompts, ...) -> Output  video uint8 [B,F,Y,X,3] and latents float32 [B,T,H,W,C]
pipeline, settings                     the stages of generate, one by one; what decides a clip
class_conditional                      a class label becomes a video, with a model trained on labelled clips
streaming, run_state                   video without end, chunk by chunk; a run as a folder, to go on from
models, kernels, diffusion, data       the rooms below: pure functions over arrays
training                               the loop, and the tasks that it trains
sharding                               meshes, where weights live, sequence-parallel attention
checkpoint, precision, errors          reading and saving weights, the dtype table, what can go wrong
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jvdiff import (
        checkpoint,
        class_conditional,
        data,
        diffusion,
        errors,
        kernels,
        models,
        pipeline,
        precision,
        run_state,
        settings,
        sharding,
        streaming,
        training,
    )
    from jvdiff.pipeline import Output, Pipeline, generate, load

_FROM_PIPELINE = ("Output", "Pipeline", "generate", "load")

__all__ = [
    "Output",
    "Pipeline",
    "checkpoint",
    "class_conditional",
    "data",
    "diffusion",
    "errors",
    "generate",
    "kernels",
    "load",
    "models",
    "pipeline",
    "precision",
    "run_state",
    "settings",
    "sharding",
    "streaming",
    "training",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'jvdiff' has no attribute {name!r}")
    if name in _FROM_PIPELINE:
        return getattr(importlib.import_module("jvdiff.pipeline"), name)
    return importlib.import_module(f"jvdiff.{name}")


def __dir__() -> list[str]:
    return __all__
