"""The configurations of Wan's diffusion transformer and VAE, read from and written as diffusers' `config.json`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jvdiff.config import known_fields
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
# Keys of diffusers' class for which only the value of every published Wan is implemented.
_FIXED = {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads"}
# Of models that attend to pictures; None in the others.
_IMAGE_RANGES = {"image_dim": (1, 65536), "added_kv_proj_dim": (1, 65536), "pos_embed_seq_len": (1, 65536)}
EXPERTS = ("transformer", "transformer_2")  # of much noise, and of little; one of them may do all the work
_SCALES = ("scale_factor_temporal", "scale_factor_spatial")  # of the VAE, which follow from its other fields
_OF_2_2 = ("decoder_base_dim", "is_residual", "patch_size")  # fields that Wan 2.1's VAE leaves as they are
_CLASSES = {"WanTransformer3DModel": False, "CausalWanTransformer3DModel": True}  # _class_name: DiTConfig.causal


@dataclass(frozen=True)
class DiTConfig:
    """diffusers' WanTransformer3DModel arguments, with its names and defaults (those of the 14B model).

    in_channels: out_channels, and those of a condition behind them where the model takes one.
    image_dim: width of the picture tokens that the blocks attend to beside text; None: there are none.
    added_kv_proj_dim: of which width these are when keys are made of them: the model's.
    pos_embed_seq_len: how many picture tokens a clip has, each with a place that was learned; None: places are not.
    gate_compress: the blocks have the gate of video sparse attention's coarse branch, as FastWan's do. A field of ours,
        which diffusers would ignore; published files show it by their tensors alone.
    causal: the weights were trained to make a video chunk by chunk, as Self-Forcing's, and the class is named
        CausalWanTransformer3DModel; tensors and computation are the same.
    image_q_norm: the file has a norm of queries that nobody uses, as published ones with image_dim have. A field of
        ours; their tensors tell, and are written back.
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
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    pos_embed_seq_len: int | None = None
    gate_compress: bool = False
    causal: bool = False
    image_q_norm: bool = False

    @property
    def width(self) -> int:
        """D: the model width, all heads together."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_json(cls, mapping: Mapping[str, Any]) -> "DiTConfig":
        """The configuration that a `transformer/config.json` describes; keys that it lacks take diffusers' defaults.

        Raises CheckpointError with the field, the value found and the allowed range.
        """
        names = [f.name for f in dataclasses.fields(cls) if f.name != "causal"]
        fields = known_fields("transformer config.json", mapping, (*names, *_FIXED))
        if (name := mapping.get("_class_name", "WanTransformer3DModel")) not in [*_CLASSES]:
            raise _error("_class_name", name, " or ".join(map(repr, _CLASSES)))
        for field, only in _FIXED.items():
            if (value := fields.pop(field, only)) != only:
                raise _error(field, value, f"{only!r}, as in every published Wan model")
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
        for field in ("gate_compress", "image_q_norm"):
            if type(value := fields.get(field, False)) is not bool:
                raise _error(field, value, "true or false")
        eps = fields.get("eps", cls.eps)
        if type(eps) is not float or not 0 < eps < 1:  # NaN compares false
            raise _error("eps", eps, "a number above 0 and below 1")
        cfg = cls(**{**fields, "patch_size": tuple(patch), "eps": eps, "causal": _CLASSES[name]})
        cfg._check_image()
        return cfg

    def _check_image(self) -> None:
        """Raises CheckpointError unless the fields of picture tokens fit together."""
        given = {field: value for field in _IMAGE_RANGES if (value := getattr(self, field)) is not None}
        for field, value in given.items():
            low, high = _IMAGE_RANGES[field]
            if type(value) is not int or not low <= value <= high:
                raise _error(field, value, f"an integer from {low} to {high}, or null")
        for field in [*given, *(["image_q_norm"] if self.image_q_norm else [])]:
            if self.image_dim is None:
                raise _error(field, getattr(self, field), "null where image_dim is")
        if self.image_dim is not None and self.added_kv_proj_dim != self.width:
            raise _error("added_kv_proj_dim", self.added_kv_proj_dim, f"{self.width}, the model's width")
        if self.image_dim is not None and self.causal:
            raise _error("image_dim", self.image_dim, "null in a causal model")

    def to_json(self) -> dict[str, Any]:
        """What `diffusers.WanTransformer3DModel.from_config` reads; it passes over fields of ours with a warning."""
        fields = dataclasses.asdict(self) | {"patch_size": list(self.patch_size)}
        for field in ("gate_compress", "image_q_norm"):
            if not fields[field]:
                del fields[field]
        name = {causal: name for name, causal in _CLASSES.items()}[bool(fields.pop("causal"))]
        return {"_class_name": name} | fields | _FIXED


WAN_2_1_T2V_1_3B = DiTConfig(num_attention_heads=12, ffn_dim=8960, num_layers=30)
WAN_2_1_T2V_14B = DiTConfig()
WAN_2_1_I2V_14B = DiTConfig(in_channels=36, image_dim=1280, added_kv_proj_dim=5120)
WAN_2_1_FLF2V_14B = dataclasses.replace(WAN_2_1_I2V_14B, pos_embed_seq_len=514)
WAN_2_2_I2V_A14B = DiTConfig(in_channels=36)
WAN_2_2_TI2V_5B = DiTConfig(num_attention_heads=24, ffn_dim=14336, num_layers=30, in_channels=48, out_channels=48)


def expert(configs: Mapping[str, Any]) -> DiTConfig:
    """The configuration of a transformer, of those of all parts: what is asked of it is the same for both, where there
    are two."""
    return next(configs[name] for name in EXPERTS if name in configs)


def _error(field: str, value: Any, allowed: str) -> CheckpointError:
    return CheckpointError(
        f"Wan transformer config.json: {field} is {value!r}; allowed is {allowed}.\n"
        f"Compare the file with the repository it came from, and copy it again."
    )


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the VAE; the names are those of diffusers' `config.json` (its spelling of "temperal" included).

    base_dim: channels at full size.
    z_dim: C, of the latents.
    dim_mult: channels on each level, from full size down, in base_dim.
    num_res_blocks: on each level of the encoder; the decoder has one more.
    temperal_downsample: whether the step after each level halves time too.
    latents_mean, latents_std: of each channel of the latents that the encoder makes.
    decoder_base_dim: channels of the decoder at full size; None: base_dim.
    is_residual: Wan 2.2's: every level has a shortcut without parameters, and the decoder's steps keep their width.
    patch_size: pixels of a square that the network sees as one with more channels.
    """

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )  # fmt: skip
    latents_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916,
    )  # fmt: skip
    decoder_base_dim: int | None = None
    is_residual: bool = False
    patch_size: int = 1

    def __post_init__(self):
        def check(field: str, ok: bool, expected: str):
            if not ok:
                raise CheckpointError(f"VAE configuration: {field} is {getattr(self, field)!r}, expected {expected}.")

        for field in ("dim_mult", "temperal_downsample", "latents_mean", "latents_std"):
            check(field, isinstance(getattr(self, field), tuple), "a list")
        for field, most in (("base_dim", 4096), ("z_dim", 1024), ("num_res_blocks", 64)):
            value = getattr(self, field)
            check(field, type(value) is int and 0 < value <= most, f"a whole number from 1 to {most}")
        whole = all(type(m) is int and 0 < m <= 64 for m in self.dim_mult)
        check("dim_mult", whole and 1 < len(self.dim_mult) <= 8, "2 to 8 whole numbers from 1 to 64")
        stages = len(self.dim_mult) - 1
        flags = all(type(t) is bool for t in self.temperal_downsample)
        check("temperal_downsample", flags and len(self.temperal_downsample) == stages, f"{stages} booleans")
        for field in ("latents_mean", "latents_std"):
            numbers = all(isinstance(v, int | float) and abs(v) < 1e6 for v in getattr(self, field))
            check(
                field,
                numbers and len(getattr(self, field)) == self.z_dim,
                f"{self.z_dim} finite numbers (z_dim)",
            )
        check("latents_std", all(v > 0 for v in self.latents_std), "positive numbers")
        width = self.decoder_width
        check("decoder_base_dim", type(width) is int and 0 < width <= 4096, "none or a whole number from 1 to 4096")
        check("is_residual", type(self.is_residual) is bool, "true or false")
        check("patch_size", type(self.patch_size) is int and 0 < self.patch_size <= 16, "a whole number from 1 to 16")
        if self.is_residual:
            check(
                "dim_mult", self._has_shortcuts(), "widths that the shortcut of each level can make of the one before"
            )

    def _has_shortcuts(self) -> bool:
        """Whether the means and repetitions that lead past each level have whole sizes."""
        down, times = self.dim_mult, self.temperal_downsample
        up = down[::-1]
        means = zip((1, *down[:-1]), down, (*times, None), strict=True)
        copies = zip((up[0], *up[:-2]), up[:-1], times[::-1], strict=True)
        return all(a * _cells(time) % b == 0 for a, b, time in means) and all(
            b * _cells(time) % a == 0 for a, b, time in copies
        )

    @property
    def decoder_width(self) -> int:
        """Channels of the decoder at full size."""
        return self.base_dim if self.decoder_base_dim is None else self.decoder_base_dim

    @property
    def latent_channels(self) -> int:
        """C, of the latents."""
        return self.z_dim

    @property
    def pixel_channels(self) -> int:
        """Channels of what the network sees as one pixel."""
        return 3 * self.patch_size**2

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent cell, along height and along width."""
        return self.patch_size * 2 ** (len(self.dim_mult) - 1)

    @property
    def temporal_factor(self) -> int:
        """Pixel frames per latent frame, after the first."""
        return 2 ** sum(self.temperal_downsample)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "VAEConfig":
        """From diffusers' `vae/config.json`; absent keys take the class's defaults.

        Raises:
          CheckpointError: a value out of range, or an unknown field.
        """
        if fields.get("attn_scales", []) not in ([], None):
            raise CheckpointError(
                f"VAE configuration: attn_scales is {fields['attn_scales']!r:.80}, but only [] is supported, as "
                "published."
            )
        names = cls.__dataclass_fields__
        derived = ("in_channels", "out_channels", *_SCALES)
        known = known_fields("vae config.json", fields, (*names, *derived, "attn_scales", "clip_output", "dropout"))
        own: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items() if k in names}
        own["patch_size"] = 1 if own.get("patch_size") is None else own["patch_size"]
        if own.get("decoder_base_dim") == own.get("base_dim", cls.base_dim):
            own["decoder_base_dim"] = None
        cfg = cls(**own)
        absent = {"in_channels": 3, "out_channels": 3}  # what the class takes for keys that are not there
        for key, size in cfg._derived().items():
            if (value := known.get(key, absent.get(key))) not in (size, None):
                raise CheckpointError(
                    f"VAE configuration: {key} is {value!r:.80}, but the other fields make it {size}."
                )
        return cfg

    def to_json(self) -> dict[str, Any]:
        """The `config.json` that diffusers' AutoencoderKLWan loads; only in Wan 2.2's stands what is its own."""
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        plain = self.patch_size == 1
        for name in [name for name in _OF_2_2 if fields[name] == type(self).__dataclass_fields__[name].default]:
            del fields[name]
        own = {name: size for name, size in self._derived().items() if name in _SCALES or not plain}
        return {"_class_name": "AutoencoderKLWan", **fields, "attn_scales": [], "dropout": 0.0, **own}

    def _derived(self) -> dict[str, int]:
        """What follows from the other fields."""
        scales = zip(_SCALES, (self.temporal_factor, self.spatial_factor), strict=True)
        return {"in_channels": self.pixel_channels, "out_channels": self.pixel_channels, **dict(scales)}


def _cells(time: bool | None) -> int:
    """How many cells become one in a step that halves the grid, and time too or not; None: there is no step."""
    return 1 if time is None else 8 if time else 4


WAN_2_1_VAE = VAEConfig()
WAN_2_2_VAE = VAEConfig(
    base_dim=160,
    decoder_base_dim=256,
    z_dim=48,
    is_residual=True,
    patch_size=2,
    latents_mean=(
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
        0.157, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
        -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123, -0.0313, -0.1649, 0.0117, 0.0723,
        -0.2839, -0.2083, -0.052, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    ),
    latents_std=(
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
        0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
        0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.06, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    ),
)  # fmt: skip
