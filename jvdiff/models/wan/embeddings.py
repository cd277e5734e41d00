"""What encoders made of prompts and pictures, given in their place: checked, and in the shape that stages give them.

B batch · S text tokens · D text width · I picture tokens · W width of the image encoder
"""

from typing import Any

import numpy as np

from jvdiff.errors import UsageError
from jvdiff.models.family import Clip, Models
from jvdiff.models.wan.conditions import TEXT_BUCKETS, TEXT_LENGTH


def text(models: Models, clip: Clip, clips: int, value: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """(rows, other): rows [B,S,D] of the prompts, zero beyond each prompt's end, and those of the negative prompt.

    value: (rows, other), each [B,S,D] with S up to 512, other None or [1,S,D] too; or rows alone, without guidance.
        Those of diffusers' `encode_prompt` have 512 rows; zeros at the end are cut, as they are for a prompt.

    Raises:
        UsageError: another shape or dtype, or no rows of a negative prompt where there is guidance.
    """
    rows, other = value if isinstance(value, tuple | list) and len(value) == 2 else (value, None)
    if clip.guided and other is None:
        raise UsageError(
            "text_embeddings are those of the prompts alone; guidance needs those of the negative prompt too: give "
            "(rows, rows of the negative prompt), or guidance=1."
        )
    width = models.configs["text_encoder"].d_model
    every = [_checked("text_embeddings", each, clips, width) for each in (rows, *([other] if clip.guided else []))]
    if (most := max(each.shape[1] for each in every)) > TEXT_LENGTH:
        raise UsageError(f"text_embeddings have {most} rows; expected at most {TEXT_LENGTH}.")
    used = max(int(np.nonzero(each.any(axis=(0, 2)))[0].max(initial=-1)) + 1 for each in every)
    bucket = next(size for size in TEXT_BUCKETS if used < size or size == TEXT_LENGTH)
    cut = [np.zeros((clips, bucket, width), each.dtype) for each in every]
    for whole, each in zip(cut, every, strict=True):
        whole[:, : each.shape[1]] = each[:, :bucket]
    return cut[0], cut[1] if clip.guided else None


def image(models: Models, clip: Clip, clips: int, value: Any) -> np.ndarray:
    """Picture tokens [B,I,W], those of a clip's pictures behind one another; raises as `text`."""
    return _checked("image_embeddings", value, clips, models.configs["image_encoder"].hidden_size)


def _checked(name: str, value: Any, clips: int, width: int) -> np.ndarray:
    """The array [B,S,width] that is meant; one for all clips may stand once."""
    array = np.asarray(value)
    floating = np.issubdtype(array.dtype, np.floating) or array.dtype.name == "bfloat16"
    if not floating or array.ndim != 3 or array.shape[0] not in (1, clips) or not array.shape[1]:
        raise UsageError(f"{name} are {array.dtype}{list(array.shape)}; expected floats [{clips},S,{width}].")
    if array.shape[2] != width:
        raise UsageError(f"{name} have width {array.shape[2]}; this model's have {width}.")
    return np.broadcast_to(array, (clips, *array.shape[1:]))
