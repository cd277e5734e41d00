"""One picture, two ways into networks: squashed for a VAE, cut out for CLIP. Each starts from the original.

Y X pixel height, width · S side that CLIP sees

Source: diffusers' VaeImageProcessor (Lanczos) and transformers' CLIPImageProcessorPil (bicubic), both by Pillow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jvdiff.config import known_fields
from jvdiff.errors import CheckpointError
from jvdiff.weights.safetensors import read_json

FILE = "preprocessor_config.json"


def squash(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [Y,X,3] -> uint8 [height,width,3], as a VAE sees it: Lanczos, nothing cut off, proportions not kept."""
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))


@dataclass(frozen=True)
class Processor:
    """What preprocessor_config.json says of CLIP's pictures.

    side: S, of the square that is cut out
    mean, std: of each colour, of values in 0..1
    """

    side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Processor:
        """Raises CheckpointError where the file asks for another way than `seen_by_clip` goes."""
        values = known_fields(FILE, config, (*_ALWAYS, "size", "crop_size", "image_mean", "image_std"))
        for name, expected in _ALWAYS.items():
            if values.get(name, expected[0]) not in expected:
                raise CheckpointError(f"{FILE}: {name} is {values[name]!r:.80}; expected {expected[0]!r}.")
        side, crop = values.get("size"), values.get("crop_size")
        side = side.get("shortest_edge") if isinstance(side, Mapping) else side
        square = {"height": side, "width": side}
        if type(side) is not int or not 1 <= side <= 4096 or crop not in (side, square):
            raise CheckpointError(
                f"{FILE}: size is {values.get('size')}, crop_size {crop}; expected one square of both."
            )
        return cls(side, _colours(values, "image_mean"), _colours(values, "image_std"))


def _colours(values: Mapping[str, Any], name: str) -> tuple[float, float, float]:
    match values.get(name):
        case [float(red), float(green), float(blue)] if all(0 < x < 1 for x in (red, green, blue)):
            return red, green, blue
    raise CheckpointError(f"{FILE}: {name} is {values.get(name)!r:.80}; expected 3 numbers between 0 and 1.")


# Values that a file may have; where it is silent, they hold.
_ALWAYS: dict[str, tuple[Any, ...]] = {
    "image_processor_type": ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"),
    "feature_extractor_type": ("CLIPFeatureExtractor",),
    "do_convert_rgb": (True,),
    "do_resize": (True,),
    "resample": (int(Image.Resampling.BICUBIC),),
    "do_center_crop": (True,),
    "do_rescale": (True,),
    "rescale_factor": (1 / 255,),
    "do_normalize": (True,),
    "data_format": ("channels_first",),
}


def read_processor(folder: Path) -> Processor:
    """The Processor of a folder; raises CheckpointError."""
    return Processor.from_json(read_json(folder / FILE))


def seen_by_clip(picture: np.ndarray, processor: Processor) -> np.ndarray:
    """uint8 [Y,X,3] -> float32 [S,S,3]: its shorter side becomes S (bicubic), the middle is cut out, and normalised."""
    side, (height, width) = processor.side, picture.shape[:2]
    short, long = min(height, width), max(height, width)
    longer = int(side * long / short)
    size = (longer, side) if width > height else (side, longer)  # width, height
    resized = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
    top, left = (resized.shape[0] - side) // 2, (resized.shape[1] - side) // 2
    middle = resized[top : top + side, left : left + side].astype(np.float64) * (1 / 255)
    mean, std = (np.array(each, np.float32) for each in (processor.mean, processor.std))
    return (middle.astype(np.float32) - mean) / std
