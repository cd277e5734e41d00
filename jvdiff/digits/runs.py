"""The runs that make the digits models: the VAE, then a transformer with its text encoder on the VAE's latents, for
clips or for videos without end.

B batch · T latent frames · H W latent grid · C latent channels · N clips
"""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jvdiff.digits import clips as digits
from jvdiff.digits import tokenizer as digits_tokenizer
from jvdiff.errors import CheckpointError, UsageError
from jvdiff.kernels import BlockCausal, VideoSparse, sparsity_schedule
from jvdiff.kernels.patterns import read as read_pattern
from jvdiff.models import layouts, wan
from jvdiff.models.family import Models, read_config, read_weights
from jvdiff.models.text import tokenizer, umt5
from jvdiff.models.wan import reconstruction
from jvdiff.models.wan.family import (
    CAUSAL,
    TEXT_AND_IMAGE_TO_VIDEO,
    TEXT_ENCODER,
    TEXT_TO_VIDEO,
    TRANSFORMER,
    VAE,
)
from jvdiff.models.wan.flow_matching import Batch, text_to_video_task
from jvdiff.models.wan.settings import EXPANDED
from jvdiff.models.wan.teacher_forcing import teacher_forcing_task
from jvdiff.pipeline import repository, resolve
from jvdiff.runtime import peers
from jvdiff.runtime.staging import check_target
from jvdiff.sharding import MeshShape, Placement, Sizes, check_mesh, make_mesh
from jvdiff.training import fields
from jvdiff.training.kept import kept
from jvdiff.training.loop import State, Task, fit
from jvdiff.types import Params
from jvdiff.weights import save

MOST_PROGRAMS = 32  # of one training: a sparsity is a part of the compiled step
_log = logging.getLogger("jvdiff.training")


