"""The command line of training.

    jvdiff train --config train_digits_vae
    jvdiff train --config train_digits_dit
    jvdiff train --config latent_video_small --clips=FOLDER

A run lives in `folder`: `config.json` (the fields that decide its numbers), `state/` (Orbax checkpoints),
`metrics.jsonl`, and when it is done the result: `vae/` or `repository/`, which `jvdiff.load` and `jvdiff sample` take
and `jvdiff to_hf` exports. The same command goes on where a stopped run was; with other fields, only with
--allow_changes; where the disk had refused the state, with the --resume that a message says. Every field is declared
(`jvdiff.training.options` and each task's own) and listed by --help; where there is a field `plan`, --plan prints what
the run would take.

Exit status: 0 done · 2 usage · 3 checkpoint or data · 4 memory or disk · 5 interrupted, resumable · 6 NaN or infinity ·
7 set-up · 1 anything else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jvdiff import config as configs
from jvdiff import models
from jvdiff.commands import arguments, command_line, options
from jvdiff.commands.arguments import Command, Request, Section
from jvdiff.commands.command_line import say
from jvdiff.config import nearest
from jvdiff.errors import UsageError
from jvdiff.runtime import peers, profiling
from jvdiff.runtime.files import alone
from jvdiff.training.options import Going, Kind, Training, function

TRAINED = ("vae", "initial", "decoder_of")  # fields that may name a checkpoint that ships, or a part of one


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status; errors are sentences on stderr."""
    return command_line.main(argv, parse, run, "folder")


def tasks(family: str | None = None) -> dict[str, Kind]:
    """Everything that can be trained, by the name of the task.

    family: MODULE:NAME of one of a user's own; its folder's trainings.py is asked too.
    """
    places = ["jvdiff.digits", *(f"{models.__name__}.{package}" for package in models.FAMILIES)]
    if models.named(family) is not None:
        places.append(str(family).partition(":")[0].rpartition(".")[0])
    found = [f"{place}.trainings" for place in places if importlib.util.find_spec(f"{place}.trainings")]
    return {name: kind for module in found for name, kind in importlib.import_module(module).TASKS.items()}


def parse(argv: Sequence[str]) -> Request:
    """The request, with everything checked that needs no model.

    Raises:
        Told: --help or --version.
        UsageError: a flag, field or value that is invalid, with the nearest name.
    """
    request = arguments.parse(COMMAND, argv)
    _check(request.config)
    for name in TRAINED:
        if isinstance(given := request.config.get(name), str) and not Path(given).exists():
            request.config[name] = configs.root_of_shipped(given)
    return request


def run(request: Request) -> list[Path]:
    """Trains what the config asks for and returns the folder of the result."""
    config = request.config
    kind = tasks(config.get("family"))[config.task]
    if config.get("plan"):
        from jvdiff.plan import training

        for line in training.lines(function(str(kind.programs)), config):
            print(line, flush=True)
        return []
    from jvdiff.training import record, states
    from jvdiff.training.loop import PROFILED

    folder = command_line.writable(config.folder, "folder")
    command_line.use_device(config)
    fields, processes = config.to_dict(), configs.names(options.Processes)
    with alone(folder / "run", folder), _quiet_orbax():
        if config.get("resume"):
            if peers.writes():
                states.take(Path(str(config.resume)), folder)
            peers.gather(None)  # nobody looks before it is there
        record.begin(folder, fields, kind, bool(config.get("allow_changes")), processes)
        command_line.compile_cache(config.get("compile_cache"))  # type: ignore[arg-type]
        advice = "Try a smaller batch or model; what was saved before is kept."
        traced = profiling.profile(config.get("profile"), PROFILED)
        with (
            command_line.device_memory(str(folder), advice),
            command_line.plain_logs(),
            _going_on(request, folder),
            traced,
        ):
            return [function(kind.run)(config, folder)]


@contextlib.contextmanager
def _going_on(request: Request, folder: Path) -> Iterator[None]:
    """Says how to go on from the state that the loop has kept when something was raised."""
    try:
        yield
    except BaseException as error:
        if (place := getattr(error, "kept", None)) is not None:
            there = None if place == folder else place
            say(f"Go on with:\n  {request.command(resume=there)}")
        raise


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Inside, what Orbax's threads raise is not printed by them: it is raised here too, and becomes a sentence."""
    logger, before = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level

    def hook(raised: Any) -> None:
        if str(raised.exc_value) != "Event loop is closed":  # of saves that were not waited for any more
            before(raised)

    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = hook
    try:
        yield
    finally:
        logger.setLevel(level)
        if sys.unraisablehook is hook:
            sys.unraisablehook = before


def _check(config: Any) -> None:
    """Raises UsageError for a field that is unknown, missing or invalid."""
    from jvdiff.pipeline.settings import check_seed
    from jvdiff.training import fields

    name, known = config.get("task"), tasks(config.get("family"))
    if name not in known:
        raise UsageError(f"task is {name!r}; expected one of {', '.join(known)}{nearest(name, known)}.")
    group = known[name].fields
    declared = configs.options((Training, group))
    first = {path: each for path, each in declared.items() if "." not in path}
    more = configs.options((Going, options.Processes))
    fields.check_names("the config", config, (*first, *more))
    required = [path for path, each in first.items() if each.required]
    if missing := [path for path in required if path not in config]:
        raise UsageError(f"the config lacks {', '.join(missing)}; task {name!r} needs {', '.join(required)}.")
    if config.seed is None:
        raise UsageError("seed is None; a run that can go on later needs a number.")
    check_seed(config.seed)
    for path, each in first.items():
        inner = [path.split(".")[1] for path in declared if path.startswith(f"{each.path}.")]
        if inner and config.get(path) is not None:
            fields.check_names(path, config[path], inner)
    arguments.check_values(config, declared | more)
    for field, value in config.loop.items():
        if field not in ("mesh", "log_to") and value is not None:
            fields.check_count(f"loop.{field}", value)
    fields.schedule(config)


def sections(config: Any, flags: Mapping[str, str]) -> list[Section]:
    """The fields of every training, and those of the configuration's task, or of all tasks."""
    every = configs.options(Training)
    nested = [path for path, each in every.items() if any(map(dataclasses.is_dataclass, each.kinds))]
    listed = [Section("every training", {p: o for p, o in every.items() if "." not in p and p not in nested})]
    for name in nested:
        inside = {p: o for p, o in every.items() if p == name or p.startswith(f"{name}.")}
        listed.append(Section(f"{name}: {every[name].told['help']}", inside))
    task = flags.get("task") or (config.get("task") if config else None)
    known = tasks(flags.get("family") or (config.get("family") if config else None))
    for name, kind in ({task: known[task]} if task in known else known).items():
        listed.append(Section(f"task {name}: {kind.about}", configs.options(kind.fields)))
    listed.append(Section("this command", configs.options(Going)))
    return [*listed, Section(str(options.Processes.__doc__), configs.options(options.Processes))]


COMMAND = Command(
    name="train",
    about="trains a model, or goes on training it",
    examples=("--config train_digits_vae", "--config latent_video_small --clips=FOLDER"),
    sections=sections,
    takes_config=True,
)
