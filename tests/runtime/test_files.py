"""Files that are whole or absent, under names that are taken once."""

import json
import subprocess
import threading

import pytest

from jvdiff.errors import ResourceError
from jvdiff.runtime import claims
from jvdiff.runtime.files import atomic, claim


def test_a_failure_keeps_the_file_that_was_there(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("before")
    with pytest.raises(KeyboardInterrupt), atomic(target) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "before"
    with atomic(target) as part:
        part.write_text("after")
    assert target.read_text() == "after"
    assert list(tmp_path.iterdir()) == [target]


def test_f58_concurrent_samplers_never_share_a_name(tmp_path):
    names, barrier = [], threading.Barrier(8)

    def sampler(i):
        barrier.wait()
        for _ in range(5):
            with claim(tmp_path, "a.red_seven") as base, atomic(f"{base}.json") as part:
                names.append(base.name)
                part.write_text(str(i))

    threads = [threading.Thread(target=sampler, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(set(names)) == 40 and "a.red_seven" in names and "a.red_seven-40" in names
    assert {p.name for p in tmp_path.iterdir()} == {f"{name}.json" for name in names}


def test_what_a_killed_process_claimed_is_free_again(tmp_path):
    (tmp_path / "clip.json").touch()  # the mark of a version before
    for name in (".clip.mp4.0123abcd.part", ".clip.preview.png.0123abcd.part", ".clip.x.mp4.0123abcd.part"):
        (tmp_path / name).touch()
    (tmp_path / ".clip.state.staging-12-0123abcd").mkdir()
    child = subprocess.Popen(["true"])
    child.wait()
    with claims.held(tmp_path / ".clip.claim"):
        content = json.loads((tmp_path / ".clip.claim").read_text())
    (tmp_path / ".clip.claim").write_text(json.dumps(content | {"pid": child.pid}))
    with claim(tmp_path, "clip") as base:
        assert base.name == "clip"
        hidden = {path.name for path in tmp_path.iterdir() if path.name.startswith(".")}
        assert hidden == {".clip.claim", ".clip.x.mp4.0123abcd.part"}  # what is another clip's stays
        with claim(tmp_path, "clip") as other:
            assert other.name == "clip-2"
    (tmp_path / "clip.json").write_text("{}")
    with claim(tmp_path, "clip") as base:
        assert base.name == "clip-2"
    with claim(tmp_path, "stream", (".jsonl", ".mp4")) as base, atomic(f"{base}.mp4") as part:
        part.write_text("a first chunk, whose line was not written")
    with claim(tmp_path, "stream", (".jsonl", ".mp4")) as base:
        assert base.name == "stream-2"


def test_a_name_may_be_as_long_as_the_file_system_takes(tmp_path):
    for name in ("a" * 255, "漢" * 85):
        with atomic(tmp_path / name) as part:
            part.write_text("whole")
        assert (tmp_path / name).read_text() == "whole"
        with claim(tmp_path / "names", name[:-5]) as base:
            assert base.name == name[:-5]


def test_f58_a_claim_that_fails_is_given_back(tmp_path):
    with pytest.raises(RuntimeError), claim(tmp_path / "new", "clip"):
        raise RuntimeError
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="it is a file"), claim(tmp_path / "file", "clip"):
        pass
