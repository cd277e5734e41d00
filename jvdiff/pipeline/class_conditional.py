"""A class label becomes a video, with the latent video models: `load` a trained one, `generate` from it.

    model = class_conditional.load("runs/latent_video_digits/repository")
    video = class_conditional.generate(model, ["seven", 7], seed=0).video

    B batch · T latent frames · H W latent grid · C latent channels · F pixel frames · Y X pixel height, width

A repository is a folder with model_index.json, vae/ and transformer/ (`jvdiff.weights.orbax`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jvdiff import precision
from jvdiff.diffusion import classifier_free, sampling, solvers
from jvdiff.diffusion import variance_preserving as vp
from jvdiff.errors import CheckpointError, NumericsError, UsageError
from jvdiff.models import latent_video
from jvdiff.pipeline import initial_noise, to_pixels
from jvdiff.pipeline.settings import check_seed
from jvdiff.runtime.staging import MANIFEST, staged
from jvdiff.types import Array, Params
from jvdiff.weights import restore
from jvdiff.weights import safetensors as reader
from jvdiff.weights.manifest import file_sha256, write_manifest
from jvdiff.weights.orbax import by_process_0, leaves_of, write_params

CLASS_NAME = "LatentVideoPipeline"
# DDIM is Euler's step in the coordinates that all of them work in (`diffusion.variance_preserving`).
SOLVERS: Mapping[str, Callable[..., solvers.Solver]] = {
    "ddim": solvers.euler,
    "ddpm": solvers.ddpm,
    "unipc": solvers.unipc,
    "euler": solvers.euler,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything besides label, seed and weights that decides what a clip looks like.

    num_frames, height, width: of pixels; fps is only written into the file. A repository has defaults of its own, those
    of the clips that it was trained on.
    """

    num_frames: int = 16
    height: int = 256
    width: int = 256
    fps: int = 8
    steps: int = 50
    guidance: float = 7.5
    solver: str = "ddim"


FIELDS = tuple(field.name for field in dataclasses.fields(Settings))


class Configs(NamedTuple):
    """What decides shapes and the noising process."""

    transformer: latent_video.DiTConfig
    vae: latent_video.VAEConfig
    noise_schedule: str = "cosine"


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """What `load` read. `params` has the trees transformer and vae; `classes` are the names of the labels."""

    path: str
    digest: str
    configs: Configs
    params: Mapping[str, Params]
    classes: tuple[str, ...]
    defaults: Settings
    precision: precision.Precision

    def settings(self, **given: Any) -> Settings:
        """Complete, checked settings: what is given and not None, else this repository's.

        Raises:
          UsageError: an unknown name, or a value that cannot be; sizes name the nearest that can.
        """
        if unknown := sorted(given.keys() - set(FIELDS)):
            raise UsageError(f"unknown setting {', '.join(unknown)}; expected some of {', '.join(FIELDS)}.")
        chosen = {name: value for name, value in given.items() if value is not None}
        settings = dataclasses.replace(self.defaults, **chosen)
        check(settings, self.configs)
        return settings


@dataclasses.dataclass(frozen=True, eq=False)
class Output:
    """video uint8 [B,F,Y,X,3]; latents float32 [B,T,H,W,C], normalised; labels and seeds: those of each clip."""

    video: np.ndarray
    latents: np.ndarray
    labels: tuple[int, ...]
    seeds: tuple[int, ...]
    settings: Settings


def load(path: str | Path, precision: str | None = None) -> Model:
    """Reads what `save` wrote.

    Args:
      precision: a name in `jvdiff.precision.TABLE`; None is bfloat16 with a float32 VAE on GPUs, float32 elsewhere.

    Raises:
      UsageError: no such folder. CheckpointError: incomplete or damaged, or no repository of this kind.
    """
    return _load(Path(path), precision)


