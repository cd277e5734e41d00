"""The command line, end to end on a tiny random repository: files, resuming, faults and exit status."""

import dataclasses
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import jvdiff
from jvdiff import kernels, pipeline, plan
from jvdiff.commands import command_line, sample, verify
from jvdiff.errors import ResourceError, SetupError
from jvdiff.media import video as videos
from jvdiff.models import wan
from jvdiff.models.wan import family
from jvdiff.runtime import environment, progress, run_state
from tests.forks import Process

PROMPT = "a red seven moving left"
STEM = "a-red-seven-moving-left_seed3"
CONFIG = "from jvdiff import sample\nget_config = sample.default_config\n"


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def command(tiny_repository, config_file, tmp_path):
    """argv of a run into tmp_path/out; keywords are config fields, None leaves one out."""

    def build(**fields):
        given = {"checkpoint": tiny_repository, "output": tmp_path / "out", "prompt": PROMPT, "seed": 3} | fields
        given.setdefault("compile_cache", "off")
        flags = [f"--config.{name}={value}" for name, value in given.items() if value is not None]
        return ["sample", f"--config={config_file}", *flags]

    return build


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test if weights are read."""

    def load(*args):
        raise AssertionError("weights were read")

    monkeypatch.setattr(pipeline, "load", load)


def read(path):
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


# -------------------------------------------------------------------------------------------------------------- files


def test_a_prompt_becomes_a_video_with_its_record(command, tmp_path, tiny_repository, capsys):
    assert sample.main(command(save_arrays="true")) == 0
    out = tmp_path / "out"
    assert capsys.readouterr().out.strip() == str(out / f"{STEM}.mp4")
    assert sorted(p.name for p in out.iterdir()) == [f"{STEM}.{kind}" for kind in ("json", "mp4", "npz", "png")]
    arrays = read(out / f"{STEM}.npz")
    same = jvdiff.generate(jvdiff.load(tiny_repository), PROMPT, seed=3)
    np.testing.assert_array_equal(arrays["latents"], same.latents[0])
    np.testing.assert_array_equal(arrays["video"], same.video[0])
    assert videos.read_video(out / f"{STEM}.mp4").shape == (5, 16, 16, 3)
    record = json.loads((out / f"{STEM}.json").read_text())
    assert record["prompt"] == PROMPT and record["seed"] == 3 and record["steps"] == 4
    assert videos.read_metadata(out / f"{STEM}.mp4").items() <= record.items()
    assert set(record["seconds"]) == {"load", "encode", "compile", "denoise", "decode"}
    assert record["attention_chosen"] == {"self": "xla", "cross": "xla"} and record["device"]["backend"] == "cpu"
    assert len(record["sigmas"]) == 5 and record["versions"]["jax"] == jax.__version__
    assert len(record["checkpoint_digest"]) == 64 and record["environment"] == environment.numerics()
    assert verify.main(["jvdiff verify", str(out)]) == 0
    assert "json: record, as written, with .mp4, .png, .npz" in capsys.readouterr().out


def test_a_sparse_pattern_is_in_the_record_and_decides_the_clip(command, tmp_path, tiny_repository):
    pattern = "video_sparse:1x1x1:0.5"
    assert sample.main(command(save_arrays="true", pattern=pattern, attention="reference")) == 0
    record = json.loads((tmp_path / "out" / f"{STEM}.json").read_text())
    assert record["pattern"] == pattern and record["attention_chosen"] == {"self": "reference", "cross": "reference"}
    pipe, latents = jvdiff.load(tiny_repository), read(tmp_path / "out" / f"{STEM}.npz")["latents"]
    same = jvdiff.generate(pipe, PROMPT, seed=3, pattern=pattern, attention="reference")
    np.testing.assert_array_equal(latents, same.latents[0])
    assert np.abs(jvdiff.generate(pipe, PROMPT, seed=3).latents[0] - latents).max() > 1e-3


def test_a_taken_name_is_never_overwritten(command, tmp_path):
    assert sample.main(command(steps=1)) == 0
    first = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert sample.main(command(steps=1)) == 0
    assert all(path.read_bytes() == content for path, content in first.items())
    assert (tmp_path / "out" / f"{STEM}-2.mp4").exists() and (tmp_path / "out" / f"{STEM}-2.json").exists()


def test_no_seed_draws_one_and_says_which(command, tmp_path, capsys):
    assert sample.main(command(seed=None, steps=1)) == 0
    record = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    assert f"seed: {record['seed']}" in capsys.readouterr().err


def test_a_converted_repository_gives_the_same_clip(command, tmp_path, tiny_repository):
    target = tmp_path / "orbax"
    assert Process("-m", "convert", "--source", tiny_repository, "--target", target).wait() == 0
    pipe = jvdiff.load(target)
    assert pipe.settings().steps == 4  # the defaults came along
    same = jvdiff.generate(jvdiff.load(tiny_repository), PROMPT, seed=3)
    np.testing.assert_array_equal(jvdiff.generate(pipe, PROMPT, seed=3).latents, same.latents)


# ----------------------------------------------------------------------------------------------------------- resuming


def test_stopped_on_purpose_and_finished_is_uninterrupted(command, tmp_path, printed, same_files):
    """The command that is printed makes every file of the whole run, byte for byte."""
    fields = {"save_arrays": "true", "preview_every": 1, "fps": 5, "negative_prompt": "blue", "vae_decode": "tf32"}
    assert sample.main(command(output=tmp_path / "whole", **fields)) == 0
    assert sample.main(command(stop_at=2, **fields)) == 0
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {f"{STEM}.state", f"{STEM}.preview.png"}
    again = printed()
    said = command(prompt=None, seed=None, resume=out / f"{STEM}.state", **fields)
    assert sorted(again[3:]) == sorted(said[2:])  # behind --config and its file
    assert sample.main(again) == 0
    same_files(tmp_path / "whole", out)
    record = json.loads((out / f"{STEM}.json").read_text())
    assert (record["resumed_at_step"], record["vae_decode"]) == (2, "tf32")
    assert record["dtypes"]["vae_decode"] == "tf32, emulated"  # there is no GPU


def test_ctrl_c_saves_a_state_that_another_process_finishes(command, tmp_path):
    child = Process("-m", "jvdiff.sample", *command(steps=1000)[1:])
    while "denoise" not in child.err:
        assert child.poll() is None, child.err
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    assert child.wait() == 5, child.err
    assert re.search(r"interrupted after step \d+ of 1000", child.err) and "Traceback" not in child.err
    state = tmp_path / "out" / f"{STEM}.state"
    assert 0 < run_state.load(state).done < 1000
    assert not list((tmp_path / "out").glob("*.mp4")) and not list((tmp_path / "out").glob("*.json"))
    assert sample.main(command(resume=state, prompt=None, seed=None, save_arrays="true")) == 0
    assert sample.main(command(steps=1000, save_arrays="true", output=tmp_path / "whole")) == 0
    whole, finished = read(tmp_path / "whole" / f"{STEM}.npz"), read(tmp_path / "out" / f"{STEM}.npz")
    np.testing.assert_array_equal(finished["latents"], whole["latents"])
    np.testing.assert_array_equal(finished["video"], whole["video"])


def test_ctrl_c_while_decoding_loses_no_step(command, tmp_path, monkeypatch):
    decode = pipeline.decode

    def interrupted(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        return decode(*args, **options)

    monkeypatch.setattr(pipeline, "decode", interrupted)
    assert sample.main(command(steps=2)) == 5
    monkeypatch.undo()
    assert run_state.load(tmp_path / "out" / f"{STEM}.state").done == 2
    assert sample.main(command(resume=tmp_path / "out" / f"{STEM}.state", prompt=None, seed=None)) == 0
    assert (tmp_path / "out" / f"{STEM}.mp4").exists()


@pytest.fixture(scope="module")
def stopped(tiny_repository, config_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("stopped")
    given = {
        "checkpoint": tiny_repository,
        "output": out,
        "prompt": PROMPT,
        "seed": 3,
        "stop_at": 1,
        "compile_cache": "off",
    }
    assert sample.main(["sample", f"--config={config_file}", *(f"--config.{k}={v}" for k, v in given.items())]) == 0
    return out / f"{STEM}.state"


@pytest.fixture
def state(stopped, tmp_path):
    return Path(shutil.copytree(stopped, tmp_path / "out" / stopped.name))


def test_other_settings_or_weights_are_refused_one_by_one(
    command, state, tmp_path, tiny_repository, capsys, no_weights
):
    other = tmp_path / "other"
    shutil.copytree(tiny_repository, other)
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text() + "\n")
    assert sample.main(command(resume=state, seed=4, solver="euler", checkpoint=other)) == 3
    said = capsys.readouterr().err
    for difference in ("seed: the state has 3, this run 4", "solver: the state has 'unipc'", "checkpoint_digest"):
        assert difference in said
    assert "prompt:" not in said


def test_a_state_of_another_environment_is_refused(command, state, tmp_path, capsys, no_weights):
    whole = run_state.load(state)
    facts = {**whole.facts, "environment": {**whole.facts["environment"], "jax_enable_x64": True}}
    folder = run_state.save(tmp_path / "other.state", dataclasses.replace(whole, facts=facts))
    assert sample.main(command(resume=folder, prompt=None, seed=None)) == 3
    assert "environment.jax_enable_x64: the state has True, this run False" in capsys.readouterr().err


def test_the_same_settings_said_again_are_fine(command, state):
    assert sample.main(command(resume=state, steps=4, guidance=3)) == 0


@pytest.mark.parametrize("name", ["prompt", "seed", "precision"])
def test_a_state_without_a_fact_is_refused(command, state, tmp_path, name, capsys, no_weights):
    whole = run_state.load(state)
    facts = {key: value for key, value in whole.facts.items() if key != name}
    folder = run_state.save(tmp_path / "less.state", dataclasses.replace(whole, facts=facts))
    assert sample.main(command(resume=folder, prompt=None, seed=None)) == 3
    assert f"the state does not describe a run of this model: it has no {name}." in capsys.readouterr().err


def test_a_state_of_another_dtype_is_told_as_such(command, state, tmp_path, capsys):
    whole = run_state.load(state)
    arrays = {name: x.astype(np.float16) for name, x in whole.arrays.items()}
    folder = run_state.save(tmp_path / "half.state", dataclasses.replace(whole, arrays=arrays))
    assert sample.main(command(resume=folder, prompt=None, seed=None)) == 3
    said = capsys.readouterr().err
    assert f"{folder}: the state has x float16[1, 2, 2, 2, 4]" in said and "needs x float32[1, 2, 2, 2, 4]" in said


@pytest.mark.parametrize("damage", ["cut", "flip", "edit", "missing", "not json", "not a folder"])
def test_a_damaged_state_is_refused(command, state, damage, capsys, no_weights):
    arrays, facts = state / "state.bin", state / "state.json"
    if damage == "cut":
        arrays.write_bytes(arrays.read_bytes()[:-1])
    elif damage == "flip":
        content = bytearray(arrays.read_bytes())
        content[len(content) // 2] ^= 1
        arrays.write_bytes(content)
    elif damage == "edit":
        facts.write_text(facts.read_text().replace('"seed": 3', '"seed": 4'))
    elif damage == "missing":
        arrays.unlink()
    elif damage == "not json":
        facts.write_bytes(b"\xff{")
    else:
        shutil.rmtree(state)
        assert sample.main(command(resume=state)) == 2
        return
    assert sample.main(command(resume=state, prompt=None, seed=None)) == 3
    assert re.search("damaged", capsys.readouterr().err)


# ------------------------------------------------------------------------------------------------------- prompts files


def test_a_text_file_of_prompts_and_what_is_left_of_it(command, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("a red two\n\na blue two\n")
    fields = {"prompt": None, "prompts": file, "steps": 1}
    assert sample.main(command(**fields)) == 0
    made = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"a-red-two_seed3.mp4", "a-blue-two_seed4.mp4"} <= made
    file.write_text("a red two\n\na blue two\nleft\n")
    assert sample.main(command(**fields)) == 0
    assert "2 of 3 videos are already" in capsys.readouterr().err
    assert {p.name for p in (tmp_path / "out").iterdir()} - made == {f"left_seed5.{k}" for k in ("mp4", "png", "json")}


def test_bad_lines_do_not_stop_the_good_ones(command, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    good = {"id": "one", "prompt": "a red two", "seed": 9, "guidance": 1}
    bad = [
        "{broken",
        "[]",
        json.dumps(good | {"prompt": "left"}),
        json.dumps({"prompt": "left", "sed": 1}),
        json.dumps({"prompt": " "}),
        json.dumps({"prompt": "left", "id": "../x"}),
        json.dumps({"prompt": "left", "seed": -1}),
        json.dumps({"prompt": "left", "num_frames": 4}),
    ]
    file.write_text("\n".join([json.dumps(good), *bad]) + "\n")
    assert sample.main(command(prompt=None, prompts=file, steps=1)) == 3
    said = capsys.readouterr().err
    for number, hint in enumerate(
        ("line 2", "not a JSON object", "'one'", "sed", "empty", "id is", "seed is", "nearest"), 2
    ):
        assert any(f"line {number}" in line and hint in line for line in said.splitlines()), hint
    assert "8 of 9 videos were not made" in said
    assert [p.name for p in (tmp_path / "out").glob("*.mp4")] == ["one.mp4"]
    assert json.loads((tmp_path / "out" / "one.json").read_text())["guidance"] == 1.0


# -------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_frames": 80}, "nearest is 81"),
        ({"height": 30}, "nearest is 32"),
        ({"steps": 0}, "nearest is 1"),
        ({"guidance": "nan"}, "guidance"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": "abc"}, "seed is 'abc'; expected a whole number"),
        ({"prompt": ""}, "empty"),
        ({"prompt": "  "}, "empty"),
        ({"prompt": "x\udc80"}, "surrogate"),
        ({"prompt": "(1, 'x')", "solver": "ddim"}, "unipc"),
        ({"prompt": None}, "prompt"),
        ({"prompts": "/no/such/file"}, "either"),
        ({"prompts": "/no/such/file", "prompt": None}, "cannot read"),
        ({"precision": "float8"}, "bfloat16"),
        ({"attention": "cudnn"}, "takes"),
        ({"attention": "cudnn", "pattern": "video_sparse:1x1x1:0.5"}, "attention is 'cudnn'; expected one of"),
        ({"pattern": "sparse"}, "'video_sparse:4x4x4:0.9' (tile, sparsity)"),
        ({"pattern": "video_sparse:4x4x4:1.5"}, "the sparsity of pattern is 1.5; expected 0 to 1"),
        ({"pattern": "video_sparse:4x4x4:nan"}, "pattern is 'video_sparse:4x4x4:nan'"),
        ({"pattern": "video_sparse:0x4x4:0.5"}, "pattern is 'video_sparse:0x4x4:0.5'"),
        ({"pattern": "sliding_tile:99x99x99:3x3x3"}, "expected 1 to 4096"),
        ({"pattern": "sliding_tile:1x1x1:3x3"}, "pattern is 'sliding_tile:1x1x1:3x3'"),
        (
            {"pattern": "sliding_tile:1x1x1:3x3x3,1x1x1,3x3x3"},
            "3 windows; expected one, or one for each",
        ),
        ({"stop_at": 0}, "stop_at"),
        ({"checkpoint": None}, "checkpoint"),
        ({"checkpoint": "/no/such/folder"}, "no such folder"),
        ({"promt": "x"}, "did you mean --prompt?"),
        ({"resume": "/no/such/state"}, "not a folder"),
    ],
)
def test_usage_errors_are_told_before_weights_are_read(command, fields, message, capsys, no_weights):
    assert sample.main(command(**fields)) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and len(said.strip().splitlines()) <= 6


@pytest.mark.parametrize("plan", (False, True))
def test_a_causal_model_is_sent_to_the_streaming_program(command, tiny_causal_repository, plan, capsys, no_weights):
    assert sample.main(command(checkpoint=tiny_causal_repository, plan=plan)) == 2
    assert "run it with `jvdiff stream`" in capsys.readouterr().err


def test_an_implementation_for_another_machine_is_refused(command, capsys, monkeypatch, no_weights):
    monkeypatch.setattr(kernels.block_sparse.reference, "unavailable", lambda target: "needs a GPU")
    assert sample.main(command(pattern="video_sparse:1x1x1:0.5", attention="reference")) == 2
    assert "'reference': needs a GPU" in capsys.readouterr().err


def test_a_prompt_that_is_cut_is_told_before_weights_are_read(command, capsys, no_weights):
    assert sample.main(command(prompt="red " * 2500)) == 1  # no_weights stops it
    assert "the last 1989 of its 2501 tokens are cut" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "prompt"),
        (["--confg=x.py"], "did you mean --config?"),
        (["--config=no_such_file.py"], "no_such_file.py"),
    ],
)
def test_a_command_line_that_makes_no_sense(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sample.main(["sample", *argv]) == 2
    assert message in capsys.readouterr().err


def test_a_prompt_is_text_whatever_it_looks_like(command):
    for prompt in ("7", "None", "a, b", "it's", 'a "b"', "x=y", "", "red " * 2500):
        assert sample.parse(command(prompt=prompt)).config.prompt == prompt
    assert sample.parse(command(prompt="('a', 'b')")).config.prompt == ("a", "b")


def test_a_config_file_with_fields_of_its_own(tmp_path, capsys):
    path = tmp_path / "own.py"
    path.write_text(
        "from jvdiff import sample\ndef get_config():\n  c = sample.default_config()\n  c.stepz = 3\n  return c\n"
    )
    assert sample.main(["sample", f"--config={path}"]) == 2
    assert "stepz" in capsys.readouterr().err


@pytest.mark.parametrize("program, field", [("sample", "stop_at"), ("stream", "save_every")])
def test_a_value_of_a_config_file_is_checked_as_a_flag_is(tmp_path, program, field, capsys):
    path = tmp_path / "own.py"
    path.write_text(f"import ml_collections\nget_config = lambda: ml_collections.ConfigDict(dict({field}='three'))\n")
    assert importlib.import_module(f"jvdiff.commands.{program}").main([program, f"--config={path}"]) == 2
    assert f"{field} is 'three'; expected a whole number" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, message",
    [
        ("def get_config(:\n", "SyntaxError: invalid syntax (own.py, line 1)"),
        ("import no_such_package\n", "No module named 'no_such_package'"),
        ("def get_config(): return nothing\n", "name 'nothing' is not defined"),
    ],
)
def test_a_config_file_that_is_not_python(tmp_path, capsys, content, message):
    (tmp_path / "own.py").write_text(content)
    assert sample.main(["sample", f"--config={tmp_path / 'own.py'}"]) == 2
    said = capsys.readouterr().err
    assert "the config file cannot be read" in said and message in said and len(said.splitlines()) == 1


def test_non_finite_latents_leave_no_video(command, tmp_path, monkeypatch, capsys):
    velocity = wan.velocity
    broken = lambda params, cfg, x, t, *a, **k: velocity(params, cfg, x, t, *a, **k) * jax.numpy.nan  # noqa: E731
    monkeypatch.setattr(wan, "velocity", broken)
    family._velocity.cache_clear()
    try:
        assert sample.main(command()) == 6
    finally:
        family._velocity.cache_clear()
    said = capsys.readouterr().err
    assert "after step 1 of 4" in said and f"{STEM}.failed.npz" in said
    assert [p.name for p in (tmp_path / "out").iterdir()] == [f"{STEM}.failed.npz"]
    failed = read(tmp_path / "out" / f"{STEM}.failed.npz")
    np.testing.assert_array_equal(failed["latents"], pipeline.initial_noise([3], (2, 2, 2, 4)))
    assert failed["step"] == 0


@pytest.mark.parametrize("stage", ["load", "denoise", "decode"])
def test_out_of_device_memory_names_the_stage(command, tmp_path, monkeypatch, capsys, stage):
    def full(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes")

    monkeypatch.setattr(pipeline, stage, full)
    assert sample.main(command(steps=1)) == 4
    said = capsys.readouterr().err
    assert f"stage {stage}" in said and "--precision=bfloat16" in said and "--num_frames" in said
    assert ("CUDA_VISIBLE_DEVICES" in said) == (stage == "load")  # where another process may have taken it
    assert (tmp_path / "out" / f"{STEM}.state").is_dir() == (stage == "decode")


def test_weights_take_turns_on_a_device_that_is_too_small(command, tmp_path, monkeypatch, capsys):
    sizes = iter([1, 1, 2**40])  # of the pool: before weights are read, for one clip, for the next
    monkeypatch.setattr(plan, "pool", lambda: next(sizes))
    trace = {"profile": tmp_path / "trace"}  # of the first clip
    assert sample.main(command(seed=None, seeds="3:5", steps=2, save_arrays="true", **trace)) == 0
    said = capsys.readouterr().err
    told = [line for line in said.splitlines() if line.startswith("weights on the device:")]
    assert len(told) == 2 and "transformer, vae, text_encoder in turn" in told[0] and "too little" in told[0]
    assert "all weights resident" in told[1] and said.index(told[0]) < said.index("loading") < said.index(told[1])
    records = [json.loads(path.read_text())["residency"] for path in sorted((tmp_path / "out").glob("*.json"))]
    assert [record["in_turn"] for record in records] == [["transformer", "vae", "text_encoder"], []]
    assert all(peak < records[1]["peaks"][name] for name, peak in records[0]["peaks"].items())
    first, second = (read(path) for path in sorted((tmp_path / "out").glob("*.npz")))
    (trace,) = (tmp_path / "trace").rglob("*.xplane.pb")
    words = (b"denoise", b"text", b"decode next", b"self_attn", b"ffn", b"xla_attention")
    assert [word for word in words if word not in trace.read_bytes()] == []
    assert np.isfinite(second["latents"]).all() and not np.array_equal(first["latents"], second["latents"])
    monkeypatch.undo()
    for asked, status in (("text_encoder", 0), ("off", 0), ("textencoder", 2)):
        assert sample.main(command(steps=2, save_arrays="true", in_turn=asked, output=tmp_path / asked)) == status
    assert "expected all, or some of transformer, vae, text_encoder" in capsys.readouterr().err
    np.testing.assert_array_equal(read(tmp_path / "text_encoder" / f"{STEM}.npz")["latents"], first["latents"])


def test_prompts_of_a_batch_are_encoded_while_the_encoder_is_there(command, tmp_path, monkeypatch, capsys):
    """It comes to the device once, before any clip is made, and sees each text once; alone a clip is the same."""
    (tmp_path / "prompts.txt").write_text("a red seven\na blue two\na red seven")
    asked, came, run = [], [], pipeline.Executor.__call__
    back = pipeline.Weights.__getitem__

    def getitem(weights, part):
        came.extend([part] if part in weights.away() else [])
        return back(weights, part)

    def execute(executor, stage, *arguments):
        asked.append(stage.part)
        return run(executor, stage, *arguments)

    monkeypatch.setattr(pipeline.Executor, "__call__", execute)
    monkeypatch.setattr(pipeline.Weights, "__getitem__", getitem)
    given = {"prompt": None, "prompts": tmp_path / "prompts.txt", "steps": 2, "save_arrays": "true"}
    assert sample.main(command(in_turn="all", **given)) == 0
    assert asked.count("text_encoder") == 2 and asked[:2] == ["text_encoder"] * 2
    assert came == ["text_encoder", *["transformer", "vae"] * 3]
    one = next((tmp_path / "out").glob("a-blue-two*.npz"))
    given = {"prompt": "a blue two", "seed": 4, "output": tmp_path / "alone"}
    assert sample.main(command(steps=2, save_arrays="true", **given)) == 0
    np.testing.assert_array_equal(read(tmp_path / "alone" / one.name)["latents"], read(one)["latents"])


def test_an_output_that_cannot_be_written_is_told_first(command, tmp_path, capsys, no_weights):
    (tmp_path / "out").write_text("a file")
    assert sample.main(command()) == 4
    assert "choose another --output" in capsys.readouterr().err


def test_a_disk_that_fills_up_while_writing_keeps_the_frames(command, tmp_path, monkeypatch, capsys):
    def full(path, *args):
        raise ResourceError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(videos, "write_mp4", full)
    assert sample.main(command(steps=1)) == 4
    said, frames = capsys.readouterr().err, tmp_path / "out" / f"{STEM}.frames.npz"
    assert f"The frames are in {frames}." in said and "their result is kept. Go on with:" in said
    assert read(frames)["video"].shape == (5, 16, 16, 3)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {f"{STEM}.frames.npz", f"{STEM}.state"}


def test_without_av_the_video_is_an_animated_png(command, tmp_path, monkeypatch, capsys):
    from PIL import Image

    def absent():
        raise SetupError('needs the package av; pip install "av>=17"')

    monkeypatch.setattr(videos, "import_av", absent)
    assert sample.main(command(steps=1)) == 0
    said = capsys.readouterr().err
    assert said.count("notice: an animated PNG") == 1 and "pip install" in said
    with Image.open(tmp_path / "out" / f"{STEM}.apng") as image:
        assert image.n_frames == 5 and image.size == (16, 16)


def test_a_compile_cache_that_others_can_write_is_refused(command, tmp_path, capsys):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o770)
    assert sample.main(command(compile_cache=tmp_path / "cache")) == 7
    assert "chmod 700" in capsys.readouterr().err


def test_a_compile_cache_is_made_for_its_owner_alone(tmp_path):
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    try:
        command_line.compile_cache(str(tmp_path / "a" / "cache"))
        assert (tmp_path / "a" / "cache").stat().st_mode & 0o777 == 0o700
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "a" / "cache")
    finally:
        jax.config.update("jax_compilation_cache_dir", before[0])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


def test_a_bug_is_reported_with_its_traceback_in_a_file(command, tmp_path, monkeypatch, capsys):
    def bug(*args, **kwargs):
        raise ZeroDivisionError("no such thing")

    monkeypatch.setattr(pipeline, "decode", bug)
    assert sample.main(command(steps=1)) == 1
    said = capsys.readouterr().err
    assert "please report" in said and "Traceback" not in said
    log = next((tmp_path / "out").glob("jvdiff-error-*.log"))
    assert str(log) in said and "Traceback" in log.read_text()


# ------------------------------------------------------------------------------------------------------------ progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_one_line_on_a_terminal_and_few_lines_in_a_log():
    terminal, log = Terminal(), io.StringIO()
    for stream in (terminal, log):
        with progress.bar("denoise", 50, start=10, stream=stream) as show:
            for done in range(11, 51):
                show(done)
    assert terminal.getvalue().count("\n") == 1 and "[####" in terminal.getvalue() and " left" in terminal.getvalue()
    assert len(log.getvalue().splitlines()) == 2 and log.getvalue().splitlines()[-1].startswith("denoise  50/50")


def test_time_left_is_said_in_minutes_and_hours():
    assert [progress.clock(s) for s in (5, 65.4, 3600)] == ["0:05", "1:05", "1:00:00"]


def test_the_command_line_loads_no_jax_until_it_must():
    code = "import sys, jvdiff.sample; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert Path(jvdiff.__file__).name == "__init__.py"
