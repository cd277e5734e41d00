"""Prompts within their template; the comparison with diffusers is in tests/parity/test_hunyuan_prompts.py."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest

from jvdiff.errors import UsageError
from jvdiff.models.hunyuan_video import prompts
from jvdiff.models.text import byte_pairs
from tests.models.text import tiny_tokenizers

WORDS = ["red", "seven"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    tiny_tokenizers.save_llama([prompts.TEMPLATE, "red seven", " red"], folder / "tokenizer")
    tiny_tokenizers.save_clip(WORDS, folder / "tokenizer_2")
    return byte_pairs.load(folder / "tokenizer"), byte_pairs.load_clip(folder / "tokenizer_2")


def told(tokenizers, ids, mask):
    return [tokenizers[0].id_to_token(i) for i in ids[mask]]


def test_a_prompt_stands_in_its_template(tokenizers):
    """95 tokens in front of it, as Llama 3 splits text where every piece is one token."""
    assert prompts.misfit(tokenizers[0]) is None
    ids, mask, clip = prompts.tokenize(*tokenizers, ["red seven", ""])
    assert ids.shape == mask.shape == (2, 95 + 32) and ids.dtype == np.int32 and mask.dtype == np.bool_
    assert told(tokenizers, ids[0], mask[0])[:3] == ["<|begin_of_text|>", "<|start_header_id|>", "system"]
    rows, seen = prompts.crop(ids[..., None], mask)
    assert told(tokenizers, rows[0, :, 0], seen[0]) == ["red", "Ġseven", "<|eot_id|>"]
    assert told(tokenizers, rows[1, :, 0], seen[1]) == ["<|eot_id|>"]
    assert {tokenizers[0].id_to_token(i) for i in ids[~mask]} == {"<pad>"}
    assert clip.shape == (2, 77) and clip.dtype == np.int32
    start, end = (tokenizers[1].token_to_id(token) for token in (byte_pairs.START, byte_pairs.END))
    np.testing.assert_array_equal(clip[1], [start] + [end] * 76)
    np.testing.assert_array_equal(clip[0, :4] == [start, 0, 0, end], [True, False, False, True])


def test_prompts_are_not_cleaned(tokenizers):
    ids, mask, _ = prompts.tokenize(*tokenizers, [" red  &amp; <b>\n"])
    text = "".join(told(tokenizers, ids[0, prompts.CROP :], mask[0, prompts.CROP :]))
    assert text == "ĠredĠĠ&amp;Ġ<b>Ċ<|eot_id|>"


def test_a_long_prompt_is_cut_and_short_ones_share_the_smallest_bucket(tokenizers, caplog):
    with caplog.at_level(logging.WARNING, logger="jvdiff"):
        ids, mask, clip = prompts.tokenize(*tokenizers, [" red" * 300, "red"])
    assert ids.shape == (2, 351) and mask[0].all() and mask[1].sum() == 97
    assert told(tokenizers, ids[0], mask[0])[-2:] == ["Ġred", "Ġred"], "the mark of the end is cut off"
    assert clip[0, -1] == tokenizers[1].token_to_id(byte_pairs.END) != clip[0, -2]
    (line,) = caplog.messages
    assert "the last 44 of its tokens are cut" in line
    caplog.clear()
    for words, rows in ((31, 32), (32, 64), (127, 128), (128, 256), (255, 256)):
        assert prompts.tokenize(*tokenizers, [" red" * words])[0].shape[1] == 95 + rows
    assert ["CLIP" in line for line in caplog.messages] == [True] * 3 and "the last 180 tokens" in caplog.messages[-1]


def test_text_that_is_not_unicode(tokenizers):
    pair, face = (prompts.tokenize(*tokenizers, [text]) for text in ("\ud83d\ude00", "\U0001f600"))
    np.testing.assert_array_equal(pair.ids, face.ids)
    with pytest.raises(UsageError, match="surrogate"):
        prompts.tokenize(*tokenizers, ["red \ud83d"])


def test_another_tokenizer_is_told(caplog):
    """What is cut away is not its template: less, which diffusers takes, or more, with words of the prompt."""
    assert prompts.misfit(tiny_tokenizers.llama(["red"])) is None
    assert "tokens of the template before a prompt, of which 95 are cut away: the others count" in caplog.text
    short = SimpleNamespace(encode=lambda text: SimpleNamespace(ids=[0] * 94))
    assert "makes 94 tokens" in (message := prompts.misfit(short)) and "with the beginning of the prompt" in message
