"""The command line: prompts become video files.

    jvdiff sample --config digits --prompt="a red seven moving left" --output=out

Every field is declared in `options` and listed by --help; the config of a training samples what it makes. For each
video the output folder gets NAME.mp4, NAME.png (a contact sheet), NAME.json (the record of the run, written last: where
it is, the video is complete) and, with save_arrays, NAME.npz. An interrupted run leaves NAME.state, to be given to
--resume.

Exit status: 0 done, or stopped at stop_at · 2 usage · 3 checkpoint or data, or some entries of many failed ·
4 memory or disk · 5 interrupted, resumable · 6 NaN or infinity · 7 set-up · 1 anything else.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import config_dict

from jvdiff import config as configs
from jvdiff import models
from jvdiff.commands import arguments, command_line, options
from jvdiff.commands.arguments import Command, Request, Section
from jvdiff.commands.command_line import say
from jvdiff.errors import CheckpointError, JvdiffError, NumericsError, UsageError
from jvdiff.runtime import ahead, peers, profiling, progress
from jvdiff.runtime.files import alone
from jvdiff.runtime.interrupts import interrupts
from jvdiff.weights import locate


def default_config() -> config_dict.ConfigDict:
    """Every field of a sampling config, those of all families too. None: from the repository, else from its family."""
    families = [configs.fields(settings, unset=True) for settings in models.settings().values()]
    common = configs.fields((*options.BEFORE, *options.AFTER))
    return config_dict.ConfigDict({name: each for family in families for name, each in family.items()} | common)


# ----------------------------------------------------------------------------------------------------- entry and exit


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status; errors are sentences on stderr."""
    return command_line.main(argv, parse, run, "output")


def parse(argv: Sequence[str], command: Command | None = None) -> Request:
    """What a command line asks for.

    Raises:
        Told: --help or --version.
        UsageError: an unknown flag or field (with the nearest one), a value of the wrong type.
    """
    command = command or COMMAND
    request = arguments.parse(command, argv)
    if {"task", "checkpoint"} <= set(request.config) and command.fresh:
        request = request._replace(config=of_training(request.config, command.fresh()))
    config = request.config
    known = {path for section in command.sections(config, dict(request.flags)) for path in section.options}
    arguments.check_file(config, known | {*request.fresh}, request.file)
    arguments.check_values(config, configs.options((*options.BEFORE, *options.AFTER)))
    if config.plan and config.distributed:
        raise UsageError("a plan is made by one process; leave --distributed out.")
    return request


def of_training(training: Any, config: Any) -> Any:
    """`config` with what the configuration of a training says of sampling; the checkpoint is its result."""
    with config.ignore_type():
        config.update({name: training[name] for name in config if training.get(name) is not None})
    if config.checkpoint is None:
        config.checkpoint = str(Path(training.folder) / RESULT)
    return config


def sections(config: Any, flags: Mapping[str, str]) -> list[Section]:
    """The fields of a sampling run, those of the checkpoint's family where it can be read, else those of all."""
    path = flags.get("checkpoint") or (config.get("checkpoint") if config else None)
    folder, families = Path(path or ""), models.settings()
    if path is not None:
        with contextlib.suppress(JvdiffError, OSError):
            folder = locate(path, download=False)
    if name := flags.get("family") or (config.get("family") if config else None):
        families = {name: models.named(name).settings}
    elif path is not None:
        with contextlib.suppress(JvdiffError, OSError):
            families = models.settings(folder)
    listed = [_section(group) for group in options.BEFORE]
    for family, settings in families.items():
        every = {p: o._replace(kind=o.kind | None) for p, o in configs.options(settings).items()}
        if len(families) == 1:
            own = models.defaults(settings, folder)
            every = {path: each._replace(default=own.get(path, each.default)) for path, each in every.items()}
        aside = f" ({family})" if len(families) > 1 else ""
        for title, chosen in (("picture and time", True), ("sampler", False)):
            listed.append(Section(title + aside, {p: o for p, o in every.items() if (p in PICTURE) == chosen}))
    return listed + [_section(group) for group in options.AFTER]


def _section(group: type) -> Section:
    return Section(str(group.__doc__), configs.options(group))


