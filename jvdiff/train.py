"""The command line of training.

    python -m jvdiff.train --config configs/train_digits_vae.py
    python -m jvdiff.train --config configs/train_digits_dit.py

A run lives in `config.folder`: `state/` (Orbax checkpoints), `metrics.jsonl`, and when it is done the result: `vae/` or
`repository/`, which `jvdiff.load` and `python -m jvdiff.sample` take and `python -m convert.to_hf` exports. The same
command goes on where a stopped run was. Fields: see COMMON, TASKS and the functions that they feed.

Exit status: 0 done · 2 usage · 3 checkpoint or data · 4 memory or disk · 5 interrupted, resumable · 6 NaN or infinity ·
7 set-up · 1 anything else.
"""

import dataclasses
import difflib
import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jvdiff import checkpoint, command_line, settings, training
from jvdiff.data import digits, digits_tokenizer, tokenizer
from jvdiff.data.video import atomic
from jvdiff.errors import CheckpointError, UsageError
from jvdiff.models import umt5, wan
from jvdiff.sharding import data_parallel
from jvdiff.training import flow_matching, reconstruction
from jvdiff.training.loop import Schedule, State, Task

COMMON = ("task", "folder", "seed", "loss", "schedule", "loop")  # of every task; and, if you like, compile_cache


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
        raise UsageError(f"task is {name!r}; expected one of {', '.join(TASKS)}{_nearest(name, TASKS)}.")
    fields = (*COMMON, *TASKS[name].fields)
    _check_names("the config", config, (*fields, *TASKS[name].optional, "compile_cache"))
    if missing := [field for field in fields if field not in config]:
        raise UsageError(f"the config lacks {', '.join(missing)}; task {name!r} needs {', '.join(fields)}.")
    if config.seed is None:
        raise UsageError("seed is None; a run that can go on later needs a number.")
    settings.check_seed(config.seed)
    _check_names("loss", config.loss, _keywords(TASKS[name].loss))
    _check_names("loop", config.loop, [field for field in _keywords(training.fit) if field not in ("seed", "params")])
    for field, value in config.loop.items():
        _check_count(f"loop.{field}", value)
    _schedule(config)
    return request


def run(request: command_line.Request) -> list[Path]:
    """Trains what the config asks for and returns the folder of the result."""
    config = request.config
    folder = command_line.writable(config.folder, "folder")
    command_line.compile_cache(config.get("compile_cache"))  # type: ignore[arg-type]
    advice = "Try a smaller batch or model; what was saved before is kept."
    with command_line.device_memory(str(folder), advice), command_line.plain_logs():
        return [TASKS[config.task].run(config, folder)]


