"""Configurations as values: derived from one another, checked, printed, and as JSON.

Classes are named in JSON by CLASSES alone: jvdiff's own, those of a family's networks, and what a user registered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jvdiff.config import nearest
from jvdiff.errors import CheckpointError, UsageError

# The classes that JSON may name, without those of networks; `jvdiff.streaming.register` adds to it.
CLASSES: dict[str, type] = {}


def derive_config(config: Any, **patch: Any) -> Any:
    """`config` with other values: a dict goes on into the field's own fields, anything else replaces the field.

    Raises:
        KeyError: there is no such field; the message has its path and the nearest name.
        TypeError: a dict for a field that has no fields.
        UsageError: a value of another type than the field's, or an invalid one.
    """
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise UsageError(f"config is {config!r:.60}; expected a configuration, for instance pipe.config.")
    return _derived(config, patch, "")


def _derived(config: Any, patch: Mapping[str, Any], path: str) -> Any:
    kinds = _kinds(type(config))
    changed = {}
    for name, value in patch.items():
        where = f"{path}{name}"
        if name not in kinds:
            hint = nearest(name, kinds) or f"; {type(config).__name__} has {', '.join(kinds)}"
            raise KeyError(f"no field {where}{hint}.")
        old = getattr(config, name)
        if isinstance(value, Mapping):
            if not dataclasses.is_dataclass(old):
                raise TypeError(
                    f"{where} is {old!r:.60}, which has no fields; give a value instead of {dict(value)!r:.60}"
                )
            value = _derived(old, value, f"{where}.")
        kind = kinds[name]
        if kind is Any and dataclasses.is_dataclass(old):  # a network's configuration, which stays one of its family
            kind = type(old)
        changed[name] = _typed(where, value, kind)
    return dataclasses.replace(config, **changed)


def check_fields(config: Any) -> None:
    """Raises UsageError for a field of another type than its class says; a whole number becomes the float it is for."""
    for name, kind in _kinds(type(config)).items():
        value = _typed(f"{type(config).__name__}: {name}", getattr(config, name), kind)
        object.__setattr__(config, name, value)


def _typed(where: str, value: Any, kind: Any) -> Any:
    if type(value) is int and (kind is float or float in get_args(kind)):
        value = float(value)
    if not _is(value, kind):
        expected = kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)
        raise UsageError(f"{where} is {value!r:.60}; expected {expected}.")
    return value


def _kinds(kind: type) -> dict[str, Any]:
    """The type of each field; Any where its annotation names what cannot be found, as that of a local class may."""
    try:
        hints = get_type_hints(kind)
    except NameError:
        hints = {}
    return {field.name: hints.get(field.name, Any) for field in dataclasses.fields(kind)}


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a field's type. What protocols ask for is checked elsewhere (`contracts.check`)."""
    inner = get_args(kind)
    if kind is Any or getattr(kind, "_is_protocol", False):
        return True
    if isinstance(kind, UnionType) or get_origin(kind) is Union:
        return any(_is(value, one) for one in inner)
    if get_origin(kind) is Literal:
        return value in inner
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and (inner[1:] != (...,) or all(_is(item, inner[0]) for item in value))
    if kind in (int, float) and (isinstance(value, bool) or value != value):
        return False
    return isinstance(value, (int, float) if kind is float else get_origin(kind) or kind)


def tree(config: Any, indent: str = "") -> str:
    """A configuration as text, a line for each field."""
    lines = [type(config).__name__]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        text = tree(value, f"{indent}  ") if dataclasses.is_dataclass(value) else repr(value)
        lines.append(f"{indent}  {field.name}: {text}")
    return "\n".join(lines)


def to_json(config: Any) -> Any:
    """A configuration as JSON values; each object names its class."""
    if dataclasses.is_dataclass(config):
        values = {field.name: to_json(getattr(config, field.name)) for field in dataclasses.fields(config)}
        return {"class": _name(type(config))} | values
    return [to_json(value) for value in config] if isinstance(config, tuple) else config


def _name(kind: type) -> str:
    """What JSON calls a class. One whose name belongs to another has one that nothing is read from."""
    known = next((name for name, one in CLASSES.items() if one is kind), None)
    return known or (f"{kind.__module__}.{kind.__qualname__}" if kind.__name__ in CLASSES else kind.__name__)


def from_json(value: Any, classes: Mapping[str, Any]) -> Any:
    """The inverse of `to_json`, for objects of these classes.

    Raises:
        CheckpointError: an unknown class or field, or an invalid value.
    """
    if isinstance(value, list):
        return tuple(from_json(item, classes) for item in value)
    if not isinstance(value, Mapping):
        return value
    fields = {name: from_json(item, classes) for name, item in value.items() if name != "class"}
    name = str(value.get("class"))
    if name not in classes:
        raise CheckpointError(
            f"a configuration has the class {name!r:.60}; expected one of {', '.join(classes)}.\n"
            "A class of your own is known once it is registered: jvdiff.streaming.register(name, cls)."
        )
    try:
        made = classes[name](**fields)
        return (
            made.from_json(made.to_json()) if hasattr(made, "from_json") else made
        )  # a network's says what is invalid
    except (TypeError, ValueError) as error:  # UsageError is one
        raise CheckpointError(f"a configuration of {name} cannot be read: {error}") from None
