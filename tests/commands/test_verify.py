"""`jvdiff verify`: a line for each thing, 0 or 3."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from convert.from_diffusers import convert
from convert.to_diffusers import to_hf
from jvdiff.commands import verify
from jvdiff.config import shipped
from jvdiff.media import video as videos
from jvdiff.media.fragmented_mp4 import FragmentedMP4
from jvdiff.runtime import run_state
from jvdiff.runtime.records import signed
from jvdiff.training.kept import kept
from jvdiff.weights.manifest import write_manifest


@pytest.fixture(scope="module")
def converted(tiny_repository, tmp_path_factory):
    convert(tiny_repository, tmp_path_factory.mktemp("converted") / "orbax")
    return next(tmp_path_factory.getbasetemp().glob("converted*/orbax"))


@pytest.fixture
def things(tmp_path):
    """A folder with one of each thing that is no repository: {what is damaged: the file}."""
    root, rng = tmp_path / "things", np.random.default_rng(0)
    video = rng.integers(255, size=(2, 16, 16, 3), dtype=np.uint8)
    record = {"prompt": "a red seven", "fps": 8, "checkpoint_digest": "0" * 64}
    clip = root / "out" / "clip"
    videos.write_mp4(f"{clip}.mp4", video, 8, record)
    videos.write_png(f"{clip}.png", videos.contact_sheet(video), record)
    np.savez(f"{clip}.npz", video=video)
    Path(f"{clip}.json").write_text(json.dumps(signed(clip, record)))
    facts = {"seed": 3}
    with FragmentedMP4(root / "out" / "s.mp4", 8) as film:
        film.append(video)
        facts = {"fps": 8, "frames": film.frames, "video": film.kept()}
        film.append(video)  # after the state was saved: cut off on resuming
    run_state.save(root / "out" / "s.state", run_state.RunState(facts, 2, {"x": np.arange(3.0)}))
    step = root / "run" / "state" / "4"
    (step / "default").mkdir(parents=True)
    (step / "default" / "d").write_bytes(b"numbers")
    write_manifest(step, {}, {}, "default/")
    kept(root / "run" / "latents.npz", "key", lambda: {"latents": np.ones(3)})
    return root


DAMAGED = [
    "out/clip.mp4",
    "out/clip.png",
    "out/clip.npz",
    "out/clip.json",
    "out/s.mp4",
    "out/s.state/state.json",
    "out/s.state/state.bin",
    "run/state/4/default/d",
    "run/state/4/jvdiff.json",
    "run/latents.npz",
]


def test_what_is_as_written_is_said_so_and_what_is_not_is_named(things, capsys):
    assert verify.main(["jvdiff verify", str(things)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all("as written" in line for line in lines)
    for name in DAMAGED:
        content = (things / name).read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 2
        (things / name).write_bytes(flipped)
        assert verify.main(["jvdiff verify", str(things)]) == 3, name
        told = capsys.readouterr()
        wrong = [line for line in told.out.splitlines() if "DIFFERS" in line]
        assert len(wrong) == 1 and "marked DIFFERS" in told.err and "Traceback" not in told.err, name
        (things / name).unlink()
        assert verify.main(["jvdiff verify", str(things)]) in (0, 3)
        capsys.readouterr()
        (things / name).write_bytes(content)
    assert verify.main(["jvdiff verify", str(things / "out" / "clip.mp4"), str(things / "run")]) == 0


def test_repositories_in_both_layouts(converted, tiny_repository, tmp_path, capsys):
    assert verify.main(["jvdiff verify", str(converted), str(tiny_repository), str(converted / "vae")]) == 0
    assert "has no digests of its own" in capsys.readouterr().out
    copy = shutil.copytree(converted, tmp_path / "copy")
    (copy / ".DS_Store").write_text("nobody's")
    assert verify.main(["jvdiff verify", str(copy)]) == 0
    (copy / "tokenizer" / "tokenizer.json").write_text(json.dumps({}))
    assert verify.main(["jvdiff verify", str(copy)]) == 3
    assert "tokenizer/tokenizer.json has" in capsys.readouterr().out


def test_a_folder_that_was_exported(converted, tmp_path, capsys):
    folder = tmp_path / "hf"
    to_hf(converted, folder)
    command = ["jvdiff verify", str(folder)]
    assert verify.main(command) == 0 and "repository, as written; sha256" in capsys.readouterr().out
    (folder / "README.md").write_text("nobody's")
    assert verify.main(command) == 0
    (folder / "jvdiff_defaults.json").rename(tmp_path / "defaults")
    assert verify.main(command) == 3 and "jvdiff_defaults.json is missing" in capsys.readouterr().out
    (tmp_path / "defaults").rename(folder / "jvdiff_defaults.json")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert verify.main(command) == 3 and f"vae/{file.name} has other content" in capsys.readouterr().out
    file.unlink()
    assert verify.main(command) == 3 and "vae: no weights" in capsys.readouterr().out


def test_what_ships_is_what_was_written(capsys):
    """Where a checkpoint is changed on purpose, CONTRIBUTING.md has the line that writes its manifest."""
    checkpoints = shipped("checkpoints")
    assert verify.main(["jvdiff verify", str(checkpoints)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list(checkpoints.glob("*/model_index.json"))) > 1
    assert all("repository, as written" in line for line in lines)


def test_a_blob_of_the_cache_is_compared_with_its_name(tiny_repository, tmp_path, capsys):
    root = tmp_path / "models--me--tiny"
    snapshot = shutil.copytree(tiny_repository, root / "snapshots" / ("0" * 40))
    (root / "blobs").mkdir()
    file = snapshot / "vae" / "diffusion_pytorch_model.safetensors"
    blob = root / "blobs" / verify.records.file_sha256(file)
    file.rename(blob)
    file.symlink_to(blob)
    assert verify.main(["jvdiff verify", str(snapshot)]) == 0
    assert "1 of 10 files compared" in capsys.readouterr().out
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    assert verify.main(["jvdiff verify", str(snapshot)]) == 3


def test_usage(tmp_path, capsys):
    for words in ([], ["--deep", "x"], ["~nobody-here/x"], ["s3://x"], [str(tmp_path)], [str(tmp_path / "nothing")]):
        assert verify.main(["jvdiff verify", *words]) == 2, words
    assert verify.main(["jvdiff verify", "--help"]) == 0
    assert "jvdiff verify: " in capsys.readouterr().out
