"""The shapes that the hub's cache and its relatives give to a repository: all read as the folder they stand for (K)."""

import hashlib
import json
import os
import shutil
import threading
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file

import jvdiff
from jvdiff import streaming
from jvdiff.commands import convert, sample, stream, train, verify
from jvdiff.errors import CheckpointError, UnsafeFormat, UsageError
from jvdiff.pipeline import repository
from jvdiff.weights import locate, safetensors

COMMIT, NAME = "0123456789abcdef" * 2 + "01234567", "diffusion_pytorch_model.safetensors"


@pytest.fixture
def cache(tiny_repository, tmp_path, monkeypatch):
    """The folder of Owner/tiny in a cache of the hub, whose snapshot is made of links to blobs."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    root = tmp_path / "hub" / "models--Owner--tiny"
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    for file in (p for p in tiny_repository.rglob("*") if p.is_file()):
        blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        link = root / "snapshots" / COMMIT / file.relative_to(tiny_repository)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return root


def snapshot(root):
    return root / "snapshots" / COMMIT


def linked(target, place):
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target)
    return place


def components(root, place):
    for entry in snapshot(root).iterdir():
        linked(entry, place / entry.name)
    return place


def files(root, place):
    for file in (p for p in snapshot(root).rglob("*") if p.is_file()):
        linked(file, place / file.relative_to(snapshot(root)))
    return place


def moved(root, place):
    shutil.copytree(root / "snapshots", place / root.name / "snapshots", symlinks=True)
    return linked(root / "blobs", place / root.name / "blobs").parent / "snapshots" / COMMIT


def annex(root, place):
    shutil.copytree(snapshot(root), place / "repo")
    store = place / ".git" / "annex" / "objects" / "KEY"
    store.parent.mkdir(parents=True)
    (place / "repo" / "vae" / NAME).rename(store)
    return linked("../../.git/annex/objects/KEY", place / "repo" / "vae" / NAME).parents[1]


SHAPES = {
    "the snapshot": lambda root, place: snapshot(root),
    "the repository of the cache": lambda root, place: root,
    "its folder of snapshots": lambda root, place: root / "snapshots",
    "a link to the snapshot": lambda root, place: linked(snapshot(root), place),
    "a link to the repository": lambda root, place: linked(root, place),
    "a cache that is a link": lambda root, place: linked(root.parent, place) / root.name / "snapshots" / COMMIT,
    "a folder of links to components": components,
    "a folder of links to files": files,
    "blobs on another disk": moved,
    "git-annex": annex,
    "by name": lambda root, place: "Owner/tiny",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_reads_as_the_folder(tiny_repository, cache, tmp_path, shape):
    expected = load_file(tiny_repository / "vae" / NAME)
    there = repository.inspect(SHAPES[shape](cache, tmp_path / "place"))
    assert there.digest == repository.inspect(tiny_repository).digest
    for part in there.models.configs:
        tensors = safetensors.open_folder(there.path / part, there.family.parts[part].stem)
        if part == "vae":
            assert all(np.array_equal(tensors.read(name), value) for name, value in expected.items())


def test_a_link_to_a_snapshot_through_every_command(cache, tiny_repository, tmp_path, monkeypatch, capsys):
    """From inside the folder, too; conversion copies the small files that are links."""
    place = linked(snapshot(cache), tmp_path / "place")
    monkeypatch.chdir(place)
    flags = ["--prompt=a red seven", "--num_frames=2", f"--output={tmp_path}/out", "--compile_cache=off"]
    assert sample.main(["sample", "--checkpoint=.", *flags]) == 2  # read, and then
    assert "num_frames is 2" in capsys.readouterr().err
    assert convert.main(["convert", "--source=.", f"--target={tmp_path}/converted"]) == 0
    assert convert.to_hf(["to_hf", f"--source={tmp_path}/converted", f"--target={tmp_path}/back"]) == 0
    names = {str(p.relative_to(tiny_repository)) for p in tiny_repository.rglob("*") if p.is_file()}
    names |= {"jvdiff_manifest.json"}
    assert {str(p.relative_to(tmp_path / "back")) for p in (tmp_path / "back").rglob("*") if p.is_file()} == names


@pytest.mark.parametrize("name", ["vae/" + NAME, "vae/config.json", "tokenizer/tokenizer.json", "model_index.json"])
def test_another_link_out_of_the_folder_is_followed_only_when_told(tiny_repository, tmp_path, name):
    """Whatever kind of file it is; DVC's store, for one, is not among those that are known."""
    copy = shutil.copytree(tiny_repository, tmp_path / "copy")
    (tmp_path / ".dvc" / "cache").mkdir(parents=True)
    (copy / name).rename(tmp_path / ".dvc" / "cache" / "file")
    linked(tmp_path / ".dvc" / "cache" / "file", copy / name)
    with pytest.raises(UnsafeFormat, match=r"outside the repository.\n.*--follow_symlinks"):
        jvdiff.load(copy)
    assert jvdiff.load(copy, follow_symlinks=True).weights


