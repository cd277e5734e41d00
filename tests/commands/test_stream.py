"""The streaming command line, end to end on a tiny random causal repository: files, resuming, faults."""

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jvdiff import pipeline, streaming
from jvdiff.commands import stream
from jvdiff.errors import CheckpointError
from jvdiff.media import pictures
from jvdiff.media import video as videos
from jvdiff.media.fragmented_mp4 import FragmentedMP4
from jvdiff.models.wan.rollout import ROLLOUT
from jvdiff.runtime import progress, run_state
from tests.forks import Process

PROMPT, OTHER = "a red seven moving left", "a blue two moving right"
STEM = "a-red-seven-moving-left_seed3"
CONFIG = "from jvdiff import stream\nget_config = stream.default_config\n"
SCHEDULER, TRANSFORMER = "pipeline.diffusion_model.scheduler", "pipeline.diffusion_model.transformer"


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def build(tiny_causal_repository, config_file):
    """argv of a run; fields are those of the config, nested ones too, None leaves one out."""

    def build(output, fields):
        given = {"checkpoint": tiny_causal_repository, "output": output, "prompt": PROMPT, "seed": 3, "chunks": 3}
        given |= {"compile_cache": "off"} | fields
        flags = [f"--config.{name}={value}" for name, value in given.items() if value is not None]
        return ["stream", f"--config={config_file}", *flags]

    return build


@pytest.fixture
def command(build, tmp_path):
    return lambda fields={}, output=tmp_path / "out", **more: build(output, fields | more)


@pytest.fixture
def resume(command):
    """argv that goes on with a state; fields as above."""
    return lambda state, fields={}, **more: command(
        {"resume": state, "prompt": None, "seed": None, "output": None} | fields | more
    )


@pytest.fixture(scope="module")
def half(build, tmp_path_factory):
    """The folder of a run that saved its state after 2 chunks, in which the prompt changes at chunk 1."""
    out = tmp_path_factory.mktemp("half")
    assert stream.main(build(out, {"chunks": 2, "save_every": 2, "then.1": OTHER})) == 0
    return out


