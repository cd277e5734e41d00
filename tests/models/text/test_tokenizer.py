"""Tokenisation without transformers; the comparison with transformers is in tests/parity/test_tokenizer.py."""

import json
import struct
import subprocess
import sys

import numpy as np
import pytest

from jvdiff.digits import tokenizer as digits_tokenizer
from jvdiff.errors import CheckpointError, UsageError
from jvdiff.models.text import tokenizer

WORDS = ["a", "moving", "red", "green", "zero", "one", "seven", "left", "right"]


@pytest.fixture
def folder(tmp_path):
    digits_tokenizer.save(digits_tokenizer.build(WORDS), tmp_path)
    return tmp_path


def test_words_are_single_tokens_and_anything_else_falls_into_characters(folder):
    tok = tokenizer.load(folder)
    ids, mask, cut = tokenizer.tokenize(tok, ["a red seven moving left", "", "red 東 Zz~"], 12)
    words = {word: 3 + i for i, word in enumerate(WORDS)}
    assert ids.dtype == np.int32 and mask.dtype == np.bool_ and ids.shape == mask.shape == (3, 12)
    np.testing.assert_array_equal(ids[0, :6], [words[w] for w in ["a", "red", "seven", "moving", "left"]] + [1])
    np.testing.assert_array_equal(mask.sum(1), [6, 1, 8])
    np.testing.assert_array_equal(ids[~mask], 0)
    assert ids[1, 0] == 1
    assert list(ids[2]).count(2) == 1, "only the character outside ASCII is unknown"
    assert cut == (0, 0, 0)
    assert tok.decode(ids[0]) == "a red seven moving left"
    assert tok.get_vocab_size() == 3 + len(WORDS) + 1 + 94


def test_truncation_keeps_eos_and_counts_what_is_lost(folder):
    tok = tokenizer.load(folder)
    prompts = ["a red seven moving left", "red", "a red"]
    ids, mask, cut = tokenizer.tokenize(tok, prompts, 3)
    np.testing.assert_array_equal(ids, [[3, 5, 1], [5, 1, 0], [3, 5, 1]])
    np.testing.assert_array_equal(mask.sum(1), [3, 2, 3])
    assert cut == (3, 0, 0)
    long = tokenizer.tokenize(tok, ["red " * 2500], 512)
    assert long.cut == (2501 - 512,) and long.mask.all() and long.ids[0, -1] == 1


def test_settings_saved_in_the_file_do_not_truncate_or_pad(tmp_path):
    tok = digits_tokenizer.build(WORDS)
    tok.enable_truncation(2)
    tok.enable_padding(length=9)
    digits_tokenizer.save(tok, tmp_path)
    assert tokenizer.tokenize(tokenizer.load(tmp_path), ["a red seven"], 8).mask.sum() == 4


def test_the_saved_folder_is_the_same_every_time(tmp_path):
    for name in ("one", "two"):
        digits_tokenizer.save(digits_tokenizer.build(WORDS), tmp_path / name)
    files = sorted(f.name for f in (tmp_path / "one").iterdir())
    assert files == ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize(
    ("dirty", "cleaned"),
    [
        ("  a\tred \n\n seven\u3000moving ", "a red seven moving"),
        ("fish &amp;amp; chips &lt;3", "fish & chips <3"),
        ("cafÃ© â€œredâ€\x9d", 'café "red"'),
        ("a \ud83d\ude00 face", "a \U0001f600 face"),
        ("", ""),
        (" \t\n", ""),
    ],
)
def test_clean(dirty, cleaned):
    assert tokenizer.clean(dirty) == cleaned


@pytest.mark.parametrize("prompt", ["red \ud83d seven", "\ude00", "\ude00\ud83d"])
def test_half_a_surrogate_pair_is_refused(prompt):
    with pytest.raises(UsageError, match="surrogate"):
        tokenizer.clean(prompt)


def broken_json(**model):
    model = {"type": "Unigram", "unk_id": 2, "vocab": [["<pad>", 0], ["</s>", 0], ["<unk>", 0]], **model}
    return json.dumps({"version": "1.0", "added_tokens": [], "model": model}).encode()


BROKEN = {
    "empty": b"",
    "cut short": broken_json()[:-20],
    "not JSON": b"\x00\xff\xfe binary",
    "not an object": b"[]",
    "no model": b"{}",
    "unk_id out of range": broken_json(unk_id=3),
    "no unk_id": broken_json(unk_id=None),
    "no vocabulary": broken_json(vocab=[]),
    "no eos at the end": broken_json(),
    "panic in the library": broken_json()[:-1]
    + b', "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}',
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_tokenizer_json_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    check_refusal(tmp_path, "tokenizer.json")


def check_refusal(folder, name):
    with pytest.raises(CheckpointError, match="the tokenizer cannot be used") as caught:
        tokenizer.load(folder)
    message = str(caught.value)
    assert name in message and "Expected" in message and message.count("\n") < 6


def test_a_missing_tokenizer_is_named(tmp_path):
    check_refusal(tmp_path, "spiece.model")
    check_refusal(tmp_path / "absent", "tokenizer.json")


def message(*fields):
    """A Protocol Buffers message; lengths below 128 only."""
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += bytes([number * 8, value])
        elif isinstance(value, float):
            out += bytes([number * 8 + 5]) + struct.pack("<f", value)
        else:
            out += bytes([number * 8 + 2, len(value)]) + value
    return out


def spiece(model_type=1):
    pieces = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2), ("▁red", -1.0, 1), ("▁", -2.0, 1), ("x", -3.0, 1)]
    encoded = [(1, message((1, text.encode()), (2, score), (3, kind))) for text, score, kind in pieces]
    return message(*encoded, (2, message((3, model_type))))


def test_spiece_model(tmp_path):
    (tmp_path / "spiece.model").write_bytes(spiece())
    ids = tokenizer.tokenize(tokenizer.load(tmp_path), ["red x redx ?"], 12).ids
    np.testing.assert_array_equal(ids[0], [3, 4, 5, 3, 5, 4, 2, 1, 0, 0, 0, 0])


@pytest.mark.parametrize(
    "content",
    [b"", spiece()[:-1], spiece()[:40], spiece(model_type=2), b"\xff" * 100, np.random.default_rng(0).bytes(3000)],
    ids=["empty", "cut short", "cut in a piece", "BPE", "ones", "random"],
)
def test_a_broken_spiece_model_is_named(tmp_path, content):
    (tmp_path / "spiece.model").write_bytes(content)
    check_refusal(tmp_path, "spiece.model")


def test_vocabulary_must_fit_the_embedding(folder):
    tok = tokenizer.load(folder)
    tokenizer.check_vocabulary(tok, tok.get_vocab_size())
    with pytest.raises(CheckpointError, match=r"tokenizer.*\n.*embedding has 50 rows"):
        tokenizer.check_vocabulary(tok, 50)


def test_transformers_is_not_imported():
    code = "import sys, jvdiff.models.text.tokenizer; sys.exit(bool({'transformers', 'torch'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