RESULT = "repository"  # in the folder of a training: the model that it made
PICTURE = ("num_frames", "height", "width", "fps")  # of a family's settings; the others are the sampler's
COMMAND = Command(
    name="sample",
    about="prompts become video files",
    examples=(
        '--prompt="a red seven moving left" --seed=3',
        '--config wan2_1_t2v_1_3b --prompt="..." --output=out',
        "--checkpoint=FOLDER --prompts=FILE",
    ),
    sections=sections,
    fresh=default_config,
    implied="digits",
    takes_config=True,
)


# --------------------------------------------------------------------------------------------------------------- run


def run(request: Request) -> list[Path]:
    """Makes every video that the config asks for and returns their paths.

    On resuming, the state's own values hold, and a field that was given on purpose and differs is an error.
    """
    state = request.config.resume
    with alone(Path(state).resolve()) if state is not None and Path(state).is_dir() else contextlib.nullcontext():
        return _run(request)


def _run(request: Request) -> list[Path]:
    config = request.config
    if config.plan:
        from jvdiff import plan  # before jax: it may have to be kept from looking for GPUs

        for line in plan.sampling(config, request.given):
            print(line, flush=True)
        return []
    from jvdiff import pipeline, precision
    from jvdiff.commands import batches, jobs, one_video
    from jvdiff.runtime import run_state

    if config.checkpoint is None:
        raise UsageError("no checkpoint; give --checkpoint=FOLDER.")
    output = command_line.writable(config.output, "output")
    how: dict[str, Any] = {"family": models.named(config.family), "follow_symlinks": config.follow_symlinks}
    repository = pipeline.inspect(folder_of(config.checkpoint), at_once=True, **how)
    if not request.file and (name := models.configuration(config.checkpoint)):
        say(f"notice: the settings that the authors of these weights use are those of --config {name}")
    command_line.use_device(config)
    batch, problems = None, []
    if config.resume is not None:
        state = run_state.load(config.resume)
        before = {"vae_decode": precision.choose("float32").vae_decode}  # of versions that do not say so
        state = dataclasses.replace(state, facts=before | dict(state.facts))
        wanted = [jobs.resumed(config, state, request.given, repository)]
        dtypes = precision.choose(state.facts["precision"], state.facts["vae_decode"])
    else:
        dtypes = precision.choose(config.precision, config.vae_decode)
        wanted, problems = jobs.make_jobs(config, repository, request.given)
        wanted = jobs.by_size(wanted)
        if config.seeds is not None or jobs.are_entries(config, repository):
            batch = batches.Batch(wanted, repository, dtypes, output, config.stop_at)
            wanted = _left(batch)
    for problem in problems:
        say(f"error: {problem}")
    peers.agree("what to make", [jobs.asked(job, repository, dtypes) for job in wanted])
    mesh = jobs.choose_mesh(wanted, repository, dtypes, config.mesh)
    _sift(wanted, batch, problems, lambda job: jobs.check_mesh(job, repository, mesh))
    context = pipeline.Context(repository.family, repository.models, dtypes, pipeline.place(mesh))
    _sift(wanted, batch, problems, lambda job: jobs.check_attention(job, context))
    if not wanted:
        return _summed(problems, [])

    with interrupts() as asked_to_stop:
        seconds: dict[str, float] = {}
        command_line.compile_cache(config.compile_cache)
        abstract = pipeline.abstract_params(repository.family, repository.models, dtypes)
        command_line.say_device(abstract, mesh)

        def programs() -> list[Any]:
            return [(call.key, call.traced) for call in one_video.calls(context, abstract, wanted[0], config.stop_at)]

        with ahead.compiling(programs) as compiled:
            in_turn = _in_turn(config, context, wanted[0], compiled, seconds)
            with progress.phase(f"loading {config.checkpoint}", seconds, "load"), one_video.stage("load"):
                pipe = pipeline.load(repository, dtypes.name, mesh, vae_decode=dtypes.vae_decode, in_turn=in_turn)
            peers.agree("of which weights", repository.digest)
            jobs.tell_tables(wanted, repository)
            if config.resume is not None:
                run_state.check_same(state.facts, jobs.weights(repository), config.resume)
        again = None if batch is None else request.command(stop_at=request.unset("stop_at"))
        maker = one_video.Maker(pipe, config, request, output, asked_to_stop, again, ahead=compiled)
        every = wanted if batch is None else batch.jobs
        return _summed(problems, _made(maker, every, batch, problems, seconds))


