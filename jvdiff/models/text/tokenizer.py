"""Prompts to token ids, for T5 encoders: cleaned as Diffusers does it, eos 1 at the end, padded on the right with 0.

B batch · S text tokens.

Files are read by the `tokenizers` library alone: importing transformers would take seconds.
"""

import html
import os
import re
from collections.abc import Sequence
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

    ids: int32 [B,S], 0 beyond the end
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
    folder = Path(folder)
    file = next((folder / name for name in FILES if os.path.lexists(folder / name)), None)
    if file is None:
        raise _unusable(folder, "neither tokenizer.json nor spiece.model is there")
    with readable(file), open(file, "rb") as data:
        if real := what_it_is(data.read(64)):
            raise _unusable(file, f"this is {real}")
    try:
        is_json = file.suffix == ".json"
        tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8")) if is_json else spiece.load(file)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        ids = tokenizer.encode("a \U0010fffd").ids  # an unassigned character: a missing unk_id shows here, not later
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library's panics in Rust are not Exceptions
        raise _unusable(file, f"{type(error).__name__}: {error}") from error
    if not ids or ids[-1] != EOS:
        raise _unusable(file, f"a prompt's ids end with {ids[-1:]}, expected eos [{EOS}] as T5 tokenizers have it")
    if is_json and (other := folder / "spiece.model").is_file() and not _same(tokenizer, other):
        tell_once(f"{folder}: tokenizer.json and spiece.model differ; tokenizer.json is used, as transformers does")
    return tokenizer


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
    """The prompt as diffusers' video pipelines tokenise it: ftfy, HTML entities decoded twice, white space collapsed.

    Raises UsageError for half a surrogate pair, which is not text (diffusers puts a replacement character there).
    """
    if bad := _LONE_SURROGATE.search(prompt):
        raise UsageError(
            f"The prompt holds U+{ord(bad.group()):04X} at character {bad.start()}, half a surrogate pair.\n"
            "Expected: Unicode text. Retype that character, or save the prompt file as UTF-8."
        )
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


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


def tokenize(tokenizer: Tokenizer, prompts: Sequence[str], length: int) -> Tokens:
    """Ids of cleaned prompts, cut or padded to S = `length` >= 1; a prompt that is cut still ends with eos.

    An empty prompt is eos alone. The caller says what to do about a cut prompt.
    """
    ids = np.full((len(prompts), length), PAD, np.int32)
    mask = np.zeros((len(prompts), length), bool)
    cut = []
    for row, prompt in enumerate(prompts):
        tokens = tokenizer.encode(prompt).ids
        cut.append(max(0, len(tokens) - length))
        tokens = [*tokens[: min(len(tokens), length) - 1], EOS]
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = True
    return Tokens(ids, mask, tuple(cut))


def _unusable(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: the tokenizer cannot be used.\n"
        f"Found: {found:.300}.\n"
        "Expected: a T5 tokenizer.json (or spiece.model). Download the repository's tokenizer folder again."
    )
