"""What a rollout remembers, as values; and how long its stages take.

B rollouts · F frames that are remembered · T latent frames of a chunk · H W latent grid · C latent channels
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from jvdiff.errors import UsageError
from jvdiff.types import Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("generated", "finalized", "key", "text", "image", "past", "history", "encoder", "decoder"),
    meta_fields=("rollouts", "config"),
)
@dataclass(frozen=True)
class StreamCache:
    """All that a rollout remembers.

    With guidance, text and past are those of 2B: the prompts, then the negative one. What text, past, history, encoder
    and decoder are made of, the components say (`jvdiff.streaming.contracts`); here are those of jvdiff's own.

    generated: numpy int32, how many chunks were made
    finalized: numpy int32, how many of them are part of the past
    key: uint32 [2], the data of the rollouts' random key
    text: keys and values of the prompts
    image: the image embeddings beside them, for transformers that take them; None for others
    past: the layers' keys and values
    history: float32 [B,F,H,W,C], the network's inputs that those were made of; None where they cannot be made anew
    encoder, decoder: what the VAE remembers; None before the first chunk
    rollouts: B
    config: the configuration's digest
    """

    generated: Any
    finalized: Any
    key: Any
    text: Any
    image: Any
    past: Any
    history: Any
    encoder: Any
    decoder: Any
    rollouts: int
    config: str


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("latents", "payload", "nonfinite"),
    meta_fields=("autoregressive_index", "milliseconds"),
)
@dataclass(frozen=True)
class FinalState:
    """What `finalize` needs of a chunk.

    latents: float32 [B,T,H,W,C], clean and normalised
    payload: what the encoder gave; None without one
    nonfinite: float32 [], the share of latents and decoded pixels that is NaN or infinite
    autoregressive_index: number of the chunk
    milliseconds: of each stage, where time is taken
    """

    latents: Array
    payload: Any
    nonfinite: Array
    autoregressive_index: int
    milliseconds: tuple[tuple[str, float], ...] = ()


def copy(cache: StreamCache) -> StreamCache:
    """The same state in memory of its own, for a rollout that goes on in two ways: `finalize` takes what it gets."""
    if not isinstance(cache, StreamCache):
        raise UsageError(f"cache is {cache!r:.60}; expected what initialize_cache, generate or finalize returned.")
    return jax.tree.map(lambda x: x.copy(), cache)


def device_memory() -> dict[str, float]:
    """GiB of the first device in use, at most so far, and what JAX's allocator has taken from it for that; without what
    the device does not tell."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    names = {"mem_alloc_gib": "bytes_in_use", "mem_peak_gib": "peak_bytes_in_use", "mem_reserved_gib": "pool_bytes"}
    return {name: statistics[key] / 2**30 for name, key in names.items() if key in statistics}


class Clock:
    """How long stages take, each waited for; nothing at all where no time is taken."""

    def __init__(self, on: bool, before: tuple[tuple[str, float], ...] = ()):
        self.on, self.milliseconds, self.start = on, list(before), time.perf_counter()

    def done(self, stage: str, result: Any) -> None:
        if self.on:
            jax.block_until_ready(result)
            now = time.perf_counter()
            self.milliseconds.append((stage, (now - self.start) * 1000))
            self.start = now

    def statistics(self) -> dict[str, float]:
        if not self.on:
            return {}
        each = dict(self.milliseconds)
        total = sum(each.values())
        return (
            {f"{stage}_ms": each.get(stage, 0.0) for stage in ("encode", "diffuse", "decode", "finalize")}
            | {"total_ms": total, "total_ms_wo_finalize": total - each["finalize"]}
            | device_memory()
        )
