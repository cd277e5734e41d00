"""The command line of training.

    python -m jvdiff.train --config configs/train_digits_vae.py
    python -m jvdiff.train --config configs/train_digits_dit.py
    python -m jvdiff.train --config configs/latent_video_small.py --config.clips=FOLDER

A run lives in `config.folder`: `state/` (Orbax checkpoints), `metrics.jsonl`, and when it is done the result: `vae/` or
`repository/`, which `jvdiff.load` and `python -m jvdiff.sample` take and `python -m convert.to_hf` exports. The same
command goes on where a stopped run was. Fields: see COMMON, TASKS and `jvdiff.training`; where there is a field `plan`,
--config.plan=true prints what the run would take.

Exit status: 0 done · 2 usage · 3 checkpoint or data · 4 memory or disk · 5 interrupted, resumable · 6 NaN or infinity ·
7 set-up · 1 anything else.
"""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jvdiff.commands import command_line
from jvdiff.commands.sample_classes import FIELDS as SAMPLING_FIELDS
from jvdiff.digits import runs as digits_runs
from jvdiff.errors import UsageError
from jvdiff.models.latent_video import runs as latent_video_runs
from jvdiff.models.latent_video.objective import latent_video_task
from jvdiff.models.wan.flow_matching import text_to_video_task
from jvdiff.models.wan.reconstruction import vae_task
from jvdiff.models.wan.teacher_forcing import teacher_forcing_task
from jvdiff.pipeline import class_conditional
from jvdiff.pipeline.settings import check_seed
from jvdiff.plan import training as train_plan
from jvdiff.runtime import peers
from jvdiff.training.fields import check_count, check_names, nearest, schedule
from jvdiff.training.loop import Task, fit

# Fields of every task; compile_cache and those of `peers.fields` may be there too.
COMMON = ("task", "folder", "seed", "loss", "schedule", "loop")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status; errors are sentences on stderr."""
    return command_line.main(argv, parse, run, "folder")


def parse(argv: Sequence[str]) -> command_line.Request:
    """The config, with everything checked that needs no model.

    Raises:
        UsageError: a flag, field or value that cannot be, with the nearest name.
    """
    request = command_line.parse(argv, "python -m jvdiff.train --config configs/train_digits_vae.py")
    config = request.config
    name = config.get("task")
    if name not in TASKS:
        raise UsageError(f"task is {name!r}; expected one of {', '.join(TASKS)}{nearest(name, TASKS)}.")
    fields = (*COMMON, *TASKS[name].fields)
    check_names("the config", config, (*fields, *TASKS[name].optional, *peers.fields(), "compile_cache"))
    if missing := [field for field in fields if field not in config]:
        raise UsageError(f"the config lacks {', '.join(missing)}; task {name!r} needs {', '.join(fields)}.")
    if config.seed is None:
        raise UsageError("seed is None; a run that can go on later needs a number.")
    check_seed(config.seed)
    check_names("loss", config.loss, _keywords(TASKS[name].loss))
    check_names("loop", config.loop, [field for field in _keywords(fit) if field not in ("seed", "params")])
    for field, value in config.loop.items():
        if field not in ("mesh", "log_to") and value is not None:
            check_count(f"loop.{field}", value)
    schedule(config)
    return request


def run(request: command_line.Request) -> list[Path]:
    """Trains what the config asks for and returns the folder of the result."""
    config = request.config
    if config.get("plan"):
        train_plan.show(latent_video_runs.programs(config), config.loop)
        return []
    folder = command_line.writable(config.folder, "folder")
    command_line.compile_cache(config.get("compile_cache"))  # type: ignore[arg-type]
    advice = "Try a smaller batch or model; what was saved before is kept."
    with command_line.device_memory(str(folder), advice), command_line.plain_logs():
        return [TASKS[config.task].run(config, folder)]


class Kind(NamedTuple):
    """A task's program, the function that config.loss feeds, and the fields of its config beside COMMON."""

    run: Callable[[ConfigDict, Path], Path]
    loss: Callable[..., Task]
    fields: tuple[str, ...]
    optional: tuple[str, ...] = ()


_DIT_FIELDS = ("vae", "clips", "batch", "tokens", "drop_text", "transformer", "text_encoder", "scheduler", "defaults")
_DIT_OPTIONAL = ("initial", "pattern", "sparsity_warmup")
_LATENT_VIDEO_FIELDS = (
    *("clips", "stride", "workers", "most_bad", "cache_latents", "vae", "transformer", "prediction", "noise_schedule"),
    *("batch", "precision", *class_conditional.FIELDS),
)
_STREAM_FIELDS = (*_DIT_FIELDS, "chunks", "gap", "change", "pattern")
TASKS = {
    "vae": Kind(digits_runs.train_vae, vae_task, ("vae", "stages"), ("decoder_of", "endless")),
    "text_to_video": Kind(digits_runs.train_text_to_video, text_to_video_task, _DIT_FIELDS, _DIT_OPTIONAL),
    "stream": Kind(digits_runs.train_stream, teacher_forcing_task, _STREAM_FIELDS, ("initial", "first")),
    "latent_video": Kind(
        latent_video_runs.train, latent_video_task, _LATENT_VIDEO_FIELDS, ("initial", "plan", *SAMPLING_FIELDS)
    ),
}


def _keywords(function: Callable[..., Any]) -> list[str]:
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
