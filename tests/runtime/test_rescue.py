"""Work that is done finds a place: in this order, and a person may help."""

import errno
import io
import os
import resource
import signal
import sys
import tempfile

import pytest

from jvdiff.errors import ResourceError
from jvdiff.runtime import rescue
from jvdiff.runtime.interrupts import interrupts
from jvdiff.runtime.rescue import attempt, kept


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(rescue, "MORE", [])
    return tmp_path / "temporary"


def saving(refused, tried):
    """save(base), which these folders refuse in one way or another, or all do as long as a file `full` is there."""

    def save(base):
        tried.append(base)
        if any(str(base).startswith(str(folder)) for folder in refused):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        base.with_suffix(".state").write_text("saved")
        return base.with_suffix(".state")

    return save


def test_places_in_their_order(tmp_path, temporary, monkeypatch, capsys):
    out, earlier, tried = tmp_path / "out", tmp_path / "earlier", []
    out.mkdir()
    earlier.mkdir()
    assert kept(saving([out], tried), [out / "a", earlier / "a"]) == earlier / "a.state"
    assert f"notice: {out / 'a'}: [Errno 28] No space left on device" in capsys.readouterr().err
    found = kept(saving([out, earlier], tried), [out / "a", earlier / "a"])
    assert found.parent.parent == temporary and found.name == "a.state"
    memory = tmp_path / "memory"
    memory.mkdir()
    monkeypatch.setattr(rescue, "MORE", [str(tmp_path / "nowhere"), str(memory)])
    assert kept(saving([out, temporary], tried), [out / "a"]).is_relative_to(memory)
    long = "a" * 300  # a name that no file system takes
    assert kept(saving([], tried), [out / long]).name == "clip.state"


def test_where_all_refuse_the_reasons_are_told(tmp_path, temporary):
    with pytest.raises(ResourceError, match=r"nothing could be saved anywhere:\n.*out/a: .*No space left"):
        kept(saving([tmp_path], []), [tmp_path / "out" / "a"])
    assert list(temporary.iterdir()) == []


def test_somebody_at_a_terminal_is_asked_until_it_works(tmp_path, temporary, monkeypatch):
    (tmp_path / "other").mkdir()
    refused = [tmp_path / "out", temporary]
    monkeypatch.setattr(sys, "stdin", Terminal(f"\ns3://bucket\n{tmp_path / 'other'}\n"))
    said = Terminal()
    monkeypatch.setattr(sys, "stderr", said)
    tried = []
    assert kept(saving(refused, tried), [tmp_path / "out" / "a"]) == tmp_path / "other" / "a.state"
    assert tried.count(tmp_path / "out" / "a") == 3
    assert said.getvalue().count("kept in memory. Free some space and press Enter") == 3
    assert "the folder is 's3://bucket', an address" in said.getvalue()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_any_signal_ends_that_wait(tmp_path, temporary, monkeypatch, number):
    waiting = Terminal()
    monkeypatch.setattr(waiting, "readline", lambda: signal.raise_signal(number))
    monkeypatch.setattr(sys, "stdin", waiting)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with interrupts(), pytest.raises(ResourceError, match="nothing could be saved"):
        kept(saving([tmp_path], []), [tmp_path / "out" / "a"])


def test_a_limit_on_the_size_of_files_that_can_be_lifted_is(tmp_path, temporary):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(base):
        base.write_bytes(bytes(20_000))
        return base

    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        assert kept(save, [tmp_path / "a"]).stat().st_size == 20_000
        assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == 10_000
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("Array deleted"),
            "the state cannot be read back from the device: Array deleted",
        ),
        (ResourceError("nothing could be saved"), "the state is lost: nothing could be saved"),
    ],
)
def test_what_cannot_be_kept_on_the_way_of_an_error_is_said_and_hides_nothing(capsys, error, said):
    def keep():
        raise error

    assert attempt(keep, "the state") is None
    assert capsys.readouterr().err == f"notice: {said}\n"
    assert attempt(lambda: 3, "the state") == 3
