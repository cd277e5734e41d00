"""Files that are whole or absent, under names that are taken once."""

import threading

import pytest

from jvdiff.errors import ResourceError
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


def test_f58_a_claim_that_fails_is_given_back(tmp_path):
    with pytest.raises(RuntimeError), claim(tmp_path / "new", "clip"):
        raise RuntimeError
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="it is a file"), claim(tmp_path / "file", "clip"):
        pass
