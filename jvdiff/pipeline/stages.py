"""The stages of a clip, told once: `encode`, `denoise`, `decode`. What runs them is an argument.

    B batch · T latent frames · H W latent grid · C latent channels · F pixel frames · Y X pixel height, width

`Executor` computes. `Tracer` traces the same calls without data, so that the command line compiles them ahead and a
plan measures them: what is planned is what runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jvdiff.diffusion import Solver, classifier_free, sampling
from jvdiff.diffusion.solvers import NoisyState
from jvdiff.errors import CheckpointError, NumericsError, UsageError
from jvdiff.models.family import Clip, Family, Forward, Models, Run, Segment, Stage
from jvdiff.pipeline.lending import Weights
from jvdiff.precision import Precision
from jvdiff.runtime import draws, profiling
from jvdiff.runtime.target import Target
from jvdiff.sharding import Placement, param_shardings
from jvdiff.types import Array, Params


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
    """What stages are computed with, whatever the request.

    family, models: whose stages
    precision: entry of the precision table; the dtype of products, and what messages and plans tell
    placement: mesh that weights and activations are on; None is one device
    """

    family: Family
    models: Models
    precision: Precision
    placement: Placement | None = None

    def forward(self, clip: Clip, segment: Segment | None = None) -> Forward:
        """How the networks compute; without a segment, those around the transformer."""
        if segment is None:
            return Forward(placement=self.placement, decode=self.precision.vae_decode)
        dtype = getattr(self.precision, self.family.parts[segment.part].precision)
        return Forward(segment.pattern, clip.attention, self.placement, dtype)


# ---------------------------------------------------------------------------------------------------------- what runs


def abstract_params(family: Family, models: Models, dtypes: Precision) -> dict[str, Params]:
    """The parameter tree of each part as ShapeDtypeStructs, in the dtypes of the precision table."""
    return {
        name: family.parts[name].abstract(cfg, jnp.dtype(getattr(dtypes, family.parts[name].precision)))
        for name, cfg in models.configs.items()
    }


@dataclasses.dataclass(frozen=True, eq=False)
class Executor:
    """Computes stages with weights that are lent for the time of a call.

    weights: of each part
    placement: mesh that they are on; None is the default device
    """

    weights: Weights
    placement: Placement | None = None

    def __call__(self, stage: Stage, *arguments: Any) -> Any:
        with profiling.stage(stage.name), self.weights.use(stage.part) as params:
            return stage.program(params, *self.placed(arguments))

    def placed(self, tree: Any) -> Any:
        """Arrays of the host on every device; what a stage made is where the next one wants it."""
        if self.placement is None:
            return tree
        everywhere = self.placement.everywhere

        def put(x: Any) -> Any:
            return x if np.ndim(x) == 0 or (isinstance(x, jax.Array) and x.committed) else jax.device_put(x, everywhere)

        return jax.tree.map(put, tree)


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """A run that is given what some parts would make: results by part."""

    run: Executor
    results: Mapping[str, Any]

    def __call__(self, stage: Stage, *arguments: Any) -> Any:
        if stage.part not in self.results:
            return self.run(stage, *arguments)
        return self.run.placed(jax.tree.map(jnp.asarray, self.results[stage.part]))


class Kept:
    """A run that keeps in the host's memory what encoders made, and computes it once for equal arguments.

    parts: those whose results are kept, since they work before the first step alone
    """

    LIMIT = 2**30  # bytes at which it is full: some hundred prompts, or 64 of the longest; at twice that it forgets

    def __init__(self, run: Executor, parts: Sequence[str] = ()):
        self.run, self.parts, self._results, self._size = run, parts, {}, 0

    def __call__(self, stage: Stage, *arguments: Any) -> Any:
        if stage.part not in self.parts:
            return self.run(stage, *arguments)
        arrays, structure = jax.tree.flatten(jax.device_get(arguments))
        content = ((x.shape, str(x.dtype), hashlib.sha256(x.tobytes()).digest()) for x in map(np.asarray, arrays))
        key = stage.name, stage.program, structure, *content
        if key not in self._results:
            result = jax.device_get(self.run(stage, *arguments))
            if self._size >= 2 * self.LIMIT:
                self.clear()
            self._results[key], self._size = result, self._size + sum(x.nbytes for x in jax.tree.leaves(result))
        return self.run.placed(jax.tree.map(jnp.asarray, self._results[key]))

    @property
    def full(self) -> bool:
        """Whether it holds as much as it should."""
        return self._size >= self.LIMIT

    def clear(self) -> None:
        """Forgets everything."""
        self._results, self._size = {}, 0


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """A program that a clip runs.

    key: equal for equal programs
    stage: which
    traced: the program, to be lowered and compiled
    times: how often the clip runs it
    """

    key: Any
    stage: Stage
    traced: jax.stages.Traced
    times: int


class Tracer:
    """Traces stages without data; `calls` has each program once, in order, and how often it ran."""

    def __init__(self, params: Mapping[str, Params], placement: Placement | None = None):
        """params: the parts' weights, which may be abstract; on a mesh, placed there."""
        self.params, self.placement = params, placement
        self.calls: dict[Any, Call] = {}

    def __call__(self, stage: Stage, *arguments: Any) -> Any:
        abstract = jax.tree.map(self._struct, arguments)
        leaves, structure = jax.tree.flatten(abstract)
        key = stage.name, stage.program, structure, tuple(map(str, leaves))
        call = self.calls.get(key)
        if call is None:
            call = Call(key, stage, stage.program.trace(self.params[stage.part], *abstract), 0)
        self.calls[key] = dataclasses.replace(call, times=call.times + 1)
        return self._results(stage, call.traced.out_info)

    def _struct(self, x: Any) -> jax.ShapeDtypeStruct:
        if isinstance(x, jax.ShapeDtypeStruct):
            return x if self.placement is None or x.sharding or not x.ndim else self._everywhere(x)
        aval: Any = jax.typeof(x)
        struct = jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)
        return self._everywhere(struct) if self.placement is not None and struct.ndim else struct

    def _everywhere(self, x: Any) -> jax.ShapeDtypeStruct:
        where = self.placement and self.placement.everywhere
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where, weak_type=x.weak_type)

    def _results(self, stage: Stage, results: Any) -> Any:
        """Where the results will be: on every device, and what is carried from call to call divided as pictures are."""
        if self.placement is None or stage.pictures is None:
            return _at(results, self.placement and self.placement.everywhere)
        *others, carried = results
        where = self.placement.spread(*stage.pictures).sharding
        return *_at(others, self.placement.everywhere), _at(carried, where)


