"""The command line: a video without end, made chunk by chunk, which can be watched while it grows.

    jvdiff stream --config stream_digits --chunks=40
    jvdiff stream --config stream_digits --prompt="a red seven moving left" \\
        --then.10="a red seven moving up" --pipeline.diffusion_model.scheduler.shift=5.0

Every field is declared in `options` and listed by --help. The output folder gets NAME.mp4, which can be played after
every chunk, NAME.jsonl with a line of statistics for each, and, when it ends, NAME.png (a contact sheet) and NAME.json
(the record of the run). Ctrl-C finishes the chunk and leaves NAME.state, for --resume; so does save_every.

Exit status: 0 done · 2 usage · 3 checkpoint or data · 4 memory or disk · 5 interrupted, resumable · 6 NaN or infinity ·
7 set-up · 1 anything else.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import config_dict

from jvdiff import config as configs
from jvdiff import models
from jvdiff.commands import arguments, command_line, options
from jvdiff.commands.arguments import Command, Request, Section
from jvdiff.commands.command_line import say
from jvdiff.errors import CheckpointError, JvdiffError, UsageError
from jvdiff.runtime import ahead, progress
from jvdiff.runtime.files import alone
from jvdiff.runtime.interrupts import interrupts
from jvdiff.weights import locate

if TYPE_CHECKING:
    from jvdiff.commands.one_stream import Rollout
    from jvdiff.runtime.run_state import RunState

# Fields that a saved state holds, so that the command that goes on need not say them again.
IN_STATE = (
    *("prompt", "then", "negative_prompt", "reencode", "image", "seed", "fps"),
    *("precision", "vae_decode", "pipeline", "name"),
)


def default_config() -> config_dict.ConfigDict:
    """Every field of a streaming config. None: from the repository, else from the model's family."""
    return config_dict.ConfigDict(configs.fields(options.STREAM))


# ----------------------------------------------------------------------------------------------------- entry and exit


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status; errors are sentences on stderr."""
    began = time.perf_counter()
    return command_line.main(argv, parse, lambda request: run(request, began), "output")


def parse(argv: Sequence[str]) -> Request:
    """What a command line asks for.

    Raises:
        Told: --help or --version.
        UsageError: an unknown flag or field (with the nearest one), a value of the wrong type.
    """
    request = arguments.parse(COMMAND, argv)
    arguments.check_file(request.config, request.fresh, request.file)
    arguments.check_values(request.config, configs.options(options.STREAM))
    return request


def _without_prompts(config: config_dict.ConfigDict, paths: Iterable[str]) -> None:
    """Puts the file's later prompts aside where the command line has prompts of its own."""
    if {"prompt", "then"} & {path.split(".")[0] for path in paths}:
        config.then = None


COMMAND = Command(
    name="stream",
    about="a video without end, made chunk by chunk, which can be watched while it grows",
    examples=(
        "--chunks=40",
        '--prompt="a blue two moving up" --then.10="a blue two moving right"',
        '--config self_forcing_wan2_1_t2v_1_3b --prompt="..."',
    ),
    sections=lambda config, flags: [Section(str(group.__doc__), configs.options(group)) for group in options.STREAM],
    fresh=default_config,
    implied="stream_digits",
    takes_config=True,
    before=_without_prompts,
)


# --------------------------------------------------------------------------------------------------------------- run


def run(request: Request, began: float | None = None) -> list[Path]:
    """Makes the video that a request asks for and returns its path.

    On resuming, the state's own values hold, and a field that was set on purpose and differs is an error. began:
    time.perf_counter() when the program began.
    """
    began = began or time.perf_counter()
    if request.config.resume is None or not Path(request.config.resume).is_dir():
        return _run(request, began)
    folder = Path(request.config.resume).resolve()
    with alone(folder.with_name(folder.name.removesuffix(".state"))):  # before the state is read: it may change
        return _run(request, began)


