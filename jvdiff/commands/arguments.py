"""argv becomes a Request: flags in any order, a configuration by name, and a command line that goes on.

Two passes: the first finds --config and the checkpoint, which say what fields there are; the second types and checks
what was given. `--x=value`, `--x value` and `--config.x=value` are the same, for nested fields too (`--loop.mesh=...`).
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jvdiff
from jvdiff import config as configs
from jvdiff.config import Option
from jvdiff.errors import UsageError

if TYPE_CHECKING:
    from ml_collections import ConfigDict

# Words that people bring along, and what they are called here.
WORDS = {
    "num_inference_steps": "steps",
    "sample_steps": "steps",
    "guidance_scale": "guidance",
    "cfg_scale": "guidance",
    "sample_guide_scale": "guidance",
    "embedded_cfg_scale": "guidance",
    "true_cfg_scale": "true_guidance",
    "generator": "seed",
    "base_seed": "seed",
    "flow_shift": "shift",
    "sample_shift": "shift",
    "scheduler": "solver",
    "sample_solver": "solver",
    "skip_time_steps": "dense_steps",
    "vsa_dense_first_n_steps": "dense_steps",
    "n_prompt": "negative_prompt",
    "frame_num": "num_frames",
    "frames": "num_frames",
    "torch_dtype": "precision",
    "dtype": "precision",
    "model": "checkpoint",
    "model_id": "checkpoint",
    "pretrained_model_name_or_path": "checkpoint",
    "ckpt_dir": "checkpoint",
    "class_labels": "class_label",
    "image_path": "image",
    "first_frame": "image",
    "last_frame": "last_image",
    "output_dir": "output",
    "save_file": "output",
    "lr": "learning_rate",
    "batch_size": "batch",
    "train_batch_size": "batch",
    "max_train_steps": "steps",
    "lr_warmup_steps": "warmup",
    "gradient_accumulation_steps": "accumulate",
    "checkpointing_steps": "save_every",
    "dataloader_num_workers": "workers",
    "num_videos_per_prompt": "a range of seeds, --seeds=0:4",
    "num_images_per_prompt": "a range of seeds, --seeds=0:4",
}


class Told(Exception):
    """Not an error: what was asked to be printed, a page of help or the version."""


class Section(NamedTuple):
    """Options under a title.

    title: of the section.
    options: by path.
    """

    title: str
    options: Mapping[str, Option]


@dataclasses.dataclass(frozen=True)
class Command:
    """A command as data.

    name: behind `jvdiff`.
    about: what it does, in one line.
    examples: what stands behind `jvdiff NAME`.
    sections: (the configuration, {path: text} of the flags) -> its fields; None: all that there may be.
    fresh: a configuration without a file; None: a file is needed.
    takes_config: whether it has --config.
    implied: the configuration where neither a file nor a checkpoint is given.
    before: (configuration, paths of the flags) -> None, what flags do to the file's values besides taking their place.
    """

    name: str
    about: str
    examples: tuple[str, ...]
    sections: Callable[[Any, Mapping[str, str]], Sequence[Section]]
    fresh: Callable[[], ConfigDict] | None = None
    implied: str | None = None
    takes_config: bool = False
    before: Callable[[ConfigDict, Iterable[str]], None] = lambda config, paths: None


class Request(NamedTuple):
    """What a command line asks for.

    config: complete.
    given: the fields that the command line itself set, nested.
    file: the configuration's name or path; "" without one.
    program: the words that started the command.
    flags: (path, text) as they were given.
    fresh: the configuration without file and flags.
    """

    config: Any
    given: dict[str, Any]
    file: str
    program: tuple[str, ...] = ()
    flags: tuple[tuple[str, str], ...] = ()
    fresh: Any = None

    def command(self, **changes: Any) -> str:
        """The command line that asks for the same with other values; None: what flags have said of it is left out."""
        words = [*self.program, *(["--config", self.file] if self.file else [])]
        dash = "--config." if self.program[-2:-1] == ("-m",) else "--"
        kept = {path: text for path, text in self.flags if path.split(".")[0] not in changes}
        kept |= {name: value for name, value in changes.items() if value is not None}
        return shlex.join(words + [f"{dash}{name}={value}" for name, value in kept.items()])

    def unset(self, name: str) -> str | None:
        """What `command` is to say of a field so that it is None: nothing, unless the configuration's file sets it."""
        return "none" if self.config.get(name) is not None and name not in self.given else None


class Line(NamedTuple):
    """A command line, cut into words.

    config: the value of --config; None without it.
    asked: which of help, version and traceback are asked for.
    flags: (path, text) as they were given; text is None without a value.
    """

    config: str | None
    asked: frozenset[str]
    flags: tuple[tuple[str, str | None], ...]

    @property
    def texts(self) -> dict[str, str]:
        """{path: text}, the last of each."""
        return {path: text for path, text in self.flags if text is not None}


