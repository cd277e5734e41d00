"""Signals: at once as long as there is nothing to lose, after the step otherwise, and never where they were ignored."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jvdiff.runtime import interrupts as interrupts_module
from jvdiff.runtime import verdict
from jvdiff.runtime.interrupts import SIGNALS, command, deferred, interrupts, shielded


@pytest.mark.parametrize("number", SIGNALS)
def test_with_nothing_to_lose_a_signal_ends_at_once(number):
    with pytest.raises(KeyboardInterrupt), interrupts():
        signal.raise_signal(number)


@pytest.mark.parametrize("number", SIGNALS)
def test_later_it_is_noted_and_a_second_ctrl_c_ends_at_once(number, capsys):
    with interrupts() as asked, interrupts() as inner, deferred():
        assert not asked()
        signal.raise_signal(number)
        assert asked() and inner()
        signal.raise_signal(signal.SIGTERM)
        with shielded():
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert capsys.readouterr().err.count("stopping after this step") == 1
    with interrupts() as asked:
        assert not asked()


@pytest.mark.parametrize("number", SIGNALS)
def test_what_was_ignored_stays_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with command(130, ""):
            signal.raise_signal(number)
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_who_obeys_a_signal_may_be_slow_to_leave(monkeypatch):
    """Its state is saved, and its status is not that of a process that was stuck."""
    ended = []
    monkeypatch.setattr(interrupts_module, "GRACE", 0.05)
    monkeypatch.setattr(verdict, "end_now", lambda *args: ended.append(args))
    with command(130, "") as _, interrupts() as asked:
        with deferred():
            signal.raise_signal(signal.SIGTERM)
            assert asked()
        time.sleep(0.3)
        assert not ended
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert ended


def test_a_signal_after_the_end_changes_no_status(tmp_path):
    (tmp_path / "jvdiff").write_text(
        "import os, signal\n"
        "from jvdiff.commands.command_line import ended\n"
        "again = lambda: os.kill(os.getpid(), signal.SIGTERM)\n"
        "class Sentence(RuntimeError):\n"
        "    def __str__(self): again(); return 'first'\n"  # as the sentence is made
        "def work(): raise Sentence\n"
        "status = ended(work, ['jvdiff'])\n"
        "again()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, tmp_path / "jvdiff"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: Sentence: first")


PROGRAM = """
import hashlib, sys
from pathlib import Path
from jvdiff.runtime.interrupts import command, deferred
from jvdiff.runtime.verdict import unfinished

folder = Path(sys.argv[1])
with command(130, "stopped at once."), unfinished(folder / ".half"):
    (folder / ".half").touch()
    with deferred(lambda: False):  # the first step, say, which is being compiled
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes, in which no handler of Python's runs
"""


def test_a_process_whose_main_thread_is_stuck_ends_within_two_seconds_and_leaves_nothing(tmp_path):
    root = Path(__file__).parents[2]
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    while not (tmp_path / ".half").exists() and child.poll() is None:
        time.sleep(0.01)
    time.sleep(0.1)
    began = time.monotonic()
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130 and time.monotonic() - began < 2
    assert said == "error: stopped at once.\n" and list(tmp_path.iterdir()) == []
