"""What the reader refuses, and what it says: the rows F01-F28 of docs/faults.md that concern files of weights."""

import json
import os
import resource
import struct
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jvdiff.errors import CheckpointError, CorruptFile, IntegrityError, MissingTensor, UnsafeFormat
from jvdiff.weights import safetensors as reader

NAME = "diffusion_pytorch_model.safetensors"


def entry(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def write(folder, header, data=bytes(8), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NAME).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return folder


def tensors(seed=0, **more):
    random = np.random.default_rng(seed)
    return {"a": random.standard_normal((3, 4), np.float32), "b": random.standard_normal((2,), np.float32), **more}


def shards(folder, weight_map, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        save_file(content, folder / f"{name}.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{NAME}.index.json").write_text(json.dumps(index))
    return folder


def refuse(folder, error, *words):
    with pytest.raises(error) as caught:
        reader.open_folder(folder)
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert len(text.splitlines()) <= 6
    assert str(folder.name) in text
    return text


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_reads_what_the_library_wrote(tmp_path, dtype):
    given = {name: value.astype(dtype) for name, value in tensors(scalar=np.array(1.5)).items()}
    save_file(given, tmp_path / NAME)
    folder = reader.open_folder(tmp_path)
    assert folder.tensors.keys() == given.keys()
    for name, value in given.items():
        assert folder.tensors[name].shape == value.shape
        assert folder.read(name).dtype == value.dtype
        assert folder.read(name).tobytes() == value.tobytes()


@pytest.mark.parametrize("shape", [(), (7,), (5, 6), (4, 3, 2, 5)])
def test_any_part_is_that_of_the_whole_and_no_other_byte_is_read(tmp_path, monkeypatch, shape):
    random = np.random.default_rng(0)
    whole = np.asarray(random.standard_normal(shape), np.float32)
    save_file({"a": np.ones(3, np.float32), "w": whole}, tmp_path / NAME)
    folder, asked, preadv = reader.open_folder(tmp_path), [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda f, views, at: asked.append(len(views[0])) or preadv(f, views, at))
    for _ in range(30):
        bounds = [sorted(random.choice(n + 1, 2, replace=False).tolist()) for n in shape]
        index = tuple(slice(*b) if random.integers(3) else slice(None) for b in bounds)
        asked.clear()
        part = folder.read("w", index)
        np.testing.assert_array_equal(part, whole[index])
        assert sum(asked) == part.nbytes


def test_bfloat16_in_a_fresh_interpreter_without_torch(tmp_path):  # F14, F26
    save_file({"a": np.ones((2,), ml_dtypes.bfloat16)}, tmp_path / NAME)
    program = (
        "import sys; from pathlib import Path; from jvdiff.weights.safetensors import open_folder\n"
        f"assert open_folder(Path({str(tmp_path)!r})).read('a').sum() == 2\n"
        "assert not {'torch', 'transformers', 'diffusers', 'jax'} & sys.modules.keys(), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("size", [0, 7])
def test_f01_too_short(tmp_path, size):
    (tmp_path / NAME).write_bytes(bytes(size))
    refuse(tmp_path, CorruptFile, NAME, f"{size} bytes", "Download it again")


@pytest.mark.parametrize(
    "cut, words", [(1, "truncated: expected"), (10, "truncated"), (80, "cut off inside its header")]
)
def test_f02_f03_truncated(tmp_path, cut, words):
    save_file({"b": tensors()["b"]}, tmp_path / NAME)
    size = (tmp_path / NAME).stat().st_size
    os.truncate(tmp_path / NAME, max(size - cut, 9))
    refuse(tmp_path, CorruptFile, words, "expected", "found")


def test_f04_trailing_byte(tmp_path):
    refuse(write(tmp_path, {"a": entry()}, bytes(9)), CorruptFile, "1 extra bytes")


@pytest.mark.parametrize("length", [2**60, 100_000_001, 2**64 - 1])
def test_f05_absurd_header(tmp_path, length):
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    refuse(write(tmp_path, {"a": entry()}, length=length), CorruptFile, f"{length:,}")
    assert time.monotonic() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


@pytest.mark.parametrize(
    "content, words",
    [
        (b"<!DOCTYPE html><html>Sign in</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer"),
        (b"PK\x03\x04" + bytes(60), "a zip archive"),
        (b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01K\x01s." + bytes(9), "a Python pickle"),
        (b"\x1f\x8b" + bytes(60), "a gzip archive"),
    ],
)
def test_f06_something_else_under_that_name(tmp_path, content, words):
    (tmp_path / NAME).write_bytes(content)
    refuse(tmp_path, CorruptFile, words)


@pytest.mark.parametrize("second", [entry(), entry(begin=8, end=16)])
def test_f07_duplicate_name(tmp_path, second):
    header = f'{{"a": {json.dumps(entry())}, "a": {json.dumps(second)}}}'.encode()
    refuse(write(tmp_path, header, bytes(16)), CorruptFile, "duplicate tensor name 'a'")


@pytest.mark.parametrize(
    "header, words",
    [
        ({"a": entry(end=12, shape=[3]), "b": entry(begin=8, end=16)}, "overlaps"),
        ({"a": entry(), "b": entry(), "c": entry(begin=8, end=16)}, "overlaps"),
        ({"a": entry(), "b": entry(begin=12, end=16, shape=[1])}, "hole"),
        ({"a": entry(begin=8, end=16)}, "hole"),
        ({"a": entry(begin=-8, end=0)}, "data_offsets"),
        ({"a": entry(begin=8, end=0)}, "before it begins"),
        ({"a": entry(shape=[3], end=16)}, "does not take 16 bytes"),
        ({"a": entry(shape=[2**40, 2**40], end=16)}, "does not take 16 bytes"),
        ({"a": entry(shape=[-2], end=16)}, "shape"),
        ({"a": entry(shape=[True, 4], end=16)}, "shape"),
        ({"a": entry(shape=[1] * 1000, end=4)}, "shape"),
        ({"a": entry(dtype="F128", end=16)}, "unknown dtype 'F128'"),
        ({"a": entry(dtype=7, end=16)}, "unknown dtype"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "exactly dtype, shape and data_offsets"),
        ({"a": [1, 2]}, "exactly dtype, shape and data_offsets"),
        (b"[1, 2]", "does not start with"),
        (b' {"a": 1}', "does not start with"),
        (b'{"a": ', "not usable as JSON"),
        (b'{"\xff": 1}', "not usable as JSON"),
        (b'{"a":' * 100_000, "not usable as JSON"),
    ],
)
def test_f08_malformed(tmp_path, header, words):
    refuse(write(tmp_path, header, bytes(16)), CorruptFile, words)


def test_f09_metadata(tmp_path):
    refuse(write(tmp_path / "bad", {"__metadata__": {"a": 1}, "a": entry()}), CorruptFile, "__metadata__")
    assert reader.open_folder(write(tmp_path / "big", {"__metadata__": {"a": "x" * 2**20}, "a": entry()})).tensors


@pytest.mark.parametrize("shape", [(0,), (0, 2**40, 2**20)])
def test_f11_empty_tensor(tmp_path, shape):
    refuse(write(tmp_path, {"a": entry(shape=shape, end=0)}, b""), CheckpointError, "empty tensor 'a'")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_f12_not_finite(tmp_path, dtype, value):
    bad = np.zeros((4, 5), dtype)
    bad[1, 2] = value
    save_file({"w": bad}, tmp_path / NAME)
    with pytest.raises(CheckpointError, match=r"tensor 'w' holds 1 NaN or infinite numbers of 20"):
        reader.open_folder(tmp_path).read("w")
    folder = reader.open_folder(tmp_path, allow_nonfinite=True)
    folder.read("w")
    assert folder.nonfinite == {"w": 1}


@pytest.mark.parametrize("dtype, bits, kind", [("F8_E4M3", 8, "fp8 checkpoints are"), ("I64", 64, "I64 tensors are")])
def test_f15_other_formats(tmp_path, dtype, bits, kind):
    header = {"a": entry(dtype=dtype, end=2 * bits // 8)}
    refuse(write(tmp_path, header, bytes(2 * bits // 8)), CheckpointError, kind, "not supported", "BF16")


def test_sharded(tmp_path):
    a, b = tensors()["a"], tensors()["b"]
    shards(tmp_path, {"a": "x-1.safetensors", "b": "x-2.safetensors"}, **{"x-1": {"a": a}, "x-2": {"b": b}})
    folder = reader.open_folder(tmp_path)
    np.testing.assert_array_equal(folder.read("b"), b)
    assert folder.tensors.keys() == {"a", "b"}


def test_f16_missing_shards(tmp_path):
    weight_map = {"a": "x-1.safetensors", "b": "x-2.safetensors", "c": "x-3.safetensors", "d": "x-3.safetensors"}
    shards(tmp_path, weight_map, **{"x-1": {"a": tensors()["a"]}})
    text = refuse(tmp_path, MissingTensor, "2 of 3 shards")
    assert "x-2.safetensors (1 tensors); x-3.safetensors (2 tensors)" in text


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/passwd", "C:\\x.safetensors", "a\0b.safetensors", "", "..", "sub/x.safetensors", 7],
)
def test_f17_names_out_of_the_folder(tmp_path, name):
    os.mkfifo(tmp_path / "x.safetensors")  # opening it would hang
    refuse(shards(tmp_path / "model", {"a": name}), UnsafeFormat, "nothing was opened")


def test_f18_index_and_shards_disagree(tmp_path):
    a = tensors()["a"]
    weight_map = {"a": "x-1.safetensors", "b": "x-1.safetensors", "c": "x-2.safetensors"}
    shards(tmp_path, weight_map, **{"x-1": {"a": a, "more": a}, "x-2": {"a": a, "c": a}})
    text = refuse(tmp_path, MissingTensor, "disagrees")
    assert "'a' is in both x-1.safetensors and x-2.safetensors" in text
    assert "'more' is in x-1.safetensors, where the index has no such tensor" in text
    assert "'b' is not in x-1.safetensors" in text


@pytest.mark.parametrize("text", ['{"weight_map": {"a": "x', '{"weight_map": {"a": "b", "a": "c"}}', "[]", '{"a": 1}'])
def test_f19_damaged_index(tmp_path, text):
    (tmp_path / f"{NAME}.index.json").write_text(text)
    refuse(tmp_path, CorruptFile, "index.json")


def test_f19_huge_index(tmp_path):
    (tmp_path / f"{NAME}.index.json").touch()
    os.truncate(tmp_path / f"{NAME}.index.json", 500 * 2**20)  # sparse
    start = time.monotonic()
    refuse(tmp_path, CorruptFile, "524,288,000")
    assert time.monotonic() - start < 1


def test_f22_the_hub_cache_is_made_of_links(tmp_path):
    blobs = tmp_path / "models--x--y" / "blobs"
    folder = tmp_path / "models--x--y" / "snapshots" / ("0" * 40) / "transformer"
    blobs.mkdir(parents=True)
    folder.mkdir(parents=True)
    save_file(tensors(), blobs / "abc")
    (folder / NAME).symlink_to("../../../blobs/abc")
    assert reader.open_folder(folder).read("a").shape == (3, 4)


def test_f23_links_out_of_a_plain_folder(tmp_path):
    folder = tmp_path / "model" / "transformer"
    folder.mkdir(parents=True)
    save_file(tensors(), tmp_path / "elsewhere.safetensors")
    (folder / NAME).symlink_to(tmp_path / "elsewhere.safetensors")
    refuse(folder, UnsafeFormat, "outside the repository", "--follow_symlinks")
    assert reader.open_folder(folder, follow_symlinks=True).tensors
    (folder / NAME).unlink()
    os.mkfifo(folder / NAME)
    refuse(folder, UnsafeFormat, "not a regular file")


def test_f24_shortened_while_reading(tmp_path):
    save_file(tensors(), tmp_path / NAME)
    folder = reader.open_folder(tmp_path)
    os.truncate(tmp_path / NAME, 100)
    with pytest.raises(CorruptFile, match="became shorter"):
        folder.read("a")


def test_f25_replaced_while_reading(tmp_path):
    save_file(tensors(), tmp_path / NAME)
    folder = reader.open_folder(tmp_path)
    folder.read("a")
    save_file(tensors(seed=1), tmp_path / "other")
    os.replace(tmp_path / "other", tmp_path / NAME)
    with pytest.raises(IntegrityError, match="source changed while reading"):
        folder.read("b")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.pt", "x.pth", "x.ckpt", "x.npz", "x.npy"])
def test_f26_f27_formats_that_can_run_code(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.")
    refuse(tmp_path, UnsafeFormat, name, "not opened", "safetensors version")
    assert not (tmp_path / "ran").exists()


def test_no_weights(tmp_path):
    refuse(tmp_path, MissingTensor, "an empty folder")
    refuse(tmp_path / "none", MissingTensor, "no such folder")
