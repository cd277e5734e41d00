"""The command line: prompts become video files.

    python -m jvdiff.sample --config configs/digits.py --config.prompt="a red seven moving left" --config.output=out

Every field is listed with its meaning in `default_config`; the config of a training of the task latent_video makes
clips of its classes instead (`sample_classes`). For each video the output folder gets NAME.mp4, NAME.png (a
contact sheet), NAME.json (the record of the run, written last: where it is, the video is complete) and, with
save_arrays, NAME.npz. An interrupted run leaves NAME.state, to be given to --config.resume.

Exit status: 0 done, or stopped at stop_at · 2 usage · 3 checkpoint or data, or some lines of a prompts file failed ·
4 memory or disk · 5 interrupted, resumable · 6 NaN or infinity · 7 set-up · 1 anything else.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import config_dict

from jvdiff.commands import command_line, sample_classes
from jvdiff.commands.command_line import say
from jvdiff.errors import CheckpointError, Interrupted, JvdiffError, ResourceError, UsageError
from jvdiff.runtime import distributed, progress
from jvdiff.runtime.interrupts import interrupts


def default_config() -> config_dict.ConfigDict:
    """Every field of a sampling config. None: from the repository, else from the model's family."""
    none = config_dict.placeholder
    return config_dict.ConfigDict(
        {
            "checkpoint": none(str),  # a Hugging Face (diffusers) folder, or what `convert` made of one
            "prompt": none(object),  # one, or a tuple of them
            "prompts": none(str),  # a file, one video a line: text, or JSONL objects with prompt, id, seed, settings
            "negative_prompt": none(str),
            "seed": none(int),  # video i gets seed + i; None draws one and prints it
            "num_frames": none(int),
            "height": none(int),  # pixels
            "width": none(int),
            "fps": none(int),
            "steps": none(int),
            "guidance": none(float),  # 1: none, and half the work
            "shift": none(float),
            "solver": none(str),  # unipc, euler
            "grid": none(str),  # diffusers, wan: whose sigmas
            "precision": none(str),  # float32, bfloat16
            "mesh": none(object),  # several devices: "sequence=4,tensor=2", a dict of that, or "auto"; None: one device
            "pattern": none(str),  # dense, sliding_tile:6x8x8:3x3x3 (tile, window), video_sparse:4x4x4:0.9 (sparsity)
            "attention": none(str),  # cudnn, xla, ...: see jvdiff/kernels; None: the best that can
            "output": "out",
            "save_arrays": False,  # NAME.npz with latents float32 [T,H,W,C] and video uint8 [F,Y,X,3]
            "resume": none(str),  # a .state folder
            "stop_at": none(int),  # stop after so many steps and save the state
            "preview_every": 0,  # write NAME.preview.png, a rough strip of all latent frames, every so many steps
            "compile_cache": none(str),  # a folder of your own, or "off"; None: the user's cache folder
            "plan": False,  # print what it would take, without weights, and exit
            "plan_target": none(str),  # h200: plan for that, or a mesh of those, instead of the devices at hand
            **distributed.fields(),  # docs/clusters.md
        }
    )


