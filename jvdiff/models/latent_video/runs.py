"""The run that makes a latent video model from a folder of labelled clips: its VAE first, then the transformer.

B batch · T latent frames · H W latent grid · C latent channels · F pixel frames
"""

import dataclasses
import functools
import hashlib
import itertools
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jvdiff.config import names, replace
from jvdiff.diffusion import variance_preserving
from jvdiff.errors import CheckpointError, DataError, UsageError
from jvdiff.media import clips as clip_files
from jvdiff.media import video as videos
from jvdiff.media.clips import Clips
from jvdiff.models import latent_video, layouts
from jvdiff.models.family import Clip, Models
from jvdiff.models.latent_video import places
from jvdiff.models.latent_video.family import CLASS_CONDITIONAL, encode_program, make_clip
from jvdiff.models.latent_video.objective import LabelledLatents, latent_video_task, video_vae_task
from jvdiff.models.latent_video.settings import Settings
from jvdiff.models.pixels import latent_statistics
from jvdiff.pipeline import (
    Context,
    Executor,
    Weights,
    begin,
    decode,
    denoise,
    encode,
    initial_noise,
    repository,
)
from jvdiff.precision import TABLE
from jvdiff.runtime import peers
from jvdiff.runtime.staging import MANIFEST, check_target
from jvdiff.sharding import MeshShape, Placement, check_mesh, make_mesh, param_shardings
from jvdiff.training import fields
from jvdiff.training.kept import kept
from jvdiff.training.loop import Schedule, Task, fit
from jvdiff.types import Params
from jvdiff.weights import restore, save
from jvdiff.weights import safetensors as reader
from jvdiff.weights.manifest import verify_small

SHOWN = 8  # clips in a grid of samples, and classes that they show
STATISTICS = 256  # clips, or a few more, that the latents' mean and deviation are taken of
PLANNED_CLASSES = 10  # of a run that is planned before its clips are there
_VAE_FIELDS = ("model", "batch", "loss", "schedule")  # and, if wanted, "short_clips"
_log = logging.getLogger("jvdiff.training")


def train(config: ConfigDict, folder: Path) -> Path:
    """Trains what the config describes (`configs/latent_video_small.py`) and writes `folder/repository`.

    The VAE is trained in `folder/vae_run` and kept in `folder/vae`, unless `config.vae` is the folder of one. Its first
    `short_clips.steps` steps, if asked for, see more clips of fewer frames, equally many frames a batch: neighbouring
    frames teach nearly the same. The transformer is then trained on the latents of the clips. They are encoded anew for
    every batch, or with `cache_latents` once. Where `config.initial` is the repository of an earlier training, its
    VAE is taken as it is, and its transformer trained on.

    Samples are in `folder/samples`.

    Raises:
      UsageError: an invalid field (see `describe`), or `folder/repository` is there and not a complete repository.
      DataError: no clips, fewer than a batch, or too many that cannot be read.
      CheckpointError: the VAE or the transformer of an earlier training is incomplete or damaged.
      NumericsError: the VAE leaves a latent channel unused, or too many steps in a row were not finite.
      Interrupted, ResourceError: see `jvdiff.training.loop.fit`.
    """
    target = folder / "repository"
    check_target(target, True)
    clips = clip_files.find(config.clips)
    plan = describe(config, clips.classes)
    _check_enough(config, plan, clips)
    _log.info("%d clips of %d classes in %s", len(clips.paths), len(clips.classes), config.clips)
    read = functools.partial(
        clip_files.batches,
        clips,
        size=plan.clip.settings.height,
        stride=config.stride,
        seed=config.seed,
        workers=config.workers,
        most_bad=config.most_bad,
    )
    mesh = make_mesh(plan.mesh)
    options = config.loop.to_dict() | {"mesh": mesh}
    vae_cfg, vae = _vae(config, plan, read, folder, {k: v for k, v in options.items() if k != "show_every"})
    models = dataclasses.replace(plan.models, configs={**plan.models.configs, "vae": vae_cfg})
    task = latent_video_task(
        models.configs["transformer"],
        _batches(config, plan, clips, read, models, vae, folder),
        _shower(models, plan, vae, folder / "samples"),
        noise_schedule=config.noise_schedule,
        compute_dtype=plan.dtype,
        placement=Placement(mesh) if plan.mesh.devices > 1 else None,
        **config.loss.to_dict(),
    )
    initial = _initial(config, models, mesh)
    average = fit(task, plan.schedule, folder, seed=config.seed, params=initial, **options).average
    params = {"transformer": average, "vae": vae}
    repository.save(
        target,
        CLASS_CONDITIONAL,
        {name: (cfg, params[name]) for name, cfg in models.configs.items()},
        files={},
        index={**models.index, "defaults": dataclasses.asdict(plan.clip.settings)},
        overwrite=True,
    )
    return target


