"""Wrong folders, known by sight: every one is told what it is and what to do, by every command that reads one."""

import json
import shutil
import struct
from pathlib import Path

import pytest

from jvdiff.commands import convert as converting
from jvdiff.commands import sample, stream, train
from jvdiff.errors import CheckpointError, JvdiffError, UnsafeFormat
from jvdiff.pipeline import repository

TENSORS = "diffusion_pytorch_model.safetensors"


def put(folder, *names, **contents):
    """Empty files, and files of text."""
    for name in (*names, *contents):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(contents.get(name, ""))
    return folder


def header(file, *names):
    """A file of safetensors with these names in its header, and no data behind it."""
    text = json.dumps({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in names}).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    return file


def authors(x, _):
    return put(x, "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/spiece.model", "config.json")


def authors_by_their_tensors(x, _):
    return header(x / TENSORS, "blocks.0.self_attn.q.weight", "head.head.weight").parent


def authors_by_their_config(x, _):
    put(x, "diffusion_pytorch_model-00001-of-00006.safetensors")
    return put(x, **{"config.json": json.dumps({"_class_name": "WanModel", "dim": 5120})})


def of_kind(x, kind, dim):
    config = {"_class_name": "WanModel", "model_type": kind, "dim": dim}
    return put(x, **{"Wan2.1_VAE.pth": "", "config.json": json.dumps(config)})


def too_high(x, tiny):
    shutil.copytree(tiny, x / "unpacked" / "Wan")
    return put(x, "notes.txt")


def several(x, tiny):
    for name in ("one", "two"):
        put(x / name, "model_index.json")
    return x


def too_deep(x, tiny):
    return shutil.copytree(tiny, x) / "transformer"


def cut_short(x, tiny):
    shutil.copytree(tiny, x)
    (x / "model_index.json").unlink()
    return put(x, ".cache/huggingface/download/vae/abc.incomplete")


def lora(x, _):
    return put(x, "pytorch_lora_weights.safetensors", "adapter_config.json")


def run_folder(x, tiny):
    shutil.copytree(tiny, x / "repository")
    return put(x, "metrics.jsonl", "config.json")


def converted_part(x, tiny):
    return put(x, "config.json", "params/_METADATA")


LAYOUTS = {
    authors: "T2V-1.3B-Diffusers or Wan-AI/Wan2.1-T2V-14B-Diffusers",
    lambda x, _: put(authors(x, _), "high_noise_model/config.json"): "Wan-AI/Wan2.2-I2V-A14B-Diffusers.",
    lambda x, _: of_kind(x, "i2v", 5120): "Wan2.1-I2V-14B-480P-Diffusers or Wan-AI/Wan2.1-I2V-14B-720P-Diffusers.",
    lambda x, _: of_kind(x, "ti2v", 3072): "published so: Wan-AI/Wan2.2-TI2V-5B-Diffusers.",
    lambda x, _: of_kind(x, "s2v", 5120): "own program, and speech-to-video; jvdiff does not run it.",
    authors_by_their_tensors: "layout of the Wan authors' own program",
    authors_by_their_config: "published so: Wan-AI/Wan2.1-T2V-14B-Diffusers.",
    lambda x, _: put(x, "wan2.1_t2v_1.3B_fp16.safetensors"): "as ComfyUI takes them",
    lambda x, _: put(x, "diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors", "vae/v.safetensors"): "as ComfyUI takes",
    lambda x, _: put(x, "w.safetensors") / "w.safetensors": "a single file of weights (all in one, as ComfyUI",
    lambda x, _: put(x, "w.gguf") / "w.gguf": "GGUF, which jvdiff does not read",
    lambda x, _: put(x, "model.pth"): "files of pickles, which can run code",
    too_high: "one folder too high: the repository is FOLDER/unpacked/Wan. Give that",
    several: "holds 2 repositories: FOLDER/one, FOLDER/two.",
    too_deep: "a part of the repository FOLDER. Give that folder.",
    lambda x, tiny: too_deep(x, tiny) / TENSORS: "one file of the repository FOLDER. Give that folder.",
    lambda x, tiny: shutil.copytree(tiny, x) / "model_index.json": "a file of a repository. Give its folder, FOLDER.",
    lambda x, tiny: shutil.copytree(tiny / "vae", x): "one part of a repository alone",
    converted_part: "one part alone, as a conversion or a training writes it",
    run_folder: "The model that it made is FOLDER/repository; give that",
    lambda x, _: put(x, "state/0/x", "metrics.jsonl", "config.json"): "has made no repository yet",
    lambda x, _: put(
        x, "state/0/x", "config.json", "vae/config.json"
    ): "made one part, FOLDER/vae, and not a repository",
    lambda x, _: put(x / "clip.state", "state.json"): "a saved state. Give it to --resume",
    lambda x, _: put(x, "models--Wan-AI--Wan2.1-T2V-1.3B-Diffusers/refs/main"): "Wan-AI/Wan2.1-T2V-1.3B-Diffusers.",
    cut_short: "was not finished.\nCopy or download it again, whole.\nA download was not finished: ",
    lora: "a LoRA, and jvdiff has none yet",
    lambda x, _: put(x, "clip.mp4"): "no model_index.json in it; expected the folder of a Diffusers repository",
    lambda x, _: x.mkdir() or x: "Found: an empty folder",
}