def train_vae(config: ConfigDict, folder: Path) -> Path:
    """Trains a causal VAE on moving digits and writes it to `folder/vae` with its latent statistics.

    `decoder_of` is the folder of a VAE whose decoder alone is trained on. `endless`: digits move on across the border.
    """
    cfg = fields.model("vae", wan.VAEConfig, config.vae)
    shape = fields.mesh(config.loop)
    stages = _stages(config.stages, cfg, shape)
    result = _result(folder / "vae")
    endless = config.get("endless", False)

    def clips(step: int) -> np.ndarray:
        _, batch, frames, size = next((stage for stage in stages if step < stage[0]), stages[-1])
        rng = np.random.default_rng((config.seed, step))
        if frames == 1:  # four pictures of every clip
            video = digits.batch(rng, -(-batch // 4))[0][:, 1::4].reshape(-1, 1, digits.SIZE, digits.SIZE, 3)[:batch]
        elif endless:
            video = np.stack([digits.stream(rng, frames)[0] for _ in range(batch)])
        else:
            video = digits.batch(rng, batch, frames=frames)[0]
        y, x = rng.integers(digits.SIZE - size + 1, size=2)
        return video[:, :, y : y + size, x : x + size]

    trained = None
    if config.get("decoder_of"):
        cfg = _same_sizes(cfg, Path(config.decoder_of))
        trained = read_weights(Path(config.decoder_of), VAE, cfg, jnp.float32, **_links(config))
    task = reconstruction.vae_task(cfg, clips, trained, **config.loss.to_dict())
    params = {**(trained or {}), **_fit(task, config, folder, make_mesh(shape)).average}
    if trained is None:
        shown = digits.batch(np.random.default_rng(config.seed), 128, frames=17)[0]
        mean, std = reconstruction.latent_statistics(cfg, params, shown)
        cfg = dataclasses.replace(cfg, latents_mean=mean, latents_std=std)
    save(result, params, config=cfg.to_json(), overwrite=True)
    return result


def train_text_to_video(config: ConfigDict, folder: Path) -> Path:
    """Trains the transformer and its text encoder on latents of moving digits, and writes a whole repository.

    `initial` is a repository, in either layout, whose transformer and text encoder are trained on; a gate that it lacks
    starts at zero. `pattern`: see `jvdiff.kernels.patterns`; `sparsity_warmup` raises its sparsity from 0 in steps
    of `rate`, every `interval` training steps.
    """
    models, shape = _models(config), fields.mesh(config.loop)
    try:
        known = Models(models.configs._asdict(), {"scheduler": config.scheduler.to_dict()}, {})
        TEXT_TO_VIDEO.clip(known, resolve(TEXT_TO_VIDEO, known, config.defaults.to_dict(), {}))
    except CheckpointError as error:
        raise UsageError(f"scheduler: {error}") from None
    pattern_at = _patterns(config, models.configs.transformer.num_attention_heads)
    sizes = wan.mesh_sizes(models.configs.transformer, _grid(models.configs.vae, 17), config.batch, pattern_at(0))
    run = _start(config, folder, models, shape, sizes)
    cfg, cached = models.configs.vae, folder / "latents.npz"
    latents, prompts = encoded_clips(cfg, run.vae, digits.batch, "", config.clips, config.seed, run.mesh, cached)
    ids, mask, _ = tokenizer.tokenize(models.tokens, [*prompts, ""], config.tokens)

    def batches(step: int) -> Batch:
        rng = np.random.default_rng((config.seed, step))
        rows = rng.integers(len(latents), size=config.batch)
        texts = np.where(rng.uniform(size=config.batch) < config.drop_text, len(prompts), rows)
        return Batch(latents[rows], ids[texts], mask[texts], pattern_at(step))

    task = text_to_video_task(
        models.configs.transformer,
        models.configs.text_encoder,
        batches,
        placement=run.placement,
        **config.loss.to_dict(),
    )
    return _trained(config, folder, models, run, task)


def train_stream(config: ConfigDict, folder: Path) -> Path:
    """Trains a transformer that makes a video chunk by chunk, on digits that move on for ever; writes a repository.

    A clip has `chunks` chunks of `pattern.chunk` latent frames; up to `gap` more were there between the first and the
    second and are left out, so that the first is long ago, as the sink of a long rollout is. (What comes first behind a
    gap nobody can know: it has no part in the loss.) At each chunk the digit takes another direction, and the prompt
    says so, with probability `change`. With `first`, every other step is of `batch` first chunks alone, of `clips`
    clips of their own: their shape comes from the text only. `initial` as in `train_text_to_video`; where a text is
    dropped, it is for the whole clip.
    """
    models, shape = _models(config), fields.mesh(config.loop)
    _check_stream(config, shape)
    first: Any = config.get("first")
    pattern, cfg = BlockCausal(**config.pattern.to_dict()), models.configs.vae
    grid = _grid(cfg, _ends(config.chunks, pattern, cfg)[-1])
    sizes = wan.mesh_sizes(models.configs.transformer, (2 * grid[0], *grid[1:]), config.batch, pattern)
    run = _start(config, folder, models, shape, sizes)

    def batches_of(chunks: int, most_gap: int, clips: int, batch: int, cached: str) -> Callable[[int], Batch]:
        whole = chunks + most_gap
        draw = functools.partial(_streams, _ends(whole, pattern, cfg), config.change)
        kind = f"stream {whole} {config.change} {pattern.chunk}"
        latents, prompts = encoded_clips(cfg, run.vae, draw, kind, clips, config.seed, run.mesh, folder / cached)
        ids, mask, _ = tokenizer.tokenize(models.tokens, [*prompts.ravel().tolist(), ""], config.tokens)
        numbers = np.arange(prompts.size).reshape(prompts.shape)

        def batch_at(step: int) -> Batch:
            rng = np.random.default_rng((config.seed, step))
            rows = rng.integers(len(latents), size=(batch, 1))
            dropped = rng.uniform(size=(batch, 1)) < config.drop_text
            gap = rng.integers(most_gap + 1, size=(batch, 1))
            chunk = np.arange(chunks) + gap * (np.arange(chunks) > 0)
            frame = (pattern.chunk * chunk[..., None] + np.arange(pattern.chunk)).reshape(batch, -1)
            texts = np.where(dropped, prompts.size, numbers[rows, chunk])
            known = (gap == 0) | (np.arange(chunks) != 1)
            return Batch(latents[rows, frame], ids[texts], mask[texts], weight=known.astype(np.float32))

        return batch_at

    in_turn = [batches_of(config.chunks, config.gap, config.clips, config.batch, "latents.npz")]
    if first:
        in_turn.append(batches_of(1, 0, first.clips, first.batch, "first.npz"))
    task = teacher_forcing_task(
        models.configs.transformer,
        models.configs.text_encoder,
        lambda step: in_turn[step % len(in_turn)](step),
        pattern,
        placement=run.placement,
        **config.loss.to_dict(),
    )
    return _trained(config, folder, models, run, task)


def _check_stream(config: ConfigDict, shape: MeshShape) -> None:
    """Raises UsageError for fields of a stream's training that are invalid."""
    fields.check_count("chunks", config.chunks)
    if not 0 <= config.change <= 1:
        raise UsageError(f"change is {config.change}; expected 0 to 1.")
    if type(config.gap) is not int or config.gap < 0:
        raise UsageError(f"gap is {config.gap!r:.40}; expected a number of chunks from 0.")
    first: Any = config.get("first")
    if first:
        fields.check_names("first", first, ("clips", "batch"))
        for name in ("clips", "batch"):
            fields.check_count(f"first.{name}", first.get(name))
        fields.check_shared("first.batch", first.batch, shape)
    fields.check_names("pattern", config.pattern, ("chunk", "window", "sink"))


def _ends(chunks: int, pattern: BlockCausal, cfg: wan.VAEConfig) -> list[int]:
    """How many pixel frames there are after each chunk."""
    return [1 + cfg.temporal_factor * (pattern.chunk * chunk - 1) for chunk in range(1, chunks + 1)]


def _streams(
    ends: list[int], change: float, rng: np.random.Generator, count: int
) -> tuple[np.ndarray, list[list[str]]]:
    """`count` streams of chunks that end at the frames `ends`, and each chunk's prompt."""
    videos, texts = [], []
    for _ in range(count):
        turns = rng.uniform(size=len(ends) - 1) < change
        video, said = digits.stream(rng, ends[-1], np.array(ends[:-1])[turns].tolist())
        videos.append(video)
        texts.append([said[n] for n in np.cumsum([0, *turns])])
    return np.stack(videos), texts


class _Configs(NamedTuple):
    transformer: wan.DiTConfig
    vae: wan.VAEConfig
    text_encoder: umt5.Config


class _Models(NamedTuple):
    configs: _Configs
    tokens: Any


class _Run(NamedTuple):
    """Where a training runs, and what it starts from.

    result: the repository that it writes
    mesh, placement: devices that share the work
    vae: its weights
    params: of transformer and text encoder; None: from nothing
    """

    result: Path
    mesh: Mesh
    placement: Placement
    vae: Params
    params: Params | None


def _models(config: ConfigDict) -> _Models:
    """The models that a config describes, around the VAE that is there, and a tokenizer of the prompts' words."""
    for name in ("clips", "batch", "tokens"):
        fields.check_count(name, config[name])
    if not 0 <= config.drop_text <= 1:
        raise UsageError(f"drop_text is {config.drop_text}; expected 0 to 1.")
    vae_cfg = _vae_config(Path(config.vae))
    every = [digits.prompt(*combo) for combo in digits.COMBOS]
    tokens = digits_tokenizer.build([word for text in every for word in text.split()])
    if cut := max(tokenizer.tokenize(tokens, every, config.tokens).cut):
        raise UsageError(f"tokens is {config.tokens}, but a prompt has {config.tokens + cut}.")
    sizes = {"in_channels": vae_cfg.z_dim, "out_channels": vae_cfg.z_dim}
    text_cfg = fields.model("text_encoder", umt5.Config, config.text_encoder, vocab_size=tokens.get_vocab_size())
    dit_cfg = fields.model("transformer", wan.DiTConfig, config.transformer, text_dim=text_cfg.d_model, **sizes)
    return _Models(_Configs(dit_cfg, vae_cfg, text_cfg), tokens)


def _grid(cfg: wan.VAEConfig, frames: int) -> tuple[int, int, int]:
    """(T,H,W) of the latents of a clip."""
    side = digits.SIZE // cfg.spatial_factor
    return 1 + (frames - 1) // cfg.temporal_factor, side, side


def _start(config: ConfigDict, folder: Path, models: _Models, shape: MeshShape, sizes: Sizes) -> _Run:
    mesh, placement = _mesh(shape, sizes)
    result = _result(folder / "repository")
    dit_cfg, vae_cfg, text_cfg = models.configs
    params = _initial(config, dit_cfg, text_cfg, placement) if config.get("initial") else None
    vae = read_weights(Path(config.vae), VAE, vae_cfg, jnp.float32, placement, **_links(config))
    return _Run(result, mesh, placement, vae, params)


def _trained(config: ConfigDict, folder: Path, models: _Models, run: _Run, task: Task) -> Path:
    """Runs the training and writes the repository."""
    params = _fit(task, config, folder, run.mesh, run.params).average
    components = {
        "transformer": (models.configs.transformer, params["transformer"]),
        "vae": (models.configs.vae, run.vae),
        "text_encoder": (models.configs.text_encoder, params["text_encoder"]),
    }
    if peers.writes():
        digits_tokenizer.save(models.tokens, folder / "tokenizer")
    family, index = CAUSAL if models.configs.transformer.causal else TEXT_TO_VIDEO, {}
    if config.loss.get("pictures"):
        family, index = TEXT_AND_IMAGE_TO_VIDEO, {EXPANDED: True}
    repository.save(
        run.result,
        family,
        components,
        index=index,
        files={
            "tokenizer": folder / "tokenizer",
            "scheduler": {"scheduler_config.json": config.scheduler.to_dict()},
        },
        defaults=config.defaults.to_dict(),
        overwrite=True,
    )
    return run.result


def _fit(task: Task, config: ConfigDict, folder: Path, mesh: Mesh, params: Params | None = None) -> State:
    options = config.loop.to_dict() | {"mesh": mesh}
    return fit(task, fields.schedule(config), folder, seed=config.seed, params=params, **options)


def _mesh(shape: MeshShape, sizes: Sizes) -> tuple[Mesh, Placement]:
    try:
        check_mesh(shape, sizes, jax.device_count())
    except UsageError as error:
        raise UsageError(f"loop.{error}") from None
    mesh = make_mesh(shape)
    return mesh, Placement(mesh, shape.ring)


def _patterns(config: Any, heads: int) -> Callable[[int], wan.Pattern]:
    """step -> the pattern of the self-attention."""
    pattern = read_pattern(config.get("pattern") or "dense", heads)
    if pattern.sha256 is not None:
        raise UsageError(f"pattern is {pattern}; a training takes one that needs no file: its record names none.")
    if not (warmup := config.get("sparsity_warmup")):
        return lambda step: pattern
    names = ("rate", "interval")
    fields.check_names("sparsity_warmup", warmup, names)
    if not isinstance(pattern, VideoSparse) or set(warmup) != set(names):
        raise UsageError(f"sparsity_warmup needs a pattern video_sparse:..., and the fields {' and '.join(names)}.")
    fields.check_count("sparsity_warmup.interval", warmup.interval)
    if not isinstance(warmup.rate, float) or not pattern.sparsity / MOST_PROGRAMS <= warmup.rate <= 1:
        raise UsageError(
            f"sparsity_warmup.rate is {warmup.rate!r:.80}; expected a number from "
            f"{pattern.sparsity / MOST_PROGRAMS} to 1: each sparsity is a program to compile, {MOST_PROGRAMS} at most."
        )

    def at(step: int) -> wan.Pattern:
        return VideoSparse(pattern.tile, sparsity_schedule(step, pattern.sparsity, warmup.rate, warmup.interval))

    return at


def _links(config: Any) -> dict[str, Any]:
    return {"follow_symlinks": bool(config.get("follow_symlinks"))}


def _initial(config: Any, dit_cfg: wan.DiTConfig, text_cfg: umt5.Config, placement: Placement) -> Params:
    """Float32 parameters of the repository `config.initial`, for models of these configurations, on a mesh."""
    there = repository.inspect(config.initial, **_links(config))
    folder, stored = there.path, there.models.configs
    gated = dit_cfg.gate_compress or stored["transformer"].gate_compress
    same = dataclasses.replace(stored["transformer"], gate_compress=gated, causal=dit_cfg.causal)
    for name, cfg, known in (("transformer", dit_cfg, same), ("text_encoder", text_cfg, stored["text_encoder"])):
        fields.check_sizes(f"{name}: not that of initial, {folder}", cfg, known)
    params = {
        name: read_weights(folder / name, part, stored[name], jnp.float32, placement, **_links(config))
        for name, part in (("transformer", TRANSFORMER), ("text_encoder", TEXT_ENCODER))
    }
    if dit_cfg.gate_compress and not stored["transformer"].gate_compress:
        gate = wan.abstract_params(dit_cfg)["blocks"]["self_attn"]["gate"]
        params["transformer"]["blocks"]["self_attn"]["gate"] = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), gate)
    return params


