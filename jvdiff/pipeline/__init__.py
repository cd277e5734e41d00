"""From a repository to a video: what it says of itself, its weights, settings, and the stages of a clip."""

from jvdiff.pipeline.generate import (
    Output,
    Pipeline,
    abstract_params,
    check_fits,
    check_parts,
    check_subjects,
    generate,
    load,
    make_request,
    place,
    read_parts,
    size_for,
)
from jvdiff.pipeline.lending import Weights
from jvdiff.pipeline.repository import Repository, inspect, save
from jvdiff.pipeline.settings import check_seed, read_defaults, resolve
from jvdiff.pipeline.stages import Call, Context, Executor, Tracer, begin, decode, denoise, encode, initial_noise, trace

__all__ = [
    "Call",
    "Context",
    "Executor",
    "Output",
    "Pipeline",
    "Repository",
    "Tracer",
    "Weights",
    "abstract_params",
    "begin",
    "check_fits",
    "check_parts",
    "check_seed",
    "check_subjects",
    "decode",
    "denoise",
    "encode",
    "generate",
    "initial_noise",
    "inspect",
    "load",
    "make_request",
    "place",
    "read_defaults",
    "read_parts",
    "resolve",
    "save",
    "size_for",
    "trace",
]