# ----------------------------------------------------------------------------------------------------- entry and exit


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status; errors are sentences on stderr."""
    argv = list(sys.argv if argv is None else argv)

    def work(request: command_line.Request) -> list[Path]:
        if request.config.get("plan") and (target := request.config.get("plan_target")):
            from jvdiff.plan import run_with_compiler

            if (status := run_with_compiler(target, ["-m", "jvdiff.sample", *argv[1:]])) is not None:
                raise SystemExit(status)
        return run(*request)

    return command_line.main(argv, parse, work, "output")


def parse(argv: Sequence[str]) -> command_line.Request:
    """The config, what the command line itself set in it, the config's file.

    Raises:
        UsageError: an unknown flag or field (with the nearest one), a value of the wrong type, no config.
    """
    usage = 'python -m jvdiff.sample --config configs/digits.py --config.prompt="a red seven moving left"'
    request = command_line.parse(_quoted_prompts(argv), f"{usage}\nFields: {', '.join(default_config())}.")
    if request.config.get("task") == sample_classes.TASK:
        return request
    if unknown := sorted(set(request.config) - set(default_config())):
        raise UsageError(f"the config file has unknown fields: {', '.join(unknown)}.")
    if request.config.plan and request.config.distributed:
        raise UsageError("a plan is made by one process; leave --config.distributed out.")
    return request


def _quoted_prompts(argv: Sequence[str]) -> list[str]:
    """argv with each prompt as a Python string, unless it is a tuple or list of them.

    The field may hold either, so its value is read as Python; a prompt such as 7 or None must stay text, and Python's
    parser gives up on a bare one of ten thousand characters.
    """
    flag = "--config.prompt="
    values = [word.removeprefix(flag) if word.startswith(flag) else None for word in argv]
    bare = [value is not None and not value.lstrip().startswith(("(", "[")) for value in values]
    return [f"{flag}{v!r}" if quote else word for word, v, quote in zip(argv, values, bare, strict=True)]


# --------------------------------------------------------------------------------------------------------------- run


def run(config: Any, given: Mapping[str, Any] | None = None, file: str = "CONFIG") -> list[Path]:
    """Makes every video that the config asks for and returns their paths.

    given: the fields that were set on purpose; on resuming, the state's own values hold, and one of these that differs
    is an error. file: the config's, for the command that resumes.
    """
    given = dict(given or {})
    if config.get("task") == sample_classes.TASK:
        return sample_classes.run(config)
    if config.plan:
        from jvdiff import plan  # before jax: it may have to be kept from looking for GPUs

        plan.show(config)
        return []
    from jvdiff import pipeline, precision
    from jvdiff.commands import jobs, one_video
    from jvdiff.models.text import tokenizer
    from jvdiff.pipeline import repository as repositories
    from jvdiff.pipeline import settings
    from jvdiff.runtime import run_state

    if config.checkpoint is None:
        raise UsageError("no checkpoint; give --config.checkpoint=FOLDER.")
    _check_numbers(config)
    output = command_line.writable(config.output, "output")
    repository = repositories.inspect(config.checkpoint, causal=False)
    configs = settings.Configs(repository.transformer, repository.vae, repository.text_encoder)
    defaults = settings.read_defaults(config.checkpoint)
    resolve = functools.partial(settings.resolve, configs, repository.scheduler, defaults)

    problems: list[str] = []
    if config.resume is not None:
        state = run_state.load(config.resume)
        wanted, dtypes = [jobs.resumed(config, state, given, repository.digest, resolve)], state.facts["precision"]
    else:
        dtypes = precision.choose(config.precision).name
        wanted, problems = jobs.make_jobs(config, resolve)
        if config.prompts is not None:
            asked, left = len(wanted), set(map(id, jobs.without_done(wanted, output, dtypes, repository.digest)))
            numbers = distributed.gather([i for i, job in enumerate(wanted) if id(job) in left])[0]  # it sees its files
            wanted = [wanted[i] for i in numbers]
            if len(wanted) < asked:
                say(f"{asked - len(wanted)} of {asked} videos are already in {output}")
    for problem in problems:
        say(f"error: {problem}")
    distributed.agree("what to make, of which weights", [jobs.facts(job, dtypes, repository.digest) for job in wanted])
    mesh = jobs.choose_mesh(wanted, configs, dtypes, config.mesh)
    jobs.check_attention(wanted, configs, dtypes, mesh)
    prompts = [job.prompt for job in wanted] or [""]
    pipeline.tokenize(tokenizer.load(repository.tokenizer), prompts)  # warns of long ones

    paths: list[Path] = []
    if wanted:
        with interrupts() as asked_to_stop:
            seconds: dict[str, float] = {}
            command_line.compile_cache(config.compile_cache)
            command_line.say_device(configs.transformer.width, mesh)
            with progress.phase(f"loading {config.checkpoint}", seconds, "load"), one_video.stage("load"):
                pipe = pipeline.load(config.checkpoint, dtypes, mesh)
            compiled: set[Any] = set()
            for number, job in enumerate(wanted, 1):
                if len(wanted) > 1:
                    say(f"video {number} of {len(wanted)}")
                try:
                    paths += one_video.make(pipe, job, config, file, output, asked_to_stop, compiled, dict(seconds))
                except (ResourceError, Interrupted):
                    raise
                except JvdiffError as error:
                    if len(wanted) + len(problems) == 1 or distributed.several():  # where others wait for this one
                        raise
                    problems.append(f"{job.stem}: {error}")
                    say(f"error: {problems[-1]}")
    if problems:
        asked = len(problems) + len(paths)
        raise CheckpointError("\n".join([f"{len(problems)} of {asked} videos were not made:", *problems[:4]]))
    return paths


def _check_numbers(config: Any) -> None:
    for name, low in (("stop_at", 1), ("preview_every", 0)):
        if config[name] is not None and config[name] < low:
            raise UsageError(f"{name} is {config[name]}; expected {low} or more.")
