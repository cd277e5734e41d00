"""Options: how the fields that a user may set are declared, read, checked and named, without JAX.

A group of options is a frozen dataclass whose fields are made by `option`: default, meaning, range. What is given is
typed and checked by `replace`, and nothing is guessed from strings; `read` is for the words of a command line.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import functools
import importlib.machinery
import logging
import math
import numbers
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from jvdiff.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from ml_collections import ConfigDict

T = TypeVar("T")
_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_COMPOUND = {tuple: "a tuple", list: "a list", dict: "a dict", Path: "a path"}
# What diffusers and transformers stamp on every file that they write.
_STAMPS = ("_class_name", "_diffusers_version", "_name_or_path", "_commit_hash", "_attn_implementation_autoset")
_log = logging.getLogger("jvdiff")
_TRUTH = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}  # as absl has it


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[Any, ...] | None = None,
    note: str = "",
    check: Callable[[str, Any], None] | None = None,
    prose: bool = False,
    path: bool = False,
) -> Any:
    """A field of a group of options.

    Args:
        default: a value of the annotated type. None, where the annotation allows it: the repository or the family
            decides. None, where it does not: the option is required on the command line; with dataclasses.MISSING also
            in Python.
        help: the meaning, in one line; a unit where there is one.
        low, high: the range of a number, both ends included; either may be None.
        choices: the values there are, where they can be listed.
        note: what the message about a value out of range adds.
        check: (name, value) raises UsageError for what type, range and choices do not tell.
        prose: the value is a person's words: on a command line `none` is one of them.
        path: text is a path, or a name that may be one (see `expanded`); options of type Path are so anyway.
    """
    told = {"help": help, "low": low, "high": high, "choices": choices, "note": note, "check": check, "prose": prose}
    return dataclasses.field(default=default, metadata=told | {"path": path})


def names(group: Any) -> tuple[str, ...]:
    """The names of a group's options, in order."""
    return tuple(field.name for field in dataclasses.fields(group))


class Option(NamedTuple):
    """An option as it was declared.

    path: its name; within a group that is a field of another, behind that field's name and a dot.
    kind: the annotated type.
    default: None where the repository or the family decides, or where it is required.
    told: what `option` was told besides.
    """

    path: str
    kind: Any
    default: Any
    told: Mapping[str, Any]

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The types that a value may have, None apart."""
        return _kinds(self.kind)

    def expanded(self, value: Any) -> Any:
        """The value, where it is a path as `expanded` gives it."""
        if isinstance(value, str | Path) and (self.told.get("path") or Path in self.kinds):
            return type(value)(expanded(self.path, value))
        return value

    @property
    def required(self) -> bool:
        """Whether there is no default, and None is not a value."""
        return self.default is None and types.NoneType not in typing.get_args(self.kind)


def options(group: Any, prefix: str = "") -> dict[str, Option]:
    """The options of a group, or of several, by path; those of a group in a field of the group come behind it."""
    if isinstance(group, tuple | list):
        return {path: each for one in group for path, each in options(one, prefix).items()}
    hints = typing.get_type_hints(group if isinstance(group, type) else type(group))
    every = {}
    for field in dataclasses.fields(group):
        path, kind = f"{prefix}{field.name}", hints[field.name]
        default = None if field.default is dataclasses.MISSING else field.default
        every[path] = Option(path, kind, default, field.metadata)
        for inner in filter(dataclasses.is_dataclass, _kinds(kind)):
            every |= options(inner, f"{path}.")
    return every


def fields(group: Any, unset: bool = False) -> dict[str, Any]:
    """What a ConfigDict of a group is made of, by path: each default, or a None that knows its type.

    unset: None everywhere.
    """
    from ml_collections import config_dict

    every = {}
    for path, each in options(group).items():
        kind = each.kinds[0] if len(each.kinds) == 1 and each.kinds[0] in _NAMES else object
        every[path] = config_dict.placeholder(kind) if unset or each.default is None else each.default
    return every


def read(name: str, text: str, kind: Any, prose: bool = False) -> Any:
    """What a word of a command line means where a value of this type is expected.

    Text stays text whatever it looks like, unless the type has other values and it is one of them: a tuple in brackets,
    a number. `none` is None where the type has it, but for prose (see `option`).

    Raises:
        UsageError: it is not of the type.
    """
    kinds = _kinds(kind)
    if kind is object or kind is Any:
        return literal(text)
    if text.lower() == "none" and types.NoneType in typing.get_args(kind) and not prose:
        return None
    if text.lstrip()[:1] in ("(", "[", "{") and not set(kinds) <= _NAMES.keys():
        value = literal(text)
        if isinstance(value, tuple(typing.get_origin(k) or k for k in kinds if k not in _NAMES)):
            return value
        if isinstance(value, list | tuple) and any(typing.get_origin(k) is tuple or k is tuple for k in kinds):
            return tuple(value)
    if Path in kinds:
        return Path(expanded(name, text))  # before a Path makes "." of nothing, and one slash of two
    if bool in kinds and text.lower() in _TRUTH:
        return _TRUTH[text.lower()]
    if int in kinds or float in kinds:
        with contextlib.suppress(ValueError, UsageError):
            return int(text) if int in kinds and text.strip("+-").isdecimal() else typed(name, float(text), kind)
    return typed(name, text, kind)


def literal(text: str) -> Any:
    """A Python value, true, false or none where the word is one; else the text."""
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def replace(group: T, values: Mapping[str, Any]) -> T:
    """The group with these values, typed and checked; None leaves an option as it is.

    Raises:
        UsageError: an unknown name (with the nearest one), a value of another type or out of range.
    """
    check_names("setting", values, names(group))
    kinds = typing.get_type_hints(type(group))
    fields = {field.name: field for field in dataclasses.fields(group)}  # type: ignore[arg-type]
    chosen = {name: typed(name, value, kinds[name]) for name, value in values.items() if value is not None}
    for name, value in chosen.items():
        check(name, value, fields[name].metadata)
    return dataclasses.replace(group, **chosen)  # type: ignore[type-var]


def typed(name: str, value: Any, kind: Any) -> Any:
    """`value` as the annotated type; a whole float is a fine int, but nothing is guessed from strings."""
    kinds = _kinds(kind)
    number = _is_number(value)
    for kind in kinds:
        if kind in (str, bool) and isinstance(value, kind):
            return value
        if kind is float and number:
            return float(value)
        if kind is int and number and (isinstance(value, int) or (math.isfinite(value) and int(value) == value)):
            return int(value)
        if kind not in _NAMES and isinstance(value, typing.get_origin(kind) or kind):
            return value
    raise UsageError(f"{name} is {value!r:.80}; expected {described(kinds)}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def described(kinds: Iterable[Any]) -> str:
    """The types of an option in words."""
    return " or ".join(map(_described, kinds))


def _described(kind: Any) -> str:
    origin = dict if dataclasses.is_dataclass(kind) else typing.get_origin(kind) or kind
    return _NAMES.get(kind) or _COMPOUND.get(origin) or f"a {getattr(origin, '__name__', origin)}"


def _kinds(kind: Any) -> tuple[Any, ...]:
    """The members of a union without None; a type that is not a union, alone."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return tuple(k for k in typing.get_args(kind) if k is not types.NoneType)
    return (kind,)


