"""Prompts to token ids, padded on the right; prompts of T5 end with eos, id 1.

B batch · S text tokens.

Files are read by the `tokenizers` library alone: importing transformers would take seconds. `opened` and `tokenize`
serve other encoders too (`byte_pairs`).
"""

import html
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ftfy
import numpy as np
from tokenizers import Tokenizer

from jvdiff.config import tell_once
from jvdiff.errors import CheckpointError, UsageError
from jvdiff.models.text import spiece
from jvdiff.weights.safetensors import readable, what_it_is

PAD, EOS = 0, 1
FILES = ("tokenizer.json", "spiece.model")  # of which `load` takes the first that is there
PROMPT_CHARACTERS = 100_000
_LONE_SURROGATE = re.compile("[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]")


class Tokens(NamedTuple):
    """One row per prompt.

    ids: int32 [B,S], the padding beyond the end
    mask: bool [B,S], true where there is a token
    cut: how many tokens of each prompt were cut off
    """

    ids: np.ndarray
    mask: np.ndarray
    cut: tuple[int, ...]


def load(folder: str | Path) -> Tokenizer:
    """Reads `tokenizer.json`, or without it `spiece.model`, of a repository's tokenizer folder, as transformers does.

    Where both are there and differ, that is told once.

    Raises:
        CheckpointError: the files are missing or broken, or not a T5 tokenizer (a prompt must end with eos, id 1).
    """
    expected = "a T5 tokenizer.json (or spiece.model)"
    tokenizer, file, ids = opened(folder, {"tokenizer.json": from_json, "spiece.model": spiece.load}, expected)
    if not ids or ids[-1] != EOS:
        raise unusable(
            file, f"a prompt's ids end with {ids[-1:]}, expected eos [{EOS}] as T5 tokenizers have it", expected
        )
    other = file.with_name("spiece.model")
    if file != other and other.is_file() and not _same(tokenizer, other):
        tell_once(f"{folder}: tokenizer.json and spiece.model differ; tokenizer.json is used, as transformers does")
    return tokenizer


def from_json(file: Path) -> Tokenizer:
    """A tokenizer.json as it is."""
    return Tokenizer.from_str(file.read_text(encoding="utf-8"))


def opened(
    folder: str | Path, readers: Mapping[str, Callable[[Path], Tokenizer]], expected: str
) -> tuple[Tokenizer, Path, list[int]]:
    """Of the first of these files that a folder has: the tokenizer, which neither cuts nor pads, and the file, and the
    ids of a letter and of a character that no vocabulary has.

    Args:
        readers: name of a file -> what reads it
        expected: what the folder should hold, for messages

    Raises:
        CheckpointError: no such file is there, or it is broken.
    """
    folder = Path(folder)
    file = next((folder / name for name in readers if os.path.lexists(folder / name)), None)
    if file is None:
        raise unusable(folder, f"no {' or '.join(readers)} is there", expected)
    with readable(file), open(file, "rb") as data:
        if real := what_it_is(data.read(64)):
            raise unusable(file, f"this is {real}", expected)
    try:
        tokenizer = readers[file.name](file)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer, file, tokenizer.encode("a \U0010fffd").ids  # a missing unk_id shows here, not later
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library's panics in Rust are not Exceptions
        raise unusable(file, f"{type(error).__name__}: {error}", expected) from error


def _same(tokenizer: Tokenizer, file: Path) -> bool:
    """Whether every piece of a spiece.model has its number in the tokenizer; a file that is none differs."""
    ids = tokenizer.get_vocab()
    try:
        return all(ids.get(text) == number for number, text in enumerate(spiece.pieces(file)))
    except (OSError, ValueError, LookupError):
        return False


def check_vocabulary(tokenizer: Tokenizer, rows: int) -> None:
    """Raises CheckpointError if the tokenizer can give an id that a token embedding of `rows` rows lacks."""
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise CheckpointError(
            f"The tokenizer and the text encoder do not belong together: ids go up to {highest},\n"
            f"but the token embedding has {rows} rows (vocab_size in text_encoder/config.json).\n"
            "Take both folders from one repository."
        )


def clean(prompt: str) -> str:
    """The prompt as some of diffusers' pipelines tokenise it: ftfy, HTML entities decoded twice, white space collapsed.

    Raises UsageError as `unicode` does.
    """
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(unicode(prompt))))).strip()


def unicode(prompt: str) -> str:
    """The prompt itself, with surrogate pairs as the characters that they stand for.

    Raises UsageError for half a surrogate pair, which is not text (diffusers puts a replacement character there).
    """
    if bad := _LONE_SURROGATE.search(prompt):
        raise UsageError(
            f"The prompt holds U+{ord(bad.group()):04X} at character {bad.start()}, half a surrogate pair.\n"
            "Expected: Unicode text. Retype that character, or save the prompt file as UTF-8."
        )
    return prompt.encode("utf-16", "surrogatepass").decode("utf-16")


def check_prompt(prompt: Any, name: str = "prompt") -> str:
    """`prompt` itself, if it is text that can be tokenised.

    Raises:
        UsageError: not text, blank, half a surrogate pair, or longer than any prompt.
    """
    if not isinstance(prompt, str):
        raise UsageError(f"{name} is {prompt!r:.80}; expected text.")
    if len(prompt) > PROMPT_CHARACTERS:
        raise UsageError(f"{name} has {len(prompt)} characters; the most is {PROMPT_CHARACTERS}.")
    if not clean(prompt):
        raise UsageError(f"{name} is empty; say what the video shows.")
    return prompt


def tokenize(
    tokenizer: Tokenizer, prompts: Sequence[str], length: int, *, end: int | None = EOS, pad: int = PAD
) -> Tokens:
    """Ids of cleaned prompts, cut or padded to S = `length` >= 1; a prompt that is cut still ends with `end`.

    An empty prompt is what the tokenizer puts round a prompt: eos alone, with T5's. The caller says what to do about a
    cut prompt.

    Args:
        end: the last id of every prompt. None: a cut prompt ends where it is cut.
        pad: id beyond the end.
    """
    ids = np.full((len(prompts), length), pad, np.int32)
    mask = np.zeros((len(prompts), length), bool)
    cut = []
    for row, prompt in enumerate(prompts):
        tokens = tokenizer.encode(prompt).ids
        cut.append(max(0, len(tokens) - length))
        tokens = tokens[:length]
        if end is not None:
            tokens = [*tokens[:-1], end]
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = True
    return Tokens(ids, mask, tuple(cut))


def unusable(path: Path, found: str, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: the tokenizer cannot be used.\n"
        f"Found: {found:.300}.\n"
        f"Expected: {expected}. Download the repository's tokenizer folder again."
    )
