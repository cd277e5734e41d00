"""The configurations of the latent video models, read from and written as `config.json`.

C latent channels · K head dim · D model width.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jvdiff.config import known_fields
from jvdiff.errors import CheckpointError

PREDICTIONS = ("v_prediction", "epsilon", "sample")  # diffusers' names
# Field -> smallest and largest value that can be meant; a file that says more is damaged or hostile.
_INT_RANGES = {
    "width": (1, 4096),
    "blocks": (1, 64),
    "groups": (1, 4096),
    "latent_channels": (1, 1024),
    "hidden_size": (4, 65536),
    "depth": (1, 1024),
    "num_heads": (1, 1024),
    "in_channels": (1, 1024),
    "patch_size": (1, 64),
    "num_classes": (1, 2**24),
    "freq_dim": (2, 65536),
}


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the video VAE; an invalid value is a CheckpointError.

    width: channels at full size.
    multipliers: channels on the four levels, from full size down, in widths.
    blocks: residual blocks on each level, of encoder and decoder.
    latent_channels: C.
    groups: of GroupNorm.
    latents_mean, latents_std: of the latents that a trained encoder makes, a number for each channel or one for all.
    """

    width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    latent_channels: int = 4
    groups: int = 32
    latents_mean: tuple[float, ...] = (0.0,)
    latents_std: tuple[float, ...] = (1.0,)

    def __post_init__(self):
        _check_integers(self)
        multipliers = self.multipliers
        fits = isinstance(multipliers, tuple) and all(type(m) is int and 1 <= m <= 64 for m in multipliers)
        if not fits or len(multipliers) != 4:
            raise _error(self, "multipliers", multipliers, "four whole numbers from 1 to 64")
        if any(self.width * m % self.groups for m in multipliers):
            raise _error(self, "groups", self.groups, f"a divisor of the levels' widths {self.widths}")
        for field, low in (("latents_mean", -1e6), ("latents_std", 0.0)):
            values = getattr(self, field)
            numbers = isinstance(values, tuple) and all(
                type(v) in (int, float) and low < v < 1e6  # NaN compares false
                for v in values
            )
            if not numbers or len(values) not in (1, self.latent_channels):
                allowed = f"1 or {self.latent_channels} numbers (latent_channels) above {low:g} and below 1e6"
                raise _error(self, field, values, allowed)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels on each level, from full size down."""
        return tuple(self.width * m for m in self.multipliers)

    @property
    def strides(self) -> tuple[tuple[int, int, int], ...]:
        """Steps between the levels, in time, height and width."""
        return (1, 2, 2), (2, 2, 2), (2, 2, 2)

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent cell, along height and along width."""
        return math.prod(stride[1] for stride in self.strides)

    @property
    def temporal_factor(self) -> int:
        """Pixel frames per latent frame."""
        return math.prod(stride[0] for stride in self.strides)

    @classmethod
    def from_json(cls, mapping: Mapping[str, Any]) -> "VAEConfig":
        """The configuration that a `vae/config.json` describes; keys that it lacks take the defaults."""
        return cls(**_read(cls, mapping))

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {"_class_name": _CLASS_NAMES[VAEConfig], **dataclasses.asdict(self)}


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of the latent video transformer, DiT-style; an invalid value is a CheckpointError.

    hidden_size: D, the model width.
    depth: blocks.
    num_heads: N.
    in_channels: C, of the latents.
    patch_size: latent cells in height and width to a token.
    num_classes: the labels are 0..num_classes-1; `null_class` means no class.
    prediction: what the network is trained to predict, one of `PREDICTIONS`; the network itself does not care.
    freq_dim: sines and cosines of the timestep.
    """

    hidden_size: int = 768
    depth: int = 12
    num_heads: int = 12
    in_channels: int = 4
    patch_size: int = 2
    num_classes: int = 1000
    prediction: str = "v_prediction"
    freq_dim: int = 256

    def __post_init__(self):
        _check_integers(self)
        if self.hidden_size % self.num_heads:
            raise _error(self, "num_heads", self.num_heads, f"a divisor of hidden_size {self.hidden_size}")
        if self.hidden_size % 4:
            raise _error(self, "hidden_size", self.hidden_size, "a multiple of 4, for sines and cosines of two axes")
        if self.freq_dim % 2:
            raise _error(self, "freq_dim", self.freq_dim, "an even number")
        if self.prediction not in PREDICTIONS:
            raise _error(self, "prediction", self.prediction, f"one of {', '.join(PREDICTIONS)}")

    @property
    def null_class(self) -> int:
        """The label of no class: what guidance is away from."""
        return self.num_classes

    @property
    def ffn_dim(self) -> int:
        """Columns of the feed-forward layer, of which there are two sets, one the other's gate."""
        return 4 * self.hidden_size

    @classmethod
    def from_json(cls, mapping: Mapping[str, Any]) -> "DiTConfig":
        """The configuration that a `transformer/config.json` describes; keys that it lacks take the defaults."""
        return cls(**_read(cls, mapping))

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {"_class_name": _CLASS_NAMES[DiTConfig], **dataclasses.asdict(self)}


_CLASS_NAMES: dict[type, str] = {VAEConfig: "LatentVideoVAE", DiTConfig: "LatentVideoTransformer"}


def _read(cls: type[VAEConfig] | type[DiTConfig], mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a `config.json` gives."""
    if (name := mapping.get("_class_name", _CLASS_NAMES[cls])) != _CLASS_NAMES[cls]:
        raise _error(cls, "_class_name", name, repr(_CLASS_NAMES[cls]))
    fields = known_fields(f"{_CLASS_NAMES[cls]} configuration", mapping, [f.name for f in dataclasses.fields(cls)])
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def _check_integers(cfg: VAEConfig | DiTConfig) -> None:
    for field in dataclasses.fields(cfg):
        if field.name in _INT_RANGES:
            low, high = _INT_RANGES[field.name]
            value = getattr(cfg, field.name)
            if type(value) is not int or not low <= value <= high:
                raise _error(cfg, field.name, value, f"a whole number from {low} to {high}")


def _error(cfg: Any, field: str, value: Any, allowed: str) -> CheckpointError:
    name = _CLASS_NAMES[cfg if isinstance(cfg, type) else type(cfg)]
    return CheckpointError(f"{name} configuration: {field} is {value!r:.80}; allowed is {allowed}.")


SMALL = DiTConfig(hidden_size=512, depth=8, num_heads=8)
MEDIUM = DiTConfig()
LARGE = DiTConfig(hidden_size=1024, depth=24, num_heads=16)
XL = DiTConfig(hidden_size=1536, depth=28, num_heads=24)
SIZES = {"small": SMALL, "medium": MEDIUM, "large": LARGE, "xl": XL}
