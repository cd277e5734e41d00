"""The training loop: gradient, clipping, AdamW, moving average, metrics, samples, checkpoints.

Everything that happens at a step is a pure function of the state, the seed and the step's number, the batch included.
So a run that was stopped, or killed, continues from its last checkpoint as if nothing had happened: bit for bit on
CPU, data order included; and under another mesh too, where only the order of sums differs.

A step whose loss or gradient is not finite changes nothing but its count, and the run goes on, unless too many follow
one another.

Where there are many processes, all call `fit` with one mesh of all their devices, and see the same `folder`.
"""

import itertools
import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jvdiff.errors import Interrupted, NumericsError, UsageError
from jvdiff.runtime import draws, peers, profiling, rescue
from jvdiff.runtime.interrupts import deferred, interrupts
from jvdiff.runtime.staging import lock
from jvdiff.runtime.verdict import EVERY, unfinished
from jvdiff.sharding import MeshShape, make_mesh, param_shardings, shape_of, spec_on
from jvdiff.sharding.rules import REPLICATED, Rules
from jvdiff.training import states
from jvdiff.training.metrics import Metrics
from jvdiff.training.options import Schedule
from jvdiff.types import Array, Params

_log = logging.getLogger("jvdiff.training")
PROFILED = 10  # steps of a trace


class State(NamedTuple):
    """All that a run remembers. `average`, the moving average of the parameters, is what is kept."""

    step: Array  # int32 []
    params: Params
    average: Params
    optimizer: optax.OptState
    skipped: Array  # int32 []: steps whose loss or gradient was not finite
    in_a_row: Array  # int32 []: how many of them came last


@dataclass(frozen=True)
class Task:
    """What is trained, on what, and how its samples are shown.

    init: key -> float32 parameters.
    loss: (parameters, batch, key) -> (scalar, metrics: a dict of scalars); pure.
    batches: step -> a generator of the batches from that step on, pytrees of numpy arrays, axis 0 the batch. The same
      step gives the same data, so that a resumed run sees what it would have seen. `each` makes one from a pure
      function of the step.
    rules: where the parameters, their average and the optimiser's moments live on a mesh.
    show: (average, step) -> None, writes samples somewhere; called every `show_every` steps.
    """

    init: Callable[[Array], Params]
    loss: Callable[[Params, Any, Array], tuple[Array, Mapping[str, Array]]]
    batches: Callable[[int], Generator[Any, None, None]]
    rules: Rules = REPLICATED
    show: Callable[[Params, int], None] | None = None


def each(batch: Callable[[int], Any]) -> Callable[[int], Generator[Any, None, None]]:
    """`Task.batches` of a pure function from a step to its batch."""
    return lambda start: (batch(step) for step in itertools.count(start))


def learning_rate(schedule: Schedule) -> optax.Schedule:
    """step, counted from 0 -> rate: 0 at first, the peak after `warmup` steps, then a cosine to the final rate."""
    peak = schedule.learning_rate
    return optax.warmup_cosine_decay_schedule(
        0.0, peak, schedule.warmup, schedule.steps, end_value=peak * schedule.final_rate
    )


