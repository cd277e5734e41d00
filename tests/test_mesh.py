"""A mesh from the outside: `generate` and the command line, on eight fake CPU devices and a tiny random repository."""

import json
import logging
import re

import jax
import numpy as np
import pytest

import jvdiff
from jvdiff import pipeline
from jvdiff.commands import sample
from jvdiff.errors import UsageError
from jvdiff.media import video as videos
from jvdiff.models.family import Request

PROMPT = "a red seven moving left"
STEM = "a-red-seven-moving-left_seed3"
SIZES = dict(num_frames=9, height=32, width=32)  # 12 tokens


@pytest.fixture(scope="module")
def alone(tiny_repository):
    return jvdiff.generate(jvdiff.load(tiny_repository), PROMPT, seed=3, **SIZES)


@pytest.fixture
def command(tiny_repository, tmp_path):
    file = tmp_path / "tiny.py"
    file.write_text("from jvdiff import sample\nget_config = sample.default_config\n")

    def build(**fields):
        given = (
            {"checkpoint": tiny_repository, "output": tmp_path / "out", "prompt": PROMPT, "seed": 3} | SIZES | fields
        )
        flags = [f"--config.{name}={value}" for name, value in given.items() if value is not None]
        return ["sample", f"--config={file}", "--config.compile_cache=off", *flags]

    return build


@pytest.fixture
def no_weights(monkeypatch):
    def load(*args):
        raise AssertionError("weights were read")

    monkeypatch.setattr(pipeline, "load", load)


@pytest.mark.parametrize(
    "mesh",
    [{"sequence": 4, "tensor": 2}, "data=2,sequence=4,ring=4", "fsdp=8"],
)
def test_a_clip_is_the_same_on_a_mesh_and_nothing_is_compiled_twice(tiny_repository, alone, mesh, caplog):
    pipe = jvdiff.load(tiny_repository, mesh=mesh)
    clip = pipe.clip(**SIZES)
    inputs = pipe.family.inputs(pipe.models, clip, Request(prompts=(PROMPT,)))
    for call in pipeline.trace(pipe.context, pipe.weights, clip, inputs):
        call.traced.lower().compile()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        out = jvdiff.generate(pipe, PROMPT, seed=3, **SIZES)
    told = " ".join(r.getMessage() for r in caplog.records if "Finished XLA compilation" in r.getMessage())
    assert not re.search(r"jit\((text|denoise|decode)\)", told)
    np.testing.assert_allclose(out.latents, alone.latents, atol=1e-5 * np.abs(alone.latents).max())
    assert np.abs(out.video.astype(int) - alone.video).max() <= 1


def test_a_batch_of_clips_is_divided(tiny_repository, alone):
    pipe = jvdiff.load(tiny_repository, mesh="data=8")
    out = jvdiff.generate(pipe, [PROMPT, "left", "a blue two", PROMPT], seed=3, **SIZES)
    np.testing.assert_allclose(out.latents[0], alone.latents[0], atol=1e-5 * np.abs(alone.latents).max())


def test_a_mesh_that_does_not_fit_the_clips_is_refused(tiny_repository):
    pipe = jvdiff.load(tiny_repository, mesh="data=8")
    with pytest.raises(UsageError, match=r"batch of 2.*\nThe nearest mesh that works is data=2"):
        jvdiff.generate(pipe, PROMPT, seed=3, **SIZES)


def test_a_library_call_chooses_no_mesh(tiny_repository):
    with pytest.raises(UsageError, match="auto"):
        jvdiff.load(tiny_repository, mesh="auto")


# ---------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("mesh", "told"),
    [
        ("tensor=8", "tensor=8 does not divide the 2 attention heads.\nThe nearest mesh that works is"),
        ("sequence=16", "16 devices, and there are 8"),
        ("sequence=8,ring=3", "ring=3 does not divide"),
        ("seqence=8", "expected some of data, fsdp, sequence, tensor, ring"),
    ],
)
def test_a_mesh_that_cannot_be_costs_no_weights(command, no_weights, capsys, mesh, told):
    assert sample.main(command(mesh=mesh)) == 2
    assert told in capsys.readouterr().err


def test_tokens_are_counted_before_weights_are_read(command, no_weights, capsys):
    assert sample.main(command(mesh="sequence=8", num_frames=5, height=16, width=16)) == 2
    assert "8 devices cannot share 2 video tokens.\nThe nearest mesh" in capsys.readouterr().err


def test_auto_takes_the_smallest_that_fits_and_says_why(command, tmp_path, capsys):
    assert sample.main(command(mesh="auto")) == 0
    told = capsys.readouterr().err
    assert re.search(r"mesh data=1: 1 of 8 devices, the smallest split that fits, .* of .*", told)
    record = json.loads((tmp_path / "out" / f"{STEM}.json").read_text())
    assert record["device"]["used"] == 1


def test_a_run_goes_on_under_another_mesh(command, tmp_path, alone, capsys):
    """Which the record names."""
    assert sample.main(command(mesh="tensor=2", stop_at=2)) == 0
    state = tmp_path / "out" / f"{STEM}.state"
    resumed = command(mesh="fsdp=2,sequence=4", resume=state, prompt=None, seed=None, save_arrays="true")
    assert sample.main(resumed) == 0
    assert "mesh fsdp=2,sequence=4" in capsys.readouterr().err
    record = json.loads((tmp_path / "out" / f"{STEM}.json").read_text())
    assert record["device"] | {"used": 8, "present": 8, "mesh": "fsdp=2,sequence=4"} == record["device"]
    with np.load(tmp_path / "out" / f"{STEM}.npz") as arrays:
        np.testing.assert_allclose(arrays["latents"], alone.latents[0], atol=1e-5 * np.abs(alone.latents).max())
    assert videos.read_video(tmp_path / "out" / f"{STEM}.mp4").shape == (9, 32, 32, 3)
