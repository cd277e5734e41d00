"""A selection of tests.signals, which sends every signal to every command; and signals while Python imports a command.

In the middle of their work: commands/test_sample, test_stream and test_train, which go on from the state.
"""

import os
import signal
import subprocess
import sys

import pytest

from tests import kills, signals

CHOSEN = [
    ("sample", "SIGHUP", "device:"),
    ("stream", "terminal", "device:"),
    ("train", "SIGHUP", "/out/config.json"),
    ("convert", "SIGHUP", f"{signals.HALF}transformer/params*"),
    ("plan", "SIGTERM", 0.2),
    ("verify", "SIGINT", ": repository"),
    ("digits", "SIGTERM", signals.HALF),
    ("install", "SIGTERM", "installing"),
    ("install", "ignored SIGHUP", "installing"),
]


@pytest.mark.parametrize(("name", "sent", "moment"), CHOSEN)
def test_a_signal_ends_a_command_in_time_with_one_sentence_and_nothing_half_written(name, sent, moment, tmp_path):
    checkpoint = kills.STREAM if name == "stream" else kills.CHECKPOINT
    outcome = signals.signalled(signals.KINDS[name], tmp_path / "out", checkpoint, None, sent, moment)
    assert outcome is not None
    _, status, wrong = outcome
    right = 0 if "ignored" in sent else signals.KINDS[name].stopped
    assert not wrong and (status == right or isinstance(moment, float))  # at a time it may not have begun


@pytest.mark.parametrize(
    "door", [["-m", "jvdiff"], ["-m", "jvdiff.sample"], ["-m", "convert"], ["jvdiff"]], ids=" ".join
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_python_imports_a_command_ends_it_without_a_word(door, number, tmp_path):
    """From the first module on that jvdiff imports; before that Python itself is starting."""
    (tmp_path / "typing.py").write_text(f"import os, time; os.kill(os.getpid(), {number:d}); time.sleep(9)")
    if door == ["jvdiff"]:  # as it is installed
        door = [tmp_path / "jvdiff"]
        door[0].write_text("import sys\nfrom jvdiff.__main__ import main\nsys.exit(main())\n")
    root = str(kills.CHECKPOINT.parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), root])}
    done = subprocess.run([sys.executable, *door, "--help"], env=environment, capture_output=True, cwd=root)
    assert (done.returncode, done.stdout, done.stderr) == (-number, b"", b"")