def test_follow_symlinks_is_a_flag_of_every_command(tiny_repository, tiny_causal_repository, tmp_path, capsys):
    elsewhere = shutil.copytree(tiny_repository / "vae", tmp_path / "elsewhere")
    whole, causal = (
        shutil.copytree(one, tmp_path / name, ignore=shutil.ignore_patterns("vae"))
        for name, one in (("whole", tiny_repository), ("causal", tiny_causal_repository))
    )
    for folder in (whole, causal):
        linked(elsewhere, folder / "vae")
    out = ["--prompt=a red seven", f"--output={tmp_path}/out", "--compile_cache=off"]
    for main, words in (
        (sample.main, [f"--checkpoint={whole}", "--num_frames=2", *out]),
        (convert.main, [f"--source={whole}", f"--target={tmp_path}/converted"]),
        (convert.to_hf, [f"--source={whole}", f"--target={tmp_path}/back"]),  # 2: not a converted one
        (stream.main, [f"--checkpoint={causal}", "--then.0=a", *out]),
    ):
        assert main(["jvdiff", *words]) == 3
        assert "outside the repository" in (said := capsys.readouterr().err) and "--follow_symlinks" in said
        assert main(["jvdiff", *words, "--follow_symlinks"]) == (0 if main is convert.main else 2)
        assert "outside the repository" not in capsys.readouterr().err
    assert (tmp_path / "converted" / "jvdiff.json").is_file()
    arrays = tmp_path / "converted" / "transformer" / "params" / "ocdbt.process_0"  # nobody looks into these but Orbax
    linked(shutil.move(arrays, tmp_path / "arrays"), arrays)
    for main, words in (
        (convert.to_hf, [f"--source={tmp_path}/converted", f"--target={tmp_path}/back"]),
        (convert.main, [f"--target={tmp_path}/converted", "--verify"]),
        (verify.main, [f"{tmp_path}/converted/transformer"]),
    ):
        assert main(["jvdiff", *words]) == 3 and "outside the repository" in "".join(capsys.readouterr())
        assert main(["jvdiff", *words, "--follow_symlinks"]) == 0
    with pytest.raises(UnsafeFormat, match="outside the repository"):
        jvdiff.load(tmp_path / "converted")
    assert jvdiff.load(tmp_path / "converted", follow_symlinks=True).weights
    metadata = tmp_path / "converted" / "vae" / "params" / "_METADATA"
    metadata.unlink()
    metadata.symlink_to("../.git/annex/objects/KEY")
    with pytest.raises(CheckpointError, match="run `git annex get`"):
        jvdiff.load(tmp_path / "converted", follow_symlinks=True)
    assert "follow_symlinks" in {path for each in train.sections({}, {}) for path in each.options}
    with pytest.raises(UnsafeFormat):
        streaming.load(causal)
    assert streaming.load(causal, follow_symlinks=True)


