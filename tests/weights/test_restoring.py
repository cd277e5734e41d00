"""Inspecting, restoring and saving: exact, sharded, and nothing damaged is ever used (F28-F31, F39-F42)."""

import functools
import hashlib
import json
import math
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff.errors import (
    CheckpointError,
    CorruptFile,
    IntegrityError,
    MissingTensor,
    ShapeMismatch,
    UsageError,
)
from jvdiff.models.family import read_config
from jvdiff.models.wan.family import TEXT_TO_VIDEO
from jvdiff.weights import manifest, one_pass, restore, restoring, save
from jvdiff.weights import orbax as directories
from jvdiff.weights import safetensors as reader
from jvdiff.weights.manifest import verify_files
from jvdiff.weights.naming import assemble, flatten
from jvdiff.weights.orbax import stored_leaves

TREE = {
    "layers": {"kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "bias": np.ones((2, 4), jnp.bfloat16)},
    "step": np.int32(7),
    "nothing": {},
}


def abstract(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), tree)


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class Part:
    """A component folder: its configuration, names and abstract tree."""

    def __init__(self, folder):
        part = TEXT_TO_VIDEO.parts[folder.name]
        self.folder, self.cfg = folder, read_config(folder, part)
        self.names, self.abstract = part.names(self.cfg), functools.partial(part.abstract, self.cfg)


@pytest.fixture
def saved(tmp_path):
    save(tmp_path / "saved", TREE)
    return tmp_path / "saved"


@pytest.fixture(scope="module")
def orbax(tiny_repository, tmp_path_factory):
    """Transformer and VAE of `tiny_repository` as directories below one manifest."""
    root, records = tmp_path_factory.mktemp("orbax"), {}
    for name in ("transformer", "vae"):
        part = Part(tiny_repository / name)
        leaves = directories.leaves_of(restore(part.folder, part.abstract(jnp.float32), part.names), [])
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(part.cfg.to_json()))
        records |= directories.write_params(root, name, leaves)
    manifest.write_manifest(root, records, {})
    return root


def test_save_and_restore(saved):
    restored = restore(saved, abstract(TREE), (), cast=False)
    assert jax.tree.structure(restored) == jax.tree.structure(TREE)
    for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(TREE), strict=True):
        assert isinstance(ours, jax.Array)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    assert [p.name for p in saved.parent.iterdir()] == ["saved"]


def test_save_refuses_to_overwrite_unless_told(saved):
    before = content(saved)
    with pytest.raises(UsageError, match=r"exists already(?s:.*)Replace it with overwrite, remove it yourself, or"):
        save(saved, {"a": np.zeros(2, np.float32)})
    assert content(saved) == before
    save(saved, {"a": np.zeros(2, np.float32)}, overwrite=True)
    assert list(stored_leaves(saved)) == ["a"]


