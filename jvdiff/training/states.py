"""The saved states of a training: Orbax checkpoints with their digests, in `state/STEP` of the run's folder.

A state that the disk of that folder refuses is kept elsewhere, as a run's folder in miniature (its record, `state/STEP`
and the lines of metrics that the disk refused), which `take` brings back.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jvdiff.errors import CheckpointError, UsageError
from jvdiff.runtime import foreign, peers
from jvdiff.runtime.files import atomic
from jvdiff.runtime.staging import MANIFEST, resource_error, staged
from jvdiff.training import record
from jvdiff.training.metrics import METRICS
from jvdiff.weights.manifest import verify_files, write_manifest

UNNAMED = "*.orbax-checkpoint-tmp*"  # what Orbax writes, until it is complete
_log = logging.getLogger("jvdiff.training")

# One device writes what many hold: by default Orbax cuts that into a part for each, by a program for each shape.
_WHOLE = ocp.type_handlers.create_type_handler_registry(
    (jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False))
)


def manager(states: Path, keep: int) -> ocp.CheckpointManager:
    """Orbax's manager of the states in a folder; digests are written with each."""
    # Folders are made at once: where one is refused in a thread, other threads wait for it for five minutes.
    how = ocp.AsyncOptions(post_finalization_callback=partial(_sign, states), create_directories_asynchronously=False)
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, async_options=how)
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=_WHOLE)
    return ocp.CheckpointManager(states, item_handlers=handler, options=options)


def _sign(states: Path) -> None:
    """Writes the manifest of a state that is complete and has not its name yet; in Orbax's own thread."""
    if peers.writes():
        for unnamed in states.glob(UNNAMED):
            write_manifest(unnamed, {}, {}, "default/")  # what Orbax itself writes beside it changes once more


def remove_unfinished(states: Path) -> None:
    """Removes what a killed process, or a disk that refused it, has left of states; nobody else may write there."""
    if peers.writes():
        for unnamed in states.glob(UNNAMED):
            shutil.rmtree(unnamed, ignore_errors=True)


def saved_steps(states: Path) -> list[int]:
    """The steps whose states are in a run's folder `state`, the last one first."""
    return sorted(
        (int(path.name) for path in states.glob("*") if path.name.isdecimal() and path.is_dir()), reverse=True
    )


# ------------------------------------------------------------------------------------------------------------ writing


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[None]:
    """Makes errors of ours of all the ways in which a disk refuses; what JAX raises is not about a disk."""
    try:
        yield
    except RuntimeError:
        raise
    except Exception as error:
        if known := resource_error(error, folder) or foreign.explained(error):
            raise known from error
        raise


def write(manager: ocp.CheckpointManager, step: int, state: tuple[Any, ...]) -> None:
    """Saves a state, unless it is saved, and waits until it is on the disk.

    Raises:
        JvdiffError: the disk refused it, or one that was still under way.
    """
    with disk(Path(manager.directory)):
        manager.wait_until_finished()
        if manager.latest_step() != step:
            manager.save(step, args=ocp.args.PyTreeSave(state))
            manager.wait_until_finished()


def root_of(folder: Path) -> Path:
    """The folder of the run of which `folder` is a part, or the whole: the one with the record."""
    return next((place for place in (folder, folder.parent) if (place / record.FILE).is_file()), folder)


def write_elsewhere(base: Path, folder: Path, step: int, state: tuple[Any, ...], lines: Sequence[str]) -> None:
    """Saves a state of the run in `folder` as the folder `base`, which must not be there, with these lines of metrics.

    Raises:
        JvdiffError, OSError: the disk refused it; nothing is left there.
    """
    if base.exists():
        raise UsageError(f"{base}: exists already, and is left as it is.")
    root = root_of(folder)
    part = base / folder.relative_to(root)
    try:
        (part / "state").mkdir(parents=True)
        if (root / record.FILE).is_file():
            shutil.copyfile(root / record.FILE, base / record.FILE)
        if lines:
            (part / METRICS).write_text("".join(lines), encoding="utf-8")
        with disk(base), manager((part / "state").absolute(), 1) as there:
            write(there, step, state)
    except BaseException:
        shutil.rmtree(base, ignore_errors=True)
        raise


