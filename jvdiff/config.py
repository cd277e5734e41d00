"""Options: how the fields that a user may set are declared, checked and named, without JAX.

A group of options is a frozen dataclass whose fields are made by `option`: default, meaning, range. What is given is
typed and checked by `replace`, and nothing is guessed from strings.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math
import numbers
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jvdiff.errors import UsageError

if TYPE_CHECKING:
    from ml_collections import ConfigDict

T = TypeVar("T")
_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[Any, ...] | None = None,
    note: str = "",
    check: Callable[[str, Any], None] | None = None,
) -> Any:
    """A field of a group of options.

    Args:
        default: of the annotated type, or None where the annotation allows it: somebody else decides then.
        help: the meaning, in one line; a unit where there is one.
        low, high: the range of a number, both ends included.
        choices: the values there are, where they can be listed.
        note: what the message about a value out of range adds.
        check: (name, value) raises UsageError for what type, range and choices do not tell.
    """
    told = {"help": help, "low": low, "high": high, "choices": choices, "note": note, "check": check}
    return dataclasses.field(default=default, metadata=told)


def names(group: Any) -> tuple[str, ...]:
    """The names of a group's options, in order."""
    return tuple(field.name for field in dataclasses.fields(group))


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
    kinds = [k for k in typing.get_args(kind) if k is not types.NoneType] or [kind]
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    for kind in kinds:
        if kind in (str, bool) and isinstance(value, kind):
            return value
        if kind is float and number:
            return float(value)
        if kind is int and number and value == value and abs(value) < 2**31 and int(value) == value:
            return int(value)
        if kind not in _NAMES and isinstance(value, kind):
            return value
    expected = " or ".join(_NAMES.get(kind, getattr(kind, "__name__", str(kind))) for kind in kinds)
    raise UsageError(f"{name} is {value!r:.80}; expected {expected}.")


def check(name: str, value: Any, told: Mapping[str, Any]) -> None:
    """Raises UsageError for a value outside an option's range or choices; the message has the nearest value."""
    if told.get("low") is not None and told.get("high") is not None:
        within(name, value, told["low"], told["high"], told["note"])
    if told.get("choices") and value not in told["choices"]:
        raise UsageError(f"{name} is {value!r:.80}; expected one of {', '.join(map(str, told['choices']))}.")
    if told.get("check"):
        told["check"](name, value)


def within(name: str, value: float, low: float, high: float, note: str = "") -> None:
    """Raises UsageError unless low <= value <= high."""
    if not (math.isfinite(value) and low <= value <= high):
        nearest_value = low if math.isnan(value) else min(max(value, low), high)
        aside = f" ({note})" if note else ""
        raise UsageError(f"{name} is {value}; expected {low} to {high}{aside}. The nearest is {nearest_value}.")


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


def nearest(name: Any, known: Iterable[str]) -> str:
    """The middle of a sentence about an unknown name: which of those that are known may be meant, if any."""
    close = difflib.get_close_matches(str(name), list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""


# ------------------------------------------------------------------------------------------------------ configurations


def find(name: str) -> Path:
    """The file of a configuration: a path, or the name of one that ships, such as digits or configs/digits.py.

    Raises:
        UsageError: there is no such file; the message has the nearest name.
    """
    if (path := Path(name)).is_file():
        return path
    folder = shipped("configs")
    stem = name.removeprefix("configs/").removesuffix(".py")
    known = sorted(path.stem for path in folder.glob("*.py"))
    if stem not in known:
        raise UsageError(
            f"no configuration {name!r:.200}{nearest(stem, known)}; expected a file, or one of {', '.join(known)}."
        )
    return folder / f"{stem}.py"


def load(name: str) -> ConfigDict:
    """What the configuration's `get_config()` returns; name: as in `find`. Configurations derive from one another so.

    Raises:
        UsageError: there is no such file, or it has no get_config.
    """
    path = find(name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"the configuration {path} is not a Python file (NAME.py).")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UsageError(f"the configuration {path} has no function get_config that returns a ConfigDict.")
    return module.get_config()


def shipped(folder: str) -> Path:
    """The folder configs or checkpoints that ships: in the package where it is installed, beside it in a checkout."""
    package = Path(__file__).parent
    return next((path for path in (package / folder, package.parent / folder) if path.is_dir()), package / folder)