@pytest.mark.parametrize("key", ["a.b", "..", "", "a/b", "a\0", "ä"])
def test_f42_keys_that_orbax_would_mix_up(tmp_path, key):
    with pytest.raises(UsageError, match="cannot be saved"):
        save(tmp_path / "saved", {"a": {key: np.zeros(2, np.float32)}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["hf", "orbax"])
def test_restore_onto_a_mesh(tiny_repository, orbax, layout):
    folder = {"hf": tiny_repository, "orbax": orbax}[layout] / "transformer"
    part = Part(folder)
    wanted = part.abstract(jnp.float32)
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    shardings = jax.tree.map(lambda leaf: replicated, wanted)
    shardings["blocks"]["ffn"]["up"]["kernel"] = split
    on_mesh = restore(folder, wanted, part.names, shardings)
    assert on_mesh["blocks"]["ffn"]["up"]["kernel"].sharding == split
    assert on_mesh["head"]["proj"]["bias"].sharding == replicated
    plain = restore(folder, wanted, part.names)
    jax.tree.map(np.testing.assert_array_equal, on_mesh, plain)
    everywhere = restore(folder, wanted, part.names, replicated)
    assert everywhere["head"]["proj"]["bias"].sharding == replicated


def sharded(tree, axis, mesh):
    """Every leaf split along its largest dimension that the mesh axis divides."""

    def place(leaf):
        sizes = [n if n % mesh.shape[axis] == 0 else 0 for n in leaf.shape]
        spec = [axis if i == sizes.index(max(sizes)) and max(sizes) else None for i in range(len(sizes))]
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    return jax.tree.map(place, tree)


def mesh(**axes):
    names, sizes = tuple(axes), tuple(axes.values())
    kinds = (jax.sharding.AxisType.Auto,) * len(names)
    return jax.make_mesh(sizes, names, axis_types=kinds, devices=jax.devices()[: math.prod(sizes)])


def test_what_was_saved_under_one_mesh_is_restored_under_any_other(tiny_repository, tmp_path):
    part = Part(tiny_repository / "transformer")
    wanted = part.abstract(jnp.float32)
    plain = restore(tiny_repository / "transformer", wanted, part.names)
    eight, other = mesh(fsdp=8), mesh(tensor=2, sequence=4)
    places = [sharded(wanted, "fsdp", eight), sharded(wanted, "tensor", other), None, sharded(wanted, "fsdp", eight)]
    last = restore(tiny_repository / "transformer", wanted, part.names, places[0])
    for number, shardings in enumerate(places[1:]):
        save(tmp_path / str(number), last, config=part.cfg.to_json())
        last = restore(tmp_path / str(number), wanted, (), shardings)
        jax.tree.map(np.testing.assert_array_equal, last, plain)
        if shardings is not None:
            assert jax.tree.map(lambda leaf: leaf.sharding, last) == shardings


@pytest.mark.parametrize("axes", [{}, {"fsdp": 8}, {"data": 2, "fsdp": 4}])
@pytest.mark.parametrize("large", [0, 2**24])
def test_each_file_is_read_once_in_order_and_hashed_meanwhile(tiny_repository, monkeypatch, axes, large):
    """Leaf by leaf, and where leaves grow on their devices, the numbers and their places are those of `assemble`."""
    folder = tiny_repository / "text_encoder"
    part, file = Part(folder), folder / "model.safetensors"
    wanted, places, digests = part.abstract(jnp.bfloat16), [], {}
    shardings = sharded(wanted, "fsdp", mesh(**axes)) if axes else None
    monkeypatch.setattr(restoring, "_LARGE", large)
    monkeypatch.setattr(restoring, "_on_host", lambda place: large > 0)
    monkeypatch.setattr(restoring, "_BLOCK", 3)
    monkeypatch.setattr(one_pass, "PIECE", 64)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda f, views, at: places.append((at, len(views[0]))) or preadv(f, views, at))
    with jax.default_device(jax.devices()[3]):
        found = restore(folder, wanted, part.names, shardings, stem="model", digests=digests)
    assert [begin for begin, _ in places] == [sum(n for _, n in places[:i]) for i in range(len(places))]
    assert sum(n for _, n in places) == file.stat().st_size
    assert digests == {file: hashlib.sha256(file.read_bytes()).hexdigest()}
    exact = assemble(part.names, wanted, reader.open_folder(folder, "model"))
    for (name, leaf), array in zip(flatten(found).items(), flatten(exact).values(), strict=True):
        assert leaf.dtype == array.dtype and np.asarray(leaf).tobytes() == array.tobytes(), name
    if axes:
        assert jax.tree.map(lambda leaf: leaf.sharding, found) == shardings
    else:
        assert {device for leaf in flatten(found).values() for device in leaf.devices()} == {jax.devices()[3]}


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"data": 2, "fsdp": 4}])
def test_of_many_processes_one_shard_is_in_host_memory_at_a_time_and_read_once(tiny_repository, monkeypatch, axes):
    folder = tiny_repository / "text_encoder"
    part = Part(folder)
    wanted = part.abstract(jnp.float32)
    shardings, counts = sharded(wanted, "fsdp", mesh(**axes)), []

    def counted(shape, dtype, *args, **options):
        counts.append(fill(shape, dtype, *args, **options))
        return counts[-1]

    fill, read, numbers = restoring.fill, reader.Folder.read, []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(restoring, "fill", counted)
    monkeypatch.setattr(reader.Folder, "read", lambda *args: numbers.append((array := read(*args)).nbytes) or array)
    found = flatten(restore(folder, wanted, part.names, shardings, stem="model"))
    total = sum(leaf.nbytes for leaf in found.values())
    assert sum(array.nbytes for array in counts) == sum(numbers) == total  # replicated leaves too are read once
    shards = {leaf.addressable_shards[0].data.nbytes for leaf in found.values()}
    assert {array.nbytes for array in counts} == shards and 4 * max(shards) <= max(v.nbytes for v in found.values())


@pytest.mark.parametrize("layout", ["hf", "orbax"])
def test_f41_casts_are_told_or_refused(tiny_repository, orbax, caplog, layout):
    folder = {"hf": tiny_repository, "orbax": orbax}[layout] / "vae"
    part = Part(folder)
    wanted = part.abstract(jnp.bfloat16)
    with pytest.raises(ShapeMismatch, match="from float32 to bfloat16"):
        restore(folder, wanted, part.names, cast=False)
    with caplog.at_level("INFO", logger="jvdiff.weights.restoring"):
        got = restore(folder, wanted, part.names)
    assert "from float32 to bfloat16" in caplog.text
    exact = restore(folder, part.abstract(jnp.float32), part.names)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b).astype(a.dtype)), got, exact)


