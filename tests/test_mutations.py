"""Sixty damaged files through the readers; `benchmarks/mutations.py` has two thousand through the command lines."""

import random
import shutil

import numpy as np
import pytest

from benchmarks import mutations
from convert.from_diffusers import convert
from jvdiff import pipeline
from jvdiff.errors import JvdiffError
from jvdiff.runtime import run_state
from jvdiff.weights import safetensors
from jvdiff.weights.manifest import verify_files


def inspect(folder):
    """All that is read of a repository but the numbers of its weights: what is said of it, and the headers."""
    said = pipeline.inspect(folder)
    headers = {}
    if said.kind == "hf":
        for name in said.models.configs:
            part = said.family.parts[name]
            headers[name] = safetensors.open_folder(folder / name, part.stem).tensors.keys()
    return repr((said.models.configs, said.models.index, said.defaults)), headers, said.digest


@pytest.fixture(scope="module")
def originals(tiny_repository, tmp_path_factory):
    root = tmp_path_factory.mktemp("originals")
    convert(tiny_repository, root / "converted")
    shutil.copytree(tiny_repository, root / "published")
    state = run_state.RunState({"seed": 3}, 2, {"x": np.arange(12.0, dtype=np.float32), "y": np.zeros(3, np.uint8)})
    run_state.save(root / "state" / "s.state", state)
    return root


def read(kind, folder):
    if kind == "state":
        state = run_state.load(folder / "s.state")
        return state.facts, state.done, {name: array.tolist() for name, array in state.arrays.items()}
    if kind == "converted":
        verify_files(folder)
    return inspect(folder)


@pytest.mark.parametrize("kind", ["published", "converted", "state"])
def test_damaged_files_are_refused_or_read_as_they_were(originals, tmp_path, kind):
    original, rng, refused = originals / kind, random.Random(kind), 0
    files = sorted(path.relative_to(original) for path in original.rglob("*") if path.is_file())
    before = read(kind, original)
    folder = shutil.copytree(original, tmp_path / "copy")
    for number in range(20):
        name = rng.choice(files)
        changed = mutations.mutate(folder / name, rng)
        try:
            now = read(kind, folder)
            named = kind == "published" or name.name == "jvdiff.json"  # another digest names what is read now
            assert not changed or now == before or (named and now[-1] != before[-1]), f"{number} {name}: unnoticed"
        except JvdiffError as error:
            refused += 1
            assert 1 <= len(str(error).splitlines()) <= 6 and error.exit_code in (2, 3), f"{number} {name}: {error}"
        shutil.copy(original / name, folder / name)
    assert refused > 5


def test_a_fault_is_told_from_what_is_right():
    one, other = [("a.npz", "1", "d")], [("a.npz", "2", "d")]
    assert mutations.fault(0, "", one, one) is None and mutations.fault(3, "error: x", one, []) is None
    assert mutations.fault(0, "", one, [("a.npz", "2", "e")]) is None
    assert "same record" in str(mutations.fault(0, "", one, other))
    assert mutations.fault(1, "", one, one) and mutations.fault(3, "Traceback", one, [])
