"""A request becomes a video: `load` a repository, `generate` from it.

    B batch · T latent frames · H W latent grid · C latent channels · F pixel frames · Y X pixel height, width

`generate` is the stages of `jvdiff.pipeline.stages` in a row, and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvdiff import precision as precisions
from jvdiff.errors import UsageError
from jvdiff.kernels import admission
from jvdiff.media import pictures
from jvdiff.models.family import PICTURES, Clip, Family, Models, Request, Stage, read_weights
from jvdiff.pipeline import stages
from jvdiff.pipeline.lending import Weights
from jvdiff.pipeline.repository import Repository, check_at_once, inspect
from jvdiff.pipeline.settings import check_seed
from jvdiff.pipeline.stages import Context, Executor, abstract_params
from jvdiff.runtime import memory, peers, profiling
from jvdiff.runtime.target import here
from jvdiff.sharding import MeshShape, Placement, check_mesh, make_mesh, read_mesh
from jvdiff.types import Params


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """What `load` read.

    repository: what the folder says of itself
    weights: of each part, lent to the stages
    precision: entry of the precision table
    placement: mesh that the weights are on; None is the default device
    """

    repository: Repository
    weights: Weights
    precision: precisions.Precision
    placement: Placement | None = None

    @property
    def family(self) -> Family:
        """What kind of repository it is."""
        return self.repository.family

    @property
    def models(self) -> Models:
        """Configurations, tokenizers and the like."""
        return self.repository.models

    @property
    def context(self) -> Context:
        """What the stages are computed with."""
        return Context(self.family, self.models, self.precision, self.placement)

    @property
    def run(self) -> Executor:
        """What computes a stage."""
        return Executor(self.weights, self.placement)

    def settings(self, **given: Any) -> Any:
        """Complete settings: what is given, else the repository's, else the family's. Raises UsageError."""
        return self.repository.settings(**given)

    def clip(self, **given: Any) -> Clip:
        """What these settings mean for these models. Raises UsageError."""
        return self.family.clip(self.models, self.settings(**given))


@dataclasses.dataclass(frozen=True, eq=False)
class Output:
    """What `generate` made.

    video: uint8 [B,F,Y,X,3]
    latents: float32 [B,T,H,W,C] after the sampler and the family's `finish` (normalised, model scale)
    subjects: prompt, or name of the class, of each clip
    seeds: of each clip
    settings: every resolved setting; of a list of negative prompts the first clip's
    """

    video: np.ndarray
    latents: np.ndarray
    subjects: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: Any


def load(
    path: str | Path | Repository,
    precision: str | None = None,
    mesh: Any = None,
    *,
    vae_decode: str | None = None,
    in_turn: Collection[str] = (),
    family: Family | None = None,
    follow_symlinks: bool = False,
) -> Pipeline:
    """Reads a whole repository: a Hugging Face (diffusers) folder, or what `convert` or a training made.

    Args:
        path: the folder with model_index.json, or what `inspect` said of it.
        precision: a name in `jvdiff.precision.TABLE`; None is bfloat16 on GPUs, where the VAE encodes in float32, and
            float32 elsewhere.
        mesh: how several devices share the work, for instance "sequence=4,tensor=2" or dict(sequence=4, tensor=2); see
            `jvdiff.sharding.MeshShape`. None: one device.
        vae_decode: how frames are decoded, "exact", "tf32" or "bf16"; None is as `precision` has it on GPUs ("bf16"
            with bfloat16), exact elsewhere.
        in_turn: parts whose weights are on the device only while they work, and in the host's memory otherwise:
            ["text_encoder", "transformer"], or "all". What fits is what `jvdiff.plan` tells.
        family: your own Family, where the repository is of none that jvdiff has (docs/adding_a_family.md); None: as its
            files say.
        follow_symlinks: let files be links to elsewhere; those into a cache of the hub are files anyway.

    Raises:
        CheckpointError: incomplete, damaged or unknown weights or configurations.
        UsageError: no such folder, a causal model (see `jvdiff.streaming.load`), an unknown precision or part, or a
            mesh of more devices than there are.
        ResourceError: the host has too little memory for the parts that are in turn.
        SetupError: a GPU is there, and JAX cannot use it.
    """
    admission.admit()
    placement, dtypes = place(read_mesh(mesh)), precisions.choose(precision, vae_decode)
    if not isinstance(path, Repository):
        path = inspect(path, at_once=True, family=family, follow_symlinks=follow_symlinks)
    elif family is not None and family is not path.family:
        raise UsageError(
            f"family is {family.name!r}, and {path.path} was inspected as {path.family.name!r}; leave it out."
        )
    check_at_once(path.path, path.family, True)
    return Pipeline(path, read_parts(path, dtypes, placement, check_parts(path.models, in_turn)), dtypes, placement)


def check_parts(models: Models, in_turn: str | Collection[str]) -> tuple[str, ...]:
    """The parts of a repository that a user named; "all" are all. Raises UsageError for one that is not there."""
    there = tuple(models.configs)
    named = there if in_turn == "all" else in_turn.split(",") if isinstance(in_turn, str) else in_turn
    for name in named:
        if name not in there:
            raise UsageError(f"in_turn is {in_turn!r:.80}; expected all, or some of {', '.join(there)}.")
    return tuple(name for name in there if name in named)


def read_parts(
    repository: Repository,
    dtypes: precisions.Precision,
    placement: Placement | None,
    in_turn: Collection[str] = (),
) -> Weights:
    """The weights of every part, where they live; the repository knows their digests afterwards.

    in_turn: parts that leave the device as soon as they are read, and are read first.

    Raises:
        ResourceError: those that the host is to hold are more than it has for this process.
    """
    abstract = abstract_params(repository.family, repository.models, dtypes)
    on_host = abstract if here().platform == "cpu" else {name: abstract[name] for name in in_turn}
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(on_host))
    memory.check_host(size, f"{repository.path}: its weights", "Use a machine with more, or --precision=bfloat16.")
    weights = Weights({}, in_turn)

    def read(name: str, cfg: Any) -> Params:
        part, digests = repository.family.parts[name], {}
        dtype, how = jnp.dtype(getattr(dtypes, part.precision)), {"follow_symlinks": repository.follow_symlinks}
        params = read_weights(repository.path / name, part, cfg, dtype, placement, digests=digests, **how)
        repository.note(digests)
        return params

    for name, cfg in sorted(repository.models.configs.items(), key=lambda item: item[0] not in in_turn):
        weights.take(name, read(name, cfg))
    return weights


def place(shape: MeshShape | str | None) -> Placement | None:
    """A mesh of this machine's devices (of all processes'); None for None.

    Raises:
        UsageError: too few devices, or the mesh is still "auto", which needs a clip's sizes (`jvdiff.plan`).
    """
    if isinstance(shape, str):
        raise UsageError(f"mesh is {shape!r}; only the command line chooses one. Name its axes here.")
    return None if shape is None else Placement(make_mesh(shape), shape.ring)


def generate(
    pipe: Pipeline,
    prompts: str | Sequence[str] | None = None,
    *,
    labels: Any = None,
    seed: int | None = None,
    noise: Any = None,
    renoise: Any = None,
    image: Any = None,
    last_image: Any = None,
    text_embeddings: Any = None,
    image_embeddings: Any = None,
    callback: Callable[[int, Any], Any] | None = None,
    profile: str | Path | None = None,
    **settings: Any,
) -> Output:
    """Videos of prompts, or of class labels, as one batch.

    Args:
        prompts: one, or a list of them, where the model takes prompts.
        labels: a class, or a list or an array of them, by name or number, where the model takes classes.
        seed: clip i gets seed + i, whatever else is in the batch; None draws one (`Output.seeds` tells).
        noise: float32 [B,T,H,W,C] to start from instead of the seed's; what a solver draws is still the seed's.
        renoise: float32 [steps-1,B,T,H,W,C] in place of what a solver draws.
        image: what the first frame shows, where the model takes it: uint8 [Y,X,3] of any size, a Pillow picture or the
            path of a file (`jvdiff.media.pictures`); one for all clips, or a list with one each. A clip has its
            proportions, at the model's area; a height or width that is given stays.
        last_image: the picture of the last frame, given as image is.
        text_embeddings: in place of what the text encoder makes of the prompts, which may then be left out: what
            `embed` gives, or (rows [B,S,D], rows of the negative prompt).
        image_embeddings: in place of what the image encoder makes of the pictures, [B,I,D].
        callback: see `stages.denoise`.
        profile: a folder that gets a trace of `jax.profiler` of the stages; the programs are compiled in it, unless
            they were before.
        settings: any of the family's (`pipe.family.settings`): num_frames, height, width, steps, guidance and so on.
            What is missing or None comes from the repository, else from the family. A negative_prompt may be a list
            with one for each clip; a pattern may be a value of `jvdiff.kernels`, vae_tiles a value too.

    Raises:
        UsageError: subjects, sizes or settings that the models cannot use.
        NumericsError: NaN or infinity, see `stages.denoise` and `stages.decode`.
    """
    if not isinstance(pipe, Pipeline):
        raise UsageError(f"pipe is {pipe!r:.80}; expected what jvdiff.load returns.")
    if callback is not None and not callable(callback):
        raise UsageError(f"callback is {callback!r:.80}; expected a function of (steps done, state).")
    embeddings = {"text_embeddings": text_embeddings, "image_embeddings": image_embeddings}
    if text_embeddings is not None and prompts is None and pipe.family.subject == "prompts":
        rows = text_embeddings[0] if isinstance(text_embeddings, tuple | list) else text_embeddings
        subjects = ("",) * len(rows)
    else:
        subjects = check_subjects(pipe.repository, prompts=prompts, labels=labels)
    clip, inputs = _asked(pipe, subjects, image, last_image, settings)
    run = stages.Given(pipe.run, _given(pipe, clip, len(subjects), embeddings))
    check_fits(pipe.context, clip, len(subjects))
    shape = (len(subjects), *clip.latents)
    first = check_seed(seed)
    if seed is None and pipe.placement is not None:  # of several processes each has drawn its own
        first = peers.gather(first)[0]
    seeds = tuple((first + i) % 2**32 for i in range(len(subjects)))
    if noise is not None:
        _check_array("noise", noise, np.float32, shape)
    solver = clip.sampler.make()
    with profiling.profile(profile):
        conditions = stages.encode(pipe.context, clip, inputs, run)
        standard = stages.initial_noise(seeds, clip.latents) if noise is None else noise
        state = stages.begin(clip, solver, standard, seeds, renoise)
        state = stages.denoise(pipe.context, clip, conditions, state, solver, pipe.run, callback=callback)
        latents = np.array(pipe.family.finish(clip, inputs, conditions, state.x))
        video = stages.decode(pipe.context, clip, latents, pipe.run)
    return Output(video, latents, subjects, seeds, clip.settings)


def embed(
    pipe: Pipeline,
    prompts: str | Sequence[str] | None = None,
    *,
    image: Any = None,
    last_image: Any = None,
    **settings: Any,
) -> dict[str, Any]:
    """What the encoders make of a request, to be given to `generate` in its place: `generate(pipe, **embeddings)`.

    Args: as those of `generate`; without guidance there is nothing of the negative prompt.

    Returns:
        text_embeddings (rows [B,S,D], rows of the negative prompt or None), image_embeddings [B,I,D] if there are
        pictures and a part that looks at them: numpy arrays, which `jvdiff.pipeline.save_embeddings` writes.

    Raises:
        UsageError: as `generate`, or a family that takes no embeddings.
    """
    names = {embedding.part: name for name, embedding in pipe.family.embeddings.items()}
    if not names:
        raise UsageError(f"{pipe.family.name} takes no embeddings.")
    subjects = check_subjects(pipe.repository, prompts=prompts)
    clip, inputs = _asked(pipe, subjects, image, last_image, settings)
    made: dict[str, Any] = {}

    def run(stage: Stage, *arguments: Any) -> Any:
        if stage.part not in names:
            return shapes(stage, *arguments)
        result = pipe.run(stage, *arguments)
        made[names[stage.part]] = jax.device_get(result)
        return result

    shapes = stages.shapes_only(pipe.context)
    stages.encode(pipe.context, clip, inputs, run)
    return made


def _asked(
    pipe: Pipeline, subjects: tuple[Any, ...], image: Any, last_image: Any, settings: dict[str, Any]
) -> tuple[Clip, Any]:
    """What settings and pictures mean, and the arrays of the request."""
    given = {"image": image, "last_image": last_image}
    shown = {name: pictures.one_each(value, len(subjects), name) for name, value in given.items()}
    if shown["image"]:
        chosen = {name for name, value in settings.items() if value is not None}
        settings |= size_for(pipe.family, pipe.models, pipe.settings(**settings), shown["image"], chosen)
    negative = _one_each("negative_prompt", settings, len(subjects))
    clips = [pipe.clip(**settings, **each) for each in negative]  # every one is checked
    texts = tuple(each["negative_prompt"] for each in negative) if len(negative) > 1 else None
    request = make_request(pipe.family, clips[0], subjects, negative_prompts=texts, **shown)
    return clips[0], pipe.family.inputs(pipe.models, clips[0], request)


def _one_each(name: str, settings: dict[str, Any], clips: int) -> list[dict[str, Any]]:
    """Takes a setting that may be a list out of the settings: what is to be set of one clip after another, or of all.

    Raises:
        UsageError: it is a list of another length.
    """
    value = settings.pop(name, None)
    if not isinstance(value, list | tuple):
        return [{} if value is None else {name: value}]
    if len(value) != clips:
        raise UsageError(f"{name} has {len(value)} texts for {clips} clips; expected one for all, or one each.")
    return [{name: each} for each in value]


def _given(pipe: Pipeline, clip: Clip, clips: int, embeddings: Mapping[str, Any]) -> dict[str, Any]:
    """Embeddings by the part that would make them, checked."""
    results = {}
    for name, value in embeddings.items():
        if value is None:
            continue
        embedding = pipe.family.embeddings.get(name)
        if embedding is None or embedding.part not in pipe.models.configs:
            raise UsageError(
                f"{pipe.repository.path}: a model of {pipe.family.name} that takes no {name}; leave them out."
            )
        results[embedding.part] = embedding.check(pipe.models, clip, clips, value)
    return results


def check_subjects(repository: Repository, **fields: Any) -> tuple[Any, ...]:
    """The subjects of the clips as `Request` has them: in its field `prompts` or `labels`, as the family takes them.

    Raises:
        UsageError: none, the wrong field, or a subject that the model cannot use.
    """
    family, models = repository.family, repository.models
    if wrong := [name for name, value in fields.items() if value is not None and name != family.subject]:
        raise UsageError(f"{family.name} takes {family.subject}, not {wrong[0]}.")
    subjects: Any = fields.get(family.subject)
    if hasattr(subjects, "ndim") and subjects.ndim < 2:  # an array of labels, or one
        subjects = np.asarray(subjects).tolist()
    if not isinstance(subjects, list | tuple):
        subjects = [] if subjects is None else [subjects]
    if not subjects:
        raise UsageError(f"no {family.subject}; give at least one.")
    return tuple(family.check_subject(models, subject) for subject in subjects)


def size_for(
    family: Family, models: Models, settings: Any, images: Sequence[np.ndarray], given: Collection[str]
) -> dict[str, int]:
    """The height and width of a clip that begins with these pictures: their proportions, at the area of the settings.

    Args:
        settings: complete.
        given: which of height and width the user chose: these stay, and the other one follows.

    Raises:
        UsageError: the pictures of a batch ask for several, or the family takes none.
    """
    check_takes(family, "image")
    chosen = {name: getattr(settings, name) for name in ("height", "width")}
    fixed, unit = {name: size for name, size in chosen.items() if name in given}, family.unit(models)
    if len(fixed) == 2:
        return chosen
    sizes = set()
    for y, x in (image.shape[:2] for image in images):
        area = {"height": settings.height**2 * x / y, "width": settings.width**2 * y / x}
        sizes.add(pictures.fitting(y, x, area[next(iter(fixed))] if fixed else settings.height * settings.width, unit))
    if len(sizes) > 1:
        several = ", ".join(f"{width}x{height}" for height, width in sorted(sizes)[:4])
        raise UsageError(
            f"the pictures ask for clips of {len(sizes)} sizes ({several}), and a batch has one; give height and width."
        )
    return dict(zip(chosen, sizes.pop(), strict=True)) | fixed


def make_request(
    family: Family,
    clip: Clip,
    subjects: tuple[Any, ...],
    *,
    image: tuple[np.ndarray, ...] | None = None,
    last_image: tuple[np.ndarray, ...] | None = None,
    negative_prompts: tuple[str, ...] | None = None,
) -> Request:
    """A request with these subjects, in the family's field, and a picture of each clip, uint8 [Y,X,3] of any size.

    Raises:
        UsageError: a picture that the family does not take, or none where it needs one.
    """
    given = {"image": image, "last_image": last_image}
    for name, each in given.items():
        if each is not None:
            check_takes(family, name)
        if each is None and name in family.needs:
            raise UsageError(f"{family.name} needs {' and '.join(family.needs)}; give {name} (--{name}=FILE).")
    if last_image is not None and (image is None or clip.frames[0] == 1):
        found = "without image" if image is None else "for a clip of one frame"
        raise UsageError(f"last_image is given {found}; it is the last frame of a clip that begins with image.")
    more: dict[str, Any] = {PICTURES[name]: each for name, each in given.items()}
    return Request(**{family.subject: subjects}, **more, negative_prompts=negative_prompts)


def check_takes(family: Family, name: str) -> None:
    """Raises UsageError for a picture that the family does not take, `image` or `last_image`."""
    if name not in family.takes:
        instead = f", or take {family.instead[name]}" if name in family.instead else ""
        raise UsageError(f"{family.name} takes no {name}; leave it out{instead}.")


def _check_array(name: str, value: Any, dtype: Any, shape: tuple[int, ...]) -> None:
    if not hasattr(value, "dtype") or value.dtype != dtype or value.shape != shape:
        kind = f"{value.dtype}{list(value.shape)}" if hasattr(value, "dtype") else f"a {type(value).__name__}"
        raise UsageError(f"{name} is {kind}; this request needs {np.dtype(dtype)}{list(shape)}.")


def check_fits(context: Context, clip: Clip, clips: int) -> None:
    """Raises UsageError, with the nearest mesh that works, unless the mesh can denoise `clips` clips at once."""
    if context.placement is not None:
        shape = context.placement.shape
        check_mesh(shape, context.family.mesh_sizes(context.models, clip, clips, shape), shape.devices)
