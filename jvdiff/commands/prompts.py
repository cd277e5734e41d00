"""Files of prompts: text, JSONL, a JSON array or CSV become entries, each checked by itself.

The suffix says what a file is, and no other suffix is guessed at. An unusable entry still counts, so that the seeds
of the others do not depend on it.
"""

from __future__ import annotations

import codecs
import collections
import csv
import functools
import io
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jvdiff import config as options
from jvdiff.commands.command_line import say
from jvdiff.errors import UsageError
from jvdiff.models.family import PICTURES, SUBJECTS
from jvdiff.pipeline import Repository, check_takes

MAX_BYTES = 64 * 2**20
ID_BYTES = 200  # a file's name has 255 at most, with `_seedN`, numbers and the suffixes of unfinished files
_STRUCTURE = re.compile(r'"(?:[^"\\]|\\.)*+"|[\[\]{},]', re.DOTALL)  # of JSON: texts, which are passed over, and marks
_BREAK = re.compile(r"\r\n|\r|\n")
_Pieces = Iterator[tuple[str, Callable[[], Any]]]  # (place, -> what stands there; ValueError)


@dataclass(frozen=True)
class Entry:
    """One entry of a prompts file.

    where: file and line
    values: its subject, and id, seed, files of pictures and settings where it has them
    problem: a sentence, where it cannot be used
    """

    where: str
    values: dict[str, Any]
    problem: str | None = None


def read_subjects(path: str | Path, repository: Repository) -> list[Entry]:
    """The entries of a prompts file in order, those that cannot be used too; blank lines and comments are none.

    Raises:
        UsageError: the file cannot be read as a whole, has another suffix, or is empty.
    """
    path = Path(path)
    pieces = _READERS.get(path.suffix.lower())
    if pieces is None:
        known = "no suffix or .txt (text), .jsonl or .ndjson, .json (an array), .csv (with a header)"
        raise UsageError(f"prompts: {path} ends in {path.suffix}; expected {known}.")
    text, entries, ids = _decoded(path), [], {}
    try:
        for place, piece in pieces(text, repository):
            where = f"{path} {place}"
            try:
                entries.append(Entry(where, _checked(piece(), repository, ids)))
            except (UsageError, RecursionError) as error:
                entries.append(Entry(where, {}, _sentence(error)))
    except (UsageError, RecursionError) as error:
        raise UsageError(f"prompts: {path} {_sentence(error)}") from None
    if not entries:
        raise UsageError(f"prompts: {path} holds no prompt.")
    return entries


# --------------------------------------------------------------------------------------------------------- characters


def _decoded(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a mark. A byte that is not UTF-8 becomes half a surrogate pair,
    which `_proper` refuses where it stands."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"prompts: {path} is larger than {MAX_BYTES >> 20} MiB; split it.")
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"prompts: cannot read {path}: {error.strerror}.") from None
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        raise UsageError(f"prompts: {path} is UTF-32; save it as UTF-8.")
    if not content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-8-sig", "surrogateescape")
    try:
        return content.decode("utf-16", "surrogatepass")
    except UnicodeDecodeError:
        raise UsageError(f"prompts: {path} is UTF-16 and ends within a character; it may have been cut.") from None


def _proper(text: str) -> str:
    """`text` without a mark that joining files has left in it; UsageError unless all of it is text."""
    if bad := re.search("[\0\ud800-\udfff]", text):
        code = ord(bad.group())
        found = f"the byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"U+{code:04X}"
        raise UsageError(f"holds {found}, which is not text; save the file as UTF-8, or as UTF-16 with a mark.")
    return text.removeprefix("\ufeff")


# -------------------------------------------------------------------------------------------------------------- formats


def _text(text: str, repository: Repository) -> _Pieces:
    """A subject a line; lines that begin with `# ` are comments."""
    field, comments = SUBJECTS[repository.family.subject], 0
    for place, line in _lines(text):
        if f"{line} ".startswith("# "):
            comments += 1
        else:
            yield place, functools.partial(_plain, line, field)
    if comments:
        lines = "1 line that begins" if comments == 1 else f"{comments} lines that begin"
        verb = "is a comment; it was a prompt" if comments == 1 else "are comments; they were prompts"
        say(f"notice: {lines} with '# ' {verb} until now")


def _plain(line: str, field: str) -> dict[str, Any]:
    """A line that is a subject; UsageError where it is an object of a JSONL file."""
    line = _proper(line).strip()
    if line.startswith("{") and field in _maybe_json(line):
        raise UsageError("is a JSON object in a file of texts; name the file .jsonl.")
    return {field: line}


