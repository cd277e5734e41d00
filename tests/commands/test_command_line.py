"""What every command does at its edges: streams that are closed or full, devices that are not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jvdiff.commands import command_line
from jvdiff.errors import ResourceError
from tests.forks import Process

ROOT = Path(__file__).parents[2]
CHECK = """
import sys
from jvdiff.commands import command_line
def work():
    open({file!r}, "w").write("mine")  # gets no number of a closed stream
    print("out"); print("err", file=sys.stderr)
sys.exit(command_line.ended(work, ["x"]))
"""


@pytest.mark.parametrize(
    "streams, status",
    [(">&- 2>&- <&-", 0), (">/dev/full", 4), ("2>/dev/full", 0), (">&-", 0)],
)
def test_closed_and_full_streams(tmp_path, streams, status):
    file = tmp_path / "file"
    code = CHECK.format(file=str(file))
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {streams}', sys.executable, code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stderr
    assert file.read_text() == "mine" and "Exception" not in done.stderr and "Traceback" not in done.stderr
    assert ("cannot write to the standard output" in done.stderr) is (status == 4)


def test_a_device_that_is_not_there_is_a_sentence(tmp_path):
    command = [sys.executable, "-m", "jvdiff", "sample", "--prompt=x", f"--output={tmp_path}"]
    environment = os.environ | {"JAX_PLATFORMS": "cuda", "PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 7 and done.stderr.startswith("error: JAX cannot start on JAX_PLATFORMS=cuda"), done.stderr
    assert len(done.stderr.splitlines()) == 3


def test_what_is_ours_is_a_bug_with_its_traceback_in_a_file(tmp_path, capsys):
    def work():
        raise KeyError("ours")

    assert command_line.ended(work, ["x"], [tmp_path]) == 1
    (log,) = tmp_path.glob("jvdiff-error-*.log")
    assert "This is a bug" in capsys.readouterr().err and 'KeyError: "ours"'.replace('"', "'") in log.read_text()


def test_a_panic_is_no_exception_and_a_sentence_all_the_same(capsys):
    class PanicException(BaseException):
        pass

    def work():
        raise PanicException("index out of bounds")

    assert command_line.ended(work, ["x"]) == 3 and "a tokenizer cannot be used" in capsys.readouterr().err


def test_an_error_of_ours_keeps_its_words(capsys):
    def work():
        raise ResourceError("full of x")

    assert command_line.ended(work, ["x"]) == 4 and capsys.readouterr().err == "error: full of x\n"


def test_who_stops_at_once_waits_for_no_thread():
    """Orbax's, for instance, when a second Ctrl-C comes while a training state is saved."""
    setup = """
import threading, time
from jvdiff.commands import verify
threading.Thread(target=time.sleep, args=(60,)).start()
def stopped(words): raise KeyboardInterrupt
verify._verify = stopped
"""
    process = Process("-m", "jvdiff", "verify", "x", setup=setup)
    assert process.wait(30) == 130 and "stopped at once" in process.err