def _check_enough(config: Any, plan: "Plan", clips: Clips) -> None:
    """Raises DataError for fewer clips than a batch."""
    most = max([config.batch, *(stage.batch for stage in plan.vae_stages)])
    if len(clips.paths) < most:
        raise DataError(
            f"{config.clips}: {len(clips.paths)} clips, fewer than a batch of {most}; add clips, or lower batch."
        )


def _batches(
    config: Any, plan: "Plan", clips: Clips, read: Callable[..., Any], models: Models, vae: Params, folder: Path
) -> Callable[[int], Generator[LabelledLatents, None, None]]:
    """`Task.batches` of the transformer: latents of clips that are read anew, or of one epoch that was kept."""
    encode_clips = encode_program(models.configs["vae"])

    def encoded(start: int) -> Generator[LabelledLatents, None, None]:
        with closing(read(batch=config.batch, frames=plan.clip.settings.num_frames, start=start)) as ahead:
            for video, labels in ahead:
                yield LabelledLatents(np.asarray(encode_clips(vae, video)), labels)

    if not config.cache_latents:
        return encoded
    latents, labels = _cached(folder / "latents.npz", config, clips, vae, encoded)

    def batches(start: int) -> Generator[LabelledLatents, None, None]:
        for step in itertools.count(start):
            rows = np.random.default_rng((config.seed, step)).integers(len(latents), size=config.batch)
            yield LabelledLatents(latents[rows], labels[rows])  # [N,T,H,W,C], [N] -> [B,T,H,W,C], [B]

    return batches


def _initial(config: Any, models: Models, mesh: Mesh) -> Params | None:
    """The transformer of `config.initial` on the mesh; None: a new one."""
    if not config.get("initial"):
        return None
    abstract = latent_video.abstract_params(models.configs["transformer"])
    shardings = param_shardings(mesh, abstract, places.DIT)
    return restore(Path(config.initial) / "transformer", abstract, (), shardings)


# -------------------------------------------------------------------------------------------------- what a config says


class Stage(NamedTuple):
    """A part of the VAE's training.

    until: the step after its last
    batch: clips in a step
    frames: pixel frames of a clip
    """

    until: int
    batch: int
    frames: int


class Plan(NamedTuple):
    """A config, checked: no clip was opened and nothing was computed.

    models: configurations of transformer and VAE, and what model_index.json will say
    clip: what is trained, and sampled
    mesh: how several devices share the work
    dtype: of the transformer's and the VAE's products
    schedule: of the transformer
    vae_schedule: of the VAE; None: it is there
    vae_stages: clips that the VAE sees, stage by stage; empty where it is there
    """

    models: Models
    clip: Clip
    mesh: MeshShape
    dtype: str
    schedule: Schedule
    vae_schedule: Schedule | None
    vae_stages: tuple[Stage, ...]


