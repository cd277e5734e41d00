"""One writer, where no lock of a file system helps: claims of the living, the dead, and of other machines."""

import os
import subprocess
import threading
import time

import pytest

from jvdiff.errors import InUse
from jvdiff.runtime import claims
from jvdiff.runtime.claims import Holder, held, holder


def of(path):
    """Who has the claim, which somebody has."""
    found = holder(path)
    assert found is not None
    return found


def written(path, **changed):
    """A claim of this process, changed."""
    with held(path):
        found = of(path)._replace(**changed)
    path.write_bytes(found.encode())
    return found


def ended():
    """The number of a process that has just ended."""
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


def test_a_second_one_is_told_who_has_it_and_nothing_is_left(tmp_path):
    path = tmp_path / ".clip.claim"
    with held(path, "clip") as claim:
        assert (of(path).pid, of(path).nonce) == (os.getpid(), claim.nonce)
        with pytest.raises(InUse, match=f"clip: is being written by process {os.getpid()} on "), held(path, "clip"):
            pass
        claim.check()
    assert holder(path) is None and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "gone", [lambda: {"pid": ended()}, lambda: {"started": "1"}], ids=["ended", "number used anew"]
)
def test_a_dead_process_is_taken_over_at_once(tmp_path, gone):
    path = tmp_path / ".clip.claim"
    before = written(path, **gone())
    assert holder(path) is None
    (tmp_path / f".clip.claim.{before.nonce[:8]}").write_bytes(before.encode())  # and so is one that was taking it over
    with held(path, watch=False) as claim:
        claim.check()
    assert list(tmp_path.iterdir()) == []


def test_of_many_that_take_over_one_wins_at_a_time(tmp_path):
    path, barrier, inside, won = tmp_path / ".clip.claim", threading.Barrier(8), [], []
    written(path, pid=ended())

    def taker():
        barrier.wait()
        for _ in range(20):
            try:
                with held(path):
                    inside.append(1)
                    won.append(len(inside))
                    time.sleep(0.001)
                    inside.pop()
            except InUse:
                pass

    threads = [threading.Thread(target=taker) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert won and set(won) == {1} and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [None, b"", b'{"host": "elsew'], ids=["another machine", "empty", "half"])
def test_what_does_not_change_for_a_minute_is_taken_over(tmp_path, monkeypatch, capsys, content):
    monkeypatch.setattr(claims, "SILENT", 0.3)
    path = tmp_path / ".clip.claim"
    written(path, host="elsewhere", boot="another")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InUse), held(path, watch=False):
        pass
    began = time.monotonic()
    with held(path):
        assert 0.2 < time.monotonic() - began < 5
    assert "watching for 0.3 s at most" in capsys.readouterr().err


def test_a_claim_of_another_machine_that_counts_on_is_left_alone(tmp_path, monkeypatch):
    path = tmp_path / ".clip.claim"
    other = written(path, host="elsewhere", boot="another")
    threading.Timer(0.25, lambda: path.write_bytes(other._replace(count=1).encode())).start()
    with pytest.raises(InUse, match="on elsewhere"), held(path):
        pass
    assert Holder._replace(other, count=1) == holder(path)


def test_a_holder_renews_and_notices_what_it_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "RENEWED", 0.02)
    path = tmp_path / ".clip.claim"
    with held(path, "clip") as claim:
        time.sleep(0.2)
        assert of(path).count > 1
        other = of(path)._replace(nonce="0" * 16, host="elsewhere")
        path.unlink()
        path.write_bytes(other.encode())
        with pytest.raises(InUse, match=f"clip: process {os.getpid()} on elsewhere took it over"):
            claim.check()
        time.sleep(0.1)
    assert holder(path) == other  # neither renewed nor removed


def test_a_folder_that_is_not_there_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError), held(tmp_path / "none" / ".clip.claim"):
        pass