def _vae_config(folder: Path) -> wan.VAEConfig:
    """The configuration of a VAE: the result of a training, or the `vae` folder of a repository."""
    if not (folder / "config.json").is_file():
        hint = layouts.inside(folder, "vae")
        raise UsageError(f"{folder}: no trained VAE there; run configs/train_digits_vae.py first.{hint}")
    return read_config(folder, VAE)


def _same_sizes(cfg: wan.VAEConfig, folder: Path) -> wan.VAEConfig:
    """The configuration of the VAE in `folder`, latent statistics included, if it is of the sizes of `cfg`."""
    known = _vae_config(folder)
    fields.check_sizes(f"vae: not the sizes of decoder_of, {folder}", cfg, known)
    return known


def _stages(stages: Any, cfg: wan.VAEConfig, shape: MeshShape) -> tuple[tuple[int, int, int, int], ...]:
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
        fields.check_shared(f"the batch of stage {number}", batch, shape)
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
    check_target(target, True)
    return target


def encoded_clips(
    cfg: wan.VAEConfig,
    params: Any,
    draw: Callable[[np.random.Generator, int], tuple[np.ndarray, Sequence[Any]]],
    kind: str,
    clips: int,
    seed: int,
    mesh: Mesh,
    path: Path,
) -> tuple[np.ndarray, np.ndarray]:
    """Normalised latents float16 [N,T,H,W,C] of N training clips, and their prompts [N] or [N,P]; kept in `path`.

    draw: (generator, count) -> clips uint8 and their prompts. kind: what it draws; "" for ordinary clips. The file is
    used again only for the same clips and the same encoder.
    """
    total = hashlib.sha256(f"{cfg} {clips} {seed}{kind}".encode())
    for leaf in jax.tree.leaves({name: part for name, part in params.items() if name not in wan.DECODER}):
        total.update(np.asarray(leaf).tobytes())

    def make() -> dict[str, np.ndarray]:
        return _encoded(cfg, params, draw, clips, seed, mesh)

    arrays = kept(path, total.hexdigest(), make)
    return arrays["latents"], arrays["prompts"]


