"""A run stopped half way, as a folder: everything needed to go on bit for bit, in another process too.

    NAME.state/state.json   what decides the run (prompt, seed, settings, digest of the checkpoint, versions), digests
    NAME.state/state.bin    its arrays, one after another: the solver's state of a clip, or the cache of a rollout

state.json is an object of these keys, of which `format` keeps its name and place in every later format:

    format   2; later versions may add facts to it
    done     steps or chunks computed
    facts    what decides the outcome
    arrays   of each array in state.bin, in order: its name, and {"dtype", "shape", "sha256" of its bytes}
    sha256   of the other keys as JSON with sorted keys, as `json.dumps` writes it

The folder appears complete or not at all. Both files are checked against their digests before anything is used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvdiff.errors import CheckpointError, IntegrityError, ResourceError, UsageError
from jvdiff.runtime.staging import staged

FORMAT = 2
FACTS, ARRAYS = "state.json", "state.bin"
MAX_FACTS = 64 * 2**20  # bytes


@dataclasses.dataclass(frozen=True, eq=False)
class RunState:
    """A run that goes on from here.

    facts: what decides the outcome, JSON values only
    done: steps, or chunks, computed
    arrays: named arrays of any dtype, for instance what `flatten` makes of a tree; when read, numpy's
    """

    facts: Mapping[str, Any]
    done: int
    arrays: Mapping[str, Any]


def save(folder: str | Path, state: RunState, *, overwrite: bool = False) -> Path:
    """Writes `folder` and returns where it is.

    overwrite: it takes the place of the state that is there, in one step; otherwise a free name beside it is taken.

    Raises:
        UsageError: with `overwrite`, `folder` is not a state; or no folder can be made there.
        ResourceError: the file system refuses.
        CheckpointError: another process is writing there.
    """
    folder = Path(folder)
    target = folder if overwrite else _free_name(folder)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        needed = sum(array.nbytes for array in state.arrays.values())
        with staged(target, needed=needed, overwrite=overwrite, manifest=FACTS) as part:
            index = _write_arrays(part / ARRAYS, state.arrays)
            body = {"format": FORMAT, "done": state.done, "facts": dict(state.facts), "arrays": index}
            text = json.dumps(body | {"sha256": _sha256(_canonical(body))}, indent=2, ensure_ascii=False)
            (part / FACTS).write_bytes(text.encode())
    except OSError as error:
        raise ResourceError(f"cannot save the run's state in {folder}: {error.strerror or error}.") from error
    return target


def load(folder: str | Path) -> RunState:
    """Reads what `save` wrote.

    Raises:
        UsageError: no such folder, or one of something else.
        CheckpointError: the state is of another format, or one of its files cannot be read.
        IntegrityError: a file is cut, changed or missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"resume: {folder} is not a folder; expected the .state folder of an interrupted run.")
    if not any((folder / name).exists() for name in (FACTS, ARRAYS)):
        inside = ", ".join(str(path) for path in sorted(folder.glob("*.state"))[:3])
        hint = f"In it there are: {inside}." if inside else "Expected the .state folder of an interrupted run."
        raise UsageError(f"resume: {folder} is not a saved state. {hint}")
    try:
        body = _read_facts(folder / FACTS)
        return RunState(body["facts"], body["done"], _read_arrays(folder / ARRAYS, body["arrays"]))
    except FileNotFoundError as error:
        raise _changed(Path(error.filename or folder), error.strerror or str(error)) from None
    except OSError as error:
        where, why = error.filename or folder, error.strerror or error
        raise CheckpointError(f"{where}: cannot be read ({why}).\nMake it readable, or begin the run anew.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _changed(folder, f"it cannot be read ({type(error).__name__}: {error})") from None


def flatten(tree: Any) -> dict[str, Any]:
    """The arrays of a pytree by name, as they are; random keys as their numbers."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): jax.random.key_data(x) if _is_key(x) else x for path, x in leaves}


def unflatten(template: Any, arrays: Mapping[str, Any], where: str = "the saved state") -> Any:
    """The pytree of which `flatten` made `arrays`, like `template`, whose leaves have shape and dtype.

    Raises:
        CheckpointError: the names, shapes or dtypes differ, each listed: the state belongs to another configuration.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(template)
    abstract = {jax.tree_util.keystr(path): x for path, x in leaves}
    _check_arrays(abstract, arrays, where)
    values = [_key(arrays[name], x) if _is_key(x) else arrays[name] for name, x in abstract.items()]
    return jax.tree.unflatten(structure, values)


def _check_arrays(abstract: Mapping[str, Any], arrays: Mapping[str, Any], where: str) -> None:
    expected = {
        name: _described(jax.eval_shape(jax.random.key_data, x) if _is_key(x) else x) for name, x in abstract.items()
    }
    saved = {name: _described(x) for name, x in arrays.items()}
    differences = [
        f"{name}: found {saved.get(name, 'nothing')}, expected {expected.get(name, 'nothing')}"
        for name in expected | saved
        if saved.get(name) != expected.get(name)
    ]
    if differences:
        raise CheckpointError(f"{where} belongs to another configuration:\n{_first_four(differences)}")


def check_same(
    saved: Mapping[str, Any], now: Mapping[str, Any], where: str, more: Callable[[], Mapping[str, Any]] = dict
) -> None:
    """Raises CheckpointError listing every key of `now` whose value is not the saved one; where there is any, those of
    `more` too, which take time to find out and are compared later else."""

    def differing(values: Mapping[str, Any]) -> list[str]:
        return [
            f"{name}: the state has {saved.get(name)!r:.60}, this run {value!r:.60}"
            for name, value in values.items()
            if saved.get(name) != value
        ]

    if differences := differing(now):
        differences = [*differing(more()), *differences]
        raise CheckpointError(f"{where} cannot be resumed with other settings or weights:\n{_first_four(differences)}")


def _free_name(folder: Path) -> Path:
    """The first of NAME.state, NAME-2.state, NAME-3.state .. that does not exist."""
    names = (folder.with_name(f"{folder.stem}-{number}{folder.suffix}") for number in itertools.count(2))
    return next(name for name in itertools.chain([folder], names) if not name.exists())


def _write_arrays(path: Path, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Writes arrays one after another; returns their names, dtypes, shapes and digests, in that order."""
    index = {}
    with open(path, "xb") as file:
        for name, array in arrays.items():
            value = np.asarray(array)
            data = np.ascontiguousarray(value).reshape(-1).view(np.uint8).data  # [bytes]
            file.write(data)
            index[name] = {"dtype": value.dtype.name, "shape": list(value.shape), "sha256": _sha256(data)}
    return index


def _read_facts(path: Path) -> dict[str, Any]:
    """state.json, its format and digest checked."""
    if path.stat().st_size > MAX_FACTS:
        raise _changed(path, "it is larger than that of any state")
    body = json.loads(path.read_bytes())
    if body["format"] != FORMAT:  # before its digest, which another format may tell otherwise
        raise CheckpointError(
            f"{path}: format {body['format']!r:.20}, and this version of jvdiff reads {FORMAT}.\n"
            "Resume with the version that wrote it (see facts.versions in that file)."
        )
    digest = body.pop("sha256")
    if digest != _sha256(_canonical(body)):
        raise _changed(path, "its digest does not match its content")
    return body


def _read_arrays(path: Path, index: Mapping[str, Any]) -> dict[str, np.ndarray]:
    kinds = {name: (entry["shape"], jnp.dtype(entry["dtype"])) for name, entry in index.items()}
    size = path.stat().st_size
    expected = sum(math.prod(shape) * dtype.itemsize for shape, dtype in kinds.values())
    if size != expected:
        raise _changed(path, f"it has {size:,} bytes, expected {expected:,}")
    arrays = {}
    with open(path, "rb") as file:
        for name, kind in kinds.items():
            arrays[name] = np.empty(*kind)
            data = arrays[name].reshape(-1).view(np.uint8).data  # [bytes]
            file.readinto(data)
            if _sha256(data) != index[name]["sha256"]:
                raise _changed(path, f"the digest of {name} is not the one in {FACTS}")
    return arrays


def _key(numbers: Any, like: Any) -> jax.Array:
    """A random key of these numbers, of the kind of `like`, which may be abstract (hence the tracing)."""
    kind: list[Any] = []
    jax.eval_shape(lambda key: kind.append(jax.random.key_impl(key)), like)
    return jax.random.wrap_key_data(jnp.asarray(numbers), impl=kind[0])


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _described(x: Any) -> str:
    return f"{x.dtype.name} {list(x.shape)}"


def _first_four(lines: list[str]) -> str:
    return "\n".join(lines[:4] + ([f"and {len(lines) - 4} more"] if len(lines) > 4 else []))


def _changed(path: Path, damage: str) -> IntegrityError:
    return IntegrityError(f"{path}: {damage}.\nThe saved state is damaged; begin the run anew, or restore the file.")


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True).encode()


def _sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()
