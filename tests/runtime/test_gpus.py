"""GPUs as files and the driver's library tell of them; a library that is not there is a program in its place."""

import json
import sys

import pytest

import jvdiff
from jvdiff.errors import SetupError
from jvdiff.runtime import gpus

OLD = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version: 12\n"
GPU = {"name": "NVIDIA H100", "capability": [9, 0], "memory": 80, "free": None}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with a GPU, a driver and JAX's packages for CUDA 13; -> says(what the driver's library answers)."""
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidiactl").touch()
    (tmp_path / "version").write_text(OLD)
    monkeypatch.setattr(gpus, "DEVICES", tmp_path)
    monkeypatch.setattr(gpus, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(gpus, "packages", lambda: [13])
    monkeypatch.setattr(gpus, "LIMIT", 600.0)
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(gpus, "asked", lambda: "")

    def says(**answer):
        line = json.dumps({"problem": None, "cuda": None, "gpus": []} | answer)
        monkeypatch.setattr(gpus, "LIBCUDA", (sys.executable, "-I", "-S", "-c", f"print({line!r})"))

    return says


def test_a_gpu_that_jax_cannot_use_is_a_sentence_with_a_status(machine, tmp_path, monkeypatch):
    machine(cuda=12020, gpus=[GPU])
    with pytest.raises(SetupError) as raised:
        gpus.check_used()
    said = str(raised.value)
    assert raised.value.exit_code == 7 and said.count("\n") < 6
    assert f"Found: {tmp_path / 'nvidia0'}; driver 535.104.05, which serves CUDA 12.2." in said
    assert "Needed: driver 580 or newer, for JAX's packages for CUDA 13." in said
    assert "Update the driver, or install jvdiff[cuda12] in place of jvdiff[cuda13]." in said
    monkeypatch.setattr(gpus, "driver", lambda: gpus.Driver("535.104.05", (12, 2), (), None))  # no kernel is checked
    with pytest.raises(SetupError, match="a GPU is there"):  # in Python too, before any weight is read
        jvdiff.load(tmp_path)


def test_what_is_in_the_way_is_named(machine, tmp_path, monkeypatch):
    machine(cuda=13000, gpus=[GPU])
    (tmp_path / "libcudnn.so.9").touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/nowhere:{tmp_path}")
    assert f"LD_LIBRARY_PATH has other CUDA libraries, in {tmp_path}: unset it." in gpus.unused(gpus.driver())
    machine(problem="libcuda.so.1: cannot open shared object file")
    monkeypatch.delenv("LD_LIBRARY_PATH")
    said = gpus.unused(gpus.driver())
    assert len(said) == 6 and "The driver says: libcuda.so.1: cannot open shared object file." in said
    assert "start a container with `--gpus all`" in said[4]


@pytest.mark.parametrize("fault", ["import time; time.sleep(60)", "import os; os.abort()", "print('no JSON')"])
def test_a_driver_that_does_not_answer_is_told(machine, monkeypatch, fault):
    monkeypatch.setattr(gpus, "LIBCUDA", (sys.executable, "-I", "-S", "-c", fault))
    monkeypatch.setattr(gpus, "LIMIT", 0.3)
    found = gpus.driver()
    assert found.gpus == () and str(found.problem).startswith("the driver does not answer: it ")


def test_a_cpu_that_was_asked_for_is_taken(machine, monkeypatch):
    machine(cuda=12020, gpus=[GPU])
    for name, value in (("CUDA_VISIBLE_DEVICES", ""), ("CUDA_VISIBLE_DEVICES", "-1")):
        monkeypatch.setenv(name, value)
        gpus.check_used()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(gpus, "asked", lambda: "cpu")
    gpus.check_used()


def test_the_pool_is_nine_tenths_unless_somebody_says_otherwise(monkeypatch):
    for name in gpus.FRACTIONS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(gpus.FRACTIONS[1], "0.4")
    gpus.reserve()
    assert gpus.FRACTIONS[0] not in gpus.os.environ and gpus.share() == 0.4  # both would be an error of JAX
    monkeypatch.delenv(gpus.FRACTIONS[1])
    monkeypatch.setenv(gpus.FRACTIONS[0], "")  # put back afterwards
    gpus.reserve()
    assert gpus.os.environ[gpus.FRACTIONS[0]] == "0.9" and gpus.share() == 0.9