def test_links_to_nowhere_and_files_of_others_are_sentences(cache, tiny_repository, tmp_path, monkeypatch):
    (snapshot(cache) / "vae" / NAME).resolve().unlink()
    (cache / "blobs" / "0123.incomplete").touch()
    with pytest.raises(CheckpointError, match=r"a link to \.\./\.\./\.\./blobs/.*, which is not there.\nA download"):
        jvdiff.load(snapshot(cache))
    index = {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    text_encoder = snapshot(cache) / "text_encoder"
    (text_encoder / "model.safetensors").rename(text_encoder / "model-1.safetensors")
    (text_encoder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as error:
        safetensors.open_folder(text_encoder, "model")
    assert "1 of 2 shards are missing: model-2.safetensors (1 tensors)." in str(error.value)
    assert "A download was not finished: " in str(error.value) and "0123.incomplete" in str(error.value)
    (snapshot(cache) / "vae" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"vae/config.json: cannot be read .*\nA download was not finished"):
        repository.inspect(snapshot(cache))

    def refuse(file, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(file))

    linked("../.git/annex/objects/KEY", tmp_path / "annexed" / NAME)
    with pytest.raises(CheckpointError, match="run `git annex get`"):
        safetensors.open_folder(tmp_path / "annexed")
    with pytest.raises(CheckpointError, match="gone: a link to nowhere, which is not there"):
        locate(linked("nowhere", tmp_path / "gone"))
    monkeypatch.setattr(safetensors, "open", refuse, raising=False)
    with pytest.raises(CheckpointError, match=r"Permission denied\).\nThe file is of \w+, mode 0\d+. Ask its owner"):
        safetensors.open_folder(tiny_repository / "vae")


def test_without_a_network_what_is_cached_is_used(cache, monkeypatch):
    """Without HF_HUB_OFFLINE, and whatever the hub's library says of it."""
    asked = threading.Event()

    def down(*args, **kwargs):
        asked.set()
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", down)
    assert locate("Owner/tiny") == snapshot(cache) and asked.is_set()
    assert locate(f"Owner/tiny@{COMMIT}") == snapshot(cache)
    with pytest.raises(
        CheckpointError, match=rf"not in the local cache.*\(ConnectionError\).\nThe cache has .*@{COMMIT}"
    ):
        locate("Owner/tiny@v2")
    shutil.copytree(snapshot(cache), cache / "snapshots" / ("f" * 40), symlinks=True)
    assert locate(cache) == snapshot(cache)
    (cache / "refs" / "main").unlink()
    with pytest.raises(UsageError, match=r"several snapshots .*Name one of them: Owner/tiny@0123"):
        locate(cache)
    with pytest.raises(CheckpointError, match="not in the local cache"):  # never another commit than was asked for
        locate("Owner/tiny")
    shutil.rmtree(cache / "snapshots")
    (cache / "snapshots").mkdir()
    with pytest.raises(CheckpointError, match=r"without a snapshot: its download was not finished(.|\n)*hf download"):
        locate(cache)


def shards(folder, names):
    """The folder's single file cut into one shard, with an index of that name."""
    tensors = load_file(folder / NAME)
    save_file({name: value * 0 for name, value in tensors.items()}, folder / names[0])
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, names[0])}
    (folder / names[1]).write_text(repr(index).replace("'", '"'))


def test_two_sets_of_weights_are_refused_and_variants_are_none(tiny_repository, tmp_path, capsys):
    copy = shutil.copytree(tiny_repository, tmp_path / "copy")
    vae, stem = copy / "vae", NAME.removesuffix(".safetensors")
    save_file({"x": np.zeros(1, np.float16)}, vae / f"{stem}.fp16.safetensors")
    shards(vae, (f"{stem}.fp16-00001-of-00001.safetensors", f"{NAME}.index.fp16.json"))
    expected = load_file(vae / NAME)
    opened = safetensors.open_folder(vae)
    assert opened.tensors.keys() == expected.keys() and {t.file.name for t in opened.tensors.values()} == {NAME}
    repository.inspect(copy)

    shards(vae, (f"{stem}-00001-of-00001.safetensors", f"{NAME}.index.json"))
    message = f"vae: holds two sets of weights: {NAME} and {NAME}.index.json with its shards."
    out = [f"--checkpoint={copy}", "--prompt=a", f"--output={tmp_path}/out", "--compile_cache=off"]
    for main, words in (
        (sample.main, out),
        (convert.main, [f"--source={copy}", f"--target={tmp_path}/converted"]),
        (stream.main, out),
    ):
        assert main(["jvdiff", *words]) == 3
        assert message in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="holds two sets of weights"):
        safetensors.open_folder(vae)
    (vae / NAME).unlink()
    assert not safetensors.open_folder(vae).read(next(iter(expected))).any()
    shards_alone = {p.name for p in Path(vae).glob("*.safetensors")}
    (vae / f"{NAME}.index.json").write_text((vae / f"{NAME}.index.json").read_text().replace("-00001-of-00001", ""))
    save_file(expected, vae / NAME)  # the index names the single file: one set
    assert safetensors.open_folder(vae).read(next(iter(expected))).any() and len(shards_alone) == 3
