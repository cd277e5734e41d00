"""Pictures as they are given (a file, a Pillow picture, an array) become uint8 RGB arrays; the sizes of their clips.

What is returned is the original, upright: every resizing starts from it, and is a model's own business
(`jvdiff.models.vision.pictures`).

Y X pixel height, width.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jvdiff.config import expanded
from jvdiff.errors import CheckpointError, CorruptFile, UsageError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 128 * 2**20  # 384 MiB of uint8 RGB
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I")  # Pillow's names of grey with 16 bits, "I" that of older versions
_WHITE = (255, 255, 255, 255)
_log = logging.getLogger("jvdiff")


def picture(value: Any, name: str = "image") -> np.ndarray:
    """A picture as it was given -> uint8 RGB [Y,X,3].

    Args:
        value: uint8 [Y,X,3], which is taken as it is; a Pillow picture; or the path of a file.
        name: of the argument or option, for messages.

    Raises:
        UsageError: none of these, or there is no such file.
        CheckpointError: more than MAX_PIXELS.
        CorruptFile: a file that is damaged, or of another kind.
    """
    if isinstance(value, str | os.PathLike):
        return read(value, name)
    if hasattr(value, "getexif") and hasattr(value, "mode"):
        _check_size(f"{name}: a {value.width}x{value.height} picture", value.width, value.height)
        return _rgb(value, name)
    shape = np.shape(value) if hasattr(value, "dtype") and value.dtype == np.uint8 else ()
    if len(shape) != 3 or shape[-1] != 3 or 0 in shape:
        found = f"{value.dtype}{list(value.shape)}" if hasattr(value, "dtype") else f"a {type(value).__name__}"
        raise UsageError(f"{name} is {found}; expected uint8 [height,width,3], a Pillow picture or the path of a file.")
    return np.asarray(value)


def read(path: str | os.PathLike, name: str = "image") -> np.ndarray:
    """A PNG, JPEG, WebP, GIF or BMP file as uint8 RGB [Y,X,3].

    It is turned upright as its EXIF says; what is transparent lies over white; 16 bits become 8; of an animation the
    first frame is taken, and a line says so.

    Raises: as `picture`.
    """
    from PIL import Image

    path = Path(expanded(name, path))
    if not path.is_file():
        raise UsageError(f"{name}: {path} is not a file; expected a picture.")
    try:
        with _patient(), Image.open(path, formats=FORMATS) as image:
            _check_size(f"{path}: {image.width}x{image.height}", image.width, image.height)
            if getattr(image, "is_animated", False) and image.format != "MPO":  # of a camera: two views of one picture
                _log.warning("%s is an animation; its first frame is taken", path)
            return _rgb(image, str(path))
    except Image.DecompressionBombError as error:
        raise CheckpointError(_too_large(str(path), str(error))) from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, UsageError):
            raise
        known = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        what = "is none" if isinstance(error, Image.UnidentifiedImageError) else f"is damaged ({str(error)[:200]})"
        raise CorruptFile(f"{path}: expected a picture ({known}), and it {what}; save it anew as PNG.") from error


@contextlib.contextmanager
def _patient() -> Iterator[None]:
    """Without Pillow's warning of large pictures: ours are limited otherwise."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _check_size(what: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise CheckpointError(_too_large(what, f"{width * height:,} pixels"))


def _too_large(what: str, size: str) -> str:
    return f"{what}: too large: {size.rstrip('.')}; expected at most {MAX_PIXELS:,} pixels; shrink it first."


def _rgb(image: Image.Image, name: str) -> np.ndarray:
    """A Pillow picture upright, over white, with 8 bits: uint8 [Y,X,3]."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode in _DEEP:
        image = Image.fromarray(_eight_bits(np.asarray(image), name))
    elif image.mode == "F":
        raise UsageError(f"{name}: a picture of mode F, whose range nobody knows; expected one with 8 or 16 bits.")
    if image.has_transparency_data:
        over = Image.new("RGBA", image.size, _WHITE)
        over.alpha_composite(image.convert("RGBA"))
        image = over
    return np.asarray(image.convert("RGB"))


def _eight_bits(grey: np.ndarray, name: str) -> np.ndarray:
    """Values of 0..65535 -> uint8, rounded."""
    if grey.min() < 0 or grey.max() > 65535:
        raise UsageError(f"{name}: values from {grey.min()} to {grey.max()}; expected a picture with 8 or 16 bits.")
    return ((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)


def one_each(value: Any, count: int, name: str = "image") -> tuple[np.ndarray, ...] | None:
    """The picture of each of `count` clips: one for all of them, or a list with one each; None for None.

    Raises: as `picture`, and UsageError where the list has another length.
    """
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        return (picture(value, name),) * count
    if len(value) != count:
        clips = "1 clip" if count == 1 else f"{count} clips"
        raise UsageError(f"{name} has {len(value)} pictures for {clips}; expected one for all, or one each.")
    return tuple(picture(each, f"{name} {i}") for i, each in enumerate(value, 1))


def digest(pixels: np.ndarray) -> str:
    """What names a picture uint8 [Y,X,3] in records: sha256 of its size and its pixels, whatever file they were in."""
    return hashlib.sha256(f"{pixels.shape[0]}x{pixels.shape[1]}:".encode() + pixels.tobytes()).hexdigest()


def fitting(height: int, width: int, area: float, unit: int) -> tuple[int, int]:
    """(height, width) of a clip with the proportions of a picture and about this area, multiples of `unit`.

    As the examples of diffusers' image-to-video pipelines choose it: each side rounded, then cut to the multiple below.
    A side is never less than one unit.
    """
    sides = math.sqrt(area * (height / width)), math.sqrt(area / (height / width))
    high, wide = (max(round(side) // unit * unit, unit) for side in sides)
    return high, wide
