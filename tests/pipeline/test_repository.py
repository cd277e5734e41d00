"""What a repository says of itself, what is refused, and trained components that become one (F28, F31)."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.from_diffusers import convert
from jvdiff import pipeline
from jvdiff.errors import CheckpointError, CorruptFile, IntegrityError, UnsafeFormat, UsageError
from jvdiff.models.family import read_weights
from jvdiff.pipeline import repository, settings
from jvdiff.weights import manifest


@pytest.fixture(scope="module")
def orbax(tiny_repository, tmp_path_factory):
    target = tmp_path_factory.mktemp("converted") / "orbax"
    convert(tiny_repository, target)
    return target


@pytest.fixture
def copy(tiny_repository, tmp_path):
    return shutil.copytree(tiny_repository, tmp_path / "repository")


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_digests_tell_weights_apart(copy, orbax, tmp_path):
    first = repository.inspect(copy).digest
    assert first == repository.inspect(copy).digest
    assert repository.inspect(orbax).digest != first
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert repository.inspect(copy).digest != first


def test_what_is_loaded_is_hashed_meanwhile_and_read_once(copy, monkeypatch):
    first, second, hashed, sha256 = repository.inspect(copy), repository.inspect(copy), [], manifest.file_sha256
    known = first.digest
    monkeypatch.setattr(manifest, "file_sha256", lambda file: hashed.append(file.suffix) or sha256(file))
    pipeline.load(second, "float32")
    assert second.digest == known and hashed and ".safetensors" not in hashed
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(IntegrityError, match=f"{file}: changed since it was read before"):
        pipeline.load(first, "float32")


READ = [
    "model_index.json",
    "jvdiff_defaults.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer.json",
    "text_encoder/config.json",
    "vae/config.json",
]
NOBODYS = [
    ".DS_Store",
    "transformer/.DS_Store",
    ".gitattributes",
    "README.md",
    "transformer/README.md",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
    "vae/config.json~",
    "tokenizer/.tokenizer.json.swp",
    ".git/config",
]


def test_what_is_read_is_under_the_digest_and_nothing_else(copy):
    first = repository.inspect(copy).digest
    for name in NOBODYS:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(b"nobody reads this")
        assert repository.inspect(copy).digest == first, name
    for name in READ:
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content + b" ")
        assert repository.inspect(copy).digest != first, name
        (copy / name).write_bytes(content)
    assert repository.inspect(copy).digest == first


def test_small_files_of_a_converted_directory_are_compared_with_the_manifest(orbax, tmp_path):
    folder = shutil.copytree(orbax, tmp_path / "orbax")
    first = repository.inspect(folder).digest
    for name in NOBODYS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"nobody reads this")
    shutil.copy(folder / ".DS_Store", folder / "vae" / "params" / ".DS_Store")
    assert repository.inspect(folder).digest == first
    pipeline.load(folder, "float32")
    for name in READ:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content.replace(b"a", b"e", 1))
        with pytest.raises(IntegrityError, match=f"{name} has other content"):
            repository.inspect(folder)
        (folder / name).unlink()
        with pytest.raises(IntegrityError, match=f"{name} is missing"):
            repository.inspect(folder)
        (folder / name).write_bytes(content)


def test_a_file_that_would_be_read_and_that_the_manifest_does_not_know(orbax, tmp_path):
    folder = shutil.copytree(orbax, tmp_path / "orbax")
    manifest = json.loads((folder / "jvdiff.json").read_text())
    del manifest["files"]["jvdiff_defaults.json"]
    (folder / "jvdiff.json").write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match=r"jvdiff_defaults.json is not in the manifest"):
        repository.inspect(folder)


@pytest.mark.parametrize(
    "value", [["my_module", "MyTransformer"], ["diffusers_modules.local", "X"], ["diffusers"], ["../evil", "X"]]
)
def test_f28_remote_code(copy, value):
    (copy / "my_module.py").write_text("open('ran', 'w')")
    change(copy / "model_index.json", transformer=value)
    with pytest.raises(UnsafeFormat, match="remote code is not supported"):
        repository.inspect(copy)
    assert not os.path.exists("ran")


def test_f28_auto_map(copy):
    change(copy / "text_encoder" / "config.json", auto_map={"AutoModel": "evil.Model"})
    with pytest.raises(UnsafeFormat, match="remote code is not supported"):
        repository.inspect(copy)


@pytest.mark.parametrize(
    "file, values, words",
    [
        ("model_index.json", {"_class_name": "WanImageToVideoPipeline"}, "latent channels"),
        (
            "model_index.json",
            {"_class_name": "WanCausalDMDPipeline"},
            "expected WanPipeline or WanDMDPipeline with that",
        ),
        (
            "transformer/config.json",
            {"_class_name": "CausalWanTransformer3DModel"},
            "expected WanCausalDMDPipeline with that",
        ),
        ("model_index.json", {"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "names transformer_2"),
        ("transformer/config.json", {"_class_name": "AutoencoderKLWan"}, "describes 'AutoencoderKLWan', expected"),
        ("transformer/config.json", {"in_channels": 36}, "do not fit together"),
        ("text_encoder/config.json", {"d_model": 24}, "do not fit together"),
    ],
)
def test_repositories_that_cannot_be_used(copy, file, values, words):
    change(copy / file, **values)
    with pytest.raises(CheckpointError, match=words):
        repository.inspect(copy)


@pytest.mark.parametrize(
    "file", ["model_index.json", "vae/config.json", "scheduler/scheduler_config.json", "text_encoder/config.json"]
)
def test_incomplete_and_truncated_repositories(copy, file):
    whole = (copy / file).read_text()
    (copy / file).write_text(whole[: len(whole) // 2])
    with pytest.raises(CorruptFile, match="not usable as JSON"):
        repository.inspect(copy)
    (copy / file).unlink()
    with pytest.raises(CheckpointError, match=file.split("/")[-1]):
        repository.inspect(copy)


def test_f26_a_single_file(tmp_path):
    (tmp_path / "model.pth").write_bytes(b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(UnsafeFormat, match="not opened"):
        repository.inspect(tmp_path / "model.pth")
    with pytest.raises(UsageError, match="no such folder"):
        repository.inspect(tmp_path / "none")


def test_f31_more_words_than_embedding_rows(copy, tmp_path):
    change(copy / "text_encoder" / "config.json", vocab_size=3)
    with pytest.raises(CheckpointError, match="do not belong together"):
        convert(copy, tmp_path / "orbax")


def test_a_causal_repository_is_for_the_streaming_program(tiny_causal_repository, tiny_repository):
    assert repository.inspect(tiny_causal_repository).models.configs["transformer"].causal
    causal = repository.inspect(tiny_causal_repository, at_once=False)
    assert causal.models.files["scheduler"]["shift"] == 5.0 and not causal.family.at_once
    assert not repository.inspect(tiny_repository, at_once=True).models.configs["transformer"].causal
    with pytest.raises(UsageError, match=r"chunk by chunk; run it with `jvdiff stream`"):
        pipeline.load(tiny_causal_repository)
    with pytest.raises(UsageError, match=r"at once; run it with `jvdiff sample`"):
        repository.inspect(tiny_repository, at_once=False)


def components(inspected):
    """The configuration and the parameters of each part."""
    parts = inspected.family.parts
    return {
        name: (cfg, read_weights(inspected.path / name, parts[name], cfg, jnp.float32))
        for name, cfg in inspected.models.configs.items()
    }


def test_save_causal_repository(tiny_causal_repository, tmp_path):
    source = repository.inspect(tiny_causal_repository)
    parts, tokenizer = components(source), source.path / "tokenizer"
    unipc = {"_class_name": "UniPCMultistepScheduler", "flow_shift": 5.0}
    stream = {"stream": {"len_t": 3, "sink_size_t": 1}}
    for number, scheduler in enumerate((source.models.files["scheduler"], unipc)):
        saved = tmp_path / str(number)
        files = {"tokenizer": tokenizer, "scheduler": {"scheduler_config.json": scheduler}}
        repository.save(saved, source.family, parts, files=files, defaults=stream)
        index = json.loads((saved / "model_index.json").read_text())
        assert index["_class_name"] == "WanCausalDMDPipeline"
        assert index["transformer"] == ["diffusers", "CausalWanTransformer3DModel"]
        assert index["scheduler"] == ["diffusers", scheduler["_class_name"]]
        kept = repository.inspect(saved)
        assert kept.models.configs["transformer"] == source.models.configs["transformer"]
        assert kept.defaults == settings.read_defaults(saved, kept.family) == {}
    euler = {"scheduler_config.json": {"_class_name": "FlowMatchEulerDiscreteScheduler"}}
    with pytest.raises(UsageError, match="needs one of SelfForcingFlowMatchScheduler"):
        repository.save(tmp_path / "x", source.family, parts, files={"tokenizer": tokenizer, "scheduler": euler})
    assert not (tmp_path / "x").exists()


def test_save_repository(tiny_repository, tmp_path):
    source = repository.inspect(tiny_repository)
    parts = components(source)
    files = {name: source.path / name for name in ("tokenizer", "scheduler")}
    repository.save(tmp_path / "trained", source.family, parts, files=files, defaults={"steps": 4})
    kept = repository.inspect(tmp_path / "trained")
    assert kept.models.configs == source.models.configs and kept.defaults == {"steps": 4}
    assert kept.models.files["scheduler"] == source.models.files["scheduler"]
    for name, (cfg, params) in components(kept).items():
        assert cfg == parts[name][0]
        jax.tree.map(np.testing.assert_array_equal, params, parts[name][1])
    with pytest.raises(UsageError, match="expected transformer, transformer_2, vae, text_encoder"):
        repository.save(tmp_path / "x", source.family, {"vae": parts["vae"]}, files=files)
    with pytest.raises(UsageError, match="expected scheduler, tokenizer"):
        repository.save(tmp_path / "x", source.family, parts, files={"scheduler": files["scheduler"]})
    assert not (tmp_path / "x").exists()