def parse(command: Command, argv: Sequence[str]) -> Request:
    """The request of a command that has a configuration.

    Raises:
        Told: --help or --version.
        UsageError: an unknown flag, field or configuration, with the nearest one; a value of the wrong type; no
            configuration where one is needed.
    """
    line = _begin(command, argv)
    file = line.config or (None if "checkpoint" in line.texts else command.implied)
    config: Any = configs.load(file) if file else command.fresh() if command.fresh else None
    if "help" in line.asked:
        raise Told(_help(command, config if file else None, line.texts))
    if config is None:
        names = ", ".join(sorted(path.stem for path in configs.shipped("configs").glob("*.py")))
        raise UsageError(
            f"no config. Usage: jvdiff {command.name} {command.examples[0]}\n--config takes a file, or one of {names}."
        )
    fresh: Any = command.fresh() if command.fresh else {}
    if "task" not in config:
        with config.unlocked():
            config.update({name: value for name, value in fresh.items() if name not in config})
    sections = command.sections(config, line.texts)
    if file and configs.ships(file):
        _root(config, sections)
    flags = _known_flags(command, line, sections, config)
    command.before(config, [path for path, _ in flags])
    given: dict[str, Any] = {}
    for path, text in flags:
        value = _value(path, text, sections, config)
        _put(config, path, value)
        given = merged(given, _nested(path, value))
    return Request(config, given, file or "", _program(command, argv), flags, fresh)


def values(command: Command, argv: Sequence[str]) -> dict[str, Any]:
    """{name: value} of a command without configurations, complete.

    Raises: as `parse`; and a UsageError for an option that is missing.
    """
    line = _begin(command, argv)
    if "help" in line.asked:
        raise Told(_help(command, None, {}))
    sections = command.sections(None, {})
    if line.config is not None:
        raise UsageError(f"jvdiff {command.name} takes no --config; --help lists its flags.")
    chosen = {path: each.default for section in sections for path, each in section.options.items()}
    for path, text in _known_flags(command, line, sections, {}):
        chosen[path] = _value(path, text, sections, {})
    for section in sections:
        for path, each in section.options.items():
            if each.required and chosen[path] is None:
                raise UsageError(f"--{path} is missing: {each.told['help']}. --help lists all flags.")
    return chosen


def traced(argv: Sequence[str]) -> bool:
    """Whether a command line, which may be wrong otherwise, asks for --traceback."""
    return any(re.fullmatch(r"--?(config\.)?traceback", word) for word in argv)


def split(words: Sequence[str], switches: Iterable[str] = ()) -> Line:
    """Cuts the words of a command line, the program apart; `switches` are flags that need no value.

    Raises:
        UsageError: a word that is neither a flag nor its value.
    """
    config, asked, flags, rest = None, set(), [], list(words)
    switches = {*switches}
    while rest:
        word = rest.pop(0)
        if not re.match("--?[A-Za-z_]", word):
            raise UsageError(f"cannot use {word!r:.80}; fields are set as --name=value.")
        name, equals, given = word.lstrip("-").partition("=")
        name, text = name.removeprefix("config."), given if equals else None
        if name in ("h", "help", "version", "traceback"):
            asked.add("help" if name == "h" else name)
            continue
        if not equals and name in switches:
            text = rest.pop(0) if rest and rest[0].lower() in ("true", "false") else "true"
        elif not equals and rest and not rest[0].startswith("--"):
            text = rest.pop(0)
        if name == "config":
            if not text:
                raise UsageError("--config has no value; give a file or the name of a configuration.")
            config = text
        else:
            flags.append((name, text))
    return Line(config, frozenset(asked), tuple(flags))


def _begin(command: Command, argv: Sequence[str]) -> Line:
    switches = [p for section in command.sections(None, {}) for p, o in section.options.items() if o.kind is bool]
    line = split(argv[1:], switches)
    if "version" in line.asked:
        raise Told(f"jvdiff {jvdiff.__version__}")
    return line


def _help(command: Command, config: Any, flags: Mapping[str, str]) -> str:
    from jvdiff.commands import help as pages

    return pages.page(command, command.sections(config, flags), config)


def _program(command: Command, argv: Sequence[str]) -> tuple[str, ...]:
    """How the command was started: `jvdiff sample` says so itself, `python -m jvdiff.sample` does not."""
    if re.fullmatch(r"(python -m )?jvdiff \w+", argv[0]):
        return tuple(argv[0].split())
    return "python", "-m", f"jvdiff.{command.name}"


# ----------------------------------------------------------------------------------------------------- names and values


def _known_flags(command: Command, line: Line, sections: Sequence[Section], config: Any) -> tuple[tuple[str, str], ...]:
    """The flags, each of a field that there is and with a value."""
    every = {path for section in command.sections(None, {}) for path in section.options}
    known = {path for section in sections for path in section.options} | (set(config) - every)
    other = every - known
    for path, text in line.flags:
        parents = {path.rsplit(".", count)[0] for count in range(path.count(".") + 1)}
        if not parents & known:
            if path in other:
                titles = ", ".join(section.title for section in sections)
                raise UsageError(f"--{path} is not a field of what is asked for here, which has: {titles}. See --help.")
            raise UsageError(f"unknown flag --{path}{meant(path, known)}; --help lists all.")
        inside = next((o for s in sections for p, o in s.options.items() if p in parents and _closed(o)), None)
        if inside is not None and path not in known:
            raise UsageError(f"unknown flag --{path}{meant(path, known)}; --help lists all.")
        if text is None:
            raise UsageError(f"--{path} has no value; give --{path}=VALUE.")
    return typing.cast("tuple[tuple[str, str], ...]", line.flags)


