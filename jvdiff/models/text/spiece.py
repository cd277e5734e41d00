"""Reads SentencePiece's spiece.model (a Protocol Buffers message) without the sentencepiece or protobuf packages.

Field numbers are those of sentencepiece_model.proto in https://github.com/google/sentencepiece.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of ModelProto
_TEXT, _SCORE, _TYPE = 1, 2, 3  # fields of a piece
_MODEL_TYPE, _CHARSMAP = 3, 2  # fields of TrainerSpec and NormalizerSpec
_UNIGRAM = 1
_UNKNOWN, _CONTROL = 2, 3  # types of a piece


def load(file: Path) -> Tokenizer:
    """The file as a T5 tokenizer that ends every prompt with eos, id 1. Raises ValueError if it is not one."""
    vocabulary: list[tuple[str, float]] = []
    special, unknown, charsmap = [], None, b""
    for field, value in _fields(file.read_bytes()):
        if not isinstance(value, bytes):
            raise ValueError("not a SentencePiece model")
        if field == _PIECES:
            piece = dict(_fields(value))
            text, kind = piece[_TEXT].decode("utf-8"), piece.get(_TYPE)
            if kind == _UNKNOWN:
                unknown = len(vocabulary)
            if kind in (_UNKNOWN, _CONTROL):
                special.append(text)
            (score,) = struct.unpack("<f", piece.get(_SCORE, bytes(4)))
            vocabulary.append((text, score))
        elif field == _TRAINER and dict(_fields(value)).get(_MODEL_TYPE, _UNIGRAM) != _UNIGRAM:
            raise ValueError("not a unigram model, which T5 uses")
        elif field == _NORMALIZER:
            charsmap = dict(_fields(value)).get(_CHARSMAP, b"")
    if len(vocabulary) < 3 or unknown is None:
        raise ValueError(f"{len(vocabulary)} pieces, and no unknown piece among them")
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=unknown, byte_fallback=False))
    tokenizer.add_special_tokens(special)
    if charsmap:
        tokenizer.normalizer = normalizers.Precompiled(charsmap)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace("▁", "always", split=True)]
    )
    eos = vocabulary[1][0]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {eos}", special_tokens=[(eos, 1)])
    return tokenizer


def pieces(file: Path) -> Iterator[str]:
    """The pieces alone, in order, which takes a quarter of the time of `load`. Raises as `load`, or LookupError."""
    for field, value in _fields(file.read_bytes()):
        if field == _PIECES and isinstance(value, bytes):
            short = value[0] == 8 * _TEXT + 2 and value[1] < 0x80
            yield (value[2 : 2 + value[1]] if short else dict(_fields(value))[_TEXT]).decode("utf-8")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of one message: whole numbers as int, everything else as its bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        field, wire = divmod(key, 8)
        if wire == 0:
            value, at = _varint(data, at)
            yield field, value
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"unknown wire type {wire} at byte {at}")
        size, at = _varint(data, at) if wire == 2 else (8 if wire == 1 else 4, at)
        if at + size > len(data):
            raise ValueError(f"ends in the middle of a value of {size} bytes at byte {at}")
        yield field, data[at : at + size]
        at += size