def _run(request: Request, began: float) -> list[Path]:
    config, given = request.config, request.given
    from jvdiff import pipeline, precision, sharding, streaming
    from jvdiff.commands import jobs, one_stream
    from jvdiff.runtime import run_state

    if config.checkpoint is None:
        raise UsageError("no checkpoint; give --checkpoint=FOLDER.")
    if config.name is not None and not re.fullmatch(r"\w[\w.-]{0,99}", config.name):
        raise UsageError(f"name is {config.name!r:.80}; expected up to 100 letters, digits, '-', '_' or '.'.")
    mesh = sharding.read_mesh(config.mesh)
    how: dict[str, Any] = {"family": models.named(config.family), "follow_symlinks": config.follow_symlinks}
    repository = pipeline.inspect(locate(config.checkpoint, tell=say), at_once=False, **how)
    command_line.use_device(config)
    if config.resume is None:
        rollout = _new(config, repository)
    else:
        rollout = _resumed(config, run_state.load(config.resume), given, repository)
    if rollout.done and config.chunks and rollout.done >= config.chunks and one_stream.is_whole(rollout):
        raise UsageError(
            f"chunks is {config.chunks}, and {config.resume} has {rollout.done}; ask for more in all, or 0: no end."
        )
    _check(rollout, repository, mesh)
    command_line.writable(str(rollout.folder), "output")

    with interrupts() as asked_to_stop:
        seconds: dict[str, float] = {}
        command_line.compile_cache(config.compile_cache)
        abstract = pipeline.abstract_params(repository.family, repository.models, precision.choose(rollout.precision))
        command_line.say_device(abstract, mesh)
        shown = "; ".join(f"{f'from chunk {i} ' if i else ''}{prompt}" for i, prompt in rollout.prompts.items())
        say(f"prompt: {shown}   seed: {rollout.seed}")
        with ahead.compiling(lambda: one_stream.programs(rollout, abstract) if mesh is None else ()) as compiled:
            with progress.phase(f"loading {config.checkpoint}", seconds, "load"), one_stream.stage("load"):
                pipe = streaming.load(repository, rollout.precision, mesh, rollout.config)
            if config.resume is not None and rollout.state is not None:
                run_state.check_same(rollout.state.facts, jobs.weights(repository), config.resume)
        again = functools.partial(request.command, **dict.fromkeys(IN_STATE))
        return [one_stream.make(pipe, rollout, config, again, asked_to_stop, seconds, began, compiled)]


def _new(config: Any, repository: Any) -> Rollout:
    """The rollout that a config asks for."""
    from jvdiff import precision, streaming
    from jvdiff.commands import one_stream
    from jvdiff.commands.jobs import slug
    from jvdiff.commands.one_stream import Rollout
    from jvdiff.models.text.tokenizer import check_prompt
    from jvdiff.pipeline.settings import check_seed

    prompts = {0: check_prompt(config.prompt)} | _schedule(config.then)
    patch, defaults = config.pipeline or {}, repository.defaults
    dtypes = precision.choose(config.precision, config.vae_decode)
    chosen = streaming.decoding(_override(streaming.config_of(repository), patch, config.timed), dtypes)
    if config.vae_decode not in (None, (told := one_stream.decoded(chosen))):
        raise UsageError(f"vae_decode is {config.vae_decode}, and pipeline.decoder.arithmetic {told}; leave one out.")
    seed = config.seed
    if seed is None and "seed" in patch.get("diffusion_model", {}):
        seed = chosen.diffusion_model.seed
    seed = check_seed(seed)
    return Rollout(
        config=chosen,
        prompts=prompts,
        negative_prompt=_first(config.negative_prompt, defaults.get("negative_prompt"), ""),
        reencode=config.reencode,
        **_begin_with(config.image, chosen),
        seed=seed,
        fps=_first(config.fps, defaults.get("fps"), 16),
        precision=dtypes.name,
        repository=repository,
        folder=Path(config.output),
        stem=config.name or f"{slug(config.prompt)}_seed{seed}",
    )


def _first(*values: Any) -> Any:
    """The first value that is not None."""
    return next(value for value in values if value is not None)


