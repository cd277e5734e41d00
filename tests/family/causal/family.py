"""The family as a value."""

import dataclasses

from jvdiff.models.wan.family import CAUSAL, TRANSFORMER

from .network import DiTConfig

_PARTS = {**CAUSAL.parts, "transformer": dataclasses.replace(TRANSFORMER, config=DiTConfig)}
OWN = dataclasses.replace(CAUSAL, name="a causal one", parts=_PARTS)