def _in_turn(config: Any, context: Any, job: Any, ahead: Any, seconds: dict[str, float]) -> tuple[str, ...]:
    """The parts whose weights are to be in turn, told before any is read.

    Where devices have memory of their own that is known when the programs are compiled, which is waited for.
    """
    from jvdiff import plan
    from jvdiff.commands import one_video

    if (pool := plan.pool()) is not None:
        with progress.phase("compiling", seconds, "compile"), one_video.stage("compile"):
            _, chosen, sentence = one_video.fitted(context, job, config, {}, ahead, pool)
    elif config.in_turn is None:
        return ()
    else:
        chosen, sentence = one_video.residency(context, job.clip, [], config.in_turn, None)
    say(sentence)
    return chosen.in_turn


def _sift(wanted: list[Any], batch: Any, problems: list[str], check: Callable[[Any], None]) -> None:
    """Takes the jobs of a batch that a check refuses out of those that are wanted, into the problems.

    Raises:
        UsageError: as the check, where it refuses all, or there is no batch: what was asked for is wrong, not a line.
    """
    refused = []
    for job in wanted:
        try:
            check(job)
        except UsageError as error:
            refused.append((job, error))
    if refused and (batch is None or len(refused) == len(wanted)):
        raise refused[0][1]
    for job, error in refused:
        wanted.remove(job)
        batch.failed.add(batch.jobs.index(job))
        problems.append(f"{job.stem}: {str(error).splitlines()[0]}")
        say(f"error: {problems[-1]}")


def _made(maker: Any, jobs: Sequence[Any], batch: Any, problems: list[str], seconds: Mapping[str, float]) -> list[Path]:
    """The videos of the jobs, one after another; of a batch, one that fails joins the problems.

    What is wrong with one job alone fails it. No memory, a full disk, a lost device or a bug would fail all.
    """
    from jvdiff.commands import one_video

    paths, encoded = [], 0
    turns = (each for each in enumerate(jobs)) if batch is None else batch.turns(maker.asked_to_stop, maker.again)
    with contextlib.closing(turns):
        for number, job in turns:
            if len(jobs) > 1:
                say(f"video {number + 1} of {len(jobs)}")
            if number >= encoded:
                encoded = number + one_video.encode_ahead(maker, jobs[number:])
            try:
                with profiling.profile(maker.config.profile if not paths else None):
                    paths += one_video.make(maker, job, dict(seconds))
            except (UsageError, CheckpointError, NumericsError) as error:
                if batch is None or peers.several():  # where others wait for this one
                    raise
                batch.failed.add(number)
                problems.append(f"{job.stem}: {error}")
                say(f"error: {problems[-1]}")
    return paths


def folder_of(checkpoint: str) -> Path:
    """Where the weights are; raises as `locate`, and says what to do where a training has not made them yet."""
    if Path(checkpoint).name == RESULT and not Path(checkpoint).exists():
        raise UsageError(f"{checkpoint}: no such folder; train a model first, or give --checkpoint=FOLDER.")
    return locate(checkpoint, tell=say)


def _left(batch: Any) -> list[Any]:
    """The jobs of a batch that are left, as process 0 sees the output folder."""
    numbers = peers.gather(batch.left())[0]
    if len(numbers) < len(batch.jobs):
        say(f"{len(batch.jobs) - len(numbers)} of {len(batch.jobs)} videos are already in {batch.output}")
    return [batch.jobs[i] for i in numbers]


def _summed(problems: Sequence[str], paths: list[Path]) -> list[Path]:
    """The paths, or CheckpointError where some of many were not made."""
    if problems:
        asked = len(problems) + len(paths)
        raise CheckpointError("\n".join([f"{len(problems)} of {asked} videos were not made:", *problems[:4]]))
    return paths