def _load(path: Path, name: str | None) -> Model:  # where `precision` is the module again
    dtypes = precision.choose(name)
    if not path.is_dir():
        raise UsageError(f"{path}: there is no such folder; train a model first, or give --config.checkpoint=FOLDER.")
    index = reader.read_json(path / "model_index.json")
    if (found := index.get("_class_name")) != CLASS_NAME:
        raise CheckpointError(f"{path / 'model_index.json'}: describes a {found!r:.60}; expected {CLASS_NAME!r}.")
    configs = Configs(
        latent_video.DiTConfig.from_json(reader.read_json(path / "transformer" / "config.json")),
        latent_video.VAEConfig.from_json(reader.read_json(path / "vae" / "config.json")),
        index.get("noise_schedule", "cosine"),
    )
    try:
        classes, defaults = tuple(index["classes"]), Settings(**index["defaults"])
        check(defaults, configs)
    except (KeyError, TypeError, UsageError) as error:
        raise CheckpointError(f"{path / 'model_index.json'}: {error}; train again, or copy the folder anew.") from None
    wanted = configs.transformer.num_classes, configs.transformer.in_channels
    if wanted != (there := (len(classes), configs.vae.latent_channels)):
        raise CheckpointError(
            f"{path}: its parts do not fit together: the transformer takes {wanted[0]} classes and {wanted[1]} latent "
            f"channels, there are {there[0]} and {there[1]}."
        )
    params = {
        "transformer": latent_video.abstract_params(configs.transformer, jnp.dtype(dtypes.transformer)),
        "vae": latent_video.abstract_params(configs.vae, jnp.dtype(dtypes.vae)),
    }
    params = {part: restore(path / part, abstract, ()) for part, abstract in params.items()}
    digest = file_sha256(path / MANIFEST)
    return Model(str(path), digest, configs, params, classes, defaults, dtypes)


