"""Tokenizers of two families of encoders with few words, of the same make as those that are published."""

import json
import re

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<pad>")
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def llama(texts):
    """Llama 3's: every piece of `texts` is one token, and anything else falls into bytes."""
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA_3), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    plain = [part for text in texts for part in re.split(r"<\|\w+\|>", text)]
    pieces = [piece for text in plain for piece, _ in split.pre_tokenize_str(text)]
    every = dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *pieces])
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(every)}, [], ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    start = SPECIAL[0], tokenizer.token_to_id(SPECIAL[0])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{start[0]} $A", special_tokens=[start])
    return tokenizer


def save_llama(texts, folder):
    """tokenizer.json, and what transformers' PreTrainedTokenizerFast wants besides."""
    folder.mkdir(parents=True, exist_ok=True)
    llama(texts).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "padding_side": "right"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def save_clip(words, folder):
    """CLIP's vocab.json and merges.txt: every word is one token, and anything else falls into bytes."""
    alphabet, merges = sorted(pre_tokenizers.ByteLevel.alphabet()), []
    for word in words:
        for i in range(1, len(word)):
            merges.append((word[:i], word[i] + "</w>" * (i == len(word) - 1)))
    merges = list(dict.fromkeys(merges))
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *(a + b for a, b in merges)]
    every = dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(every)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