def describe(config: Any, classes: Sequence[str]) -> Plan:
    """What a config says of models, sizes and schedules, for clips of these classes.

    Raises:
      UsageError: an invalid field.
    """
    for name in ("batch", "stride", "workers"):
        fields.check_count(name, config[name])
    if not isinstance(config.most_bad, float) or not 0 <= config.most_bad < 1:
        raise UsageError(f"most_bad is {config.most_bad!r:.40}; expected a share of the clips, below 1.")
    if config.precision not in TABLE:
        raise UsageError(f"precision is {config.precision!r:.40}; expected one of {', '.join(TABLE)}.")
    if config.height != config.width:
        raise UsageError(f"height is {config.height} and width {config.width}; clips are trained as squares.")
    vae_schedule, vae_stages = None, ()
    if given_vae := _given_vae(config):
        vae_cfg = _trained_vae(given_vae)
    else:
        fields.check_names("vae", config.vae, (*_VAE_FIELDS, "short_clips"))
        if missing := [name for name in _VAE_FIELDS if name not in config.vae]:
            raise UsageError(f"vae lacks {', '.join(missing)}; expected the folder of a trained one, or these fields.")
        fields.check_count("vae.batch", config.vae.batch)
        vae_cfg = fields.model("vae.model", latent_video.VAEConfig, config.vae.model)
        vae_schedule = fields.schedule(config.vae)
        fields.check_shared("vae.batch", config.vae.batch, fields.mesh(config.loop, _planned(config)))
        vae_stages = _stages(config, vae_schedule, vae_cfg.temporal_factor)
    sized = {"in_channels": vae_cfg.latent_channels, "num_classes": len(classes), "prediction": config.prediction}
    if isinstance(config.transformer, str):
        if config.transformer not in latent_video.SIZES:
            sizes = ", ".join(latent_video.SIZES)
            raise UsageError(f"transformer is {config.transformer!r:.40}; expected one of {sizes}, or fields.")
        base = dataclasses.asdict(latent_video.SIZES[config.transformer])
        chosen = ConfigDict({name: value for name, value in base.items() if name not in sized})
    else:
        chosen = config.transformer
    cfg = fields.model("transformer", latent_video.DiTConfig, chosen, **sized)
    if config.get("initial"):
        if (Path(config.initial) / MANIFEST).is_file():
            verify_small(Path(config.initial))
        known = latent_video.DiTConfig.from_json(reader.read_json(Path(config.initial) / "transformer" / "config.json"))
        fields.check_sizes(f"transformer: not that of initial, {config.initial}", cfg, known)
        learnt = reader.read_json(Path(config.initial) / "model_index.json").get("noise_schedule")
        if learnt != config.noise_schedule:
            raise UsageError(
                f"noise_schedule is {config.noise_schedule!r:.40}; {config.initial} has learnt {learnt!r:.40}."
            )
    variance_preserving.alphas_cumprod(config.noise_schedule)  # raises for an unknown name
    index = {"noise_schedule": config.noise_schedule, "classes": list(classes)}
    models = Models({"transformer": cfg, "vae": vae_cfg}, {}, index)
    clip = make_clip(models, replace(Settings(), {name: config[name] for name in names(Settings)}))
    shape = fields.mesh(config.loop, _planned(config))
    try:
        there = shape.devices if _planned(config) else jax.device_count()
        check_mesh(shape, latent_video.mesh_sizes(cfg, (config.batch, *clip.latents[:3])), there)
    except UsageError as error:
        raise UsageError(f"loop.{error}") from None
    return Plan(
        models, clip, shape, TABLE[config.precision].transformer, fields.schedule(config), vae_schedule, vae_stages
    )


def _planned(config: Any) -> bool:
    """Whether the mesh is one of devices that need not be there."""
    return bool(config.get("plan") and config.get("plan_target"))


