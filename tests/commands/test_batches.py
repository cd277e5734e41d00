"""Batches: each line is made once, fails alone, and goes on from where it was stopped, whoever makes it."""

import collections
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from jvdiff import pipeline, precision
from jvdiff.commands import batches, jobs, one_video, sample
from jvdiff.errors import CheckpointError, NumericsError, ResourceError
from jvdiff.runtime import claims
from jvdiff.runtime.files import claim
from jvdiff.runtime.interrupts import deferred

RED, BLUE = "a red seven", "a blue two"


@pytest.fixture
def command(tiny_repository, tmp_path):
    """argv of a batch of these lines into tmp_path/out; keywords are fields."""

    def build(*lines, **fields):
        file = tmp_path / "prompts.jsonl"
        if lines:
            file.write_text(
                "".join(json.dumps(line) + "\n" if isinstance(line, dict) else f"{line}\n" for line in lines)
            )
        given = {"checkpoint": tiny_repository, "output": tmp_path / "out", "prompts": file}
        flags = [f"--{name}={value}" for name, value in (given | fields).items() if value is not None]
        return ["jvdiff sample", *flags]

    return build


@pytest.fixture
def made(monkeypatch):
    """The (name, seed) of what is made, by a program that writes the record and nothing else; made.before(job) runs
    before it does."""
    monkeypatch.setattr(batches, "PAUSE", 0.02)
    monkeypatch.setattr(
        pipeline,
        "load",
        lambda repository, name, mesh, vae_decode, in_turn: SimpleNamespace(
            repository=repository,
            precision=precision.choose(name, vae_decode),
            weights=SimpleNamespace(in_turn=in_turn),
        ),
    )

    monkeypatch.setattr(one_video, "calls", lambda *args: [])  # nothing is compiled ahead

    class Made(list):
        before = staticmethod(lambda job: None)

    made = Made()

    def make(maker, job, seconds):
        with deferred(), claim(maker.output, job.stem) as base:  # as what makes a clip does
            made.before(job)
            path = Path(f"{base}.json")
            path.write_text(json.dumps(jobs.facts(job, maker.pipe.repository, maker.pipe.precision)))
        made.append((path.stem, job.seed))
        return [path]

    monkeypatch.setattr(one_video, "make", make)
    return made


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


# -------------------------------------------------------------------------------------------------------- what is made


def test_a_mended_line_alone_is_made_and_with_the_seed_of_its_place(command, made, tmp_path):
    lines = [{"prompt": RED}, {"promt": BLUE}, {"prompt": BLUE}]
    assert sample.main(command(*lines, seed=10)) == 3
    lines[1] = {"prompt": "left"}
    assert sample.main(command(*lines, seed=10)) == 0
    assert made == [("a-red-seven_seed10", 10), ("a-blue-two_seed12", 12), ("left_seed11", 11)]
    assert sample.main(command(*lines, seed=10)) == 0 and len(made) == 3 and not hidden(tmp_path / "out")


def test_a_record_stands_for_the_line_of_its_name_or_its_seed(command, made, tmp_path):
    lines = [{"prompt": RED, "id": "a"}, {"prompt": RED, "id": "b"}, {"prompt": RED, "seed": 4}, {"prompt": RED}]
    assert sample.main(command(*lines)) == 0
    for name, left in (("a", "a"), ("b", "b"), ("a-red-seven_seed4", "a-red-seven_seed4")):
        (tmp_path / "out" / f"{name}.json").unlink()
        made.clear()
        assert sample.main(command(*lines)) == 0
        assert [stem for stem, _ in made] == [left]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NumericsError("NaN"), 3),
        (CheckpointError("damaged"), 3),
        (ResourceError("the disk is full"), 4),
        (jax.errors.JaxRuntimeError("INTERNAL: the device is lost"), None),
        (ZeroDivisionError("a bug"), 1),
    ],
    ids=["numbers", "data", "disk", "device", "bug"],
)
def test_what_fails_alone_and_what_stops_the_batch(command, made, tmp_path, error, status, capsys):
    def fail(job):
        if job.subject == BLUE:
            raise error

    made.before = fail
    argv = command({"prompt": RED}, {"prompt": BLUE}, {"prompt": "left"}, seed=0)
    found = sample.main(argv)
    assert found == status or (status is None and found not in (0, 3))
    alone = status == 3
    assert [seed for _, seed in made] == ([0, 2] if alone else [0])
    assert ("1 of 3 videos were not made" in capsys.readouterr().err) == alone
    made.before = lambda job: None
    assert sample.main(argv) == 0 and sorted(seed for _, seed in made) == [0, 1, 2]  # what is left, and no more
    assert not hidden(tmp_path / "out")


