"""The loader's benchmark runs, and tells waiting from not waiting."""

import importlib
import json
import time
from pathlib import Path

import pytest

pytest.importorskip("av")
pytest.importorskip("grain")


@pytest.fixture
def loader(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("loader")


def test_it_says_what_a_step_waits_and_what_a_clip_costs(loader, tmp_path, monkeypatch, capsys):
    read, slow = loader.clips.read, 0.1
    monkeypatch.setattr(loader.clips, "read", lambda *args, **kw: (time.sleep(slow), read(*args, **kw))[1])
    sizes = ["--batch=2", "--frames=2", "--size=16", "--clips=2", "--clip_frames=4"]
    rest = ["--steps=4", "--step=0.01", "--workers=1", f"--output={tmp_path / 'loader.json'}"]
    assert loader.main(sizes + rest) == 0
    report = json.loads((tmp_path / "loader.json").read_text())
    assert report["waited"] > 0.5  # two clips take 0.2 s and more, a step 0.01 s
    assert report["milliseconds_of_a_clip"]["resize_and_copy"] > 50
    assert report["settings"]["workers"] == 1 and report["machine"]["cores"]
    assert "most goes into: resize_and_copy" in capsys.readouterr().out
