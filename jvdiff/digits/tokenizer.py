"""The digits model's tokenizer: every word of its prompts is one token, any other text falls into characters.

Same files and conventions as the published T5 tokenizers (pad 0, eos 1 at the end, unk 2), so that transformers and
diffusers load the folder and give the same ids.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

SPECIAL = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2
_CHARACTERS = tuple(map(chr, range(0x21, 0x7F)))  # printable ASCII
_SPACE = "▁"  # what T5 writes for the start of a word


def build(words: Sequence[str]) -> Tokenizer:
    """A T5 tokenizer (Unigram) of the given words and the printable ASCII characters; ids follow that order."""
    # Unigram takes the split of the highest total score: one whole word before any split into characters.
    vocabulary = [(token, 0.0) for token in SPECIAL]
    vocabulary += [(_SPACE + word, -1.0) for word in dict.fromkeys(words)]
    vocabulary += [(character, -10.0) for character in (_SPACE, *_CHARACTERS)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=False))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(_SPACE, "always", split=True)]
    )
    tokenizer.decoder = decoders.Metaspace(_SPACE, "always", split=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


def save(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json; same tokenizer, same bytes."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = dict(zip(("pad_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    config = {
        "tokenizer_class": "T5Tokenizer",
        **names,
        "extra_ids": 0,  # transformers would add 100 sentinel tokens that the embedding has no rows for
        "additional_special_tokens": [],
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", names)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
