"""A run stopped half way, as a folder: everything needed to go on bit for bit, in another process too.

    NAME.state/state.json   what decides the run (prompt, seed, settings, digest of the checkpoint, versions), digests
    NAME.state/state.bin    its arrays, one after another: the solver's state of a clip, or the cache of a rollout

The folder appears complete or not at all. Both files are checked against their digests before anything is used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Mapping
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
    """facts: what decides the outcome, JSON values only. done: steps, or chunks, computed.
    arrays: named arrays of any dtype, what `flatten` makes of a tree for instance; when read, numpy's."""

    facts: Mapping[str, Any]
    done: int
    arrays: Mapping[str, Any]


def save(folder: str | Path, state: RunState, *, overwrite: bool = False) -> Path:
    """Writes `folder` and returns where it is.

    overwrite: it takes the place of the state that is there, in one step; otherwise a free name beside it is taken.

    Raises:
        UsageError: with `overwrite`, there is something else than a state; or no folder can be made there.
        ResourceError: the file system refuses.
        CheckpointError: another process is writing there.
    """
    folder = Path(folder)
    names = (folder.with_name(f"{folder.stem}-{number}{folder.suffix}") for number in itertools.count(2))
    target = folder if overwrite else next(name for name in itertools.chain([folder], names) if not name.exists())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        needed = sum(array.nbytes for array in state.arrays.values())
        with staged(target, needed=needed, overwrite=overwrite, manifest=FACTS) as part:
            index = {}
            with open(part / ARRAYS, "xb") as file:
                for name, array in state.arrays.items():
                    value = np.asarray(array)
                    data = np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
                    file.write(data)
                    entry = {"dtype": value.dtype.name, "shape": list(value.shape), "sha256": _sha256(data)}
                    index[name] = entry
            body = {"format": FORMAT, "done": state.done, "facts": dict(state.facts), "arrays": index}
            text = json.dumps(body | {"sha256": _sha256(_canonical(body))}, indent=2, ensure_ascii=False)
            (part / FACTS).write_bytes(text.encode())
    except OSError as error:
        raise ResourceError(f"cannot save the run's state in {folder}: {error.strerror or error}.") from error
    return target


def load(folder: str | Path) -> RunState:
    """Reads what `save` wrote.

    Raises:
        UsageError: there is no such folder.
        IntegrityError: a file is cut, changed or missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"resume: {folder} is not a folder; expected the .state folder of an interrupted run.")
    try:
        if (folder / FACTS).stat().st_size > MAX_FACTS:
            raise _changed(folder / FACTS, "it is larger than that of any state")
        body = json.loads((folder / FACTS).read_bytes())
        digest = body.pop("sha256")
        if digest != _sha256(_canonical(body)):
            raise _changed(folder / FACTS, "its digest does not match its content")
        if body["format"] != FORMAT:
            raise CheckpointError(
                f"{folder / FACTS}: format {body['format']!r}, and this version of jvdiff reads {FORMAT}.\n"
                "Resume with the version that wrote it (see facts.versions in that file)."
            )
        return RunState(body["facts"], body["done"], _read_arrays(folder / ARRAYS, body["arrays"]))
    except OSError as error:
        raise _changed(Path(error.filename or folder), error.strerror or str(error)) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _changed(folder, f"it cannot be read ({type(error).__name__}: {error})") from None


def flatten(tree: Any) -> dict[str, Any]:
    """The arrays of a pytree by name, as they are; random keys as their numbers."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): jax.random.key_data(x) if _is_key(x) else x for path, x in leaves}


def unflatten(template: Any, arrays: Mapping[str, Any], where: str = "the saved state") -> Any:
    """The pytree of which `flatten` made `arrays`, like `template`, whose leaves have shape and dtype.

    Raises:
        CheckpointError: the names, shapes or dtypes are others, each listed: it belongs to another configuration.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(template)
    wanted = {jax.tree_util.keystr(path): x for path, x in leaves}
    expected = {
        name: _described(jax.eval_shape(jax.random.key_data, x) if _is_key(x) else x) for name, x in wanted.items()
    }
    found = {name: _described(x) for name, x in arrays.items()}
    differences = [
        f"{name}: found {found.get(name, 'nothing')}, expected {expected.get(name, 'nothing')}"
        for name in expected | found
        if found.get(name) != expected.get(name)
    ]
    if differences:
        shown = differences[:4] + ([f"and {len(differences) - 4} more"] if len(differences) > 4 else [])
        raise CheckpointError("\n".join([f"{where} belongs to another configuration:", *shown]))
    values = [_key(arrays[name], x) if _is_key(x) else arrays[name] for name, x in wanted.items()]
    return jax.tree.unflatten(structure, values)


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError listing every key of `now` whose value is not the saved one."""
    differences = [
        f"{name}: the state has {saved.get(name)!r:.60}, this run {value!r:.60}"
        for name, value in now.items()
        if saved.get(name) != value
    ]
    if differences:
        shown = differences[:4] + ([f"and {len(differences) - 4} more"] if len(differences) > 4 else [])
        raise CheckpointError("\n".join([f"{where} cannot be resumed with other settings or weights:", *shown]))


def _read_arrays(path: Path, index: Mapping[str, Any]) -> dict[str, np.ndarray]:
    kinds = {name: (entry["shape"], jnp.dtype(entry["dtype"])) for name, entry in index.items()}
    size, expected = path.stat().st_size, sum(math.prod(shape) * dtype.itemsize for shape, dtype in kinds.values())
    if size != expected:
        raise _changed(path, f"it has {size:,} bytes, expected {expected:,}")
    arrays = {}
    with open(path, "rb") as file:
        for name, kind in kinds.items():
            arrays[name] = np.empty(*kind)
            data = arrays[name].reshape(-1).view(np.uint8).data
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


def _changed(path: Path, found: str) -> IntegrityError:
    return IntegrityError(f"{path}: {found}.\nThe saved state is damaged; begin the run anew, or restore the file.")


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True).encode()


def _sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()