def decayed(params: Params) -> Params:
    """Which leaves weight decay shrinks: matrices, known by name because stacked layers give a bias two axes too."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)


def optimizer(schedule: Schedule) -> optax.GradientTransformation:
    """The gradient transformation of a schedule: clipping, then AdamW."""
    adamw = optax.adamw(learning_rate(schedule), b2=0.99, weight_decay=schedule.weight_decay, mask=decayed)
    return optax.chain(optax.clip_by_global_norm(schedule.clip), adamw)


def state_shardings(mesh: Mesh, task: Task, schedule: Schedule) -> State:
    """Where the state of a training lives: a tree of NamedShardings.

    Raises:
      LookupError: `task.rules` say nothing about a leaf.
    """
    abstract: Any = jax.eval_shape(partial(start, task, schedule, jax.random.key(0)))
    return param_shardings(mesh, abstract, task.rules)


def start(
    task: Task, schedule: Schedule, key: Array, params: Params | None = None, shardings: State | None = None
) -> State:
    """The state before the first step, made where it lives: from `task.init(key)`, or a copy of given parameters."""

    def make(key: Array, params: Params | None) -> State:
        given = task.init(key) if params is None else params
        own: Any = jax.tree.map(jnp.copy, given)  # copied, because a step donates what it is given
        step, *skipped = (jnp.zeros((), jnp.int32) for _ in range(3))
        return State(step, own, jax.tree.map(jnp.copy, own), optimizer(schedule).init(own), *skipped)

    if params is not None and shardings is not None:
        params = jax.device_put(params, shardings.params)
    return jax.jit(make, out_shardings=shardings)(key, params)


def make_step(task: Task, schedule: Schedule, key: Array, shardings: State | None = None, accumulate: int = 1) -> Any:
    """One compiled, donated training step: (state, batch) -> (state, metrics); the state stays where it lives.

    accumulate: into how many parts a batch is cut, whose gradients are computed one after another and averaged.
    """
    transformation = optimizer(schedule)
    placed = None
    if shardings is not None:  # metrics on every device
        placed = shardings, NamedSharding(shardings.step.mesh, PartitionSpec())  # type: ignore[union-attr]

    one = jax.value_and_grad(task.loss, has_aux=True)

    def gradient(params: Params, batch: Any, key: Array) -> Any:
        size = len(jax.tree.leaves(batch)[0])
        if accumulate == 1:
            return one(params, batch, key)
        if size % accumulate:
            raise UsageError(f"accumulate is {accumulate}; expected a divisor of the batch, which is {size}.")
        # Every n-th row, so that a device's rows stay on it. [B,...] -> [accumulate,B/accumulate,...]
        parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
        keys = jax.random.split(key, accumulate)
        first = jax.eval_shape(one, params, jax.tree.map(lambda x: x[0], parts), keys[0])

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, one(params, *part)), None

        total, _ = jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first), (parts, keys))
        return jax.tree.map(lambda x: x / accumulate, total)

    @partial(jax.jit, donate_argnums=0, out_shardings=placed)
    def step(state: State, batch: Any) -> tuple[State, Mapping[str, Array]]:
        noise_key = jax.random.fold_in(key, state.step)
        (loss, metrics), grads = gradient(state.params, batch, noise_key)
        if shardings is not None:  # sums and shards the gradients in one collective (reduce-scatter)
            grads = jax.lax.with_sharding_constraint(grads, shardings.params)
        norm = optax.tree.norm(grads)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies its int32 count with floats
            updates, opt_state = transformation.update(grads, state.optimizer, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        count = state.step.astype(jnp.float32)
        decay = jnp.minimum(schedule.average_decay, (1.0 + count) / (10.0 + count))
        average: Any = optax.incremental_update(params, state.average, 1.0 - decay)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        skipped = state.skipped + (~good).astype(jnp.int32)
        changed = state._replace(params=params, average=average, optimizer=opt_state)
        kept: State = jax.tree.map(partial(jnp.where, good), changed, state)
        kept = kept._replace(step=state.step + 1, skipped=skipped, in_a_row=jnp.where(good, 0, state.in_a_row + 1))
        return kept, {"loss": loss, "grad_norm": norm, **metrics, "skipped": skipped}

    return step


def batch_sharding(mesh: Mesh, size: int) -> NamedSharding:
    """How `size` clips lie on a mesh: divided over `data`, and over `fsdp` too where they can be.

    Raises:
      UsageError: `data` does not divide them.
    """
    shape = shape_of(mesh)
    data, fsdp = shape.data, shape.fsdp
    if size % data:
        raise UsageError(f"the batch is {size}; expected a multiple of the {data} that share it (mesh data={data}).")
    spec = PartitionSpec(("data", "fsdp") if size % (data * fsdp) == 0 else "data")
    return NamedSharding(mesh, spec_on(mesh, spec))


def shared(batch: Any, mesh: Mesh) -> Any:
    """A batch that every process has, on the mesh; each device gets its part of it."""

    def place(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, batch_sharding(mesh, len(x)), lambda index: x[index])

    return jax.tree.map(place, batch)


def fit(
    task: Task,
    schedule: Schedule,
    folder: Path,
    *,
    seed: int = 0,
    params: Params | None = None,
    save_every: int = 500,
    log_every: int = 20,
    show_every: int | None = None,
    keep: int = 2,
    accumulate: int = 1,
    most_skipped: int = 10,
    log_to: Sequence[str] = (),
    mesh: Mesh | None = None,
    profile: str | Path | None = None,
) -> State:
    """Trains, or goes on training, until `schedule.steps` steps are done.

    Args:
      folder: gets `state/` (Orbax checkpoints with their digests, the last `keep`) and `metrics.jsonl`; an earlier run
        there is resumed, from the last state that is what was written.
      params: to start from, where there is no earlier run; None: `task.init`.
      save_every, log_every, show_every: steps between checkpoints, lines of metrics and samples (None: no samples).
      accumulate: into how many parts a batch is cut for the gradient; the result is that of the whole, but for noise.
      most_skipped: how many steps in a row, skipped because their loss or gradient is not finite, end the run.
      log_to: "tensorboard" and "wandb", besides `metrics.jsonl`.
      mesh: of `jvdiff.sharding.make_mesh`, whose devices share every batch, and the state by `task.rules`; None: one
        device. A run may go on under another mesh than it began with.
      profile: a folder that gets a trace of `jax.profiler` of the first `PROFILED` steps, the first of which compiles.

    Raises:
      Interrupted: SIGINT or SIGTERM came; the state after the last whole step is saved.
      NumericsError: too many steps in a row were skipped. The last checkpoint is kept; nothing after it is saved.
      CheckpointError: the run in `folder` is of another model, another process is at it, or all its states are damaged.
      ResourceError: the disk refuses a state, which is kept elsewhere then.
      Whatever is raised after a step that was finished has an attribute `kept`: where the state after that step is,
      the run's folder or another that `states.take` takes; None: nowhere.
    """
    counts = {"save_every": save_every, "log_every": log_every, "show_every": show_every, "keep": keep}
    _check_counts(**counts, accumulate=accumulate, most_skipped=most_skipped)
    mesh = make_mesh(MeshShape()) if mesh is None else mesh
    folder.mkdir(parents=True, exist_ok=True)
    shardings = state_shardings(mesh, task, schedule)
    with draws.pinned(), interrupts() as stopped, _managed((folder / "state").absolute(), keep) as manager:
        init_key, step_key = jax.random.split(draws.key(seed))
        state = _begun(manager, partial(start, task, schedule, init_key, params, shardings), shardings)
        step = make_step(task, schedule, step_key, shardings, accumulate)
        every, begun = _Every(save_every, log_every, show_every), int(state.step)
        with Metrics(folder, begun, schedule.steps, log_to) as metrics:
            run = _Run(folder, manager, metrics, most_skipped, state, begun)
            with deferred(lambda: run.done > begun), run.keeping(), profiling.profile(profile, PROFILED):
                run.train(task, schedule.steps, step, mesh, every, stopped)
                run.save()
                with states.disk(folder):
                    manager.wait_until_finished()
    if run.done < schedule.steps:
        raise Interrupted(f"{folder}: stopped after step {run.done}, state saved; the same command goes on.")
    return run.state


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; expected 1 or more.")


class _Every(NamedTuple):
    """How often the loop does what.

    save: steps between checkpoints
    log: steps between lines of metrics
    show: steps between samples; None: no samples
    """

    save: int
    log: int
    show: int | None


@dataclass
class _Run:
    """A training under way.

    folder, manager: where its states are saved
    metrics: where its numbers go
    most_skipped: how many skipped steps in a row end it
    state: after `done` steps
    done: how many steps
    """

    folder: Path
    manager: ocp.CheckpointManager
    metrics: Metrics
    most_skipped: int
    state: State
    done: int

    def check(self) -> None:
        """Raises NumericsError if `most_skipped` steps in a row were skipped, or more."""
        if (bad := int(self.state.in_a_row)) >= self.most_skipped:
            kept = self.manager.latest_step()
            raise NumericsError(
                f"{self.folder}: at step {self.done} the loss or its gradient is not finite for {bad} steps in a row;\n"
                f"{self.most_skipped} end the run (loop.most_skipped). "
                + (f"The state of step {kept} is kept. " if kept else "Nothing was saved yet. ")
                + "Try a lower learning_rate, a longer warmup or a lower clip."
            )

    def train(
        self,
        task: Task,
        steps: int,
        step: Callable[[State, Any], Any],
        mesh: Mesh,
        every: _Every,
        stopped: Callable[[], bool],
    ) -> None:
        """Takes the state to step `steps`, or to where the run is stopped."""
        with closing(_ahead(task.batches(self.done), steps - self.done)) as batches:
            for batch in batches:
                if stopped():
                    break
                with profiling.step("train", self.done):
                    self.state, values = step(self.state, shared(batch, mesh))
                self.after_step(task, every, values, self.done + 1 == steps)

    def after_step(self, task: Task, every: _Every, values: Mapping[str, Any], last: bool) -> None:
        """Counts a step, and does what is due after it."""
        self.done += 1
        if self.done % every.log == 0 or last:
            self.check()
            self.metrics.write(self.done, {name: float(np.asarray(value)) for name, value in values.items()})
        with states.disk(self.folder):
            self.manager.check_for_errors()  # of a save that is under way; the state that is kept then has its line
        if self.done % every.save == 0:
            self.save()
        if task.show is not None and every.show is not None and self.done % every.show == 0:
            task.show(self.state.average, self.done)

    def save(self) -> None:
        """Saves the state, unless it is saved."""
        if self.manager.latest_step() != self.done:
            self.check()
            with states.disk(self.folder):  # an earlier save may still be under way, and fail here
                self.manager.save(self.done, args=ocp.args.PyTreeSave(tuple(self.state)))

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Keeps the state after the last step, whatever is raised inside, and says in the error's `kept` where.

        Not of several processes, which would have to write together where all of them see it, and whose errors end all.
        """
        begun = self.done
        try:
            yield
        except (KeyboardInterrupt, NumericsError):  # at once, on purpose; what is not worth it
            raise
        except BaseException as error:
            if self.done > begun and not peers.several():
                error.kept = self._keep()  # type: ignore[attr-defined]
            raise

    def _keep(self) -> Path | None:
        """Saves the state in the run's folder, or where there is room, and returns in which; None: nowhere."""
        root = states.root_of(self.folder)

        def put(base: Path) -> Path:
            if base == root:
                states.write(self.manager, self.done, tuple(self.state))
                self.metrics.write_refused()
            else:
                states.write_elsewhere(base, self.folder, self.done, tuple(self.state), self.metrics.refused)
            return base

        place = rescue.attempt(lambda: rescue.kept(put, [root]), f"the state after step {self.done}")
        if place is not None:
            _log.warning("the state after step %d is in %s", self.done, place)
        return place


