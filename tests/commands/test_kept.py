"""Whatever happens after the last step or chunk, what was made is on some disk, and a command goes on from it."""

import errno
import io
import json
import os
import re
import resource
import shlex
import shutil
import signal
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff import pipeline
from jvdiff.commands import one_stream, sample, stream, train
from jvdiff.media import video as videos
from jvdiff.media.fragmented_mp4 import FragmentedMP4
from jvdiff.runtime import claims, progress, run_state, staging
from jvdiff.training import loop

PROMPT, STEM = "a red seven moving left", "a-red-seven-moving-left_seed3"


@pytest.fixture
def flags(tmp_path):
    """argv of a run with these fields into tmp_path/out; None leaves one out."""

    def build(checkpoint, **fields):
        given = {"checkpoint": checkpoint, "output": tmp_path / "out", "prompt": PROMPT, "seed": 3} | fields
        return ["jvdiff", *(f"--{name}={value}" for name, value in given.items() if value is not None)]

    return build


@pytest.fixture
def command(flags, tiny_repository):
    return lambda checkpoint=tiny_repository, **fields: flags(checkpoint, **{"steps": 1} | fields)


@pytest.fixture
def streaming(flags, tiny_causal_repository):
    return lambda **fields: flags(tiny_causal_repository, **{"chunks": 3} | fields)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


def going_on(said):
    """The words of the command that is said to go on."""
    return ["jvdiff", *shlex.split(re.findall(r"(?:[Gg]o on|finish it) with:\n  (.*)", said)[-1])[3:]]


def system(code):
    def refuse(*args, **options):
        raise OSError(code, os.strerror(code))

    return refuse


def raising(error):
    def fail(*args, **options):
        raise error

    return fail