@pytest.mark.parametrize(("make", "words"), LAYOUTS.items(), ids=[str(i) for i in range(len(LAYOUTS))])
def test_a_wrong_folder_is_known_by_sight(tiny_repository, tmp_path, monkeypatch, make, words):
    place = make(tmp_path / "FOLDER", tiny_repository)
    with pytest.raises(CheckpointError) as error:
        repository.inspect(place)
    text = str(error.value).replace(f"{tmp_path}/", "")
    assert words in text and len(text.splitlines()) <= 6, text
    assert str(place) in str(error.value)
    if place.is_dir():  # and from inside, as `.`
        monkeypatch.chdir(place)
        with pytest.raises(CheckpointError):
            repository.inspect(".")


@pytest.mark.parametrize(
    ("pipeline", "transformer", "what"),
    [
        ("WanVACEPipeline", "WanVACETransformer3DModel", "VACE"),
        ("WanAnimatePipeline", "WanAnimateTransformer3DModel", "Animate"),
        ("WanPipeline", "WanVACETransformer3DModel", "VACE"),
        ("WanVideoToVideoPipeline", "WanTransformer3DModel", "video-to-video"),
        ("WanSpeechToVideoPipeline", "WanS2VTransformer3DModel", "speech-to-video"),
        ("WanFunControlPipeline", "WanTransformer3DModel", "Fun"),
        ("SkyReelsV2Pipeline", "SkyReelsV2Transformer3DModel", "SkyReels"),
        ("SkyReelsV2DiffusionForcingPipeline", "SkyReelsV2Transformer3DModel", "SkyReels"),
    ],
)
def test_models_that_look_alike_are_refused_by_name(tiny_repository, tmp_path, pipeline, transformer, what):
    """Some would load and run, and be wrong."""
    folder = shutil.copytree(tiny_repository, tmp_path / "FOLDER")
    for name, value in (("model_index.json", pipeline), ("transformer/config.json", transformer)):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": value}))
    with pytest.raises(CheckpointError, match=rf"is {what}\b.*; jvdiff does not run it\.\nUse a text-to-video"):
        repository.inspect(folder)


def test_pickles_are_called_unsafe_and_what_is_not_there_is_no_folder(tmp_path):
    with pytest.raises(UnsafeFormat, match="not opened"):
        repository.inspect(put(tmp_path, "a.pth") / "a.pth")
    with pytest.raises(JvdiffError, match="no such folder"):
        repository.inspect(tmp_path / "none")


def test_every_command_says_so(tiny_repository, tmp_path, capsys):
    high = too_high(tmp_path / "FOLDER", tiny_repository)
    out = ["--compile_cache=off", f"--output={tmp_path}/out"]
    shipped = Path(__file__).parents[2] / "checkpoints" / "digits"
    training = ["--config=train_digits_dit", f"--folder={tmp_path}/run", "--compile_cache=off"]
    for main, words in (
        (sample.main, [f"--checkpoint={high}", "--prompt=a", *out]),
        (stream.main, [f"--checkpoint={high}", "--prompt=a", *out]),
        (converting.main, [f"--source={high}", f"--target={tmp_path}/converted"]),
        (converting.to_hf, [f"--source={high}", f"--target={tmp_path}/exported"]),
        (train.main, [*training, f"--vae={shipped}/vae", f"--initial={high}"]),
    ):
        assert main(["jvdiff", *words]) == 3, words
        assert f"the repository is {high}/unpacked/Wan. Give that folder." in capsys.readouterr().err
    assert train.main(["jvdiff", *training, f"--vae={shipped}"]) == 2
    assert f"The vae in it is {shipped}/vae; give that." in capsys.readouterr().err
    assert not (tmp_path / "converted").exists() and not (tmp_path / "exported").exists()


def test_a_component_that_model_index_names_and_that_is_not_there(tiny_repository, tmp_path):
    copy = shutil.copytree(tiny_repository, tmp_path / "copy")
    shutil.rmtree(copy / "tokenizer")
    put(copy, ".cache/huggingface/download/tokenizer/x.incomplete")
    with pytest.raises(CheckpointError) as error:
        repository.inspect(copy)
    assert "names tokenizer, and there is no such folder" in str(error.value)
    assert "A download was not finished: " in str(error.value) and "x.incomplete" in str(error.value)
    index = json.loads((copy / "model_index.json").read_text())
    for value in ({"a": 1}, 5, "x", [], None):  # whatever the entry is, a sentence
        (copy / "model_index.json").write_text(json.dumps(index | {"tokenizer": value, "transformer_2": value}))
        with pytest.raises(CheckpointError):
            repository.inspect(copy)


def test_a_pointer_of_git_lfs_is_named_in_any_file(tiny_repository, tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for number, name in enumerate(("tokenizer/tokenizer.json", "vae/config.json", f"transformer/{TENSORS}")):
        copy = shutil.copytree(tiny_repository, tmp_path / str(number))
        (copy / name).write_text(pointer)
        with pytest.raises(CheckpointError, match=r"a Git LFS pointer.*run `git lfs pull`"):
            there = repository.inspect(copy)
            repository.safetensors.open_folder(there.path / "transformer")


def test_two_sets_of_weights_converted_and_published(tiny_repository, tmp_path):
    both = shutil.copytree(tiny_repository, tmp_path / "both")
    (both / "vae" / "params").mkdir()
    with pytest.raises(CheckpointError, match=f"two sets of weights: {TENSORS} and params/"):
        repository.inspect(both)
