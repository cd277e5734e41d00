"""The sizes of the causal video VAE of HunyuanVideo."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jvdiff.config import known_fields
from jvdiff.errors import CheckpointError

TEMPORAL_FACTOR = 4  # the only one that diffusers' decoder has


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the VAE; the names are those of diffusers' `config.json`.

    block_out_channels: on each level, from full size down; each step to the next halves height and width, and the last
        two halve time, too. (The decoder's last two double it.)
    latent_channels: C, of the latents.
    layers_per_block: residual blocks on each level of the encoder; the decoder has one more.
    norm_num_groups: of channels, which are normalised together.
    scaling_factor: what the encoder's latents are multiplied by for the transformer.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    latent_channels: int = 16
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.476986

    def __post_init__(self):
        for field, most in (("latent_channels", 1024), ("layers_per_block", 64), ("norm_num_groups", 1024)):
            value = getattr(self, field)
            self._check(field, type(value) is int and 0 < value <= most, f"a whole number from 1 to {most}")
        widths, groups = self.block_out_channels, self.norm_num_groups
        self._check(
            "block_out_channels", isinstance(widths, tuple) and 3 <= len(widths) <= 8, "a list of 3 to 8 numbers"
        )
        whole = all(type(width) is int and 0 < width <= 8192 and width % groups == 0 for width in widths)
        self._check("block_out_channels", whole, f"multiples of {groups} (norm_num_groups) up to 8192")
        scale = self.scaling_factor
        number = type(scale) in (int, float) and 0 < scale < 1e6  # NaN compares false
        self._check("scaling_factor", number, "a positive number")

    def _check(self, field: str, ok: bool, expected: str) -> None:
        if not ok:
            raise CheckpointError(f"VAE configuration: {field} is {getattr(self, field)!r:.80}, expected {expected}.")

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent cell, along height and along width."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def temporal_factor(self) -> int:
        """Pixel frames per latent frame, after the first."""
        return TEMPORAL_FACTOR

    @property
    def steps(self) -> tuple[bool, ...]:
        """Of each step from one level to the next, in the order of either network: whether time changes, too."""
        steps = len(self.block_out_channels) - 1
        return tuple(i >= steps - int(math.log2(TEMPORAL_FACTOR)) for i in range(steps))

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "VAEConfig":
        """From diffusers' `vae/config.json`; absent keys take the class's defaults.

        Raises:
          CheckpointError: a value out of range or not supported, or an unknown field.
        """
        names = cls.__dataclass_fields__
        known = known_fields("vae config.json", fields, (*names, *cls()._fixed()))
        own: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items() if k in names}
        cfg = cls(**own)
        absent = cls()._fixed()  # what diffusers takes for keys that are not there
        for field, only in cfg._fixed().items():
            if (value := known.get(field, absent[field])) != only:
                raise CheckpointError(
                    f"VAE configuration: {field} is {value!r:.80}, but only {only!r} is supported with "
                    f"{len(cfg.block_out_channels)} levels (block_out_channels), as published."
                )
        return cfg

    def to_json(self) -> dict[str, Any]:
        """The `config.json` that diffusers' AutoencoderKLHunyuanVideo loads."""
        own = dataclasses.asdict(self) | {"block_out_channels": list(self.block_out_channels)}
        return {"_class_name": "AutoencoderKLHunyuanVideo", **own, **self._fixed()}

    def _fixed(self) -> dict[str, Any]:
        """What can have one value alone, or follows from the other fields."""
        levels = len(self.block_out_channels)
        return {
            "act_fn": "silu",
            "down_block_types": ["HunyuanVideoDownBlock3D"] * levels,
            "in_channels": 3,
            "mid_block_add_attention": True,
            "out_channels": 3,
            "spatial_compression_ratio": self.spatial_factor,
            "temporal_compression_ratio": TEMPORAL_FACTOR,
            "up_block_types": ["HunyuanVideoUpBlock3D"] * levels,
        }


HUNYUAN_VIDEO_VAE = VAEConfig()