def _resumed(config: Any, state: RunState, given: Mapping[str, Any], repository: Any) -> Rollout:
    """The rollout that `state` is the beginning of; refuses what differs from it."""
    from jvdiff import precision, streaming
    from jvdiff.commands.jobs import weights
    from jvdiff.commands.one_stream import ELSEWHERE, FACTS, Rollout, decoded
    from jvdiff.media.fragmented_mp4 import FragmentedMP4
    from jvdiff.runtime import environment, run_state

    folder, facts, done = Path(config.resume).resolve(), state.facts, state.done
    if missing := [name for name in ("pipeline", "prompts", "checkpoint_digest", "image", *FACTS) if name not in facts]:
        raise CheckpointError(f"{folder}: the state does not describe a rollout of a video: it has no {missing[0]}.")
    try:
        base = Path(facts.get(ELSEWHERE, folder.with_name(folder.name.removesuffix(".state"))))
        chosen = streaming.config_from_json(facts["pipeline"], streaming.rollout_of(repository))
        chosen = streaming.decoding(chosen, precision.choose("float32"))  # a version that does not say so decoded so
        prompts = {int(i): prompt for i, prompt in facts["prompts"].items()}
        asked = (name for name in (*FACTS, "vae_decode") if given.get(name) is not None)
        now: dict[str, Any] = {name: given[name] for name in asked}
        saved = {name: facts[name] for name in (*FACTS, "checkpoint_digest", "image")}
        saved |= _flat(streaming.to_json(chosen)) | {"vae_decode": decoded(chosen)}
    except (KeyError, ValueError, TypeError, AttributeError, UsageError) as error:
        raise CheckpointError(f"{folder}: the state does not describe a rollout of a video: {error.args[0]}.") from None
    if patch := given.get("pipeline"):
        now |= _flat(streaming.to_json(_override(chosen, patch, chosen.enable_sync_and_profile)))
    if given.get("image"):
        now["image"] = _begin_with(config.image, chosen)["image_digest"]
    wanted = _schedule(given.get("then")) | ({0: given["prompt"]} if given.get("prompt") is not None else {})
    past = {i: prompt for i, prompt in prompts.items() if i < done}
    saved |= {f"the prompt from chunk {i} on": past.get(i, "no change there") for i in wanted if i < done}
    now |= {f"the prompt from chunk {i} on": prompt for i, prompt in wanted.items() if i < done}
    saved_there, there = environment.compared(facts)
    same = functools.partial(weights, repository)
    run_state.check_same(saved | saved_there, now | there, config.resume, same)
    if facts.get("video") and facts["frames"]:  # told before a line of the statistics is cut off
        film = Path(f"{base}.mp4")
        FragmentedMP4(film, facts["fps"], frames=facts["frames"], kept=facts["video"])
    to_come = wanted if given.get("then") else prompts
    if given.get("output") and Path(given["output"]).resolve() != base.parent:
        raise UsageError(f"output is {config.output}; a rollout goes on where it is, in {base.parent}.")
    return Rollout(
        config=_override(chosen, {}, config.timed),
        prompts=past | {i: prompt for i, prompt in sorted(to_come.items()) if i >= done},
        image=None,
        image_digest=facts["image"],
        repository=repository,
        folder=base.parent,
        stem=base.name,
        state=state,
        **{name: facts[name] for name in FACTS},
    )


def _override(config: Any, patch: Mapping[str, Any], timed: bool) -> Any:
    """A pipeline's configuration with the values of a config's field `pipeline`."""
    from jvdiff import streaming

    try:
        return dataclasses.replace(streaming.override(config, patch), enable_sync_and_profile=timed)
    except (KeyError, TypeError, ValueError, JvdiffError) as error:
        raise UsageError(f"pipeline: {error.args[0]}") from None


