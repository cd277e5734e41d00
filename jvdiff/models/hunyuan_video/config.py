"""The configuration of HunyuanVideo's diffusion transformer, read from and written as diffusers' `config.json`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jvdiff.config import known_fields
from jvdiff.errors import CheckpointError

# Field -> smallest and largest value that can be meant; a file that says more is damaged or hostile.
_INT_RANGES = {
    "in_channels": (1, 4096),
    "out_channels": (1, 4096),
    "num_attention_heads": (1, 256),
    "attention_head_dim": (6, 512),
    "num_layers": (1, 1024),
    "num_single_layers": (1, 1024),
    "num_refiner_layers": (1, 1024),
    "patch_size": (1, 64),
    "patch_size_t": (1, 64),
    "text_embed_dim": (1, 65536),
    "pooled_projection_dim": (1, 65536),
}
_CLASS = "HunyuanVideoTransformer3DModel"
_CONDITIONS = (None, "latent_concat", "token_replace")


@dataclass(frozen=True)
class DiTConfig:
    """diffusers' HunyuanVideoTransformer3DModel arguments, with its names and defaults (those of text-to-video).

    num_layers: blocks with weights of their own for video and text; num_single_layers: those that share them.
    num_refiner_layers: blocks that text goes through by itself before.
    mlp_ratio: feed-forward columns for each of the width; the refiner's is 4 whatever this is.
    guidance_embeds: the network is told how strongly to follow its prompt.
    rope_axes_dim: channels of a head that turn with time, height and width.
    image_condition_type: how a picture enters: None, "latent_concat" (as further channels) or "token_replace" (as the
        first frame, whose tokens are told that they are clean).
    """

    in_channels: int = 16
    out_channels: int = 16
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    num_layers: int = 20
    num_single_layers: int = 40
    num_refiner_layers: int = 2
    mlp_ratio: float = 4.0
    patch_size: int = 2
    patch_size_t: int = 1
    guidance_embeds: bool = True
    text_embed_dim: int = 4096
    pooled_projection_dim: int = 768
    rope_theta: float = 256.0
    rope_axes_dim: tuple[int, int, int] = (16, 56, 56)
    image_condition_type: str | None = None

    @property
    def width(self) -> int:
        """D: the model width, all heads together."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def ffn_dim(self) -> int:
        """Columns of the blocks' feed-forward."""
        return int(self.width * self.mlp_ratio)

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latent cells of a token in time, height and width."""
        return self.patch_size_t, self.patch_size, self.patch_size

    @property
    def layers(self) -> int:
        """Blocks whose attention sees the video, in the order of a table of windows: double ones, then single ones."""
        return self.num_layers + self.num_single_layers

    @classmethod
    def from_json(cls, mapping: Mapping[str, Any]) -> "DiTConfig":
        """The configuration that a `transformer/config.json` describes; keys that it lacks take diffusers' defaults.

        Raises CheckpointError with the field, the value found and the allowed range.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        fields = known_fields("transformer config.json", mapping, (*names, "qk_norm"))
        if (name := mapping.get("_class_name", _CLASS)) != _CLASS:
            raise _error("_class_name", name, repr(_CLASS))
        if (norm := fields.pop("qk_norm", "rms_norm")) != "rms_norm":
            raise _error("qk_norm", norm, "'rms_norm', as in every published HunyuanVideo")
        if fields.get("out_channels", 0) is None:
            fields["out_channels"] = fields.get("in_channels", cls.in_channels)
        for field, (low, high) in _INT_RANGES.items():
            value = fields.get(field, getattr(cls, field))
            if type(value) is not int or not low <= value <= high:
                raise _error(field, value, f"an integer from {low} to {high}")
        for field, (low, high) in {"mlp_ratio": (0, 64), "rope_theta": (1, 1e9)}.items():
            value = fields.setdefault(field, getattr(cls, field))
            if type(value) not in (int, float) or not low < value <= high:  # NaN compares false
                raise _error(field, value, f"a number above {low}, at most {high:g}")
            fields[field] = float(value)
        if type(value := fields.get("guidance_embeds", True)) is not bool:
            raise _error("guidance_embeds", value, "true or false")
        if (value := fields.get("image_condition_type")) not in _CONDITIONS:
            raise _error("image_condition_type", value, "null, 'latent_concat' or 'token_replace'")
        axes, head = fields.get("rope_axes_dim", cls.rope_axes_dim), fields.get("attention_head_dim", 128)
        listed = isinstance(axes, list | tuple) and len(axes) == 3
        if not listed or not all(type(n) is int and n > 0 and n % 2 == 0 for n in axes) or sum(axes) != head:
            raise _error("rope_axes_dim", axes, f"three even numbers that make {head} (attention_head_dim)")
        return cls(**{**fields, "rope_axes_dim": tuple(axes)})

    def to_json(self) -> dict[str, Any]:
        """What `diffusers.HunyuanVideoTransformer3DModel.from_config` reads."""
        fields = dataclasses.asdict(self) | {"rope_axes_dim": list(self.rope_axes_dim)}
        if self.image_condition_type is None:  # as in the published file of text-to-video
            del fields["image_condition_type"]
        return {"_class_name": _CLASS} | fields | {"qk_norm": "rms_norm"}


HUNYUAN_VIDEO = DiTConfig()


def _error(field: str, value: Any, allowed: str) -> CheckpointError:
    return CheckpointError(
        f"HunyuanVideo transformer config.json: {field} is {value!r:.80}; allowed is {allowed}.\n"
        f"Compare the file with the repository it came from, and copy it again."
    )
