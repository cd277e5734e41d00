"""The command line that records which windows of sliding tile attention the heads of a model need.

    jvdiff windows --checkpoint=FOLDER --prompts=FILE --tile=6x8x8 --candidates=3x3x3,1x5x7,3x1x9 --table=windows.json
    jvdiff windows --mask_strategy=mask_strategy.json --canvas=18x48x80 --table=windows.json

Every clip is made up to its latents, with dense attention. At each step, in each layer, what every candidate would make
of the same queries, keys and values is compared with what dense attention makes of them; each head gets the candidate
with the least mean square over all clips and both branches of guidance. `jvdiff sample --pattern=windows:windows.json`
takes the table. With --mask_strategy a table of FastVideo's is converted, and no model is read.

Exit status: 0 done · 2 usage · 3 checkpoint or data · 4 memory or disk · 6 NaN or infinity · 130 stopped, nothing is
kept · 1 anything else.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jvdiff import config as configs
from jvdiff.commands import command_line, options, sample
from jvdiff.commands.arguments import Section
from jvdiff.commands.command_line import say
from jvdiff.errors import NumericsError, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status; errors are sentences on stderr."""
    return command_line.main(
        argv, lambda words: sample.parse(words, COMMAND), lambda request: [run(request.config)], "output"
    )


def _default_config() -> ConfigDict:
    config = sample.default_config()
    config.update(configs.fields(options.Windows))
    return config


COMMAND = dataclasses.replace(
    sample.COMMAND,
    name="windows",
    about="records which windows of sparse attention a model's heads need",
    examples=(
        "--checkpoint=FOLDER --prompts=FILE --tile=6x8x8 --candidates=3x3x3,1x5x7,3x1x9",
        "--mask_strategy=FILE --canvas=18x48x80",
    ),
    sections=lambda config, flags: [
        Section(str(options.Windows.__doc__), configs.options(options.Windows)),
        *sample.sections(config, flags),
    ],
    fresh=_default_config,
)


def run(config: Any) -> Path:
    """Makes the table and returns its path.

    Raises:
        UsageError: a model without patterns of tiles, clips that differ in size or sampler, a mesh, or candidates that
            do not fit into their video.
        NumericsError: NaN or infinity.
    """
    from jvdiff.kernels import windows
    from jvdiff.runtime.files import atomic

    path = Path(config.table)
    if path.is_dir():
        raise UsageError(f"table is {path}, a folder; expected the name of a file.")
    if other := next((name for name in ("plan", "resume", "stop_at") if config.get(name)), None):
        raise UsageError(f"{other} is of `jvdiff sample`; leave it out.")
    if config.mask_strategy is not None:
        made = _converted(config)
    elif config.canvas is not None:
        raise UsageError("canvas is that of a mask_strategy; a recorded table has that of its clips. Leave it out.")
    else:
        made = _recorded(config)
    with atomic(path) as part:
        part.write_text(windows.to_text(made), encoding="utf-8")
    rows, layers, heads = made.table.shape
    say(f"{rows} rows of {layers} layers of {heads} heads, {len(made.choices)} windows; {_kept(made):.0%} of all pairs")
    return path


def _converted(config: Any) -> Any:
    from jvdiff.kernels import windows

    if config.canvas is None:
        raise UsageError("a mask_strategy does not say of which video it is; give --canvas=18x48x80, its tokens.")
    file = Path(config.mask_strategy)
    try:
        text = file.read_bytes()
    except OSError as error:
        raise UsageError(f"mask_strategy: {file} cannot be read ({error.strerror}).") from None
    return windows.from_strategy(text, _three("tile", config.tile), _three("canvas", config.canvas), str(file))


