"""How it makes a video chunk by chunk."""

import dataclasses

from jvdiff.models import wan
from jvdiff.models.text import umt5
from jvdiff.models.wan import rollout

from .network import DiTConfig

ROLLOUT = dataclasses.replace(rollout.ROLLOUT, configs=(DiTConfig, wan.VAEConfig, umt5.Config))