def _ahead(batches: Generator[Any, None, None], count: int) -> Generator[Any, None, None]:
    """The next `count` batches, each read while the step before it is computed."""
    with closing(batches), ThreadPoolExecutor(1) as reader:
        upcoming = reader.submit(next, batches) if count else None
        for left in range(count - 1, -1, -1):
            assert upcoming is not None
            batch = upcoming.result()
            upcoming = reader.submit(next, batches) if left else None
            yield batch


@contextmanager
def _managed(folder: Path, keep: int) -> Iterator[ocp.CheckpointManager]:
    """Orbax's manager of a run's states, the last of which is what was written; no other process has it meanwhile."""
    mine = peers.writes()
    with lock(folder) if mine else nullcontext(), unfinished(folder / states.UNNAMED, EVERY) if mine else nullcontext():
        states.remove_unfinished(folder)
        states.set_damaged_aside(folder)
        manager = states.manager(folder, keep)
        try:
            yield manager
        except BaseException:
            with suppress(Exception):  # of a save that failed: nothing beside what is raised already
                manager.close()
            states.remove_unfinished(folder)
            raise
        manager.close()


def _begun(manager: ocp.CheckpointManager, begin: Callable[[], State], shardings: State) -> State:
    """The state that was saved last, or a new one."""
    if (saved := manager.latest_step()) is None:
        return begin()
    abstract = jax.eval_shape(begin)
    like = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract, shardings)
    return State(*states.restore(manager, saved, tuple(like)))
