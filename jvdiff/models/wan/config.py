"""The configuration of Wan's diffusion transformer, read from and written as diffusers' `config.json`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jvdiff.errors import CheckpointError

# Field -> smallest and largest value that can be meant; a file that says more is damaged or hostile.
_INT_RANGES = {
    "num_attention_heads": (1, 256),
    "attention_head_dim": (6, 512),
    "in_channels": (1, 4096),
    "out_channels": (1, 4096),
    "text_dim": (1, 65536),
    "freq_dim": (2, 65536),
    "ffn_dim": (1, 1048576),
    "num_layers": (1, 1024),
    "rope_max_seq_len": (1, 1048576),
}
# Keys of diffusers' class for which only Wan 2.1 text-to-video's value is implemented.
_FIXED = {
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}
_CLASSES = {"WanTransformer3DModel": False, "CausalWanTransformer3DModel": True}  # _class_name: DiTConfig.causal


@dataclass(frozen=True)
class DiTConfig:
    """diffusers' WanTransformer3DModel arguments, with its names and defaults (those of the 14B model).

    gate_compress: the blocks have the gate of video sparse attention's coarse branch, as FastWan's do. A field of ours,
        which diffusers would ignore; published files show it by their tensors alone.
    causal: the weights were trained to make a video chunk by chunk, as Self-Forcing's, and the class is named
        CausalWanTransformer3DModel; tensors and computation are the same.
    """

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    eps: float = 1e-6
    rope_max_seq_len: int = 1024
    gate_compress: bool = False
    causal: bool = False

    @property
    def width(self) -> int:
        """D: the model width, all heads together."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_json(cls, mapping: Mapping[str, Any]) -> "DiTConfig":
        """The configuration that a `transformer/config.json` describes; keys that it lacks take diffusers' defaults.

        Raises CheckpointError with the field, the value found and the allowed range.
        """
        fields = {k: v for k, v in mapping.items() if not k.startswith("_")}
        if (name := mapping.get("_class_name", "WanTransformer3DModel")) not in _CLASSES:
            raise _error("_class_name", name, " or ".join(map(repr, _CLASSES)))
        for field, only in _FIXED.items():
            if (value := fields.pop(field, only)) != only:
                raise _error(field, value, f"{only!r} (Wan 2.1 text-to-video)")
        names = [f.name for f in dataclasses.fields(cls) if f.name != "causal"]
        for field in fields:
            if field not in names:
                raise _error(field, fields[field], f"one of the known fields: {', '.join([*names, *_FIXED])}")
        if fields.get("out_channels", 0) is None:
            fields["out_channels"] = fields.get("in_channels", cls.in_channels)
        for field, (low, high) in _INT_RANGES.items():
            value = fields.get(field, getattr(cls, field))
            if type(value) is not int or not low <= value <= high:
                raise _error(field, value, f"an integer from {low} to {high}")
        for field in ("attention_head_dim", "freq_dim"):
            if fields.get(field, 2) % 2:
                raise _error(field, fields[field], "an even number")
        patch = fields.get("patch_size", cls.patch_size)
        if not isinstance(patch, list | tuple) or tuple(patch) != cls.patch_size:
            raise _error("patch_size", patch, f"{list(cls.patch_size)}, as in every published Wan model")
        if type(gate := fields.get("gate_compress", False)) is not bool:
            raise _error("gate_compress", gate, "true or false")
        eps = fields.get("eps", cls.eps)
        if type(eps) is not float or not 0 < eps < 1:  # NaN compares false
            raise _error("eps", eps, "a number above 0 and below 1")
        return cls(**{**fields, "patch_size": tuple(patch), "eps": eps, "causal": _CLASSES[name]})

    def to_json(self) -> dict[str, Any]:
        """What `diffusers.WanTransformer3DModel.from_config` reads; it passes over a `gate_compress` with a warning."""
        fields = dataclasses.asdict(self) | {"patch_size": list(self.patch_size)}
        if not self.gate_compress:
            del fields["gate_compress"]
        name = {causal: name for name, causal in _CLASSES.items()}[bool(fields.pop("causal"))]
        return {"_class_name": name} | fields | _FIXED


WAN_2_1_T2V_1_3B = DiTConfig(num_attention_heads=12, ffn_dim=8960, num_layers=30)
WAN_2_1_T2V_14B = DiTConfig()


def _error(field: str, value: Any, allowed: str) -> CheckpointError:
    return CheckpointError(
        f"Wan transformer config.json: {field} is {value!r}; allowed is {allowed}.\n"
        f"Compare the file with the repository it came from, and copy it again."
    )