def _maybe_json(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return ()


def _jsonl(text: str, repository: Repository) -> _Pieces:
    """A JSON object a line."""
    del repository
    for place, line in _lines(text):
        yield place, functools.partial(_json, line)


def _array(text: str, repository: Repository) -> _Pieces:
    """A JSON array of objects or texts, each read by itself, so that one that cannot be read fails alone."""
    field, text = SUBJECTS[repository.family.subject], text.removeprefix("\ufeff")
    try:
        values = json.loads(text, parse_int=float, strict=False)
    except RecursionError:
        values = [...] if text.lstrip().startswith("[") else None
    except json.JSONDecodeError as error:
        raise UsageError(_not_json(error, text)) from None
    if not isinstance(values, list):
        raise UsageError("is not a JSON array; objects that stand one on a line are a .jsonl file.")
    for number, element in enumerate(_elements(text) if values else (), 1):
        yield f"entry {number}", functools.partial(_element, element, field)


def _element(text: str, field: str) -> Any:
    value = _json(text)
    return {field: value} if isinstance(value, str) else value


def _elements(text: str) -> Iterator[str]:
    """The text of each element of a JSON array, however deep it is."""
    depth = begin = 0
    for token in _STRUCTURE.finditer(text):
        mark = token[0]
        depth += (mark in "[{") - (mark in "]}")
        if (mark == "," and depth == 1) or depth == 0:
            yield text[begin : token.start()]
        if depth == 0:
            if text[token.end() :].strip():
                raise UsageError("is not JSON: something stands behind its array.")
            return
        if depth == 1 and mark in "[,":
            begin = token.end()
    raise UsageError("is nested too deeply, and its array does not end; the file may have been cut.")


def _csv(text: str, repository: Repository) -> _Pieces:
    """Rows below a header that names the keys; a cell without text is none."""
    rows, header = csv.reader(io.StringIO(text, newline=""), strict=True), None
    while True:
        place, row, problem = f"line {rows.line_num + 1}", [], None
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            problem = UsageError(f"is not CSV: {error}")
        if not problem and not any(cell.strip() for cell in row):
            continue
        if header is None:
            if problem:
                raise problem
            header = [_proper(name).strip() for name in row]
            _check_header(header, repository)
        else:
            yield place, functools.partial(_cells, header, row, problem, repository)


_READERS: dict[str, Callable[[str, Repository], _Pieces]] = {
    "": _text,
    ".txt": _text,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _array,
    ".csv": _csv,
}


def _lines(text: str) -> Iterator[tuple[str, str]]:
    """(place, line) of each line that is not blank."""
    for number, line in enumerate(_BREAK.split(text), 1):
        if line.strip():
            yield f"line {number}", line


class _Twice(dict):
    """A JSON object in which names stand more than once: those names, and how often."""


def _json(text: str) -> Any:
    """A JSON value. Numbers of any length are read: what no field can be is told by the field."""
    integer = lambda digits: int(digits) if len(digits) <= 20 else float(digits)  # noqa: E731
    try:
        return json.loads(_proper(text), object_pairs_hook=_object, parse_int=integer)
    except json.JSONDecodeError as error:
        raise UsageError(_not_json(error, text)) from None


def _not_json(error: json.JSONDecodeError, text: str) -> str:
    where = f"line {error.lineno}, " if _BREAK.search(text) else ""
    return f"is not JSON: {error.msg.removesuffix(' at')} at {where}character {error.colno}."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = collections.Counter(name for name, _ in pairs)
    twice = {name: count for name, count in counts.items() if count > 1}
    return _Twice(twice) if twice else dict(pairs)


def _check_header(header: list[str], repository: Repository) -> None:
    """Raises UsageError unless a CSV's first line names keys, each once."""
    try:
        options.check_names("column", header, _keys(repository))
    except UsageError as error:
        raise UsageError(f"line 1, which names the columns: {error}") from None
    if len(set(header)) < len(header):
        raise UsageError(f"line 1 names a column twice: {', '.join(header)}.")


def _cells(header: list[str], row: list[str], problem: UsageError | None, repository: Repository) -> dict[str, Any]:
    """A row as an object, its cells as the command line would read them."""
    if problem:
        raise problem
    if len(row) != len(header):
        raise UsageError(f"has {len(row)} cells, the header {len(header)}.")
    declared, values = options.options(repository.family.settings), {}
    for name, cell in zip(header, map(_proper, row), strict=True):
        if not cell.strip():
            continue
        if name == "seed":
            values[name] = options.read(name, cell.strip(), int)
        elif name in declared:
            values[name] = options.read(name, cell, declared[name].kind | None, declared[name].told["prose"])
        else:
            values[name] = cell.strip()
    return values


# -------------------------------------------------------------------------------------------------------------- entries


def _keys(repository: Repository) -> tuple[str, ...]:
    """What an entry may say."""
    family = repository.family
    return SUBJECTS[family.subject], "id", "seed", *family.takes, *options.names(family.settings)


def _checked(entry: Any, repository: Repository, ids: dict[str, str]) -> dict[str, Any]:
    """An entry whose subject can be made and whose id, which joins `ids`, can name files."""
    if not isinstance(entry, dict):
        raise UsageError(f"is {entry!r:.40}, not a JSON object.")
    if isinstance(entry, _Twice):
        raise UsageError(f"says {', '.join(entry)} more than once.")
    for name in PICTURES.keys() & entry.keys():
        check_takes(repository.family, name)
        if not isinstance(entry[name], str | None):
            raise UsageError(f"{name} is {entry[name]!r:.80}; expected the path of a picture.")
    options.check_names("key", entry, _keys(repository))
    for name, value in entry.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{name} is {value}; expected a finite number.")
    field = SUBJECTS[repository.family.subject]
    entry = {**entry, field: repository.family.check_subject(repository.models, entry.get(field))}
    if (name := entry.get("id")) is not None:
        _check_id(name, ids)
    return entry


def _check_id(name: Any, ids: dict[str, str]) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]{0,99}", name):
        raise UsageError(f"id is {name!r:.80}; expected up to 100 letters, digits, '-', '_' or '.'")
    if (size := len(name.encode())) > ID_BYTES:
        raise UsageError(f"id {name!r:.40} has {size} bytes; a name of files has at most {ID_BYTES}.")
    plain = unicodedata.normalize("NFC", name).casefold()
    if plain.endswith((".preview", ".failed", ".frames")):
        raise UsageError(f"id {name!r} ends in what names other files: .preview, .failed, .frames; choose another.")
    if (earlier := ids.get(plain)) is not None:
        aside = "" if earlier == name else f" as {earlier!r}, and not every file system tells them apart"
        raise UsageError(f"id {name!r} was used on an earlier line{aside}.")
    ids[plain] = name


def _sentence(error: Exception) -> str:
    return "is nested too deeply." if isinstance(error, RecursionError) else str(error).splitlines()[0]