def test_a_line_that_this_machine_cannot_compute_fails_alone(command, made, monkeypatch, capsys):
    """Its attention, or a size that the mesh does not divide; where no line can be computed, the command is wrong."""
    monkeypatch.setattr("jvdiff.kernels.block_sparse.reference.unavailable", lambda target: "needs a GPU")
    sparse = {"prompt": BLUE, "pattern": "video_sparse:1x1x1:0.5", "attention": "reference"}
    assert sample.main(command({"prompt": RED}, sparse, {"prompt": "left"}, seed=0)) == 3
    assert [seed for _, seed in made] == [0, 2] and "'reference': needs a GPU" in capsys.readouterr().err
    assert sample.main(command(sparse, sparse, seed=0)) == 2 and len(made) == 2
    made.clear()
    argv = command({"prompt": RED}, {"prompt": RED, "num_frames": 1}, seed=5, mesh="sequence=2")
    assert sample.main(argv) == 3 and [seed for _, seed in made] == [5]
    assert "sequence" in capsys.readouterr().err.split("a-red-seven_seed6: ")[1]


def test_a_tuple_of_prompts_is_a_batch_too(command, made, capsys):
    """Of a field and of a configuration: an entry fails alone, keeps its seed, and nothing is made twice."""
    argv = command(prompts=None, prompt=(RED, " ", BLUE), seed=10)
    made.before = lambda job: job.subject == BLUE and (_ for _ in ()).throw(NumericsError("NaN"))
    assert sample.main(argv) == 3 and made == [("a-red-seven_seed10", 10)]
    said = capsys.readouterr().err
    assert "2 of 3 videos were not made" in said and "prompt 2: prompt is empty" in said
    made.before = lambda job: None
    argv = command(prompts=None, prompt=(RED, "left", BLUE), seed=10)
    assert sample.main(argv) == 0 and made[1:] == [("left_seed11", 11), ("a-blue-two_seed12", 12)]
    assert sample.main(argv) == 0 and len(made) == 3
    assert sample.main(command(prompts=None, prompt=(RED, "left"), seeds="10:12")) == 0 and len(made) == 5
    assert (
        sample.main(command(prompts=None, prompt=(), seed=10)) == 2 and "give at least one" in capsys.readouterr().err
    )


def test_seeds_of_one_prompt_are_a_batch_too(command, made):
    argv = command(prompts=None, prompt=RED, seeds="0:3")
    made.before = lambda job: job.seed == 1 and (_ for _ in ()).throw(NumericsError("NaN"))
    assert sample.main(argv) == 3
    made.before = lambda job: None
    assert sample.main(argv) == 0 and [seed for _, seed in made] == [0, 2, 1]


# ------------------------------------------------------------------------------------------------------ many processes