def check(name: str, value: Any, told: Mapping[str, Any]) -> None:
    """Raises UsageError for a value outside an option's range or choices; the message has the nearest value."""
    if not (told.get("low") is None and told.get("high") is None):
        within(name, value, told["low"], told["high"], told["note"])
    if told.get("choices") and value not in told["choices"]:
        raise UsageError(f"{name} is {value!r:.80}; expected one of {', '.join(map(str, told['choices']))}.")
    if told.get("check"):
        told["check"](name, value)


def within(name: str, value: float, low: float | None, high: float | None, note: str = "") -> None:
    """Raises UsageError unless value is finite and low <= value <= high; an end that is None is none."""
    bottom, top = -math.inf if low is None else low, math.inf if high is None else high
    if not (math.isfinite(value) and bottom <= value <= top):
        nearest_value = bottom if math.isnan(value) else min(max(value, bottom), top)
        aside = f" ({note})" if note else ""
        told = f" The nearest is {nearest_value}." if math.isfinite(nearest_value) else ""
        raise UsageError(f"{name} is {value}; expected {span(low, high)}{aside}.{told}")


def span(low: float | None, high: float | None, form: str = "") -> str:
    """The range of a number in words; form: of its ends."""
    ends = [format(end, form) for end in (low, high) if end is not None]
    return " to ".join(ends) if len(ends) == 2 else f"{ends[0]} or {'more' if high is None else 'less'}"


def multiple(name: str, value: int, unit: int, low: int, high: int, extra: int = 0) -> None:
    """Raises UsageError, with the nearest that fits, unless value is extra + k * unit within low..high."""
    nearest_value = min(max(round((value - extra) / unit) * unit + extra, low), high)
    if value != nearest_value:
        rule = f"a multiple of {unit}" + (f" plus {extra}" if extra else "")
        raise UsageError(
            f"{name} is {value}; this model needs {rule} from {low} to {high}. The nearest is {nearest_value}."
        )