def _schedule(then: Any) -> dict[int, str]:
    """The field `then` as {chunk: prompt}, in order."""
    from jvdiff.models.text.tokenizer import check_prompt

    try:
        schedule = {int(i): check_prompt(prompt, f"then.{i}") for i, prompt in dict(then or {}).items()}
        if min(schedule, default=1) >= 1:
            return dict(sorted(schedule.items()))
    except UsageError:
        raise
    except (TypeError, ValueError):
        pass
    raise UsageError(
        f"then is {then!r:.60}; expected prompts by the number of a chunk from 1, for instance --then.10=TEXT."
    )


def _begin_with(path: str | None, config: Any) -> dict[str, Any]:
    """Of a Rollout: the picture uint8 [1,Y,X,3] that a pipeline with an ImageEncoder begins with, and its digest; None
    without one."""
    from jvdiff import streaming
    from jvdiff.media import pictures
    from jvdiff.models.vision.pictures import squash

    encoder, cfg = config.encoder, config.diffusion_model.transformer
    if encoder is None and path is not None:
        raise UsageError(
            f"image is {path}, and this pipeline takes none; leave it out, or take a model that continues pictures\n"
            "with --pipeline.encoder.class=ImageEncoder."
        )
    if encoder is None:
        return {"image": None, "image_digest": None}
    if not isinstance(encoder, streaming.ImageEncoder):
        raise UsageError(f"pipeline.encoder is {type(encoder).__name__}; this program feeds an ImageEncoder only.")
    if path is None:
        raise UsageError("this pipeline begins with a picture; give --image=FILE.")
    ratio, picture = encoder.spatial_compression_ratio, pictures.read(path)
    seen = squash(picture, cfg.height * ratio, cfg.width * ratio)
    return {"image": seen[None], "image_digest": pictures.digest(picture)}


def _flat(value: Any, path: str = "pipeline") -> dict[str, Any]:
    """The values of a configuration's JSON by path, the default seed apart."""
    if not isinstance(value, Mapping):
        return {} if path == "pipeline.diffusion_model.seed" else {path: value}
    return {key: leaf for name, inner in value.items() for key, leaf in _flat(inner, f"{path}.{name}").items()}


def _check(rollout: Rollout, repository: Any, mesh: Any) -> None:
    """All that can be known to fail before weights are read."""
    import jax

    from jvdiff import sharding
    from jvdiff.media import video as videos
    from jvdiff.streaming import FamilyTextEncoder

    config, configs = rollout.config, repository.models.configs
    cfg = config.diffusion_model.transformer
    if config.decoder is None:
        raise UsageError("pipeline.decoder is None; a video needs one. For latents use jvdiff.streaming in Python.")
    for component, name, part in (
        (cfg, "diffusion_model.transformer.network", "transformer"),
        (cfg.text_encoder, "diffusion_model.transformer.text_encoder.network", "text_encoder"),
        (config.decoder, "decoder.vae", "vae"),
    ):
        found = getattr(component, name.rpartition(".")[2], None)
        if component is not None and component.part == part and found != configs[part]:
            raise UsageError(f"pipeline.{name} is not that of the weights; leave it as the repository has it.")
    ratio, (_, height, width, *_) = config.decoder.spatial_compression_ratio, cfg.latent_shape
    videos.check_mp4(height * ratio, width * ratio)
    texts, rows = [*rollout.prompts.values(), rollout.negative_prompt], cfg.text_shape[0]
    if isinstance(cfg.text_encoder, FamilyTextEncoder):  # what another one makes of a prompt, its weights say
        counts = cfg.text_encoder.token_counts(repository.models.files["tokenizer"], texts)
        for text, tokens in zip(texts, counts, strict=True):
            if tokens > rows:
                raise UsageError(f"the prompt {text!r:.60} has {tokens} tokens; text_rows is {rows}. Shorten it.")
    if isinstance(mesh, str):
        raise UsageError(f"mesh is {mesh!r}; name its axes here, for instance --mesh=sequence=4.")
    if mesh is not None and (sizes := getattr(cfg, "mesh_sizes", None)):
        sharding.check_mesh(mesh, sizes(1), jax.device_count())