def test_another_model_is_refused_with_a_list(saved):
    wanted = abstract(TREE)
    wanted["layers"]["kernel"] = jax.ShapeDtypeStruct((2, 4, 3), np.float32)
    with pytest.raises(ShapeMismatch, match=r"layers/kernel is \[2, 3, 4\], expected \[2, 4, 3\]"):
        restore(saved, wanted, ())
    wanted["more"] = jax.ShapeDtypeStruct((1,), np.float32)
    del wanted["step"]
    with pytest.raises(MissingTensor) as error:
        restore(saved, wanted, ())
    assert "missing (1): more" in str(error.value) and "not expected (1): step" in str(error.value)
    assert len(str(error.value).splitlines()) <= 6


def test_f39_a_flipped_bit_in_any_file_is_noticed(orbax, tmp_path):
    folder = shutil.copytree(orbax, tmp_path / "orbax")
    wanted = Part(folder / "vae").abstract(jnp.float32)
    random = np.random.default_rng(0)
    for file in sorted(p for p in (folder / "vae").rglob("*") if p.is_file()):
        whole = file.read_bytes()
        for _ in range(40 if len(whole) > 100_000 else 3):
            damaged = bytearray(whole)
            damaged[random.integers(len(whole))] ^= 1 << random.integers(8)
            file.write_bytes(damaged)
            with pytest.raises(IntegrityError) as error:
                verify_files(folder / "vae")
            assert f"{file.relative_to(folder)} has other content" in str(error.value)
        file.write_bytes(whole)
    restore(folder / "vae", wanted, ())


@pytest.mark.parametrize("processes", [1, 2])
def test_f39_damaged_numbers_are_never_given_out(orbax, tmp_path, monkeypatch, processes):
    """Files are read and compared side by side, and the comparison has the last word."""
    folder = shutil.copytree(orbax, tmp_path / "orbax")
    file = max((folder / "vae" / "params").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    whole, wanted = file.read_bytes(), Part(folder / "vae").abstract(jnp.float32)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(restoring, "_METADATA", 2**12)
    for place in np.random.default_rng(0).integers(len(whole), size=4):
        data = bytearray(whole)
        data[place] ^= 1
        file.write_bytes(data)
        with pytest.raises(IntegrityError, match=f"{file.relative_to(folder)} has other content"):
            restore(folder / "vae", wanted, ())


def test_f39_an_array_that_differs_from_its_record_is_named(saved):
    manifest = json.loads((saved / "jvdiff.json").read_text())
    manifest["tensors"]["params/layers/bias"]["sha256"] = "0" * 64
    (saved / "jvdiff.json").write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match="array layers/bias differs"):
        restore(saved, abstract(TREE), ())
    del manifest["tensors"]["params/layers/bias"]
    (saved / "jvdiff.json").write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match="array layers/bias differs"):
        restore(saved, abstract(TREE), ())


@pytest.mark.parametrize("how", ["removed", "cut"])
def test_f40_a_file_is_gone_or_cut(saved, how):
    for name, whole in content(saved).items():
        if how == "removed":
            (saved / name).unlink()
        else:
            (saved / name).write_bytes(whole[:-2])
        with pytest.raises(CheckpointError):
            restore(saved, abstract(TREE), ())
        (saved / name).write_bytes(whole)
    restore(saved, abstract(TREE), ())


def test_f40_more_files_than_were_written(saved):
    (saved / "params" / "more").write_text("x")
    with pytest.raises(IntegrityError, match="params/more is not in the manifest"):
        restore(saved, abstract(TREE), ())
    restore(saved, abstract(TREE), (), verify=False)


def test_without_verification_orbax_errors_are_ours(saved):
    shutil.rmtree(saved / "params" / "d")
    with pytest.raises(CorruptFile, match="Orbax cannot read it"):
        restore(saved, abstract(TREE), (), verify=False)


def test_a_manifest_of_a_later_version(saved):
    manifest = json.loads((saved / "jvdiff.json").read_text())
    (saved / "jvdiff.json").write_text(json.dumps({**manifest, "version": 2}))
    with pytest.raises(CheckpointError, match="version 1"):
        restore(saved, abstract(TREE), ())


def test_a_saved_directory_does_not_say_where_it_was_made(tmp_path):
    save(tmp_path / "model", {"a": {"kernel": np.ones((2, 3), np.float32)}})
    files = [file for file in (tmp_path / "model").rglob("*") if file.is_file()]
    assert [file.name for file in files if str(tmp_path).encode() in file.read_bytes()] == []
