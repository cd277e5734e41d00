"""Byte-level BPE without transformers; the comparison with transformers is in tests/parity/test_tokenizer.py."""

import json

import pytest

from jvdiff.digits import tokenizer as digits_tokenizer
from jvdiff.errors import CheckpointError
from jvdiff.models.text import byte_pairs
from tests.models.text import tiny_tokenizers

WORDS = ["red", "seven", "don", "café"[:3]]


@pytest.fixture
def folder(tmp_path):
    tiny_tokenizers.save_clip(WORDS, tmp_path)
    return tmp_path


def test_clip(folder):
    tokenizer = byte_pairs.load_clip(folder)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    assert end == max(vocabulary.values()) == start + 1

    def tokens(text):
        ids = tokenizer.encode(text).ids
        assert ids[0] == start and ids[-1] == end
        return [tokenizer.id_to_token(i) for i in ids[1:-1]]

    assert tokens("  Red\t SEVEN") == ["red</w>", "seven</w>"]
    assert tokens("don't 12") == ["don</w>", "'", "t</w>", "1</w>", "2</w>"]
    assert tokens("redx.") == ["re", "d", "x</w>", ".</w>"], "the end of a word is part of its last symbol"
    assert tokens("e\u0301") == tokens("é") == ["Ã", "©</w>"], "letters and accents are joined first"
    assert tokens("a <|endoftext|>") == ["a</w>", "<|endoftext|>"]
    assert tokens("") == []
    tokenizer.enable_truncation(4)
    tokenizer.save(str(folder / "tokenizer.json"))
    again = byte_pairs.load_clip(folder)
    assert again.encode("Red seven don't").ids[1:-1] == [vocabulary[t] for t in tokens("red seven don't"[:9])] + [
        vocabulary[t] for t in ["don</w>", "'", "t</w>"]
    ], "what a file says of cutting does not hold"


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda folder: (folder / "merges.txt").unlink(), "vocab.json"),
        (lambda folder: (folder / "vocab.json").unlink(), "tokenizer.json or vocab.json"),
        (write("vocab.json", b'{"a": 0}'), "vocab.json"),
        (write("vocab.json", b""), "vocab.json"),
        (write("merges.txt", b"\xff\xfe"), "vocab.json"),
        (write("tokenizer.json", b"{}"), "tokenizer.json"),
        (lambda folder: digits_tokenizer.save(digits_tokenizer.build(WORDS), folder), "<|startoftext|>"),
    ],
)
def test_what_is_not_clips_is_named(folder, spoil, named):
    spoil(folder)
    with pytest.raises(CheckpointError, match="the tokenizer cannot be used") as caught:
        byte_pairs.load_clip(folder)
    message = str(caught.value)
    assert named in message and "Expected: CLIP's" in message and message.count("\n") < 6


def test_llama(tmp_path):
    tiny_tokenizers.save_llama(["a red seven\n\n2024"], tmp_path)
    tokenizer = byte_pairs.load(tmp_path)
    tokens = [tokenizer.id_to_token(i) for i in tokenizer.encode("a red  seven<|eot_id|>\n\n2024b").ids]
    assert tokens == ["<|begin_of_text|>", "a", "Ġred", "Ġ", "Ġseven", "<|eot_id|>", "ĊĊ", "202", "4", "b"]
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json is there"):
        byte_pairs.load(tmp_path / "absent")