def train_vae(config: ConfigDict, folder: Path) -> Path:
    """Trains a causal VAE on moving digits and writes it to `folder/vae` with its latent statistics."""
    cfg = _model("vae", wan.VAEConfig, config.vae)
    stages = _stages(config.stages, cfg, config.loop.get("devices", 1))
    result = _result(folder / "vae")

    def clips(step: int) -> np.ndarray:
        _, batch, frames, size = next((stage for stage in stages if step < stage[0]), stages[-1])
        rng = np.random.default_rng((config.seed, step))
        if frames == 1:  # four pictures of every clip
            video = digits.batch(rng, -(-batch // 4))[0][:, 1::4].reshape(-1, 1, digits.SIZE, digits.SIZE, 3)[:batch]
        else:
            video = digits.batch(rng, batch, frames=frames)[0]
        y, x = rng.integers(digits.SIZE - size + 1, size=2)
        return video[:, :, y : y + size, x : x + size]

    trained = None
    if config.get("decoder_of"):
        known = _vae_config(Path(config.decoder_of))
        if cfg != dataclasses.replace(known, latents_mean=cfg.latents_mean, latents_std=cfg.latents_std):
            raise UsageError(f"vae: its sizes are not those of {config.decoder_of}; use {known}.")
        cfg, trained = known, checkpoint.restore(config.decoder_of, wan.abstract_params(known))
    task = training.vae_task(cfg, clips, trained, **config.loss.to_dict())
    params = {**(trained or {}), **_fit(task, config, folder).average}
    if trained is None:
        shown = digits.batch(np.random.default_rng(config.seed), 128, frames=17)[0]
        mean, std = reconstruction.latent_statistics(cfg, params, shown)
        cfg = dataclasses.replace(cfg, latents_mean=mean, latents_std=std)
    checkpoint.save(result, params, config=cfg.to_json(), overwrite=True)
    return result


def train_text_to_video(config: ConfigDict, folder: Path) -> Path:
    """Trains the transformer and its text encoder on latents of moving digits, and writes a whole repository."""
    for name in ("clips", "batch", "tokens"):
        _check_count(name, config[name])
    _check_shared("batch", config.batch, devices := config.loop.get("devices", 1))
    if not 0 <= config.drop_text <= 1:
        raise UsageError(f"drop_text is {config.drop_text}; expected 0 to 1.")
    vae_cfg = _vae_config(Path(config.vae))
    every = [digits.prompt(*combo) for combo in digits.COMBOS]
    tokens = digits_tokenizer.build([word for text in every for word in text.split()])
    if cut := max(tokenizer.tokenize(tokens, every, config.tokens).cut):
        raise UsageError(f"tokens is {config.tokens}, but a prompt has {config.tokens + cut}.")
    sizes = {"in_channels": vae_cfg.z_dim, "out_channels": vae_cfg.z_dim}
    text_cfg = _model("text_encoder", umt5.Config, config.text_encoder, vocab_size=tokens.get_vocab_size())
    dit_cfg = _model("transformer", wan.DiTConfig, config.transformer, text_dim=text_cfg.d_model, **sizes)
    scheduler, defaults = config.scheduler.to_dict(), config.defaults.to_dict()
    try:
        settings.resolve(settings.Configs(dit_cfg, vae_cfg, text_cfg), scheduler, defaults)
    except CheckpointError as error:
        raise UsageError(f"scheduler: {error}") from None
    result = _result(folder / "repository")
    vae = checkpoint.restore(config.vae, wan.abstract_params(vae_cfg))

    latents, prompts = _encoded_digits(vae_cfg, vae, config.clips, config.seed, devices, folder / "latents.npz")
    ids, mask, _ = tokenizer.tokenize(tokens, [*prompts, ""], config.tokens)

    def batches(step: int) -> flow_matching.Batch:
        rng = np.random.default_rng((config.seed, step))
        rows = rng.integers(len(latents), size=config.batch)
        texts = np.where(rng.uniform(size=config.batch) < config.drop_text, len(prompts), rows)
        return flow_matching.Batch(latents[rows], ids[texts], mask[texts])

    task = training.text_to_video_task(dit_cfg, text_cfg, batches, **config.loss.to_dict())
    params = _fit(task, config, folder).average
    components = {
        "transformer": (dit_cfg, params["transformer"]),
        "vae": (vae_cfg, vae),
        "text_encoder": (text_cfg, params["text_encoder"]),
    }
    digits_tokenizer.save(tokens, folder / "tokenizer")
    checkpoint.save_repository(
        result,
        components,
        tokenizer=folder / "tokenizer",
        scheduler=scheduler,
        defaults=defaults,
        overwrite=True,
    )
    return result


class Kind(NamedTuple):
    """A task's program, the function that config.loss feeds, and the fields of its config beside COMMON."""

    run: Callable[[ConfigDict, Path], Path]
    loss: Callable[..., Task]
    fields: tuple[str, ...]
    optional: tuple[str, ...] = ()


_TEXT_TO_VIDEO = (
    "vae",
    "clips",
    "batch",
    "tokens",
    "drop_text",
    "transformer",
    "text_encoder",
    "scheduler",
    "defaults",
)
TASKS = {
    "vae": Kind(train_vae, training.vae_task, ("vae", "stages"), ("decoder_of",)),
    "text_to_video": Kind(train_text_to_video, training.text_to_video_task, _TEXT_TO_VIDEO),
}


def _fit(task: Task, config: ConfigDict, folder: Path) -> State:
    return training.fit(task, _schedule(config), folder, seed=config.seed, **config.loop.to_dict())


def _schedule(config: ConfigDict) -> Schedule:
    _check_names("schedule", config.schedule, [field.name for field in dataclasses.fields(Schedule)])
    try:
        return Schedule(**config.schedule.to_dict())
    except (TypeError, UsageError) as error:
        raise UsageError(f"schedule: {error}") from None


def _keywords(function: Callable[..., Any]) -> list[str]:
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]


def _vae_config(folder: Path) -> wan.VAEConfig:
    """The configuration of a VAE: the result of a training, or the `vae` folder of a repository."""
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder}: no trained VAE there; run configs/train_digits_vae.py first.")
    return wan.VAEConfig.from_json(json.loads((folder / "config.json").read_text()))


def _model(where: str, kind: Any, values: Any, **fixed: Any) -> Any:
    """A model's configuration, checked as if it had been read from a file."""
    _check_names(where, values, [f.name for f in dataclasses.fields(kind) if f.name not in fixed])
    try:
        return kind.from_json(kind(**values.to_dict(), **fixed).to_json())
    except (TypeError, CheckpointError) as error:
        raise UsageError(f"{where}: {str(error).splitlines()[0]}") from None