def save(path: str | Path, configs: Configs, params: Mapping[str, Params], classes: Sequence[str], defaults: Settings):
    """Writes a trained model as a folder that `load` reads; it appears complete or not at all."""
    spread: list[jax.Array] = []
    leaves = {part: leaves_of(params[part], spread) for part in ("transformer", "vae")}
    index = {
        "_class_name": CLASS_NAME,
        "noise_schedule": configs.noise_schedule,
        "classes": list(classes),
        "defaults": dataclasses.asdict(defaults),
    }

    def write() -> None:
        with staged(path, overwrite=True) as staging:
            (staging / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            records: dict[str, Any] = {}
            for part, cfg in (("transformer", configs.transformer), ("vae", configs.vae)):
                (staging / part).mkdir()
                text = json.dumps(cfg.to_json(), indent=2) + "\n"
                (staging / part / "config.json").write_text(text, encoding="utf-8")
                records |= write_params(staging, part, leaves[part])
            write_manifest(staging, records, {})

    by_process_0(write, spread)


def check(settings: Settings, configs: Configs) -> None:
    """Raises UsageError for settings that this model cannot run; sizes name the nearest that it can."""
    vae = configs.vae
    side = vae.spatial_factor * configs.transformer.patch_size
    for name, unit in (("num_frames", vae.temporal_factor), ("height", side), ("width", side)):
        value = getattr(settings, name)
        if type(value) is not int or value < 1 or value % unit:
            nearest = f" The nearest is {max(round(value / unit), 1) * unit}." if isinstance(value, int) else ""
            raise UsageError(f"{name} is {value!r:.40}; this model needs a multiple of {unit}.{nearest}")
    for name, kinds, low, high in (
        ("fps", int, 1, 240),
        ("steps", int, 1, 1000),
        ("guidance", (int, float), 1, 100),
    ):
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            raise UsageError(f"{name} is {value!r:.40}; expected {low} to {high}.")
    if settings.solver not in SOLVERS:
        raise UsageError(f"solver is {settings.solver!r:.40}; expected one of {', '.join(SOLVERS)}.")


def latent_shape(configs: Configs, settings: Settings) -> tuple[int, int, int, int]:
    """[T,H,W,C] of one clip."""
    t, s = configs.vae.temporal_factor, configs.vae.spatial_factor
    return settings.num_frames // t, settings.height // s, settings.width // s, configs.vae.latent_channels


def label(classes: Sequence[str], given: Any) -> int:
    """The number of a class, given by number or by name.

    Raises:
      UsageError: there is no such class.
    """
    if isinstance(given, str) and given in classes:
        return classes.index(given)
    if type(given) is int and 0 <= given < len(classes):
        return given
    names = ", ".join(f"{i} {name}" for i, name in enumerate(classes[:20])) + (", ..." if len(classes) > 20 else "")
    raise UsageError(
        f"class_label is {given!r:.60}; expected a number from 0 to {len(classes) - 1}, or a name: {names}."
    )


# ------------------------------------------------------------------------------------------------------- programs


@functools.lru_cache(maxsize=8)
def _network(cfg: latent_video.DiTConfig, noise_schedule: str) -> Callable[..., Array]:
    """(params, x, t, labels) -> the flow's velocity; made once, because jit compiles once for each function object."""
    abar = vp.alphas_cumprod(noise_schedule)

    def network(params: Params, x: Array, t: Array, labels: Array) -> Array:
        return vp.velocity(lambda x, t: latent_video.denoise(params, cfg, x, t, labels), cfg.prediction, abar)(x, t)

    return network


@functools.lru_cache(maxsize=8)
def _encode_program(cfg: latent_video.VAEConfig) -> Any:
    """jitted (params, uint8 [B,F,Y,X,3]) -> normalised means of the latents [B,T,H,W,C]."""

    def encode(params: Params, video: Array) -> Array:
        mean, _ = latent_video.encode(params, cfg, video.astype(jnp.float32) / 127.5 - 1.0)
        return latent_video.normalize_latents(cfg, mean)

    return jax.jit(encode)


@functools.lru_cache(maxsize=8)
def _decode_program(cfg: latent_video.VAEConfig) -> Any:
    """jitted (params, normalised latents [1,T,H,W,C]) -> (uint8 [1,F,Y,X,3], whether all was finite)."""

    def decode(params: Params, latents: Array) -> tuple[Array, Array]:
        frames = latent_video.decode(params, cfg, latent_video.denormalize_latents(cfg, latents))
        return to_pixels(frames), jnp.all(jnp.isfinite(frames))

    return jax.jit(decode)


def sample(
    configs: Configs,
    params: Params,
    labels: Array,
    settings: Settings,
    noise: Array,
    key: Array | None = None,
    callback: Callable[[int, Any], Any] | None = None,
) -> Array:
    """Normalised latents float32 [B,T,H,W,C] of labels int32 [B], from standard normal noise of that shape. Pure.

    Args:
      params: the transformer's tree.
      key: what the solver "ddpm" draws from; the other solvers draw nothing.
      callback: as for `diffusion.denoise`.

    Raises:
      NumericsError: a step made NaN or infinity.
    """
    schedule = vp.schedule(vp.alphas_cumprod(configs.noise_schedule), settings.steps)
    run = SOLVERS[settings.solver](schedule)
    network = Partial(_network(configs.transformer, configs.noise_schedule), params)
    null = jnp.full_like(labels, configs.transformer.null_class)
    start = vp.initial(noise, schedule)
    if settings.solver == "ddpm":
        if key is None:
            raise UsageError("sample: the solver 'ddpm' draws noise; give a key.")
        state = run.init(start, key)
    else:
        state = run.init(start)

    def checked(done: int, state: Any) -> Any:
        if not np.isfinite(np.asarray(state.x)).all():
            raise NumericsError(f"transformer: after step {done} of {settings.steps} the latents are not finite.")
        return callback(done, state) if callback else None

    velocity = classifier_free(network, labels, null, settings.guidance)
    return sampling.denoise(velocity, run, state, callback=checked).x


def encode(configs: Configs, params: Params, video: np.ndarray) -> np.ndarray:
    """Video uint8 [B,F,Y,X,3] -> normalised latents float32 [B,T,H,W,C], the posterior's mean; params: the VAE's tree.

    Raises:
      UsageError: clips of a size that does not fit; the sentence names the nearest that does.
    """
    return np.asarray(_encode_program(configs.vae)(params, video))


def decode(configs: Configs, params: Params, latents: Array | np.ndarray) -> np.ndarray:
    """Normalised latents [B,T,H,W,C] -> video uint8 [B,F,Y,X,3], a clip at a time; params: the VAE's tree.

    Raises:
      NumericsError: the decoder made NaN or infinity.
    """
    program, clips = _decode_program(configs.vae), []
    for number, clip in enumerate(np.asarray(latents, np.float32), 1):
        pixels, finite = program(params, clip[None])
        if not finite:
            raise NumericsError(f"VAE decoder: the pixels of clip {number} of {len(latents)} are not finite.")
        clips.append(np.asarray(pixels)[0])
    return np.stack(clips)


def generate(
    model: Model,
    labels: Sequence[Any],
    *,
    seed: int | None = None,
    callback: Callable[[int, Any], Any] | None = None,
    **given: Any,
) -> Output:
    """Videos of these classes (numbers or names), as one batch.

    Args:
      seed: clip i gets seed + i; None draws one (`Output.seeds` tells). With the solver "ddpm" a clip depends on what
        else is in the batch, with the others on its seed alone.
      given: any of `FIELDS`; what is missing or None comes from the repository.

    Raises:
      UsageError: a class or a setting that cannot be. NumericsError: NaN or infinity.
    """
    if not labels:
        raise UsageError("no labels; give at least one.")
    settings = model.settings(**given)
    numbers = tuple(label(model.classes, each) for each in labels)
    first = check_seed(seed)
    seeds = tuple((first + i) % 2**32 for i in range(len(numbers)))
    noise = initial_noise(seeds, latent_shape(model.configs, settings))
    key = jax.random.fold_in(jax.random.key(np.uint32(first)), 0)
    ids = jnp.asarray(numbers, jnp.int32)
    latents = np.array(sample(model.configs, model.params["transformer"], ids, settings, noise, key, callback))
    return Output(decode(model.configs, model.params["vae"], latents), latents, numbers, seeds, settings)