@pytest.mark.parametrize("lines", [[{"prompt": f"{RED} {i}"} for i in range(12)], [{"prompt": RED}] * 12])
@pytest.mark.parametrize("seed", [5, None])
def test_three_share_a_file_and_every_line_is_made_once(command, made, tmp_path, lines, seed):
    """Seeds that each draws for itself too, and lines that nothing else tells apart."""
    argv, codes = command(*lines, seed=seed), []
    made.before = lambda job: time.sleep(0.01)
    threads = [threading.Thread(target=lambda: codes.append(sample.main(argv))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert codes == [0, 0, 0] and len(made) == 12 and not hidden(tmp_path / "out")
    records = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")]
    assert collections.Counter(r["prompt"] for r in records) == collections.Counter(line["prompt"] for line in lines)


def test_what_another_process_makes_is_waited_for_and_made_if_it_dies(command, made, tmp_path, monkeypatch):
    """The claim of a process that was killed is nobody's; that of a living one is respected."""
    claimed = {}
    made.before = lambda job: claimed.update(
        {path: path.read_text() for path in (tmp_path / "out").glob(".*-0.claim") if path not in claimed}
    )
    argv = command({"prompt": RED}, {"prompt": BLUE}, seed=0)
    assert sample.main(argv) == 0 and len(claimed) == 2
    (tmp_path / "out" / "a-red-seven_seed0.json").unlink()
    child = subprocess.Popen(["sleep", "60"])
    (path, content), _ = claimed.items()
    path.write_text(json.dumps(json.loads(content) | {"pid": child.pid, "started": claims._started(child.pid)}))
    made.clear()
    waited = []

    def dies(line):
        if line.startswith(f"waiting for videos that others make: process {child.pid} on"):
            waited.append(not made and (child.kill(), child.wait()))

    monkeypatch.setattr(batches, "say", dies)
    assert sample.main(argv) == 0 and made == [("a-red-seven_seed0", 0)] and len(waited) == 1


def test_what_a_process_of_another_machine_left_is_made_under_its_name(command, made, tmp_path, monkeypatch):
    """Its claims of the clip and of the name end together, after a minute without change."""
    monkeypatch.setattr(claims, "SILENT", 0.4)
    left = {}
    made.before = lambda job: left.update({path: path.read_text() for path in (tmp_path / "out").glob(".*.claim")})
    argv = command({"prompt": RED, "id": "red"})
    assert sample.main(argv) == 0 and len(left) == 2
    (tmp_path / "out" / "red.json").unlink()
    for path, content in left.items():
        path.write_text(json.dumps(json.loads(content) | {"host": "elsewhere"}))
    made.before = lambda job: None
    assert sample.main(argv) == 0 and [name for name, _ in made] == ["red", "red"]


def test_a_signal_ends_the_waiting_with_the_command_that_goes_on(command, made, tmp_path, printed):
    made.before = lambda job: os.kill(os.getpid(), signal.SIGTERM)
    argv = command({"prompt": RED}, {"prompt": BLUE}, seed=0, stop_at=3)
    assert sample.main(argv) == 5 and len(made) == 1
    made.before = lambda job: None
    again = printed()
    assert again == [word for word in argv if word != "--stop_at=3"]
    assert sample.main(again) == 0 and len(made) == 2


# ------------------------------------------------------------------------------------------------------------ going on


def test_a_stopped_batch_is_finished_by_the_command_that_is_printed(
    command, tmp_path, monkeypatch, printed, same_files, capsys
):
    """Byte for byte: stopped in the first clip's steps, in the second's decoding; a stop_at that is reached counts."""
    lines = [{"prompt": RED, "id": "one"}, {"prompt": BLUE, "fps": 5}]
    fields = {"seed": 0, "steps": 2, "save_arrays": "true", "preview_every": 1}
    assert sample.main(command(*lines, **fields, output=tmp_path / "whole")) == 0
    denoise, decode = pipeline.denoise, pipeline.decode

    def interrupted(stage):
        def run(*args, **options):
            os.kill(os.getpid(), signal.SIGTERM)
            return stage(*args, **options)

        return run

    monkeypatch.setattr(pipeline, "denoise", interrupted(denoise))
    assert sample.main(command(**fields)) == 5
    again = printed()
    monkeypatch.setattr(pipeline, "denoise", denoise)
    assert sample.main([*again, "--stop_at=1"]) == 0  # that one is there already
    assert {path.name for path in (tmp_path / "out").glob("*.state")} == {"one.state", "a-blue-two_seed1.state"}
    monkeypatch.setattr(pipeline, "decode", interrupted(decode))
    assert sample.main(again) == 5
    monkeypatch.setattr(pipeline, "decode", decode)
    capsys.readouterr()
    assert sample.main(again) == 0 and "denoise  2/2" not in capsys.readouterr().err.split("video 2")[0]
    same_files(tmp_path / "whole", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "one.json").read_text())["resumed_at_step"] == 2
    assert sample.main(again) == 0 and not list((tmp_path / "out").glob("*-2.*4"))


def test_a_drawn_seed_goes_on_and_a_damaged_state_is_begun_anew(command, tmp_path, capsys):
    argv = command({"prompt": RED}, {"prompt": RED}, steps=2)
    assert sample.main([*argv, "--stop_at=1"]) == 0
    first, second = sorted((tmp_path / "out").glob("*.state"))
    (second / "state.bin").write_bytes(b"")
    capsys.readouterr()
    assert sample.main(argv) == 0
    assert capsys.readouterr().err.count("begins anew: ") == 1
    records = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")]
    assert sorted(r["resumed_at_step"] or 0 for r in records) == [0, 1]
    assert {f"{r['prompt'].replace(' ', '-')}_seed{r['seed']}" for r in records} >= {first.stem}