FAULTS = {
    "disk full": (videos, "write_mp4", system(errno.ENOSPC), 4),
    "input or output error": (os, "replace", system(errno.EIO), 4),
    "memory": (videos, "contact_sheet", raising(MemoryError()), 4),
    "a bug": (videos, "encode", raising(RuntimeError("no such encoder")), 1),
    "a second Ctrl-C": (videos, "write_mp4", raising(KeyboardInterrupt()), 5),
    "another bug": (pipeline, "decode", raising(ZeroDivisionError()), 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_is_raised_after_the_last_step_the_state_is_kept(command, tmp_path, monkeypatch, capsys, fault):
    module, name, broken, status = FAULTS[fault]
    with monkeypatch.context() as patch:
        patch.setattr(module, name, broken)
        assert sample.main(command()) == status
    said, state = capsys.readouterr().err, tmp_path / "out" / f"{STEM}.state"
    assert run_state.load(state).done == 1 and f"--config.resume={state}" in going_on(said)
    assert not any(path.name.startswith(".") for path in (tmp_path / "out").iterdir())
    if fault == "disk full":
        assert not [*(tmp_path / "out").glob("*.png")]  # which was made beside it
        assert sample.main(going_on(said)) == 0
        assert len(videos.read_video(tmp_path / "out" / f"{STEM}.mp4")) == 5


AMID = {
    "a bug": (ZeroDivisionError(), 1),
    "no device memory": (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), 4),
    "a lost device": (jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS"), 7),
    "a second Ctrl-C": (KeyboardInterrupt(), 130),
}


@pytest.mark.parametrize("fault", AMID)
def test_whatever_is_raised_amid_the_steps_those_that_are_done_are_kept(command, tmp_path, monkeypatch, capsys, fault):
    (error, status), denoise = AMID[fault], pipeline.denoise

    def broken(*args, callback, **options):
        def after(done, state):
            callback(done, state)
            if done == 2:
                for array in state:
                    array.delete()  # as a step takes its buffers, or a lost device
                raise error

        return denoise(*args, callback=after, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "denoise", broken)
        assert sample.main(command(steps=3)) == status
    said, state = capsys.readouterr().err, tmp_path / "out" / f"{STEM}.state"
    assert state.exists() == ("2 steps are done, and kept" in said) == (status != 130)
    if fault == "a bug":
        assert sample.main(going_on(said)) == sample.main(command(steps=3, output=tmp_path / "whole")) == 0
        one, other = (videos.read_video(tmp_path / folder / f"{STEM}.mp4") for folder in ("out", "whole"))
        np.testing.assert_array_equal(one, other)


def test_a_state_that_its_place_refuses_is_saved_elsewhere(command, tmp_path, temporary, monkeypatch, capsys):
    usage = staging.shutil.disk_usage

    def full(path):
        found = usage(path)
        return found._replace(free=0) if Path(path) == tmp_path / "out" else found

    monkeypatch.setattr(staging.shutil, "disk_usage", full)
    assert sample.main(command(steps=2, stop_at=1)) == 0
    said = capsys.readouterr()
    (state,) = temporary.glob(f"jvdiff-*/{STEM}.state")
    assert said.out.splitlines() == [str(state)] and f"notice: {tmp_path / 'out' / STEM}" in said.err
    assert sample.main(going_on(said.err)) == 0
    assert (tmp_path / "out" / f"{STEM}.mp4").exists()


@pytest.mark.parametrize("main", [sample.main, stream.main])
def test_an_output_that_names_a_file_is_refused_before_anything_is_made(main, command, streaming, tmp_path, capsys):
    argv = (command if main is sample.main else streaming)(output=tmp_path / "clip.mp4")
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert "expected a folder" in said and f"--output={tmp_path / 'clip'}." in said
    assert not (tmp_path / "clip.mp4").exists()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_stream_keeps_the_chunk_that_the_disk_refused(streaming, tmp_path, temporary, monkeypatch, capsys, elsewhere):
    real, base = FragmentedMP4.append, tmp_path / "out" / STEM

    def append(self, video):
        if self.frames:
            system(errno.ENOSPC)()
        return real(self, video)

    def refuse(target, needed):
        if elsewhere and target.parent == base.parent:
            system(errno.ENOSPC)()

    with monkeypatch.context() as patch:
        patch.setattr(FragmentedMP4, "append", append)
        patch.setattr(staging, "_check_space", refuse)
        assert stream.main(streaming(chunks=2)) == 4
    said = capsys.readouterr().err
    state = next(temporary.glob("*/*.state")) if elsewhere else Path(f"{base}.state")
    saved = run_state.load(state)
    assert saved.done == 2 and len(saved.arrays["unwritten"]) == 4 and len(videos.read_video(f"{base}.mp4")) == 1
    assert stream.main(going_on(said)) == 0
    assert stream.main(streaming(chunks=2, name="whole")) == 0
    whole = videos.read_video(tmp_path / "out" / "whole.mp4")
    np.testing.assert_array_equal(videos.read_video(f"{base}.mp4"), whole)
    assert len(Path(f"{base}.jsonl").read_text().splitlines()) == 2 and Path(f"{base}.json").exists()


def test_a_stream_keeps_the_line_of_statistics_that_the_disk_refused(streaming, tmp_path, monkeypatch, capsys):
    lines, line = tmp_path / "out" / f"{STEM}.jsonl", one_stream._line

    def refused(statistics):
        if statistics["chunk"] == 1:
            limit(lines.stat().st_size + 9)
        return line(statistics)

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        patch.setattr(one_stream, "_line", refused)
        try:
            assert stream.main(streaming(chunks=2)) == 4
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err
    assert f"cannot write {lines.with_suffix('')}: File too large" in said
    assert stream.main([*going_on(said), "--config.chunks=3"]) == 0
    made = [json.loads(text) for text in lines.read_text().splitlines()]
    assert [(row["chunk"], "wall_ms" in row) for row in made] == [(0, True), (1, True), (2, True)]


def test_a_lost_device_hides_nothing_of_what_a_stream_says(streaming, tmp_path, monkeypatch, capsys):
    make, lost = one_stream._make_chunk, jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS")

    def fail(making):
        if making.done:
            for array in jax.tree.leaves(making.cache.past):
                array.delete()
            raise lost
        return make(making)

    monkeypatch.setattr(one_stream, "_make_chunk", fail)
    assert stream.main(streaming(chunks=2)) == 7
    said = capsys.readouterr().err
    assert "notice: the state after chunk 0 cannot be read back from the device: Array has been deleted" in said
    assert "error: the device, or the way to it, failed" in said
    assert len(videos.read_video(tmp_path / "out" / f"{STEM}.mp4")) == 1


def test_names_that_are_no_utf8(command, tiny_repository, tmp_path):
    checkpoint = shutil.copytree(tiny_repository, tmp_path / "caf\udce9")
    assert sample.main(command(checkpoint=checkpoint, output=tmp_path / "v\udceddeos")) == 0
    assert (tmp_path / "v\udceddeos" / f"{STEM}.json").exists()


def test_a_log_that_cannot_be_written_any_more_loses_nothing(capsys):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with progress.bar("denoise", 2, stream=Gone()) as show:
        show(1)
        show(2)


# ----------------------------------------------------------------------------------------------------------- training


@pytest.fixture
def training(tmp_path, temporary, monkeypatch):
    """run(argv, happens, save_every): the exit status of a training; before each batch happens(step). Its
    argv is a name in tmp_path, or a whole command line. run.made: the state and the lines of metrics, without times."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def run(argv, happens=lambda step: None, save_every=100):
        def loss(params, batch, key):
            value = jnp.mean((batch @ params["kernel"] - jax.random.normal(key, (3, 1))) ** 2)
            return value, {}

        def batch(step):
            happens(step)
            return np.random.default_rng(step).standard_normal((3, 4), np.float32)

        def fit(config, folder):
            task = loop.Task(lambda key: {"kernel": jax.random.normal(key, (4, 1))}, loss, loop.each(batch))
            state = loop.fit(task, loop.Schedule(steps=8, warmup=1), folder, log_every=1, save_every=save_every)
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            run.made = state, [{k: x for k, x in row.items() if k != "seconds_per_step"} for row in rows]
            return folder

        monkeypatch.setattr(train, "function", lambda name: fit)
        if isinstance(argv, str):
            argv = ["jvdiff", "--config", "train_digits_vae", f"--folder={tmp_path / argv}"]
        return train.main(argv)

    yield run
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


REFUSALS = {
    "a periodic state": (3, lambda: limit(1500), 4),
    "the last state": (7, lambda: limit(1500), 100),
    "the state of SIGTERM": (5, lambda: (limit(1500), signal.raise_signal(signal.SIGTERM)), 100),
    "a line of metrics": (5, lambda: limit(500), 100),
}


@pytest.mark.parametrize("fault", REFUSALS)
def test_a_state_of_a_training_that_the_disk_refuses_is_kept_elsewhere(training, tmp_path, temporary, capsys, fault):
    at, happens, save_every = REFUSALS[fault]
    assert training("run", lambda step: happens() if step == at else None, save_every) == 4
    said = capsys.readouterr().err
    (kept,) = temporary.glob("jvdiff-*/run")
    (state,) = kept.glob("state/*")
    assert not any("tmp" in path.name for path in (tmp_path / "run" / "state").iterdir())
    assert f"the state after step {state.name} is in {kept}\n" in said and "Traceback" not in said
    limit(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    asked = []
    for _ in range(2):  # the command may be given again
        assert training(going_on(said), asked.append) == 0
    assert asked == list(range(int(state.name), 8))
    state, lines = training.made
    assert training("whole") == 0
    jax.tree.map(np.testing.assert_array_equal, state, training.made[0])
    assert lines == training.made[1]


def test_a_training_keeps_its_last_step_whatever_is_raised(training, tmp_path, capsys):
    def fail(step):
        if step == 5:
            raise ZeroDivisionError

    assert training("run", fail) == 1
    said, asked = capsys.readouterr().err, []
    assert f"the state after step 5 is in {tmp_path / 'run'}\n" in said and "resume" not in said
    assert training(going_on(said), asked.append) == 0 and asked == [5, 6, 7]


# ------------------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_loading_ends_at_once(command, tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(pipeline, "load", lambda *_, **__: signal.raise_signal(number))
    assert sample.main(command()) == 130
    assert capsys.readouterr().err.endswith("error: stopped at once; nothing more was saved.\n")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_closed_terminal_saves_the_state(command, tmp_path, monkeypatch):
    denoise = pipeline.denoise

    def hung_up(*args, callback, **options):
        signal.raise_signal(signal.SIGHUP)
        return denoise(*args, callback=callback, **options)

    monkeypatch.setattr(pipeline, "denoise", hung_up)
    assert sample.main(command(steps=3)) == 5
    assert run_state.load(tmp_path / "out" / f"{STEM}.state").done == 1


# --------------------------------------------------------------------------------------------------------- one writer


def test_one_writer_for_a_state_and_for_a_stream(command, streaming, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "load", raising(AssertionError("weights were read")))
    state = tmp_path / "out" / "clip.state"
    state.mkdir(parents=True)
    by = rf"is being written by process {os.getpid()} on "
    for main, argv, path in ((sample.main, command, ".clip.state"), (stream.main, streaming, ".clip")):
        with claims.held(tmp_path / "out" / f"{path}.claim"):
            assert main(argv(resume=state, prompt=None, seed=None, output=None)) == 3
        assert re.search(by, capsys.readouterr().err)


def test_one_writer_for_the_folder_of_a_training(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    with claims.held(tmp_path / "run" / ".run.claim"):
        assert train.main(["train", "--config", "train_digits_vae", f"--folder={tmp_path / 'run'}"]) == 3
    assert f"{tmp_path / 'run'}: is being written by process" in capsys.readouterr().err
    assert list((tmp_path / "run").iterdir()) == []
