"""The first hour on a GPU: parts that end however they like, what is kept of them, and a rehearsal of all of it."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jvdiff.errors import UsageError

ROOT = Path(__file__).parents[2]
new_jax = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="rehearsed on Python 3.12, by make kernels")


@pytest.fixture
def hour(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("first_gpu_hour")


def script(hour, name, code, limit=60.0):
    """A part that is a script in which `out` is the file to write."""
    words = ("-c", f"import json, os, sys, time; out = sys.argv[1]\n{code}", "{out}")
    return hour.Part(name, limit, words, words)


def writes(result):
    return f"json.dump({result!r}, open(out, 'w'))\n"


@pytest.fixture
def parts(hour, monkeypatch):
    machine = {"device": "NVIDIA H200", "driver": "580.1", "jax": "0.12.0", "python": "3.12", "commit": "abc"}
    parts = [
        script(hour, "right", writes({"tried": 3})),
        script(hour, "hangs", writes({"tried": 1}) + "time.sleep(100)", 4.0),
        script(hour, "crashes", "os.abort()"),
        script(hour, "wrong", "sys.exit('mosaic_gpu is wrong')"),
        script(hour, "step, dense", writes({"seconds": 0.9})),
        script(hour, "attention, STA", writes({"rows": [{"ours": 1, "pattern": "s", "tflops_per_s": 400}]})),
    ]
    monkeypatch.setattr(hour, "PARTS", tuple(parts))
    monkeypatch.setattr(hour, "own", lambda *_: script(hour, "machine", writes(machine)))
    return parts


def test_a_part_that_hangs_crashes_or_fails_ends_alone(hour, parts, tmp_path, capsys):
    words = ["--output", str(tmp_path / "hour.json")]
    assert hour.main(words) == 1
    report = json.loads((tmp_path / "hour.json").read_text())
    found = report["parts"]
    status = [found[part.name]["status"] for part in parts]
    assert status == ["done", "out of time", "crashed", "failed", "done", "done"]
    assert found["hangs"]["result"] == {"tried": 1} and found["hangs"]["seconds"] < 60  # what it had found is kept
    assert found["wrong"]["said"] == ["mosaic_gpu is wrong"] and found["crashes"]["exit"] == -6
    assert report["machine"]["driver"] == "580.1" and found["right"]["at"] == "abc"
    assert report["nearest"] == {"goal": hour.GOALS[0].what, "wanted": 850, "found": 900.0, "ratio": 1.06}
    assert report["farthest"]["ratio"] == 1.5 and "ratio 1.5" in capsys.readouterr().out


def test_the_same_command_goes_on(hour, parts, monkeypatch):
    report = {"parts": {"right": {"status": "done"}, "hangs": {"status": "out of time"}}}
    again = hour.waiting(parts, report, [])
    assert [part.name for part in again] == ["crashes", "wrong", "step, dense", "attention, STA", "hangs"]
    assert [part.name for part in hour.waiting(parts, report, ["right"])] == ["right"]


def test_nothing_begins_without_time_and_no_machine_is_mixed_with_another(hour, parts, tmp_path, capsys):
    output = tmp_path / "hour.json"
    assert hour.main(["--minutes=0", "--output", str(output)]) == 0
    assert "out of time; the same command goes on" in capsys.readouterr().out and not output.exists()
    output.write_text(json.dumps({"machine": {"device": "NVIDIA H100"}, "parts": {}}))
    with pytest.raises(UsageError, match="of another machine: device NVIDIA H100 there, NVIDIA H200 here"):
        hour.main(["--output", str(output)])
    with pytest.raises(UsageError, match="is in none of: right; hangs"):
        hour.main(["--only=nothing"])


def test_every_goal_has_its_part(hour):
    names = [part.name for part in hour.PARTS]
    assert len(set(names)) == len(names) and {goal.part for goal in hour.GOALS} <= set(names)
    assert hour.judged({}) == {"goals": []}
    assert sum(part.limit for part in hour.PARTS[:3]) < 300  # the first parts fit into a first pass, whatever they do


@new_jax
def test_some_of_it_is_rehearsed(tmp_path):
    """The parts that are cheap; `--rehearse` alone runs all of them."""
    some = [f"--only={name}" for name in ("step, dense", "top-k", "side by side")]
    command = [sys.executable, ROOT / "benchmarks/first_gpu_hour.py", "--rehearse", "--minutes=120", *some]
    done = subprocess.run([*command, "--output", tmp_path / "r.json"], capture_output=True, text=True, timeout=7200)
    report = json.loads((tmp_path / "r.json").read_text())
    wrong = {name: part for name, part in report["parts"].items() if part["status"] != "done"}
    assert done.returncode == 0 and not wrong, wrong or done.stderr
    assert report["rehearsal"] and len(report["parts"]) == 3 and report["nearest"]["goal"].startswith("step")