def _encoded(
    cfg: wan.VAEConfig,
    params: Any,
    draw: Callable[[np.random.Generator, int], tuple[np.ndarray, Sequence[Any]]],
    clips: int,
    seed: int,
    mesh: Mesh,
) -> dict[str, np.ndarray]:
    """The latents and prompts of `encoded_clips`, computed."""
    devices, everywhere = mesh.size, NamedSharding(mesh, PartitionSpec())
    shared = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    params = jax.device_put(params, everywhere)

    @functools.partial(jax.jit, out_shardings=everywhere)
    def encode(params, video):
        latents = wan.encode(params, cfg, video.astype(jnp.float32) / 127.5 - 1.0)
        return wan.normalize_latents(cfg, latents)

    parts, texts = [], []
    for start in range(0, -(-clips // 16), devices):  # the same clips on any number of devices: 16 with each seed
        drawn = [draw(np.random.default_rng((seed, 1, i)), 16) for i in range(start, start + devices)]
        video = np.concatenate([video for video, _ in drawn])
        placed = jax.make_array_from_callback(video.shape, shared, video.__getitem__)
        parts.append(np.asarray(encode(params, placed), np.float16))
        texts += [text for _, prompts in drawn for text in prompts]
        if len(parts) % 50 == 1:
            _log.info("encoding clips: %d of %d", 16 * start, clips)
    return {"latents": np.concatenate(parts)[:clips], "prompts": np.array(texts[:clips])}