def _recorded(config: Any) -> Any:
    """The table of what a model's heads need, by the clips that a config asks for."""
    import numpy as np

    from jvdiff import models, pipeline, precision
    from jvdiff.commands import jobs
    from jvdiff.kernels import mask_search, windows

    if config.mesh is not None or config.distributed:
        raise UsageError("windows are recorded on one device; leave --mesh and --distributed out.")
    tile, candidates = _three("tile", config.tile), _candidates(config.candidates)
    how: Any = {"family": models.named(config.family), "follow_symlinks": config.follow_symlinks}
    repository = pipeline.inspect(sample.folder_of(config.checkpoint), at_once=True, **how)
    if repository.family.window_losses is None:
        raise UsageError(f"{repository.family.name} has no search for windows of tiles; there is nothing to record.")
    wanted, problems = jobs.make_jobs(config, repository)
    if problems or not wanted:
        raise UsageError(problems[0] if problems else f"part is {config.part}, which has no clip.")
    clip = wanted[0].clip
    timesteps = tuple(clip.sampler.make().timesteps.tolist())
    _check(wanted, timesteps)
    network = repository.models.configs[clip.segments[-1].part]
    canvas: Any = tuple(n // p for n, p in zip(clip.latents[:3], network.patch_size, strict=True))
    _check_candidates(candidates, canvas, tile)
    command_line.use_device(config)
    command_line.compile_cache(config.compile_cache)
    pipe = pipeline.load(repository, precision.choose(config.precision).name)
    measure = _measure(pipe, clip, tile, candidates)
    losses = np.stack([np.stack(measure(job), axis=1) for job in wanted])  # [clips,candidates,steps,layers,heads]
    if not np.isfinite(losses).all():
        clips, _, steps, layers, _ = np.argwhere(~np.isfinite(losses))[0]
        raise NumericsError(f"{wanted[clips].stem}: step {steps + 1}, layer {layers}: attention is NaN or infinite.")
    table = mask_search.best(losses, len(candidates)).astype(np.int32)
    facts = {name: value for name, value in clip.facts().items() if name not in ("pattern", "attention", "dense_steps")}
    recorded = {
        "checkpoint_digest": repository.digest,
        **facts,
        repository.family.facts[0] + "s": [job.subject for job in wanted],
        "seeds": [job.seed for job in wanted],
        "precision": pipe.precision.name,
        "loss": float(losses.mean(axis=0).min(axis=0).mean()),
    }
    return windows.Windows(tile, canvas, candidates, table, timesteps, recorded)


def _check(wanted: Sequence[Any], timesteps: tuple[float, ...]) -> None:
    from jvdiff.kernels import windows

    clip = wanted[0].clip
    if any((job.clip.latents, job.clip.sampler) != (clip.latents, clip.sampler) for job in wanted):
        raise UsageError("the clips differ in size or sampler; a table is of one size, and its rows are one sampler's.")
    if len({segment.part for segment in clip.segments}) > 1:
        raise UsageError(
            "two transformers share the steps, and a table is of one; give all steps to one of them, with "
            f"--boundary_step=0 or --boundary_step={len(timesteps)}."
        )
    if not windows.falling(timesteps):
        raise UsageError(f"two of the {len(timesteps)} timesteps cannot be told apart; take fewer steps.")


def _measure(pipe: Any, clip: Any, tile: Any, candidates: Any) -> Callable[[Any], list[Any]]:
    """job -> float32 [candidates,layers,heads] of each step."""
    import jax
    import numpy as np

    from jvdiff import pipeline
    from jvdiff.commands import one_video
    from jvdiff.diffusion import classifier_free, sampling
    from jvdiff.models.family import Stage
    from jvdiff.runtime import progress

    solver, segment = clip.sampler.make(), clip.segments[-1]
    forward = pipe.context.forward(clip, segment)
    network = pipe.family.window_losses(pipe.models, segment.part, forward, tile, candidates)

    def step(params: Any, condition: Any, other: Any, scale: Any, state: Any, t: Any, row: Any) -> Any:
        seen = []

        def velocity(x: Any, t: Any, condition: Any) -> Any:
            v, losses = network(params, x, t, condition)
            seen.append(losses)  # [layers,candidates,heads], of each branch
            return v

        guided = classifier_free(velocity, condition, other, 1.0 if other is None else scale, mode="sequential")
        state = sampling.advanced(solver.advance, guided, state, t, row)
        return state, sum(seen) / len(seen)

    stage = Stage("record", segment.part, jax.jit(step, donate_argnames="state"))

    def measured(job: Any) -> list[Any]:
        condition, other = pipeline.encode(pipe.context, clip, job.inputs, pipe.run)
        state, found = pipeline.begin(clip, solver, pipeline.initial_noise([job.seed], clip.latents), [job.seed]), []
        with one_video.stage("record"), progress.bar(job.stem, len(solver)) as show:
            for i, row in enumerate(solver.table):
                state, losses = pipe.run(
                    stage, condition, other, segment.guidance, state, solver.timesteps[i], row
                )  # fmt: skip
                found.append(np.moveaxis(np.asarray(losses), 0, 1))
                show(i + 1)
        return found

    return measured


def _three(name: str, text: str) -> Any:
    match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})x([1-9]\d{0,3})", str(text))
    if match is None:
        raise UsageError(f"{name} is {text!r:.80}; expected three whole numbers, as 6x8x8.")
    return tuple(map(int, match.groups()))


def _candidates(text: str | None) -> tuple[Any, ...]:
    if text is None:
        raise UsageError("no candidates; give windows in tiles to choose among: --candidates=3x3x3,1x5x7,3x1x9.")
    return tuple(dict.fromkeys(_three("candidates", each) for each in text.split(",")))


def _check_candidates(candidates: Any, canvas: Any, tile: Any) -> None:
    from jvdiff.kernels import tiles

    counts = tiles.counts(canvas, tile)
    for window in candidates:
        if any(w > n for w, n in zip(window, counts, strict=True)):
            raise UsageError(
                f"candidates has {'x'.join(map(str, window))}, and the video has {'x'.join(map(str, counts))} tiles."
            )


def _kept(made: Any) -> float:
    """The share of pairs that the windows of a table keep, in the mean."""
    from jvdiff.kernels import tiles
    from jvdiff.kernels.pattern import seen_of

    sizes = tiles.variable_block_sizes(made.canvas, made.tile)
    seen = seen_of(made.choices, tiles.counts(made.canvas, made.tile), sizes, widest=False)  # [choices,tiles]
    shares = (seen * sizes).sum(axis=1) / sizes.sum() ** 2
    return float(shares[made.table].mean())