@pytest.fixture
def copied(half, tmp_path):
    return shutil.copytree(half, tmp_path / "copy")


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test if weights are read."""

    def load(*args):
        raise AssertionError("weights were read")

    monkeypatch.setattr(streaming, "load", load)


@pytest.fixture
def written(monkeypatch):
    """Every array of frames that is written to a video, before it is compressed."""
    chunks, append = [], FragmentedMP4.append
    monkeypatch.setattr(FragmentedMP4, "append", lambda self, x: (append(self, x), chunks.append(x))[0])
    return chunks


def lines(base):
    return [json.loads(line) for line in Path(f"{base}.jsonl").read_text().splitlines()]


def error_of(capsys):
    return capsys.readouterr().err.split("error: ")[-1]


# -------------------------------------------------------------------------------------------------------------- files


def test_chunks_become_a_video_with_statistics_and_a_record(command, tmp_path, tiny_causal_repository, written, capsys):
    assert stream.main(command({"then.1": OTHER, "seed": None, "pipeline.diffusion_model.seed": 3})) == 0
    base = tmp_path / "out" / STEM
    assert capsys.readouterr().out.strip() == f"{base}.mp4"
    assert {p.name for p in base.parent.iterdir()} == {f"{STEM}.{kind}" for kind in ("json", "jsonl", "mp4", "png")}
    pipe = streaming.load(tiny_causal_repository)
    cache = pipe.initialize_cache(3, [PROMPT])
    for i, found in enumerate(written):
        if i == 1:
            cache = pipe.set_prompts(cache, [OTHER])
        frames, cache, final = pipe.generate(i, cache)
        np.testing.assert_array_equal(found, frames[0])
        cache, _ = pipe.finalize(i, cache, final)
    assert videos.read_video(f"{base}.mp4").shape == (9, 16, 16, 3)
    told = lines(base)
    assert [(x["chunk"], x["prompt"], x["frames"]) for x in told] == [(0, PROMPT, 1), (1, OTHER, 4), (2, OTHER, 4)]
    for line in told:
        stages = [line[f"{stage}_ms"] for stage in ("encode", "diffuse", "decode", "finalize")]
        assert sum(stages) == pytest.approx(line["total_ms"], abs=0.01) and min(stages[1:]) > 0 and stages[0] == 0
        assert line["total_ms"] - line["finalize_ms"] == pytest.approx(line["total_ms_wo_finalize"], abs=0.01)
        assert line["fps"] == pytest.approx(1000 * line["frames"] / line["total_ms"], rel=0.01)
        assert line["fps_wo_finalize"] > line["fps"] and line["wall_ms"] > line["write_ms"] > 0
        assert line["rss_peak_gib"] > 0
    assert told[0]["first_frame_cold_ms"] > told[0]["first_frame_ms"] > 0 and "first_frame_ms" not in told[1]
    assert "prompt_ms" in told[1] and "prompt_ms" not in told[2]
    record = json.loads(Path(f"{base}.json").read_text())
    assert record["prompts"] == {"0": PROMPT, "1": OTHER} and record["seed"] == 3 and record["fps"] == 8
    assert streaming.config_from_json(record["pipeline"], ROLLOUT).digest == pipe.config.digest
    assert record["chunks"] == 3 and record["frames"] == 9 and record["versions"]["jax"] == jax.__version__
    assert (
        record["speed"]["first_frame_ms"] > 0 and record["speed"]["fps"] > 0 and len(record["checkpoint_digest"]) == 64
    )
    assert set(record["seconds"]) == {"load", "compile"}
    assert videos.read_metadata(f"{base}.mp4")["prompts"] == record["prompts"]


def test_without_times_the_frames_are_the_same_and_names_are_never_taken_twice(command, tmp_path, written):
    for timed, trace in (("true", None), ("false", tmp_path / "trace")):
        assert stream.main(command(chunks=2, timed=timed, profile=trace)) == 0
    for one, other in zip(written[:2], written[2:], strict=True):
        np.testing.assert_array_equal(one, other)
    (line, _), base = lines(tmp_path / "out" / f"{STEM}-2"), tmp_path / "out" / STEM
    assert "diffuse_ms" not in line and line["total_ms"] > 0 and line["fps"] > 0 and len(lines(base)) == 2
    (trace,) = (tmp_path / "trace").rglob("*.xplane.pb")
    assert [word for word in (b"chunk", b"diffuse", b"finalize", b"self_attn") if word not in trace.read_bytes()] == []


def test_memory_of_the_contact_sheet_is_bounded_and_its_frames_are_spread():
    from jvdiff.commands import one_stream

    sheet = {}
    for i in range(1000):
        sheet = one_stream._thinned(sheet | {i: np.zeros(())})
        assert len(sheet) <= one_stream.SHEET
        assert len(sheet) >= one_stream.SHEET // 2 or len(sheet) == i + 1
        assert len(set(np.diff(list(sheet)))) <= 1 and 0 in sheet and max(sheet) >= i * (1 - 2 / one_stream.SHEET)


def test_progress_without_an_end():
    out = io.StringIO()
    with progress.bar("chunks", None, start=3, stream=out) as show:
        show(4)
    assert re.fullmatch(r"chunks  4  .* each, 0:00 so far\n", out.getvalue())


# ------------------------------------------------------------------------------------------------------------ resuming


def test_a_resumed_rollout_is_the_uninterrupted_one(command, resume, copied, tmp_path, written, capsys):
    base = copied / STEM
    with open(f"{base}.jsonl", "a") as file:  # as if it had been killed in chunk 3
        file.write('{"chunk": 2, "prompt": "lost"}\n{"chu')
    with FragmentedMP4(f"{base}.mp4", 8, frames=5) as film:
        film.append(np.zeros((4, 16, 16, 3), np.uint8))
    written.clear()
    future = {"then.1": OTHER, "then.3": PROMPT}
    assert stream.main(resume(f"{base}.state", future, chunks=4)) == 0
    resumed = list(written)
    assert stream.main(command(future, chunks=4)) == 0
    for one, other in zip(resumed, written[-2:], strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(videos.read_video(f"{base}.mp4"), videos.read_video(tmp_path / "out" / f"{STEM}.mp4"))
    told, whole = lines(base), lines(tmp_path / "out" / STEM)
    assert [(x["chunk"], x["prompt"]) for x in told] == [(x["chunk"], x["prompt"]) for x in whole]
    assert json.loads(Path(f"{base}.json").read_text())["resumed_at_chunk"] == 2
    sheets = [Path(f"{place}.png") for place in (base, tmp_path / "out" / STEM)]
    one, other = (pictures.read(path) for path in sheets)
    np.testing.assert_array_equal(one, other)


def test_a_rollout_on_a_mesh_is_resumed_on_it(command, resume, tmp_path, written):
    assert stream.main(command(mesh="tensor=2", chunks=1, save_every=1)) == 0
    assert stream.main(resume(tmp_path / "out" / f"{STEM}.state", mesh="tensor=2", chunks=3)) == 0
    assert stream.main(command(mesh="tensor=2", chunks=3)) == 0
    for one, other in zip(written[:3], written[3:], strict=True):
        np.testing.assert_array_equal(one, other)


def test_ctrl_c_saves_a_state_that_another_process_goes_on_from_bit_for_bit(command, resume, tmp_path, capsys):
    argv = command(chunks=0)
    base = tmp_path / "out" / STEM
    process = Process("-m", "jvdiff.stream", *argv[1:])
    while process.poll() is None and not (Path(f"{base}.jsonl").exists() and lines(base)):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 5, process.err
    state = run_state.load(f"{base}.state")
    done = len(lines(base))
    assert state.done == done and len(videos.read_video(f"{base}.mp4")) == 4 * done - 3
    assert Path(f"{base}.png").exists() and json.loads(Path(f"{base}.json").read_text())["chunks"] == done
    assert f"--config.chunks=0 --config.compile_cache=off --config.resume={base}.state" in process.err
    assert stream.main(resume(f"{base}.state", chunks=done + 2, save_every=1)) == 0
    assert stream.main(command(chunks=done + 2, save_every=done + 2, name="whole")) == 0
    one, other = (run_state.load(tmp_path / "out" / f"{name}.state").arrays for name in (STEM, "whole"))
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array.reshape(-1).view(np.uint8), other[name].reshape(-1).view(np.uint8), name)


def test_the_command_that_is_printed_makes_every_file_of_the_whole_run(
    command, tmp_path, monkeypatch, printed, same_files
):
    """Byte for byte; it says all that the command line said, but what the state holds."""
    held = {"then.1": OTHER, "negative_prompt": "red", "fps": 5, f"{SCHEDULER}.shift": 4.0, "vae_decode": "bf16"}
    kept = {"timed": "false", "save_every": 2}
    assert stream.main(command(held | kept, output=tmp_path / "whole")) == 0
    append = FragmentedMP4.append
    monkeypatch.setattr(
        FragmentedMP4, "append", lambda film, x: append(film, x) or os.kill(os.getpid(), signal.SIGTERM)
    )
    assert stream.main(command(held | kept)) == 5
    monkeypatch.undo()
    again = printed()
    state = tmp_path / "out" / f"{STEM}.state"
    said = command({"prompt": None, "seed": None, "resume": state} | kept)
    assert sorted(again[3:]) == sorted(said[2:])  # behind --config and its file
    assert run_state.load(state).done == 1 and stream.main(again) == 0
    same_files(tmp_path / "whole", tmp_path / "out")


def flip(state):
    data = bytearray((state / "state.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (state / "state.bin").write_bytes(data)


def blur(state):
    """A bit of the video that the state goes on from."""
    film = state.with_suffix(".mp4")
    data = bytearray(film.read_bytes())
    data[run_state.load(state).facts["video"]["bytes"] - 9] ^= 1
    film.write_bytes(data)


def cut(state):
    (state / "state.bin").write_bytes((state / "state.bin").read_bytes()[:-1])


def reword(state):
    text = (state / "state.json").read_text()
    (state / "state.json").write_text(text.replace(OTHER, PROMPT))


def forget(state):
    """The seed, in a state that is whole otherwise."""
    whole = run_state.load(state)
    facts = {name: value for name, value in whole.facts.items() if name != "seed"}
    shutil.rmtree(state)
    run_state.save(state, dataclasses.replace(whole, facts=facts))


@pytest.mark.parametrize(
    ("damage", "fields", "status", "words"),
    [
        (forget, {}, 3, "the state does not describe a rollout of a video: it has no seed."),
        (flip, {}, 3, "digest"),
        (cut, {}, 3, "bytes, expected"),
        (blur, {}, 3, "frames are not what was written"),
        (reword, {}, 3, "digest"),
        (lambda state: shutil.rmtree(state), {}, 2, "not a folder"),
        (None, {"prompt": OTHER}, 3, "the prompt from chunk 0 on: the state has 'a red seven moving left'"),
        (None, {"then.1": PROMPT}, 3, "the prompt from chunk 1 on"),
        (None, {"seed": 4}, 3, "seed: the state has 3, this run 4"),
        (None, {"fps": 9}, 3, "fps: the state has 8, this run 9"),
        (None, {f"{SCHEDULER}.shift": 4}, 3, "pipeline.diffusion_model.scheduler.shift: the state has 5.0"),
        (None, {"reencode": "true"}, 3, "reencode"),
        (None, {"output": "elsewhere"}, 2, "goes on where it is"),
        (None, {"chunks": 2}, 2, "ask for more"),
    ],
)
def test_what_cannot_be_resumed_is_left_as_it_is(damage, fields, status, words, resume, copied, no_weights, capsys):
    if damage:
        damage(copied / f"{STEM}.state")
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    assert stream.main(resume(copied / f"{STEM}.state", fields)) == status
    assert words in error_of(capsys)
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_a_state_is_not_resumed_with_other_weights(resume, copied, tiny_causal_repository, tmp_path, capsys):
    other = shutil.copytree(tiny_causal_repository, tmp_path / "other")
    scheduler = other / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text() + "\n")
    assert stream.main(resume(copied / f"{STEM}.state", checkpoint=other)) == 3
    assert "checkpoint_digest" in error_of(capsys)


# -------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"checkpoint": None}, "no checkpoint"),
        ({"checkpoint": "nowhere"}, "no such folder"),
        ({"prompt": None}, "prompt is None; expected text"),
        ({"prompt": " "}, "prompt is empty"),
        ({"chunk": 4}, "did you mean --chunks?"),
        ({"distributed": "true"}, "unknown flag --distributed"),
        ({"chunks": -1}, "chunks is -1; expected 0"),
        ({"save_every": -1}, "save_every is -1"),
        ({"fps": 0}, "fps is 0; expected 1 to 240"),
        ({"seed": -1}, "seed is -1"),
        ({"name": "../x"}, "name is '../x'"),
        ({"precision": "half"}, "half"),
        ({"mesh": "auto"}, "auto"),
        ({"mesh": "fsdp=3"}, "fsdp"),
        ({"then.0": OTHER}, "a chunk from 1"),
        ({"then.soon": OTHER}, "a chunk from 1"),
        ({"then.4": ""}, "then.4 is empty"),
        ({f"{TRANSFORMER}.hight": 2}, "no field diffusion_model.transformer.hight (did you mean height?)"),
        ({"pipeline.dekoder.vae": 2}, "did you mean decoder?"),
        ({f"{TRANSFORMER}.height.pixels": 2}, "has no fields"),
        ({f"{TRANSFORMER}.height": 3.5}, "diffusion_model.transformer.height is 3.5; expected int"),
        ({f"{TRANSFORMER}.height": 3}, "expected a multiple of 2"),
        ({f"{TRANSFORMER}.window_size_t": -1}, "window"),
        ({f"{TRANSFORMER}.text_rows": 2}, "text_rows is 2"),
        ({f"{TRANSFORMER}.network.num_layers": 1}, "is not that of the weights"),
        ({f"{TRANSFORMER}.guidance_scale": 0.5}, "guidance_scale is 0.5"),
        ({f"{SCHEDULER}.shift": "abc"}, "scheduler.shift is 'abc'; expected float"),
        ({f"{SCHEDULER}.num_inference_steps": 2}, "make the two equal"),
        ({f"{SCHEDULER}.denoising_timesteps": "(1000, 'x', 3, 1)"}, "denoising_timesteps is (1000, 'x', 3, 1)"),
        ({f"{SCHEDULER}.class": "Euler"}, "the class 'Euler'"),
        ({"pipeline.diffusion_model.context_noise": 2000}, "context_noise is 2000"),
        ({"pipeline.decoder": "none"}, "a video needs one"),
        ({"image": "picture.png"}, "this pipeline takes none"),
        ({"pipeline.encoder.class": "ImageEncoder"}, "begins with a picture"),
        ({"pipeline.encoder.class": "ImageEncoder", "image": "nowhere.png"}, "nowhere.png is not a file"),
        ({"pipeline.encoder.class": "ImageEncoder", "pipeline.encoder.mode": "blend", "image": "x.png"}, "mode"),
        ({"pipeline.encoder.class": "NullEncoder", "image": "x.png"}, "feeds an ImageEncoder only"),
    ],
)  # fmt: skip
def test_bad_input_is_a_sentence_before_any_weight_is_read(fields, words, command, tmp_path, no_weights, capsys):
    assert stream.main(command(fields)) == 2
    assert words in error_of(capsys)
    assert not list(tmp_path.rglob("*.mp4")) and not list(tmp_path.rglob("*.jsonl"))


def test_a_model_that_makes_a_video_at_once_is_sent_to_the_other_program(command, tiny_repository, no_weights, capsys):
    assert stream.main(command(checkpoint=tiny_repository)) == 2
    assert "run it with `jvdiff sample`" in error_of(capsys)


def test_without_av_it_says_so(command, monkeypatch, no_weights, capsys):
    monkeypatch.setitem(sys.modules, "av", None)
    assert stream.main(command()) == 7
    assert "pip install" in error_of(capsys)


def test_a_file_that_is_no_picture_is_refused(command, tmp_path, no_weights, capsys):
    (tmp_path / "picture.png").write_text("<html>")
    assert stream.main(command({"pipeline.encoder.class": "ImageEncoder", "image": tmp_path / "picture.png"})) == 3
    assert "PNG, JPEG, WEBP, GIF or BMP" in error_of(capsys)


def numbers_go_wrong(made):
    frames, cache, final = made
    return frames, cache, type(final)(**vars(final) | {"nonfinite": np.float32(0.25)})


def memory_runs_out(made):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")


def second_ctrl_c(made):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("fault", "status", "words"),
    [
        (numbers_go_wrong, 6, "chunk 2: 25.0% of its latents or pixels are NaN or infinite.\nThe 5 frames before it"),
        (memory_runs_out, 4, "chunk 2: the device has not enough memory"),
        (second_ctrl_c, 130, "stopped at once"),
    ],
)
def test_what_was_made_before_a_fault_is_kept(fault, status, words, command, resume, tmp_path, monkeypatch, capsys):
    generate = streaming.StreamInferencePipeline.generate

    def faulty(self, i, *args):
        made = generate(self, i, *args)
        return fault(made) if i == 2 else made

    with monkeypatch.context() as patch:
        patch.setattr(streaming.StreamInferencePipeline, "generate", faulty)
        assert stream.main(command(save_every=1)) == status
    assert words in error_of(capsys)
    base = tmp_path / "out" / STEM
    assert len(videos.read_video(f"{base}.mp4")) == 5 and len(lines(base)) == 2
    assert run_state.load(f"{base}.state").done == 2
    if fault is numbers_go_wrong:
        assert stream.main(resume(f"{base}.state")) == 0
        assert len(videos.read_video(f"{base}.mp4")) == 9


# ------------------------------------------------------------------------------------------------------- what it can do


def test_a_picture_begins_the_video(command, resume, tmp_path, written):
    videos.write_png(tmp_path / "light.png", np.full((20, 30, 3), 200, np.uint8))
    videos.write_png(tmp_path / "dark.png", np.full((20, 30, 3), 10, np.uint8))
    fields = {"pipeline.encoder.class": "ImageEncoder", "chunks": 2, "save_every": 2}
    assert stream.main(command(fields, image=tmp_path / "light.png", name="light")) == 0
    assert stream.main(command(fields, image=tmp_path / "dark.png")) == 0
    assert np.abs(written[0].astype(int) - written[2]).max() > 0
    assert lines(tmp_path / "out" / STEM)[0]["encode_ms"] > 0
    state = tmp_path / "out" / f"{STEM}.state"
    assert stream.main(resume(state, image=tmp_path / "light.png")) == 3
    assert stream.main(resume(state)) == 0
    assert len(written) == 5


def test_a_repository_may_name_another_scheduler(tiny_causal_repository, tmp_path):
    root = shutil.copytree(tiny_causal_repository, tmp_path / "other")
    defaults = json.loads((root / "jvdiff_defaults.json").read_text())
    defaults["stream"] |= {"scheduler": {"class": "UniPCSchedulerConfig", "num_inference_steps": 3}}
    (root / "jvdiff_defaults.json").write_text(json.dumps(defaults))
    model = streaming.config_of(root).diffusion_model
    assert model.scheduler == streaming.UniPCSchedulerConfig(num_inference_steps=3)
    assert model.transformer.window_size_t == 3
    (root / "jvdiff_defaults.json").write_text(json.dumps({"stream": {"transformer": {"window": 3}}}))
    with pytest.raises(CheckpointError, match=r"other/jvdiff_defaults\.json: its defaults for streaming are invalid"):
        streaming.config_of(pipeline.inspect(root))


def test_an_empty_negative_prompt_is_one(command, tiny_causal_repository, tmp_path):
    root = shutil.copytree(tiny_causal_repository, tmp_path / "other")
    defaults = json.loads((root / "jvdiff_defaults.json").read_text())
    (root / "jvdiff_defaults.json").write_text(json.dumps(defaults | {"negative_prompt": "left"}))
    for given, expected in ({}, "left"), ({"negative_prompt": ""}, ""):
        assert stream.main(command(given, checkpoint=root, chunks=1, name=f"x{len(given)}")) == 0
        assert json.loads((tmp_path / "out" / f"x{len(given)}.json").read_text())["negative_prompt"] == expected


def test_a_command_with_prompts_puts_those_of_the_file_aside(tmp_path):
    path = tmp_path / "config.py"
    lines = ["from jvdiff import stream", "def get_config():", "    config = stream.default_config()"]
    path.write_text("\n".join([*lines, "    config.then = {4: 'x'}", "    return config"]))
    read = lambda *words: stream.parse(["stream", f"--config={path}", *words]).config.then  # noqa: E731
    assert read() == {4: "x"} and read("--config.prompt=y") is None
    assert read("--config.then.5=y", "--config.then.6=7") == {"5": "y", "6": "7"}