def check_names(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises UsageError for names that are not known, with the nearest of those that are."""
    known = tuple(known)
    if unknown := sorted(set(given) - set(known)):
        raise UsageError(
            f"unknown {what} {unknown[0]}{nearest(unknown[0], known)}; expected some of {', '.join(known)}."
        )


def known_fields(where: str, given: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """The fields of a file that are known: one rule for whatever describes a model, its scheduler or its defaults.

    An unknown field passes, and is told once, where it can ask for nothing: it is null or false, or begins with `_`.

    Raises:
        CheckpointError: any other unknown field, since what it asks for would not be done.
    """
    known = tuple(known)
    unknown = {name: value for name, value in given.items() if name not in known}
    passed = [name for name, value in unknown.items() if value is None or value is False or name.startswith("_")]
    for name in (name for name in unknown if name not in passed):
        raise CheckpointError(
            f"{where}: unknown field {name!r:.80} = {unknown[name]!r:.80}{nearest(name, known)}.\n"
            "What it asks for is not known here. Compare the file with the repository that it came from,\n"
            "or remove the field if it has no effect."
        )
    if names := [name for name in passed if name not in _STAMPS]:
        tell_once(f"{where}: passed over, since they ask for nothing: {', '.join(names):.200}")
    return {name: value for name, value in given.items() if name in known}


@functools.cache
def tell_once(line: str) -> None:
    """Logs a line about what a user's files say, the first time that it comes up."""
    _log.warning("%s", line)


def nearest(name: Any, known: Iterable[str]) -> str:
    """The middle of a sentence about an unknown name: which of those that are known may be meant, if any."""
    close = difflib.get_close_matches(str(name), list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""


# --------------------------------------------------------------------------------------------------------------- paths


def expanded(name: str, given: str | os.PathLike) -> str:
    """What a user typed as a path; name: of the option, for messages.

    `~` and `~USER` at its beginning are home folders, whether a shell has seen it or not (behind `=`, in quotes, in a
    configuration, in Python); `./~` is a folder of that name. Variables stay as they are. What is relative is so to the
    working directory.

    Raises:
        UsageError: it is empty, an address, or of a user who has no home folder here.
    """
    text = os.fspath(given)
    if not text or "\0" in text:
        raise UsageError(f"{name} is {text!r:.80}; expected a path.")
    if address := re.match(r"(?i)(file:/*(?=/)|[a-z][a-z0-9+.-]*://|https?:/)", text):
        hub = re.match(r"https?:/+(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", text)
        meant = hub[1] if hub else text[address.end() :] if address[0].lower().startswith("file") else ""
        hint = f", for instance {meant:.200}" if meant else ""
        raise UsageError(f"{name} is {text!r:.200}, an address; expected a path on this machine, or a name{hint}.")
    path = os.path.expanduser(text)
    if text.startswith("~") and path == text:
        user = text[1:].partition("/")[0]
        whose = f"a home folder of {user!r:.80}" if user else "your home folder (HOME is not set)"
        raise UsageError(f"{name} is {text!r:.200}, and {whose} is not known; ./{text:.100} is a folder of that name.")
    return os.path.abspath(path) if str(Path(path)).startswith("~") else path  # a Path has no ./ any more


def root_of_shipped(text: str) -> str:
    """`checkpoints/...` as a path of what ships with jvdiff; other text, and what does not ship, as it is."""
    first, *rest = Path(text).parts or ("",)
    there = shipped("checkpoints").joinpath(*rest)
    return str(there) if first == "checkpoints" and rest and there.exists() else text


# ------------------------------------------------------------------------------------------------------ configurations


def find(name: str) -> Path:
    """The file of a configuration: a path, or the name of one that ships, such as digits or configs/digits.py.

    Raises:
        UsageError: there is no such file; the message has the nearest name.
    """
    if os.path.isfile(name := expanded("config", name)):
        return Path(name)
    folder = shipped("configs")
    stem = name.removeprefix("configs/").removesuffix(".py")
    known = sorted(path.stem for path in folder.glob("*.py"))
    if stem not in known:
        raise UsageError(
            f"no configuration {name!r:.200}{nearest(stem, known)}; expected a file, or one of {', '.join(known)}."
        )
    return folder / f"{stem}.py"


def load(name: str) -> ConfigDict:
    """What the configuration's `get_config()` returns; name: as in `find`.

    Configurations use this to derive from one another. What stands behind a colon (NAME:TEXT) is handed to get_config.

    Raises:
        UsageError: there is no such file, it is not Python, or its get_config does not return a ConfigDict.
    """
    from ml_collections import ConfigDict

    path, *argument = _found(name)
    loader = importlib.machinery.SourceFileLoader(path.stem, str(path))
    module = types.ModuleType(path.stem)
    try:
        loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise UsageError(f"{path}: has no function get_config that returns a ConfigDict.")
        config = module.get_config(*argument)
    except UsageError:
        raise
    except Exception as error:  # a configuration is a program of its author's
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UsageError(f"{path}: the config file cannot be read: {text}.") from error
    if not isinstance(config, ConfigDict):
        raise UsageError(f"{path}: get_config returns {type(config).__name__}; expected a ConfigDict.")
    return config


def ships(name: str) -> bool:
    """Whether a configuration is one that ships with jvdiff; name, raises: as in `load`."""
    return _found(name)[0].resolve().is_relative_to(shipped("configs").resolve())


def _found(name: str) -> list[Any]:
    """The file of a configuration, and what stands behind a colon."""
    stem, *argument = (name,) if os.path.isfile(expanded("config", name)) else name.split(":", 1)
    return [find(stem), *argument]


def shipped(folder: str) -> Path:
    """The folder configs or checkpoints that ships: in the package where it is installed, beside it in a checkout."""
    package = Path(__file__).parent
    return next((path for path in (package / folder, package.parent / folder) if path.is_dir()), package / folder)
