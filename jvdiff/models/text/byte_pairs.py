"""Byte-level BPE tokenizers: Llama 3's and CLIP's, as their repositories publish them."""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jvdiff.models.text.tokenizer import from_json, opened, unusable

START, END = "<|startoftext|>", "<|endoftext|>"  # of CLIP's prompts
_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def load(folder: str | Path) -> Tokenizer:
    """Reads tokenizer.json, which says all of itself; special tokens within a prompt are read as such.

    What the class in tokenizer_config.json is called is of no use: transformers 5 splits text as Llama 2 did if it is
    LlamaTokenizerFast, which Llama 3's are published under.

    Raises:
        CheckpointError: the file is missing or broken.
    """
    return opened(folder, {"tokenizer.json": from_json}, "the tokenizer.json of Llama 3")[0]


def load_clip(folder: str | Path) -> Tokenizer:
    """Reads CLIP's `tokenizer.json`, or without it `vocab.json` and `merges.txt`, as transformers does.

    Raises:
        CheckpointError: the files are missing or broken, or not CLIP's (a prompt stands between START and END).
    """
    expected = "CLIP's tokenizer.json (or vocab.json and merges.txt)"
    tokenizer, file, ids = opened(folder, {"tokenizer.json": from_json, "vocab.json": _from_vocabulary}, expected)
    ends = [tokenizer.token_to_id(START), tokenizer.token_to_id(END)]
    if [*ids[:1], *ids[-1:]] != ends:
        raise unusable(file, f"a prompt's ids are {ids}, expected {START} and {END} round them, {ends}", expected)
    return tokenizer


def _from_vocabulary(file: Path) -> Tokenizer:
    vocabulary, merges = models.BPE.read_file(str(file), str(file.with_name("merges.txt")))
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary, merges, unk_token=END, continuing_subword_prefix="", end_of_word_suffix="</w>", fuse_unk=False
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (START, END)])
    start, end = ((token, vocabulary[token]) for token in (START, END))
    tokenizer.post_processor = processors.RobertaProcessing(end, start, trim_offsets=False, add_prefix_space=False)
    return tokenizer
