"""Video diffusion in JAX. This list is the product; each name is imported when it is first used.

load(path) -> Pipeline                 a Hugging Face folder or a converted repository
generate(pipe, prompts, ...) -> Output  video uint8 [B,F,Y,X,3] and latents float32 [B,T,H,W,C]
embed(pipe, prompts, ...)              what encoders make of them, for generate(pipe, **embeddings)
pipeline                               the stages of generate, one by one; what decides a clip
streaming                              video without end, chunk by chunk
models, kernels, diffusion             the rooms below: pure functions over arrays
training                               the loop that trains any task; tasks stand beside the models
weights                                reading and saving parameters, in both layouts
media                                  video files, pictures, folders of clips
sharding                               meshes, where weights live, sequence-parallel attention
plan                                   what a run would take, found out without weights
digits                                 the toy: moving digits, their judge, and the runs that make its models
runtime, precision, errors             saved states and processes, the precision table, what can go wrong
"""

from jvdiff import program

program.end_by_ctrl_c()

from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING  # noqa: E402

from jvdiff.lazy import attach  # noqa: E402

if TYPE_CHECKING:
    from jvdiff import (
        diffusion,
        digits,
        errors,
        kernels,
        media,
        models,
        pipeline,
        plan,
        precision,
        runtime,
        sharding,
        streaming,
        training,
        weights,
    )
    from jvdiff.pipeline import Output, Pipeline, embed, generate, load

__version__ = "0.1.0"

# In a checkout convert/, configs/ and checkpoints/ lie beside the package; where it is installed, in it (setup.py).
if not Path(__file__).with_name("convert").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

__all__ = [
    "Output",
    "Pipeline",
    "diffusion",
    "digits",
    "embed",
    "errors",
    "generate",
    "kernels",
    "load",
    "media",
    "models",
    "pipeline",
    "plan",
    "precision",
    "runtime",
    "sharding",
    "streaming",
    "training",
    "weights",
]

__getattr__ = attach(__name__, __all__, ("pipeline",))


def __dir__() -> list[str]:
    return __all__