def _stages(config: Any, schedule: Schedule, factor: int) -> tuple[Stage, ...]:
    """The stages of the VAE's training. factor: divides the frames of a clip."""
    whole = Stage(schedule.steps, config.vae.batch, config.num_frames)
    if (short := config.vae.get("short_clips")) is None:
        return (whole,)
    fields.check_names("vae.short_clips", short, ("steps", "num_frames"))
    steps, frames = short.get("steps"), short.get("num_frames")
    fields.check_count("vae.short_clips.steps", steps)
    fields.check_count("vae.short_clips.num_frames", frames)
    if frames % factor or whole.frames % frames:
        raise UsageError(
            f"vae.short_clips.num_frames is {frames}; expected a multiple of {factor} that divides the "
            f"{whole.frames} frames of a clip."
        )
    if steps >= whole.until:
        raise UsageError(f"vae.short_clips.steps is {steps}; expected fewer than the {whole.until} of vae.schedule.")
    return Stage(steps, whole.batch * whole.frames // frames, frames), whole


def programs(config: ConfigDict, placement: Placement | None = None) -> Iterator[tuple[str, Task, Schedule, Any, int]]:
    """(name, task, schedule, abstract batch, into how many parts a batch is cut) of each part of the run, for a plan.

    The clips need not be there.

    placement: the devices, which need not be there either; None: those at hand.
    """
    there = Path(config.clips).exists()
    classes = clip_files.find(config.clips).classes if there else [str(i) for i in range(PLANNED_CLASSES)]
    plan = describe(config, classes)

    def none(start: int) -> Generator[Any, None, None]:
        yield from ()

    if plan.vae_schedule:
        video = (config.vae.batch, *plan.clip.frames, 3)
        yield (
            "vae",
            video_vae_task(plan.models.configs["vae"], none, compute_dtype=plan.dtype, **config.vae.loss.to_dict()),
            plan.vae_schedule,
            jax.ShapeDtypeStruct(video, jnp.uint8),
            1,
        )
    task = latent_video_task(
        plan.models.configs["transformer"],
        none,
        noise_schedule=config.noise_schedule,
        compute_dtype=plan.dtype,
        placement=placement or (Placement(make_mesh(plan.mesh)) if plan.mesh.devices > 1 else None),
        **config.loss.to_dict(),
    )
    latents = jax.ShapeDtypeStruct((config.batch, *plan.clip.latents), jnp.float32)
    labels = jax.ShapeDtypeStruct((config.batch,), jnp.int32)
    batch: Any = LabelledLatents(latents, labels)  # type: ignore[arg-type]
    yield "transformer", task, plan.schedule, batch, config.loop.get("accumulate", 1)


# ----------------------------------------------------------------------------------------------------------- the VAE


def _vae(config: ConfigDict, plan: Plan, read: Callable[..., Any], folder: Path, options: dict[str, Any]) -> Any:
    """(configuration, parameters) of the VAE: trained, or read where it is."""
    path = _given_vae(config) or folder / "vae"
    if plan.vae_schedule is not None and not (path / "config.json").is_file():
        cfg = plan.models.configs["vae"]

        def clips(start: int) -> Generator[np.ndarray, None, None]:
            for until, batch, frames in plan.vae_stages:
                if start < until:
                    with closing(read(batch=batch, frames=frames, start=start)) as ahead:
                        for video, _ in itertools.islice(ahead, until - start):
                            yield video
                    start = until

        task = video_vae_task(cfg, clips, compute_dtype=plan.dtype, **config.vae.loss.to_dict())
        options = options | {"accumulate": 1}
        params = fit(task, plan.vae_schedule, folder / "vae_run", seed=config.seed, **options).average
        with closing(read(batch=config.vae.batch, frames=plan.clip.settings.num_frames, start=0)) as first:
            shown = [next(first)[0] for _ in range(-(-STATISTICS // config.vae.batch))]
        cfg = _with_statistics(cfg, params, shown)
        save(path, params, config=cfg.to_json(), overwrite=True)
    cfg = _trained_vae(path)
    return cfg, restore(path, latent_video.abstract_params(cfg), ())


def _given_vae(config: Any) -> Path | None:
    """The folder of a VAE that is there already; None: it is to be trained."""
    if config.get("initial"):
        layouts.check(Path(config.initial))
        return Path(config.initial) / "vae"
    return Path(config.vae) if isinstance(config.vae, str) else None


def _trained_vae(folder: Path) -> latent_video.VAEConfig:
    if not (folder / "config.json").is_file():
        hint = layouts.inside(folder, "vae")
        raise UsageError(f"vae: {folder} holds no trained VAE; expected its folder, or the fields to train one.{hint}")
    try:
        return latent_video.VAEConfig.from_json(reader.read_json(folder / "config.json"))
    except CheckpointError as error:
        raise UsageError(f"vae: {folder}: {error}") from None


def _with_statistics(cfg: latent_video.VAEConfig, params: Params, shown: list[np.ndarray]) -> latent_video.VAEConfig:
    """The VAE's configuration with mean and standard deviation of each channel over these clips.

    Raises:
      NumericsError: see `pixels.latent_statistics`.
    """
    latents = np.concatenate([np.asarray(encode_program(cfg)(params, video)) for video in shown])  # [clips,T,H,W,C]
    mean, std = latent_statistics(latents, "train longer, with a smaller kl, or with fewer latent_channels")
    return dataclasses.replace(cfg, latents_mean=mean, latents_std=std)


# ------------------------------------------------------------------------------------------------ latents and samples


def _cached(
    path: Path, config: ConfigDict, clips: Clips, vae: Params, encoded: Callable[[int], Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Latents float16 and labels of one epoch, kept in `path` for the same files, labels, settings and encoder."""
    total = hashlib.sha256(repr([config[name] for name in ("seed", "num_frames", "height", "stride")]).encode())
    total.update(repr((clips.labels.tolist(), clips.classes)).encode())
    for file in clips.paths:
        status = file.stat() if file.exists() else None
        total.update(f"{file}\0{status and (status.st_size, status.st_mtime_ns)}\0".encode())
    for leaf in jax.tree.leaves(vae["encoder"]):
        total.update(np.asarray(leaf).tobytes())

    def make() -> dict[str, np.ndarray]:
        parts = []
        with closing(encoded(0)) as batches:
            for number in range(-(-len(clips.paths) // config.batch)):
                if number % 50 == 0:
                    _log.info("encoding clips: %d of %d", number * config.batch, len(clips.paths))
                parts.append(next(batches))
        return {
            "latents": np.concatenate([part.latents for part in parts]).astype(np.float16),  # [clips,T,H,W,C]
            "labels": np.concatenate([part.labels for part in parts]),  # [clips]
        }

    arrays = kept(path, total.hexdigest(), make)
    return arrays["latents"], arrays["labels"]


def _shower(models: Models, plan: Plan, vae: Params, folder: Path) -> Callable[[Params, int], None]:
    """A function that writes a grid of samples of the first classes, the same noise every time, as PNG and MP4."""
    settings = dataclasses.replace(plan.clip.settings, steps=min(plan.clip.settings.steps, 25))
    clip, context = make_clip(models, settings), Context(CLASS_CONDITIONAL, models, TABLE["float32"])
    labels = np.arange(SHOWN, dtype=np.int32) % models.configs["transformer"].num_classes
    noise, solver = initial_noise(range(SHOWN), clip.latents), clip.sampler.make()

    def show(average: Params, step: int) -> None:
        run = Executor(Weights({"transformer": average, "vae": vae}))
        conditions = encode(context, clip, labels, run)
        state = begin(clip, solver, noise, range(SHOWN))
        latents = denoise(context, clip, conditions, state, solver, run).x
        video = decode(context, clip, latents, run)
        if peers.writes():
            # [SHOWN,F,Y,X,3] -> two rows, [F,2Y,SHOWN/2*X,3]; the picture has up to four frames, one below another.
            tiled = np.concatenate([np.concatenate(list(row), axis=2) for row in np.split(video, 2)], axis=1)
            videos.write_png(folder / f"{step:06d}.png", np.concatenate(list(tiled[:: -(-len(tiled) // 4)])))
            videos.write_mp4(folder / f"{step:06d}.mp4", tiled, settings.fps)

    return show
