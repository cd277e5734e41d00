"""Pages of help: every field with type, default and meaning, under titles."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jvdiff.commands.arguments import Command, Section
from jvdiff.config import Option, span

_LEFT = 44  # columns of name, type and default
_TYPES = {int: "whole number", float: "number", str: "text", bool: "true or false", tuple: "tuple", dict: "fields"}
_TYPES[Path] = "path"


def page(command: Command, sections: Sequence[Section], config: Any = None) -> str:
    """The help of a command; config: whose values are the defaults, where one was named."""
    lines = [f"jvdiff {command.name}: {command.about}", ""]
    lines += [f"  jvdiff {command.name} {example}" for example in command.examples]
    for section in sections:
        shown = [each for each in section.options.values() if not any(map(dataclasses.is_dataclass, each.kinds))]
        if shown:
            lines += ["", section.title, *(line for each in shown for line in _entry(each, config))]
    return "\n".join([*lines, "", *_also(command)])


def overview(commands: Mapping[str, str]) -> str:
    """The help of `jvdiff` itself; commands: what each does, by name."""
    width = max(map(len, commands))
    return "\n".join(
        [
            "jvdiff: video diffusion in JAX",
            "",
            '  jvdiff sample --prompt="a red seven moving left"',
            "  jvdiff COMMAND --help",
            "",
            "commands",
            *(f"  {name:<{width}}  {about}" for name, about in commands.items()),
            "",
            "also: --version, --help",
        ]
    )


def _entry(each: Option, config: Any) -> Iterator[str]:
    """The lines of one option."""
    value = each.default
    if config is not None:
        found: Any = config
        for name in each.path.split("."):
            found = found.get(name) if hasattr(found, "keys") else None
        value = each.default if found is None else found
    default = "required" if value is None and each.required else _shown(value)
    left = f"  --{each.path}  {kind(each)}  [{default}]"
    width = max(shutil.get_terminal_size((120, 24)).columns, 72)
    meaning = textwrap.wrap(each.told["help"] + _range(each), width - _LEFT)
    if len(left) > _LEFT - 2:
        yield left
    else:
        meaning[0] = f"{left:<{_LEFT}}{meaning[0]}"
    first = len(left) <= _LEFT - 2
    yield from (line if first and i == 0 else f"{'':<{_LEFT}}{line}" for i, line in enumerate(meaning))


def kind(each: Option) -> str:
    """The type of an option in a word or two."""
    if each.told.get("choices") and all(isinstance(choice, str) for choice in each.told["choices"]):
        return "|".join(each.told["choices"])
    return " or ".join(dict.fromkeys(_TYPES.get(typing.get_origin(k) or k, "text") for k in each.kinds))


def _range(each: Option) -> str:
    low, high = each.told.get("low"), each.told.get("high")
    return "" if low is None and high is None else f" ({span(low, high, 'g')})"


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    text = "{...}" if hasattr(value, "keys") else value if isinstance(value, str) and value else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _also(command: Command) -> Iterable[str]:
    if command.takes_config:
        implied = f" [{command.implied}, unless a checkpoint is given]" if command.implied else ""
        yield f"also: --config=NAME or FILE{implied}; --config.x=VALUE is --x=VALUE"
    yield "also: --traceback (where in the program an error arose), --version, --help"
