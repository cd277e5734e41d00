"""Saved runs: every bit comes back, damage and other configurations are told, nothing is half written or lost."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jvdiff.errors import CheckpointError, IntegrityError, ResourceError, UsageError
from jvdiff.runtime import run_state
from jvdiff.runtime.run_state import RunState


@partial(jax.tree_util.register_dataclass, data_fields=["index", "key", "past", "decoder"], meta_fields=[])
@dataclasses.dataclass
class Cache:
    index: np.ndarray
    key: jax.Array
    past: dict
    decoder: object


def cache(frames=3):
    bits = np.random.default_rng(0).integers(0, 2**16, (2, frames, 5), np.uint16)  # NaNs, infinities, denormals
    past = {"k": jnp.asarray(bits.view(ml_dtypes.bfloat16)), "slots": (np.arange(frames, dtype=np.int32),)}
    decoder = {"conv_in": np.linspace(0, 1, 7, dtype=np.float32), "empty": np.zeros((0, 3), np.float32)}
    return Cache(np.asarray(4, np.int32), jax.random.key(7), past, decoder)


def bits(x):
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x).tobytes()


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype, bits(x)) == (y.shape, y.dtype, bits(y))


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


FACTS = {"prompt": "猫", "seed": 3, "shift": 5.0, "mesh": None}


@pytest.fixture
def saved(tmp_path):
    return run_state.save(tmp_path / "new" / "a.state", RunState(FACTS, 5, run_state.flatten(cache())))


def test_every_bit_comes_back(saved):
    state = run_state.load(saved)
    assert (state.facts, state.done) == (FACTS, 5)
    template = jax.eval_shape(cache)
    same(run_state.unflatten(template, state.arrays), cache())
    same(run_state.unflatten(template, run_state.flatten(cache())), cache())  # without a file
    same(run_state.unflatten(cache(), state.arrays), cache())  # a template of arrays
    assert {path.name for path in saved.iterdir()} == {"state.json", "state.bin"}
    assert [path.name for path in saved.parent.iterdir()] == ["a.state"]


def test_a_name_that_is_taken_is_left_alone_and_a_state_replaced_on_request(saved):
    before, later = content(saved), RunState(FACTS, 6, {"x": np.ones(3, np.float32)})
    for number in (2, 3):
        assert run_state.save(saved, later) == saved.with_name(f"a-{number}.state")
    assert content(saved) == before
    assert run_state.save(saved, later, overwrite=True) == saved
    assert run_state.load(saved).done == 6 and run_state.load(saved).arrays.keys() == {"x"}
    assert sorted(path.name for path in saved.parent.iterdir()) == ["a-2.state", "a-3.state", "a.state"]


def test_only_a_state_is_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "jvdiff.json").write_text("{}")  # a checkpoint
    (tmp_path / "file").write_text("")
    for name in ("folder", "file"):
        with pytest.raises(UsageError, match="is not a saved state"):
            run_state.save(tmp_path / name, RunState({}, 0, {}), overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "file"}


def test_a_failure_keeps_the_state_that_was_there(saved):
    class Broken:
        nbytes = 4

        def __array__(self, dtype=None, copy=None):
            raise OSError(28, "No space left on device")

    before = content(saved)
    for overwrite in (True, False):
        with pytest.raises(ResourceError, match="full"):
            run_state.save(saved, RunState(FACTS, 6, {"x": np.ones(3), "y": Broken()}), overwrite=overwrite)
    enormous = type("Enormous", (), {"nbytes": 2**60})()
    with pytest.raises(ResourceError, match="needs about 1,152,921"):
        run_state.save(saved, RunState(FACTS, 6, {"x": enormous}), overwrite=True)
    assert content(saved) == before and [path.name for path in saved.parent.iterdir()] == ["a.state"]


def test_a_killed_process_leaves_the_earlier_state(saved):
    before = content(saved)
    code = """if True:
        import os, signal, sys, numpy as np
        from jvdiff.runtime import run_state

        class Deadly:
            nbytes = 4
            def __array__(self, dtype=None, copy=None):
                os.kill(os.getpid(), signal.SIGKILL)

        arrays = {"x": np.ones(1000), "y": Deadly()}
        run_state.save(sys.argv[1], run_state.RunState({}, 9, arrays), overwrite=True)
    """
    done = subprocess.run([sys.executable, "-c", code, str(saved)], env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == -signal.SIGKILL
    assert content(saved) == before and run_state.load(saved).done == 5
    run_state.save(saved, RunState(FACTS, 6, {}), overwrite=True)  # which also clears what it left
    assert run_state.load(saved).done == 6 and [path.name for path in saved.parent.iterdir()] == ["a.state"]


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("state.bin", lambda data: data[:-1], "bytes, expected"),
        ("state.bin", lambda data: data + b"x", "bytes, expected"),
        ("state.bin", lambda data: b"", "0 bytes, expected"),
        ("state.bin", lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:], "the digest of"),
        ("state.json", lambda data: data.replace(b'"seed": 3', b'"seed": 4'), "digest does not match"),
        ("state.json", lambda data: data.replace(b"float32", b"float16"), "digest does not match"),
        ("state.json", lambda data: data[:100], "cannot be read"),
        ("state.json", lambda data: b"[]", "cannot be read"),
        ("state.json", lambda data: b"\xff{", "cannot be read"),
        ("state.json", None, "No such file"),
        ("state.bin", None, "No such file"),
    ],
)
def test_damage_is_told_in_a_sentence(saved, name, damage, says):
    file = saved / name
    data = file.read_bytes()
    file.unlink() if damage is None else file.write_bytes(damage(data))
    with pytest.raises(IntegrityError, match=says) as error:
        run_state.load(saved)
    assert str(saved) in str(error.value) and str(error.value).count("\n") == 1


def test_a_folder_of_something_else_is_not_called_damaged(saved):
    with pytest.raises(UsageError, match=rf"is not a saved state. In it there are: .*{saved.name}"):
        run_state.load(saved.parent)
    (saved / "state.json").unlink()
    (saved / "state.bin").unlink()
    with pytest.raises(UsageError, match=r"is not a saved state\. Expected the \.state folder"):
        run_state.load(saved)


def write_by_hand(folder, **changes):
    """A state as the docstring of `run_state` describes it, of two arrays, in a new folder."""
    arrays = {".x": np.arange(6, dtype=np.float32).reshape(1, 2, 3), ".key": np.asarray([0, 7], np.uint32)}
    facts = {"prompt": "a red seven moving left", "seed": 3, "num_frames": 9, "height": 64, "width": 64, "steps": 20}
    facts |= {"guidance": 5.0, "negative_prompt": "", "shift": 3.0, "solver": "unipc", "grid": "diffusers"}
    facts |= {"pattern": "dense", "attention": None, "precision": "float32", "checkpoint_digest": "0123"}
    facts |= {"versions": {"jvdiff": "0.1.0", "jax": "0.10.2"}}
    index = {
        name: {"dtype": x.dtype.name, "shape": list(x.shape), "sha256": hashlib.sha256(x.tobytes()).hexdigest()}
        for name, x in arrays.items()
    }
    body = {"format": 2, "done": 7, "facts": facts, "arrays": index} | changes
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps(body | {"sha256": digest}))
    (folder / "state.bin").write_bytes(b"".join(x.tobytes() for x in arrays.values()))
    return facts, arrays


def test_a_file_that_may_not_be_read_is_not_damaged(saved, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(run_state.Path, "read_bytes", refused)
    with pytest.raises(CheckpointError, match=r"state.json: cannot be read \(Permission denied\).\nMake it readable"):
        run_state.load(saved)


def test_a_state_of_the_version_before_is_read(tmp_path):
    facts, arrays = write_by_hand(tmp_path / "old.state")
    state = run_state.load(tmp_path / "old.state")
    assert (state.facts, state.done, list(state.arrays)) == (facts, 7, list(arrays))
    for name, value in arrays.items():
        np.testing.assert_array_equal(state.arrays[name], value, strict=True)


def test_a_later_version_may_add_facts(tmp_path):
    facts = {"prompt": "a red seven moving left", "condition": {"label": "seven", "picture": None}}
    write_by_hand(tmp_path / "new.state", facts=facts)
    assert run_state.load(tmp_path / "new.state").facts == facts


@pytest.mark.parametrize("number", [1, 3])
def test_another_format_is_refused_in_a_sentence(tmp_path, number):
    write_by_hand(tmp_path / "a.state", format=number)
    text = (tmp_path / "a.state" / "state.json").read_text()
    for body in (text, json.dumps({"format": number, "everything else": "is new"})):
        (tmp_path / "a.state" / "state.json").write_text(body)
        with pytest.raises(CheckpointError, match=f"format {number}, and this version of jvdiff reads 2") as error:
            run_state.load(tmp_path / "a.state")
        assert not isinstance(error.value, IntegrityError) and "with the version that wrote it" in str(error.value)


def test_what_is_not_a_folder_is_not_a_state(tmp_path):
    with pytest.raises(UsageError, match="not a folder"):
        run_state.load(tmp_path / "none")


def test_a_cache_of_another_configuration_is_refused_with_the_differences():
    arrays = run_state.flatten(cache())
    with pytest.raises(CheckpointError, match="another configuration") as error:
        run_state.unflatten(jax.eval_shape(lambda: cache(frames=4)), arrays, "out/a.state")
    lines = str(error.value).splitlines()
    assert lines[0].startswith("out/a.state")
    assert lines[1:] == [
        ".past['k']: found bfloat16 [2, 3, 5], expected bfloat16 [2, 4, 5]",
        ".past['slots'][0]: found int32 [3], expected int32 [4]",
    ]
    other = dataclasses.replace(cache(), decoder=None)
    with pytest.raises(CheckpointError, match=r"\.decoder\['conv_in'\]: found float32 \[7\], expected nothing"):
        run_state.unflatten(other, arrays)
    with pytest.raises(CheckpointError, match=r"\.decoder\['conv_in'\]: found nothing, expected float32 \[7\]"):
        run_state.unflatten(cache(), run_state.flatten(other))
    with pytest.raises(CheckpointError, match=r"float32 \[2, 3, 5\], expected bfloat16") as error:
        run_state.unflatten(cache(), arrays | {".past['k']": np.zeros((2, 3, 5), np.float32)})
    with pytest.raises(CheckpointError, match="and 3 more") as error:
        run_state.unflatten({}, arrays | {"one more": np.zeros(1)})
    assert len(str(error.value).splitlines()) == 6
