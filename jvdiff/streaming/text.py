"""Prompts as rows of text: the text encoder of a family's network.

B prompts · S text tokens · D text width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jvdiff import models
from jvdiff.errors import UsageError
from jvdiff.sharding import Placement
from jvdiff.streaming.contracts import TextEncoder, bind, check, check_network, lacking
from jvdiff.types import Array, Params


@dataclass(frozen=True)
class FamilyTextEncoder:
    """The text encoder of a family's repositories, with its tokenizer.

    network: configuration of the network
    """

    network: Any
    setup = bind

    def __post_init__(self):
        check_network("text_encoder", self.network, 2)

    @property
    def part(self) -> str:
        """The repository's."""
        return "text_encoder"

    def encode_texts(
        self, params: Params, tokenizer: Any, texts: Sequence[str], *, placement: Placement | None = None
    ) -> Array:
        """Rows [B,S,D] of the texts, zeros beyond each text's end. UsageError without a tokenizer."""
        if tokenizer is None:
            raise UsageError("this pipeline was set up without a tokenizer; give text rows in place of prompts.")
        return models.rollout(self.network).encode_texts(self.network, params, tokenizer, texts, placement)

    def token_counts(self, tokenizer: Any, texts: Sequence[str]) -> list[int]:
        """How many rows each text fills."""
        return models.rollout(self.network).token_counts(tokenizer, texts)


def text_encoder_of(config: Any) -> TextEncoder | None:
    """The text encoder that a configuration is, or that its family makes of the network's; None for None.

    Raises:
        UsageError: it is neither.
    """
    if config is None or not lacking(type(config), TextEncoder):
        return config
    if not hasattr(type(config), "from_json"):  # as the configurations of networks have it
        check("text_encoder", config, TextEncoder)
    return FamilyTextEncoder(config)