def _at(tree: Any, sharding: Any) -> Any:
    """The abstract values of a tree, at one place."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def trace(
    context: Context,
    params: Mapping[str, Params],
    clip: Clip,
    inputs: Any,
    last: int | None = None,
    first: int = 0,
) -> list[Call]:
    """Every program that a clip runs, traced: in order, each once, with how often it runs.

    Once one of them is lowered and compiled, the stage that runs it with the same shapes does not compile again.

    Args:
        params: weights of the parts; they may be abstract, and are then placed on the context's mesh, whose devices
            need not be there.
        inputs: of the family, may be abstract.
        last: the step after which the clip is stopped; None: it is decoded.
        first: the step that it goes on with.
    """
    run, solver = _tracer(context, params), clip.sampler.make()
    conditions = encode(context, clip, inputs, run)
    state = jax.eval_shape(lambda: begin(clip, solver, jnp.zeros((1, *clip.latents), jnp.float32), (0,)))
    denoise(context, clip, conditions, state, solver, run, start=first, stop=last)
    if last is None or last >= len(solver):
        latents = np.broadcast_to(np.float32(0), (1, *clip.latents))
        for _ in context.family.decode(context.models, clip, context.forward(clip), run, latents):
            pass
    return list(run.calls.values())


def shapes_only(context: Context) -> Tracer:
    """A run that computes nothing and gives shapes."""
    return _tracer(context, abstract_params(context.family, context.models, context.precision))


def _tracer(context: Context, params: Mapping[str, Params]) -> Tracer:
    if context.placement is not None:
        params = {name: _placed_params(context, name, tree) for name, tree in params.items()}
    return Tracer(params, context.placement)


def _placed_params(context: Context, part: str, tree: Params) -> Any:
    if isinstance(jax.tree.leaves(tree)[0], jax.Array):
        return tree
    assert context.placement is not None
    where = param_shardings(context.placement.mesh, tree, context.family.parts[part].places)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), dict(tree), where)


# ---------------------------------------------------------------------------------------------------------- the stages


def initial_noise(seeds: Any, shape: Any) -> Array:
    """Standard normal float32 [B,*shape], each clip from its own seed at the whole clip's shape.

    So a clip depends neither on what else is in the batch nor on how arrays are spread over devices.
    """
    return jnp.stack([draws.normal(draws.key(seed), tuple(shape)) for seed in seeds])


def begin(clip: Clip, solver: Solver, noise: Array, seeds: Any, renoise: Any = None) -> Any:
    """The solver's state before the first step, from standard normal noise float32 [B,T,H,W,C].

    Args:
        seeds: of the clips; what solvers draw comes from a key of each.
        renoise: float32 [steps-1,B,T,H,W,C] in place of what would be drawn; None draws.

    Raises:
        UsageError: `renoise` has another shape, or the solver draws nothing.
    """
    keys = jnp.stack([jax.random.key_data(jax.random.fold_in(draws.key(seed), 0)) for seed in seeds])  # uint32 [B,2]
    state = solver.init(clip.sampler.begin(jnp.asarray(noise)), keys)
    if renoise is None:
        return state
    if not isinstance(state, NoisyState):
        raise UsageError("renoise is given, and the solver of this clip draws no noise; leave it out.")
    shape = (len(solver) - 1, *state.x.shape)
    if np.shape(renoise) != shape:
        raise UsageError(f"renoise is {list(np.shape(renoise))}; this request needs float32{list(shape)}.")
    return state._replace(noise=jnp.array(renoise, jnp.float32))


def encode(context: Context, clip: Clip, inputs: Any, run: Run) -> tuple[Any, Any]:
    """The condition of the transformer, and that of guidance's other branch (None without guidance).

    Raises:
        NumericsError: an encoder made NaN or infinity.
    """
    parts: dict[str, None] = {}  # those that ran, in order

    def noted(stage: Stage, *arguments: Any) -> Any:
        parts[stage.part] = None
        return run(stage, *arguments)

    conditions = context.family.encode(context.models, clip, context.forward(clip), noted, inputs)
    for leaf in jax.tree.leaves(conditions):
        computed = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating)
        if computed and (share := nonfinite(np.asarray(leaf, np.float32))):
            name = " or ".join(map(_spoken, parts))
            raise NumericsError(f"{name}: {share:.1%} of the numbers of its output ({leaf.dtype}) are NaN or infinite.")
    return conditions


class Asked(Protocol):
    """A clip and the arrays of its request, which may be made anew each time that they are asked for."""

    @property
    def clip(self) -> Clip: ...

    @property
    def inputs(self) -> Any: ...


def encode_ahead(context: Context, requests: Sequence[Asked], kept: Kept) -> int:
    """Lets one encoder after another see several requests, so that its weights come to the device once.

    It ends when `kept` is full, and returns how many it has seen. What other parts make of a request is not computed.
    Numbers are checked by `encode`.
    """
    shapes = shapes_only(context)
    for part in kept.parts:

        def run(stage: Stage, *arguments: Any, part: str = part) -> Any:
            return (kept if stage.part == part else shapes)(stage, *arguments)

        for number, asked in enumerate(requests, 1):
            with contextlib.suppress(CheckpointError, UsageError):  # of one request: told when its turn comes
                context.family.encode(context.models, asked.clip, context.forward(asked.clip), run, asked.inputs)
            if kept.full and part == kept.parts[0]:
                requests = requests[:number]
                break
    return len(requests)


def denoise(
    context: Context,
    clip: Clip,
    conditions: tuple[Any, Any],
    state: Any,
    solver: Solver,
    run: Run,
    *,
    start: int = 0,
    stop: int | None = None,
    callback: Callable[[int, Any], Any] | None = None,
) -> Any:
    """Takes a state of `begin` from step `start` to step `stop` (default: the end).

    Args:
        state: consumed (its buffers are donated); its `x` are the latents.
        callback: called as callback(done, state) after each step, `done` of them computed; a true value stops there.
            Copy from the state what must outlive the call.

    Raises:
        NumericsError: a step made NaN or infinity; the error's `step` (the steps done before it) and `latents`
            (float32 [B,T,H,W,C], as they were then) tell where it went wrong.
    """
    stop, ended = len(solver) if stop is None else stop, False
    good = None if isinstance(state.x, jax.ShapeDtypeStruct) else np.array(state.x)

    def check(part: str, done: int, state: Any) -> Any:
        nonlocal good, ended
        if isinstance(state.x, jax.ShapeDtypeStruct):
            return False
        latents = np.array(state.x)
        if share := nonfinite(latents):
            raise _numerics(
                f"{_spoken(part)}: after step {done} of {len(solver)}, {share:.1%} of the latents are NaN or infinite "
                f"(matrix products in {getattr(context.precision, context.family.parts[part].precision)}).",
                step=done - 1,
                latents=good,
            )
        good, ended = latents, bool(callback and callback(done, state))
        return ended

    for segment in clip.segments:
        first, last = max(start, segment.start), min(stop, segment.stop)
        if first < last and not ended:
            one = _step(context, clip, segment, conditions, solver, run, len(state.x))
            state = sampling.loop(
                one, solver, state, start=first, stop=last, callback=functools.partial(check, segment.part)
            )
    return state


def _step(
    context: Context, clip: Clip, segment: Segment, conditions: tuple[Any, Any], solver: Solver, run: Run, clips: int
) -> Callable[[Any, Any, Any], Any]:
    """step(state, timestep, row) -> state under the velocity of a segment."""
    placement = context.placement
    network = context.family.network(context.models, segment, context.forward(clip, segment))
    condition, other = conditions
    mode = None
    if segment.guidance != 1:
        mode = "batched" if clip.batched(clips, placement and placement.shape) else "sequential"
    program = _denoise_program(network, solver.advance, mode, context.forward(clip, segment).target)
    stage = Stage(_name_of(segment, clip.segments), segment.part, program)
    return functools.partial(run, stage, condition, other if mode else None, segment.guidance)


def _name_of(segment: Segment, every: Sequence[Segment]) -> str:
    """What the program of a segment is called: by its part, or by its steps where a part has several."""
    if len(every) == 1:
        return "denoise"
    shared = sum(other.part == segment.part for other in every) > 1
    return f"denoise {segment.start + 1}-{segment.stop}" if shared else f"denoise {segment.part}"


@functools.lru_cache(maxsize=16)  # jit compiles once for each function object
def _denoise_program(
    network: Callable[..., Array], advance: Callable[..., Any], mode: str | None, target: Target
) -> Any:
    """jitted (params, condition, other, scale, state, timestep, row) -> state; the state is donated."""

    def denoise(params: Params, condition: Any, other: Any, scale: Any, state: Any, t: Any, row: Any) -> Any:
        bound = Partial(network, params)
        velocity = (
            classifier_free(bound, condition, None, 1.0)
            if mode is None
            else classifier_free(bound, condition, other, scale, mode=mode)
        )
        return sampling.advanced(advance, velocity, state, t, row)

    return jax.jit(denoise, donate_argnames="state", compiler_options=target.options)


def decode(
    context: Context, clip: Clip, latents: Any, run: Run, *, callback: Callable[[int], Any] | None = None
) -> np.ndarray:
    """Normalised latents [B,T,H,W,C] -> video uint8 [B,F,Y,X,3], one clip after another.

    The device decodes the next frame while the pixels of one are copied, and is one frame ahead at most.

    Args:
        callback: called as callback(done) with the number of latent frames decoded so far, of B * T.

    Raises:
        NumericsError: the decoder made NaN or infinity; the error's `step` is the latent frame, the first of several
            that are decoded at once.
    """
    latents = np.asarray(latents, np.float32)
    total, forward, clips = latents.shape[1], context.forward(clip), []
    for b in range(len(latents)):
        frames, before = [], 0
        decoded = _ahead(context.family.decode(context.models, clip, forward, run, latents[b : b + 1]))
        for pixels, bad, done in decoded:
            if share := float(bad):
                which = f"frame {done}" if done == before + 1 else f"frames {before + 1} to {done}"
                raise _numerics(
                    f"VAE decoder: {share:.1%} of the pixels of latent {which} of {total} are NaN or infinite "
                    f"(vae_decode: {context.precision.vae_decode}).",
                    step=before,
                    latents=latents,
                )
            frames.append(np.asarray(pixels)[0])
            before = done
            if callback is not None:
                callback(b * total + done)
        clips.append(np.concatenate(frames))  # [f,Y,X,3], one after another -> [F,Y,X,3]
    return np.stack(clips)  # B x [F,Y,X,3] -> [B,F,Y,X,3]


def _ahead(decoded: Iterator[tuple[Any, Any, int]]) -> Iterator[tuple[Any, Any, int]]:
    """What is decoded, each when the one after it has been dispatched."""
    before = None
    for each in decoded:
        if before is not None:
            yield before
        before = each
    if before is not None:
        yield before


def _spoken(part: str) -> str:
    """The name of a part in a sentence."""
    return part.replace("_", " ")


def nonfinite(x: np.ndarray) -> float:
    """The share of numbers that are NaN or infinite."""
    return 1.0 - float(np.isfinite(x).mean())


def _numerics(message: str, *, step: int, latents: Any) -> NumericsError:
    error = NumericsError(message)
    error.step, error.latents = step, latents  # type: ignore[attr-defined]
    return error
