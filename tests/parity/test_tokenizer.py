"""Cleaning and ids against diffusers and transformers, live."""

import io
import json
import random

import numpy as np
import pytest

from jvdiff.digits import clips as digits
from jvdiff.digits import tokenizer as digits_tokenizer
from jvdiff.models.text import byte_pairs, tokenizer
from tests.models.text import tiny_tokenizers

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

WORDS = [*digits.COLOURS, *digits.DIGITS, *digits.DIRECTIONS, "a", "an", "moving"]
PROMPTS = [
    "a red seven moving left",
    "an orange zero moving up",
    "",
    "A Ünïcode ▁ prompt with </s> and <pad> (8/9) 日本語 \U0001f600!",
    "upward reddish nineteen",
    "a  red\tseven",
    "x" * 700,
    "red " * 600,
]


def check(ours, theirs, prompts=PROMPTS):
    for length in (7, 64, 512):
        want = theirs(
            prompts,
            padding="max_length",
            max_length=length,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="np",
        )
        got = tokenizer.tokenize(ours, prompts, length)
        np.testing.assert_array_equal(got.ids, want.input_ids)
        np.testing.assert_array_equal(got.mask, want.attention_mask.astype(bool))


@pytest.mark.parametrize("name", ["AutoTokenizer", "T5TokenizerFast"])
def test_digits_tokenizer(tmp_path, name):
    digits_tokenizer.save(digits_tokenizer.build(WORDS), tmp_path)
    theirs = getattr(transformers, name).from_pretrained(tmp_path)
    assert len(theirs) == tokenizer.load(tmp_path).get_vocab_size()
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id) == (0, 1, 2)
    check(tokenizer.load(tmp_path), theirs)


def test_digits_tokenizer_in_a_pipeline(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    digits_tokenizer.save(digits_tokenizer.build(WORDS), tmp_path / "tokenizer")
    components = {name: [None, None] for name in ("text_encoder", "transformer", "vae", "scheduler")}
    index = {"_class_name": "WanPipeline", "tokenizer": ["transformers", "T5TokenizerFast"], **components}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    pipe = diffusers.WanPipeline.from_pretrained(tmp_path, **dict.fromkeys(components))
    check(tokenizer.load(tmp_path / "tokenizer"), pipe.tokenizer)


def test_spiece_model(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    rng = random.Random(0)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(rng.choices(WORDS, k=6)) for _ in range(500)),
        model_writer=model,
        vocab_size=48,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    theirs = transformers.T5TokenizerFast.from_pretrained(tmp_path, extra_ids=0)
    prompts = [*PROMPTS, "ﬁne ① Ａ½ re\u0301d"]  # what the precompiled character map rewrites
    check(tokenizer.load(tmp_path), theirs, prompts)
    theirs.save_pretrained(tmp_path / "saved")
    check(tokenizer.load(tmp_path / "saved"), theirs, prompts)


MORE = [
    "İstanbul ǅ ½ ﬁ ß",
    "e\u0301 x\u00a0y \u3000 z",
    "I'LL we're don't",
    "12345678",
    "<|endoftext|>",
    "<|ENDOFTEXT|> <|eot_id|>b",
]


def test_clip(tmp_path):
    """From vocabulary and merges, and from the tokenizer.json that transformers makes of them."""
    tiny_tokenizers.save_clip([*WORDS, "we", "x"], tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").is_file() and not (tmp_path / "saved" / "vocab.json").exists()
    for ours in (byte_pairs.load_clip(tmp_path), byte_pairs.load_clip(tmp_path / "saved")):
        end = ours.token_to_id(byte_pairs.END)
        assert end == theirs.eos_token_id == theirs.pad_token_id
        for length in (7, 77):
            prompts = [*PROMPTS, *MORE]
            want = theirs(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="np")
            got = tokenizer.tokenize(ours, prompts, length, end=end, pad=end)
            np.testing.assert_array_equal(got.ids, want.input_ids)


def test_llama(tmp_path):
    """As transformers reads the file under its own class; under LlamaTokenizerFast, which Llama 3's are published with,
    transformers 5 splits text in another way than the file says."""
    tiny_tokenizers.save_llama([*PROMPTS, *MORE], tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    prompts = [*PROMPTS, *MORE, *("\n\n" + text for text in MORE)]
    for length in (7, 64):
        want = theirs(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="np")
        ours = byte_pairs.load(tmp_path)
        got = tokenizer.tokenize(ours, prompts, length, end=None, pad=ours.token_to_id("<pad>"))
        np.testing.assert_array_equal(got.ids, want.input_ids)
        np.testing.assert_array_equal(got.mask, want.attention_mask.astype(bool))


def test_clean():
    prompt_clean = pytest.importorskip("diffusers.pipelines.wan.pipeline_wan").prompt_clean
    for prompt in [
        *PROMPTS,
        " \u3000a\u00a0 red\r\n",
        "cafÃ© &amp;lt;b&amp;gt; &eacute;",
        "â€œquotesâ€\x9d ﬁ Ａ",
        "\ufeffx\x00y\x1b[31m",
        "\ud83d\ude00",
        "&#32; x &nbsp;",
    ]:
        assert tokenizer.clean(prompt) == prompt_clean(prompt)