def _stages(stages: Any, cfg: wan.VAEConfig, devices: int) -> tuple[tuple[int, int, int, int], ...]:
    """((until step, batch, frames, crop), ...), checked; the last stage goes on for ever."""
    wanted = "a tuple of (until step, batch, frames, crop)"
    if not isinstance(stages, tuple | list) or not stages:
        raise UsageError(f"stages is {stages!r:.80}; expected {wanted}.")
    before, longest = 0, digits.SIZE - digits.BOX - 2 * digits.MARGIN + 1  # frames until a digit leaves the picture
    for number, stage in enumerate(stages, 1):
        whole = isinstance(stage, tuple | list) and len(stage) == 4 and all(type(v) is int for v in stage)
        if not whole or min(stage) < 1:
            raise UsageError(f"stage {number} is {stage!r:.80}; expected {wanted}, whole numbers from 1.")
        until, batch, frames, size = stage
        _check_shared(f"the batch of stage {number}", batch, devices)
        if until <= before:
            raise UsageError(f"stage {number} ends at step {until}; expected a step after {before}.")
        if (frames - 1) % cfg.temporal_factor or frames > longest:
            raise UsageError(
                f"stage {number} has {frames} frames; expected 1 + {cfg.temporal_factor}k, {longest} at most."
            )
        if size % cfg.spatial_factor or size > digits.SIZE:
            raise UsageError(
                f"stage {number} has a crop of {size} pixels; expected a multiple of {cfg.spatial_factor}, "
                f"{digits.SIZE} at most."
            )
        before = until
    return tuple(map(tuple, stages))


def _result(target: Path) -> Path:
    """`target`, if the result can be written there; asked before hours of work."""
    checkpoint.check_target(target, True)
    return target


def _check_count(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise UsageError(f"{name} is {value!r:.80}; expected a whole number from 1.")


def _check_shared(name: str, value: int, devices: int) -> None:
    if value % devices:
        raise UsageError(f"{name} is {value}; expected a multiple of the {devices} that share it (loop.devices).")


def _check_names(where: str, given: Any, known: Sequence[str]) -> None:
    if not isinstance(given, ConfigDict):
        raise UsageError(f"{where} is {given!r:.80}; expected a dictionary.")
    for name in given:
        if name not in known:
            raise UsageError(
                f"{where} has an unknown field {name!r}{_nearest(name, known)}.\nFields: {', '.join(known)}."
            )


def _nearest(name: Any, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(names), 1)
    return f"; did you mean {near[0]!r}" if near else ""


def _encoded_digits(
    cfg: wan.VAEConfig, params: Any, clips: int, seed: int, devices: int, path: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Normalised latents float16 [N,T,H,W,C] of N training clips, and their prompts; kept in the file `path`.

    The file is used again only for the same clips and the same encoder.
    """
    total = hashlib.sha256(f"{cfg} {clips} {seed}".encode())
    for leaf in jax.tree.leaves({name: part for name, part in params.items() if name not in reconstruction.DECODER}):
        total.update(np.asarray(leaf).tobytes())
    key = total.hexdigest()
    if path.is_file():
        with np.load(path) as stored:
            if "key" in stored and stored["key"] == key:
                return stored["latents"], stored["prompts"]

    everywhere, shared = data_parallel(devices)
    params = jax.device_put(params, everywhere)

    @jax.jit
    def encode(params, video):
        latents = wan.encode(params, cfg, video.astype(jnp.float32) / 127.5 - 1.0)
        return wan.normalize_latents(cfg, latents)

    parts, texts = [], []
    for start in range(0, -(-clips // 16), devices):  # the same clips on any number of devices: 16 with each seed
        drawn = [digits.batch(np.random.default_rng((seed, 1, i)), 16) for i in range(start, start + devices)]
        video = np.concatenate([video for video, _ in drawn])
        parts.append(np.asarray(encode(params, jax.device_put(video, shared)), np.float16))
        texts += [text for _, prompts in drawn for text in prompts]
        if len(parts) % 50 == 1:
            command_line.say(f"encoding clips: {16 * start} of {clips}")
    latents, prompts = np.concatenate(parts)[:clips], np.array(texts[:clips])
    with atomic(path) as part, open(part, "wb") as file:
        np.savez(file, latents=latents, prompts=prompts, key=key)
    return latents, prompts


if __name__ == "__main__":
    sys.exit(main())