def _root(config: Any, sections: Sequence[Section]) -> None:
    """Paths in a configuration that ships are of what ships beside it, wherever the command was started."""
    for section in sections:
        for path, each in section.options.items():
            if isinstance(value := _at(config, path), str) and each.told.get("path"):
                place = configs.root_of_shipped(value)
                if not (os.path.exists(value) and os.path.exists(place) and os.path.samefile(value, place)):
                    _put(config, path, place)


def _closed(each: Option) -> bool:
    """Whether the names inside a field are known beforehand."""
    return any(dataclasses.is_dataclass(kind) for kind in each.kinds) and dict not in {
        typing.get_origin(kind) for kind in each.kinds
    }


def meant(name: str, known: Iterable[str]) -> str:
    """The middle of a sentence about an unknown flag: which of those that are known may be meant, if any."""
    known = sorted({*known, "config", "help", "version", "traceback"})
    plain = name.replace("-", "_")
    word = WORDS.get(plain.rsplit(".", 1)[-1], "")
    if " " in word:
        return f" (here it is {word})" if "seeds" in known else ""
    for wanted in filter(None, (plain, word, plain.rsplit(".", 1)[-1])):
        for path in known:
            if wanted in (path, path.rsplit(".", 1)[-1]):
                return f" (did you mean --{path}?)"
    return configs.nearest(plain, known).replace("mean ", "mean --")


def _value(path: str, text: str, sections: Sequence[Section], config: Any) -> Any:
    """The value of a flag: as its option is declared, else as the file's value is."""
    options = {name: each for section in sections for name, each in section.options.items()}
    if path in options:
        each = options[path]
        value = configs.read(path, text, each.kind, each.told["prose"])
        if value is not None:
            configs.check(path, value, each.told)
        return each.expanded(value)
    parents = [options[p] for p in (path.rsplit(".", n)[0] for n in range(1, path.count(".") + 1)) if p in options]
    inner = [typing.get_args(kind) for each in parents[:1] for kind in each.kinds if typing.get_origin(kind) is dict]
    if inner and inner[0][1] is str:
        return text
    there = _at(config, path)
    return configs.read(path, text, object if there is None else dict if _is_dict(there) else type(there))


def _put(config: Any, path: str, value: Any) -> None:
    """Sets a field, a nested one too; its parents are made where they are not there."""
    from ml_collections import ConfigDict

    root, *inner = path.split(".")
    with config.unlocked(), config.ignore_type():
        old = config.get(root)
        if inner and old is not None and not _is_dict(old):
            raise UsageError(f"{root} is {old!r:.60}, which has no fields; --{path} cannot be set.")
        if isinstance(old, ConfigDict) and inner:
            _put(old, ".".join(inner), value)
        else:
            config[root] = merged(old or {}, _nested(".".join(inner), value)) if inner else value


def _nested(path: str, value: Any) -> Any:
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def _at(values: Any, path: str) -> Any:
    for name in path.split("."):
        values = values.get(name) if _is_dict(values) else None
    return values


def _is_dict(value: Any) -> bool:
    return hasattr(value, "keys")


def merged(old: Any, new: Any) -> dict[str, Any]:
    """Both mappings as one, the new values where both have one; what is nested, merged too."""
    both = dict(old)
    for name, value in new.items():
        inner = both.get(name)
        both[name] = merged(inner, value) if _is_dict(inner) and _is_dict(value) else value
    return both


def check_values(config: Any, options: Mapping[str, Option]) -> None:
    """Raises UsageError for a value of another type, out of range or not among the choices, whoever has set it.

    Paths that a configuration has set are expanded, as those of flags are when they are read.
    """
    for path, each in options.items():
        value = _at(config, path)
        if value is None or any(map(dataclasses.is_dataclass, each.kinds)):
            continue
        value = dict(value) if _is_dict(value) else tuple(value) if isinstance(value, list) else value
        configs.check(path, configs.typed(path, value, each.kind), each.told)
        if (place := each.expanded(value)) != value:
            _put(config, path, place)


# Fields that say which command a configuration is for.
_MARKS = {"task": "train", "chunks": "stream", "stop_at": "sample"}


def check_file(config: Iterable[str], known: Iterable[str], file: str) -> None:
    """Raises UsageError for a field of a configuration that a command does not have, with the nearest."""
    known = sorted(known)
    if not (unknown := sorted(set(config) - set(known))):
        return
    for mark, command in _MARKS.items():
        if mark in unknown:
            raise UsageError(f"{Path(file).name} is a configuration of jvdiff {command}; see jvdiff {command} --help.")
    names = ", ".join(f"{name}{configs.nearest(name, known)}" for name in unknown[:5])
    raise UsageError(f"{Path(file).name}: the config file has unknown fields: {names}.")