def take(source: Path, folder: Path) -> None:
    """Brings what `write_elsewhere` wrote back into the run's folder, which may be another one, or new.

    A state that is not later than those that are there is passed over with a notice, so that a command that says
    `resume` may be given again.

    Raises:
        UsageError: there is no training state in `source`.
        IntegrityError: it is not what was written.
        CheckpointError: it is of a training with other fields.
        ResourceError: the disk refuses it.
    """
    found = [path for pattern in ("state/*", "*/state/*") for path in source.glob(pattern) if path.name.isdecimal()]
    if not found:
        raise UsageError(f"resume: {source} holds no state of a training; expected the folder that a message named.")
    for path in found:
        target = folder / path.relative_to(source)
        last = max(saved_steps(target.parent), default=0)
        if last > int(path.name):
            _log.warning("%s is at step %d; the state of step %s is not needed", target.parent, last, path.name)
            continue
        verify_files(path, follow_symlinks=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        _take_record(source / record.FILE, folder / record.FILE)
        _take_lines(path.parents[1] / METRICS, target.parents[1] / METRICS)
        if last < int(path.name):
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            with staged(target, needed=size) as copy:
                shutil.copytree(path, copy, dirs_exist_ok=True)


def _take_record(source: Path, target: Path) -> None:
    if not source.is_file():
        return
    if not target.is_file():
        with atomic(target) as part:
            shutil.copyfile(source, part)
    elif record.read(source)["fields"] != record.read(target)["fields"]:
        raise CheckpointError(
            f"resume: the state in {source.parent} is of a training with other fields than {target.parent};\n"
            f"compare {record.FILE} in both. Give the folder that it came from, or a new one."
        )


def _take_lines(source: Path, target: Path) -> None:
    """Adds the lines of metrics that the disk had refused, behind those that it took whole."""
    if source.is_file():
        there = target.read_bytes().splitlines(keepends=True) if target.is_file() else []
        there = [line for line in there if line.endswith(b"\n")]
        refused = [line for line in source.read_bytes().splitlines(keepends=True) if line not in there]
        with atomic(target) as part:
            part.write_bytes(b"".join([*there, *refused]))


# ------------------------------------------------------------------------------------------------------------ reading


def set_damaged_aside(states: Path) -> None:
    """Renames the states after the last one that is what was written, with a warning that says so.

    A run of a version that wrote no digests goes on as it is, with a warning.

    Raises:
      CheckpointError: none is what was written. Nothing is renamed.
    """
    steps = saved_steps(states)
    if steps and not any((states / str(step) / MANIFEST).exists() for step in steps):
        _log.warning("%s: saved without digests, by an earlier version; it is used as it is", states)
        return
    problems: dict[int, CheckpointError] = {}
    for step in steps:
        try:
            verify_files(states / str(step), follow_symlinks=True)  # the run's own, on whatever disk
            break
        except CheckpointError as error:
            problems[step] = error
    if problems and len(problems) == len(steps):
        first = problems[steps[0]]
        raise CheckpointError(
            f"{_first_line(first)}\nNo earlier state is whole; restore one from a copy, or remove {states}."
        ) from first
    for step, error in problems.items():
        aside = states.with_name(f"damaged-{step}-{secrets.token_hex(2)}")
        _log.warning("%s\nIt is now %s; the run goes on from an earlier state.", _first_line(error), aside)
        if peers.writes():
            (states / str(step)).rename(aside)
    peers.gather(None)  # nobody looks before they are gone


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def restore(manager: ocp.CheckpointManager, saved: int, like: tuple[Any, ...]) -> Any:
    """The state of step `saved`, with the shapes, dtypes and shardings of `like`, whose second part are the parameters;
    each shard read where it lives.

    Raises:
      CheckpointError: it is of another model, or cannot be read.
    """
    arguments = ocp.checkpoint_utils.construct_restore_args(like)
    try:
        here, wanted = _shapes(manager.item_metadata(saved).tree[1]), _shapes(like[1])
        if other := sorted(dict(here.items() ^ wanted.items())):
            first = f"{other[0]} is {here.get(other[0])} there, {wanted.get(other[0])} here"
            raise ValueError(f"{len(other)} parameters differ, {first}")
        restored = manager.restore(saved, args=ocp.args.PyTreeRestore(like, restore_args=arguments))
    except Exception as error:  # Orbax and TensorStore raise many types
        raise CheckpointError(
            f"{manager.directory}: step {saved} cannot be restored: {' '.join(str(error).split()):.300}.\n"
            "It may be of a run with another model or optimizer; choose another folder, or remove it to start anew."
        ) from error
    _log.info("resuming at step %d", saved)
    return restored


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}
