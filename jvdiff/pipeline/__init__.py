"""A prompt becomes a video: `load` a repository, `generate` from it, and the stages that `generate` puts in a row.

    B batch · T latent frames · H W latent grid · C latent channels · S text tokens · D text width ·
    F pixel frames · Y X pixel height, width

Every stage is a function of its arguments: `encode_prompts`, `initial_noise`, `denoise`, `decode`. The four programs
that they run compile when first called, or before, through `traced`: the command line does that to show and time it,
and `jvdiff.plan` does it without weights, so that what is planned is what runs.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jvdiff import precision
from jvdiff.diffusion import classifier_free, sampling, schedules, solvers
from jvdiff.errors import NumericsError, UsageError
from jvdiff.models import wan
from jvdiff.models.text import tokenizer as tokenizers
from jvdiff.models.text import umt5
from jvdiff.models.wan import places
from jvdiff.pipeline import repository as repositories
from jvdiff.pipeline.settings import (
    Configs,
    Settings,
    check_prompt,
    check_seed,
    latent_shape,
    read_defaults,
    read_pattern,
    resolve,
)
from jvdiff.sharding import MeshShape, Placement, Sizes, check_mesh, make_mesh, param_shardings, read_mesh, rules
from jvdiff.types import Array, Params
from jvdiff.weights import checkpoint

log = logging.getLogger("jvdiff")

TEXT_LENGTH = 512  # rows of text that the DiT attends to; those beyond the prompt are zeros (Wan pads, without a mask)
TEXT_BUCKETS = (32, 64, 128, 256, TEXT_LENGTH)


# -------------------------------------------------------------------------------------------------------- pipeline


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """What `load` read. `params` has the trees transformer, vae, text_encoder; scheduler and defaults feed `resolve`.

    placement: the mesh that the parameters are on; None: the default device.
    """

    path: str
    digest: str
    configs: Configs
    params: Mapping[str, Params]
    tokenizer: Any
    precision: precision.Precision
    scheduler: Mapping[str, Any]
    defaults: Mapping[str, Any]
    placement: Placement | None = None

    def settings(self, **given: Any) -> Settings:
        """`resolve` with what this repository says."""
        return resolve(self.configs, self.scheduler, self.defaults, **given)


@dataclasses.dataclass(frozen=True, eq=False)
class Output:
    """video uint8 [B,F,Y,X,3]; latents float32 [B,T,H,W,C] as the sampler left them (normalised, model scale);
    seeds: the one of each clip, empty where the noise was given; settings: every resolved setting."""

    video: np.ndarray
    latents: np.ndarray
    seeds: tuple[int, ...]
    settings: Settings


def abstract_params(configs: Configs, dtypes: precision.Precision) -> dict[str, Params]:
    """The three parameter trees as ShapeDtypeStructs in the dtypes of the precision table."""
    return {
        "transformer": wan.abstract_params(configs.transformer, jnp.dtype(dtypes.transformer)),
        "vae": wan.abstract_params(configs.vae, jnp.dtype(dtypes.vae)),
        "text_encoder": umt5.abstract_params(configs.text_encoder, jnp.dtype(dtypes.text_encoder)),
    }


RULES = {"transformer": places.DIT, "vae": rules.REPLICATED, "text_encoder": umt5.PLACES}


def shardings(placement: Placement, abstract: Mapping[str, Params]) -> dict[str, Any]:
    """Where the three parameter trees live on a mesh, leaf by leaf."""
    return {part: param_shardings(placement.mesh, tree, RULES[part]) for part, tree in abstract.items()}


def load(path: str | Path, precision: str | None = None, mesh: Any = None) -> Pipeline:
    """Reads a whole text-to-video repository: a Hugging Face (diffusers) folder, or what `convert` made of one.

    Args:
        path: the folder with model_index.json.
        precision: a name in `jvdiff.precision.TABLE`; None is bfloat16 with a float32 VAE on GPUs, float32 elsewhere.
        mesh: how several devices share the work, for instance "sequence=4,tensor=2" or dict(sequence=4, tensor=2); see
            `jvdiff.sharding.MeshShape`. None: one device.

    Raises:
        CheckpointError: incomplete, damaged or unknown weights or configurations.
        UsageError: no such folder, one for `jvdiff.stream`, an unknown precision, or a mesh of more devices than there
            are.
    """
    return _load(path, precision, mesh)


def _load(path: str | Path, name: str | None, mesh: Any) -> Pipeline:  # where `precision` is the module again
    placement = place(read_mesh(mesh))
    dtypes = precision.choose(name)
    repository = repositories.inspect(path, causal=False)
    configs = Configs(repository.transformer, repository.vae, repository.text_encoder)
    defaults = read_defaults(path)
    tokenizer = tokenizers.load(repository.tokenizer)
    tokenizers.check_vocabulary(tokenizer, configs.text_encoder.vocab_size)
    abstract = abstract_params(configs, dtypes)
    where = shardings(placement, abstract) if placement else dict.fromkeys(abstract)
    params = {part: checkpoint.restore(Path(path) / part, abstract[part], where[part]) for part in abstract}
    return Pipeline(
        str(path), repository.digest, configs, params, tokenizer, dtypes, repository.scheduler, defaults, placement
    )


def place(shape: MeshShape | str | None) -> Placement | None:
    """A mesh of this machine's devices (of all processes'); None for None.

    Raises:
        UsageError: there are not so many, or the mesh is still "auto", which needs a clip's sizes (`jvdiff.plan`).
    """
    if isinstance(shape, str):
        raise UsageError(f"mesh is {shape!r}; only the command line chooses one. Name its axes here.")
    return None if shape is None else Placement(make_mesh(shape), shape.ring)


def batched(configs: Configs, settings: Settings, clips: int, shape: MeshShape | None = None) -> bool:
    """Whether guidance's two branches are one batch: they fill devices that share batches, and small clips one device.

    Large clips fit one device better in turn.
    """
    shared = shape is not None and shape.data * shape.fsdp > 1
    return shared or clips * math.prod(latent_shape(configs, settings)[:3]) <= 2**14


def mesh_sizes(configs: Configs, settings: Settings, clips: int, shape: MeshShape) -> Sizes:
    """What a mesh must divide to denoise so many clips at once."""
    branches = 2 if settings.guidance != 1 and batched(configs, settings, clips, shape) else 1
    grid, pattern = latent_shape(configs, settings)[:3], read_pattern(settings.pattern)
    return wan.mesh_sizes(configs.transformer, grid, clips * branches, pattern)


# -------------------------------------------------------------------------------------------------------- programs


def schedule(settings: Settings) -> schedules.Schedule:
    """Sigmas and timesteps of a run."""
    return schedules.make(settings.steps, shift=settings.shift, grid=settings.grid, solver=settings.solver)


def solver(settings: Settings) -> solvers.Solver:
    """The solver of a run on its schedule."""
    return solvers.SOLVERS[settings.solver](schedule(settings))


def velocity(
    configs: Configs,
    settings: Settings,
    params: Params,
    text: Array,
    negative: Array | None,
    placement: Placement | None = None,
) -> Partial:
    """The guided velocity(x, t) of a run, x float32 [B,T,H,W,C], t float32 [B]; `negative` None: without guidance."""
    pattern = read_pattern(settings.pattern)
    network = Partial(_network(configs.transformer, pattern, settings.attention, placement), params)
    if negative is None:
        return classifier_free(network, text, None, 1.0)
    shape = None if placement is None else placement.shape
    mode = "batched" if batched(configs, settings, len(text), shape) else "sequential"
    return classifier_free(network, text, negative, settings.guidance, mode=mode)


# The functions below are made once for each configuration, because jit compiles once for each function object.


@functools.lru_cache(maxsize=8)
def _network(
    cfg: wan.DiTConfig, pattern: wan.Pattern, attention: str | None, placement: Placement | None
) -> Callable[..., Array]:
    how: Any = dict(pattern=pattern, text_length=TEXT_LENGTH, implementation=attention, placement=placement)

    def network(params: Params, x: Array, t: Array, text: Array) -> Array:
        return wan.velocity(params, cfg, x, t, text, **how)

    return network


@functools.lru_cache(maxsize=8)
def _text_program(cfg: umt5.Config, placement: Placement | None) -> Any:
    """jitted (params, ids int32 [B,S], mask bool [B,S]) -> rows [B,S,D], zero where the mask is false."""

    def text(params: Params, ids: Array, mask: Array) -> Array:
        rows = umt5.encode(params, cfg, ids, mask, placement=placement)
        return jnp.where(mask[:, :, None], rows, jnp.zeros((), rows.dtype))

    return jax.jit(text)


@functools.lru_cache(maxsize=8)
def _decode_program(cfg: wan.VAEConfig, placement: Placement | None) -> Any:
    """jitted (params, normalised latents [1,1,H,W,C], cache or None) -> (uint8 [1,F,Y,X,3], non-finite share, cache).

    F is 1 without a cache and 4 with one; the cache is donated.
    """

    def decode(params: Params, latents: Array, cache: Any) -> tuple[Array, Array, Any]:
        latents = wan.denormalize_latents(cfg, latents)
        frames, cache = wan.decode_chunk(params, cfg, latents, cache, placement=placement)
        pixels = to_pixels(frames)
        bad = jnp.mean(1.0 - jnp.isfinite(frames).astype(jnp.float32))
        if placement is not None:
            pixels, bad = placement.replicate((pixels, bad))
        return pixels, bad, cache

    return jax.jit(decode, donate_argnums=2)


def to_pixels(frames: Array) -> Array:
    """Frames in -1..1 -> uint8, rounded as diffusers does it: to [0,1], clamped, times 255, halves to even."""
    return jnp.round(jnp.clip(frames / 2 + 0.5, 0.0, 1.0) * 255).astype(jnp.uint8)


@functools.lru_cache(maxsize=8)
def first_frames(cfg: wan.VAEConfig, placement: Placement | None = None) -> Any:
    """jitted (params, normalised latents [B,1,H,W,C]) -> float32 first frames [B,1,Y,X,3] in -1..1, for previews."""

    def first(params: Params, latents: Array) -> Array:
        frames, _ = wan.decode_chunk(params, cfg, wan.denormalize_latents(cfg, latents), None, placement=placement)
        return frames if placement is None else placement.replicate(frames)

    return jax.jit(first)


def _everywhere(placement: Placement | None, tree: Any) -> Any:
    """Arrays on every device of the mesh: what a stage takes and gives has always the same place."""
    return tree if placement is None else jax.device_put(tree, placement.everywhere)


def traced(
    configs: Configs,
    settings: Settings,
    params: Mapping[str, Params],
    rows: int = 64,
    placement: Placement | None = None,
) -> Iterator[tuple[str, jax.stages.Traced]]:
    """(name, traced program) of each stage of one clip, in order; `params` may be abstract.

    Once one of them is lowered and compiled, the stage that runs it with the same shapes does not compile again.
    Names: text, denoise (one step), decode first (1 frame), decode next (4 frames).

    Args:
        rows: the text bucket.
        placement: the mesh, also one of devices that are not there; abstract parameters are placed on it.
    """
    guided, everywhere = settings.guidance != 1, placement and placement.everywhere
    struct = functools.partial(jax.ShapeDtypeStruct, sharding=everywhere)

    def placed(tree: Any) -> Any:  # numbers come from Python, and so from nowhere
        plain = jax.ShapeDtypeStruct
        return jax.tree.map(lambda x: (struct if x.ndim else plain)(x.shape, x.dtype, weak_type=x.weak_type), tree)

    if placement is not None and not isinstance(jax.tree.leaves(params)[0], jax.Array):
        where = shardings(placement, params)
        params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), dict(params), where)

    text_program = _text_program(configs.text_encoder, placement)
    decode_program = _decode_program(configs.vae, placement)
    ids, mask = struct((1 + guided, rows), jnp.int32), struct((1 + guided, rows), jnp.bool_)
    yield "text", text_program.trace(params["text_encoder"], ids, mask)

    encoded = jax.eval_shape(text_program, params["text_encoder"], ids, mask)
    text = struct((1, *encoded.shape[1:]), encoded.dtype)
    shape, run = latent_shape(configs, settings), solver(settings)
    state = placed(jax.eval_shape(run.init, struct((1, *shape), jnp.float32)))
    guided_velocity = functools.partial(velocity, configs, settings, placement=placement)
    flow = placed(jax.eval_shape(guided_velocity, params["transformer"], text, text if guided else None))
    weights, (leaves, structure) = jax.tree.leaves(params["transformer"]), jax.tree.flatten(flow)
    flow = jax.tree.unflatten(structure, weights + leaves[len(weights) :])  # the weights come first, with their places
    number, row = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((), run.table.shape[1:]))
    yield "denoise", sampling.step.trace(run.advance, flow, state, number, row)

    frame = struct((1, 1, *shape[1:]), jnp.float32)
    first = decode_program.trace(params["vae"], frame, None)
    yield "decode first", first
    if shape[0] > 1:
        cache = first.out_info[2]
        if placement is not None:
            divided = functools.partial(jax.ShapeDtypeStruct, sharding=placement.spread(*shape[1:3]).sharding)
            cache = jax.tree.map(lambda x: divided(x.shape, x.dtype), cache)
        yield "decode next", decode_program.trace(params["vae"], frame, cache)


# ---------------------------------------------------------------------------------------------------------- stages


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """ids int32 [B,S] and mask bool [B,S] at the smallest bucket that leaves a padding row, or at 512 rows.

    A longer prompt is cut after 512 tokens, the end token kept, and a warning says so.
    """
    ids, mask, cut = tokenizers.tokenize(tokenizer, [tokenizers.clean(p) for p in prompts], TEXT_LENGTH)
    for prompt, tokens in zip(prompts, cut, strict=True):
        if tokens:
            _warn_cut(prompt, tokens)
    longest = int(mask.sum(axis=1).max())
    bucket = next(b for b in TEXT_BUCKETS if longest < b or b == TEXT_LENGTH)
    return ids[:, :bucket], mask[:, :bucket]


@functools.lru_cache(maxsize=64)  # once for each prompt
def _warn_cut(prompt: str, tokens: int) -> None:
    log.warning("prompt %.40r...: the last %d of its %d tokens are cut", prompt, tokens, tokens + TEXT_LENGTH)


def encode_prompts(
    pipe: Pipeline, prompts: Sequence[str], negative_prompt: str | None = None
) -> tuple[Array, Array | None]:
    """Text rows [B,S,D] of the prompts, and of the negative prompt (None without one); zeros beyond each prompt's end.

    S is a bucket, not 512: the last row, zero like the 512 - S that would follow, stands for all of them
    (`velocity(..., text_length=512)`).

    Raises:
        UsageError: a prompt that cannot be tokenised.
        NumericsError: the encoder made NaN or infinity.
    """
    texts = [check_prompt(prompt) for prompt in prompts] + ([] if negative_prompt is None else [negative_prompt])
    rows = encode_texts(pipe.configs.text_encoder, pipe.params["text_encoder"], pipe.tokenizer, texts, pipe.placement)
    if negative_prompt is None:
        return rows, None
    return _everywhere(pipe.placement, (rows[:-1], jnp.broadcast_to(rows[-1:], rows[:-1].shape)))


def encode_texts(
    cfg: umt5.Config, params: Params, tokenizer: Any, texts: Sequence[str], placement: Placement | None = None
) -> Array:
    """Text rows [B,S,D] of any texts, also empty ones; S a bucket, zeros beyond each text's end. Raises as
    `encode_prompts`."""
    ids, mask = _everywhere(placement, tokenize(tokenizer, texts))
    rows = _text_program(cfg, placement)(params, ids, mask)
    if bad := _nonfinite(np.asarray(rows, np.float32)):
        raise NumericsError(f"text encoder: {bad:.1%} of its output ({rows.dtype}) is NaN or infinite.")
    return rows


def initial_noise(seeds: Sequence[int], shape: Sequence[int]) -> Array:
    """Standard normal float32 [B,*shape], each clip from its own seed at the whole clip's shape.

    So a clip depends neither on what else is in the batch nor on how arrays are spread over devices.
    """
    return jnp.stack([jax.random.normal(jax.random.key(np.uint32(seed)), tuple(shape), jnp.float32) for seed in seeds])


def denoise(
    pipe: Pipeline,
    settings: Settings,
    state: Any,
    text: Array,
    negative: Array | None,
    *,
    start: int = 0,
    stop: int | None = None,
    callback: Callable[[int, Any], Any] | None = None,
) -> Any:
    """Takes a state of `solver(settings).init(noise)` from step `start` to step `stop` (default: the end).

    Args:
        state: consumed (its buffers are donated); its `x` are the latents.
        callback: called as callback(done, state) when `done` steps have been computed; a true value stops there.
            Copy from the state what must outlive the call.

    Raises:
        NumericsError: a step made NaN or infinity; the error's `step` (the steps done before it) and `latents`
            (float32 [B,T,H,W,C], as they were then) tell where it went wrong.
    """
    good = np.array(state.x)
    state = _everywhere(pipe.placement, state)

    def check(done: int, state: Any) -> Any:
        nonlocal good
        latents = np.array(state.x)
        if bad := _nonfinite(latents):
            raise _numerics(
                f"transformer: after step {done} of {settings.steps}, {bad:.1%} of the latents is NaN or infinite "
                f"(matrix products in {pipe.precision.transformer}).",
                step=done - 1,
                latents=good,
            )
        good = latents
        return callback(done, state) if callback else None

    flow = velocity(pipe.configs, settings, pipe.params["transformer"], text, negative, pipe.placement)
    return sampling.denoise(flow, solver(settings), state, start=start, stop=stop, callback=check)


def decode(pipe: Pipeline, latents: Array | np.ndarray, *, callback: Callable[[int], Any] | None = None) -> np.ndarray:
    """Normalised latents [B,T,H,W,C] -> video uint8 [B,F,Y,X,3], one latent frame of one clip at a time.

    Device memory depends neither on B nor on T; the frames gather in host memory.

    Args:
        callback: called as callback(done) with the number of latent frames decoded so far, of B * T.

    Raises:
        NumericsError: the decoder made NaN or infinity; the error's `step` is the latent frame.
    """
    program, params = _decode_program(pipe.configs.vae, pipe.placement), pipe.params["vae"]
    latents = np.asarray(latents, np.float32)
    clips = []
    for b, clip in enumerate(latents):
        frames, cache = [], None
        for t in range(len(clip)):
            frame = _everywhere(pipe.placement, clip[None, t : t + 1])
            pixels, bad, cache = program(params, frame, cache)
            if bad := float(bad):
                raise _numerics(
                    f"VAE decoder: {bad:.1%} of the pixels of latent frame {t + 1} of {len(clip)} is NaN or infinite "
                    f"(computed in {pipe.precision.vae}).",
                    step=t,
                    latents=latents,
                )
            frames.append(np.asarray(pixels)[0])
            if callback is not None:
                callback(b * len(clip) + t + 1)
        clips.append(np.concatenate(frames))
    return np.stack(clips)


def _nonfinite(x: np.ndarray) -> float:
    return 1.0 - float(np.isfinite(x).mean())


def _numerics(message: str, *, step: int, latents: np.ndarray) -> NumericsError:
    error = NumericsError(message)
    error.step, error.latents = step, latents  # type: ignore[attr-defined]
    return error


# -------------------------------------------------------------------------------------------------------- generate

_solver = solver  # `generate` has an argument of that name


def generate(
    pipe: Pipeline,
    prompts: str | Sequence[str],
    *,
    seed: int | None = None,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    shift: float | None = None,
    solver: str | None = None,
    grid: str | None = None,
    pattern: str | None = None,
    attention: str | None = None,
    noise: Array | np.ndarray | None = None,
    callback: Callable[[int, Any], Any] | None = None,
) -> Output:
    """Videos of the prompts, as one batch.

    Args:
        seed: clip i gets seed + i, whatever else is in the batch; None draws one (`Output.seeds` tells).
        num_frames, height, width: pixel frames 1 + 4k, pixels in multiples of 16.
        steps, shift, solver, grid: see `jvdiff.diffusion.schedules.make`; "unipc" or "euler", "diffusers" or "wan".
        guidance: weight of classifier-free guidance; 1 runs the network once a step and ignores the negative prompt.
        pattern: which tokens see each other, for instance "video_sparse:4x4x4:0.9"; see `jvdiff.kernels.patterns`.
        attention: an implementation of the pattern's attention in `jvdiff.kernels`; None takes the best for the device.
        noise: float32 [B,T,H,W,C] to start from instead of the seed's.
        callback: see `denoise`.
        What is None comes from the repository, else from the Wan 2.1 family (`Settings`).

    Raises:
        UsageError: sizes, prompts or settings that cannot be.
        NumericsError: NaN or infinity, see `denoise` and `decode`.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise UsageError("no prompts; give at least one.")
    settings = pipe.settings(
        num_frames=num_frames, height=height, width=width, steps=steps, guidance=guidance,
        negative_prompt=negative_prompt, shift=shift, solver=solver, grid=grid, pattern=pattern, attention=attention,
    )  # fmt: skip
    if pipe.placement is not None:
        mesh = pipe.placement.shape
        check_mesh(mesh, mesh_sizes(pipe.configs, settings, len(prompts), mesh), mesh.devices)
    shape = (len(prompts), *latent_shape(pipe.configs, settings))
    seeds: tuple[int, ...] = ()
    if noise is None:
        first = check_seed(seed)
        seeds = tuple((first + i) % 2**32 for i in range(len(prompts)))
        noise = initial_noise(seeds, shape[1:])
    elif noise.shape != shape or noise.dtype != jnp.float32:
        found = f"{noise.dtype}{list(noise.shape)}"
        raise UsageError(f"noise is {found}; these prompts and sizes need float32{list(shape)}.")
    text, negative = encode_prompts(pipe, prompts, settings.negative_prompt if settings.guidance != 1 else None)
    state = denoise(pipe, settings, _solver(settings).init(jnp.asarray(noise)), text, negative, callback=callback)
    latents = np.array(state.x)
    return Output(decode(pipe, latents), latents, seeds, settings)
