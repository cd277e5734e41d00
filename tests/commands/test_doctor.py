"""`jvdiff doctor` on machines that are files, a driver's answer, and children's answers."""

import json
import sys

import jax
import pytest

from jvdiff.commands import doctor, examinations, one_video
from jvdiff.kernels import admission
from jvdiff.runtime import gpus, target
from jvdiff.runtime.target import Target

H200 = {"name": "NVIDIA H200", "capability": [9, 0], "memory": 140 * 2**30, "free": 139 * 2**30}
CUDNN = {"found": 91200, "needed": 90800}
DEVICES = {"platform": "gpu", "kind": "NVIDIA H200", "capability": [9, 0], "count": 1, "pool": 126 * 2**30}
DEVICES |= {"cudnn": CUDNN, "attention": {"dense": ["cudnn", {}]}}
REDUCED = {"devices": 1, "ms": 0.2, "right": True}


def child(code):
    return sys.executable, "-I", "-S", "-c", code


def answers(value):
    return child(f"print({json.dumps(value)!r})")


FOUND, SUMMED, RIGHT = answers(DEVICES), answers(REDUCED), answers({"problem": None})
HANGS, CRASHES = child("import time; time.sleep(60)"), child("import os; os.abort()")


@pytest.fixture
def examined(tmp_path, monkeypatch, capsys):
    """A machine with an H200; examined(*flags, driver=, jax=, reduce=, kernel=) -> (exit status, what was printed)."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(admission, "LIMIT", 600.0)
    for name, value in {"DEVICES": tmp_path / "dev", "DRIVER": tmp_path / "version", "LIMIT": 600.0}.items():
        monkeypatch.setattr(gpus, name, value)
    for name, value in {"packages": lambda: [13], "asked": lambda: "", "reserve": lambda: None}.items():
        monkeypatch.setattr(gpus, name, value)
    for name in (*gpus.FRACTIONS, "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)

    def run(*flags, driver=None, jax=FOUND, reduce=SUMMED, kernel=RIGHT):
        said = {"problem": None, "cuda": 13000, "gpus": [H200]} | (driver or {})
        monkeypatch.setattr(gpus, "LIBCUDA", answers(said))
        monkeypatch.setattr(admission, "COMMAND", kernel)
        ask, parts = doctor.children.ask, {"devices": jax, "reduce": reduce}

        def asked(words, limit, environment=None):
            known = words[len(doctor.EXAMINE)] if tuple(words[:3]) == doctor.EXAMINE else ""
            return ask(parts[known], 0.5 if parts[known] is HANGS else 600) if known else ask(words, limit, environment)

        with monkeypatch.context() as inside:
            inside.setattr(doctor.children, "ask", asked)
            code = doctor.main(["jvdiff doctor", *flags])
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


def test_a_machine_on_which_all_is_well(examined, tmp_path):
    code, out, _ = examined("--devices=1")
    assert code == 0 and f"jax {jax.__version__}" in out
    assert "driver: 580.65.06, serves CUDA 13.0; CUDA 13 needs 580 or newer" in out
    assert "GPU 0: NVIDIA H200, compute capability 9.0, 140.0 GiB, 139.0 GiB free" in out
    assert "attention kernel triton: right" in out and "attention, dense: cudnn" in out
    assert "JAX: gpu, 1 x NVIDIA H200; pool of 126.0 GiB, 0.9 of each" in out
    assert "cuDNN: 9.12.0 found, 9.8.0 needed" in out and "all-reduce of 1 MB: right" in out
    assert f"cache of compiled programs: {tmp_path / 'cache/jvdiff/compiled'}, empty" in out
    old = jax.__version_info__ < (0, 11)
    assert out.count("advice:") == old and ("take Python 3.12 or newer" in out) == old


CPU = DEVICES | {"platform": "cpu", "kind": "cpu", "pool": None, "cudnn": {"found": None, "needed": None}}
# what is wrong -> flags, what differs from a good machine, exit status, what is said
WRONG = {
    "JAX hangs": ([], {"jax": HANGS}, 7, "JAX: it did not end within 0.5 s"),
    "JAX crashes": ([], {"jax": CRASHES}, 7, "JAX: it was ended by SIGABRT"),
    "JAX takes the CPU": ([], {"jax": answers(CPU)}, 7, "error: a GPU is there, and JAX cannot use it"),
    "an old driver": ([], {"jax": answers(CPU), "driver": {"cuda": 12020}}, 7, "advice: Update the driver, or install"),
    "too few": (["--devices=8"], {}, 7, "error: 8 GPUs were asked for, and JAX finds 1; see above."),
    "no driver": ([], {"driver": {"problem": "no libcuda.so.1", "gpus": [], "cuda": None}}, 0, "`--gpus all`"),
    "another cuDNN": (
        [],
        {"jax": answers(DEVICES | {"cudnn": CUDNN | {"found": 90100}})},
        0,
        "cuDNN: 9.1.0 found, 9.8.0 needed\nadvice: install it again",
    ),
    "another process": ([], {"driver": {"gpus": [H200 | {"free": 2**30}]}}, 0, "advice: another process uses it"),
    "NCCL hangs": ([], {"reduce": HANGS}, 0, "advice: NCCL_DEBUG=INFO says where it stops"),
    "a wrong sum": ([], {"reduce": answers(REDUCED | {"right": False})}, 0, "its result is wrong"),
    "a kernel crashes": ([], {"kernel": CRASHES}, 0, "attention kernel triton: left out, it was ended by SIGABRT"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_wrong_has_a_line_of_advice_and_ends_nothing(fault, examined):
    flags, differs, status, said = WRONG[fault]
    code, out, err = examined(*flags, **differs)
    assert code == status and said in out + err and "host memory:" in out
    assert ("advice: " in out) or status == 7


def test_what_the_children_find_here():
    found = examinations.devices({})
    assert found["platform"] == "cpu" and found["count"] == len(jax.devices())
    assert found["attention"]["dense"][0] == "xla"
    reduced = examinations.reduce()
    assert reduced["right"] and reduced["devices"] == len(jax.devices())


def test_what_each_pattern_gets_on_a_gpu_and_why():
    here = Target("gpu", "NVIDIA A100", (8, 0), refused=(("triton", "it did not end within 120 s"),))
    told = examinations.attention(here)
    assert told["dense"] == ["cudnn", {}]
    name, reasons = told["sliding_tile:6x8x8:3x3x3"]
    assert name == "xla" and reasons["triton"] == "failed its check on NVIDIA A100: it did not end within 120 s"
    assert told[examinations.RING] == ["cudnn", {}]


def test_a_record_says_which_kernels_were_refused(monkeypatch):
    pipe = type("Pipeline", (), {"placement": None})()
    assert "refused" not in one_video.device(pipe)
    monkeypatch.setattr(one_video, "here", lambda: Target("gpu", "NVIDIA A100", (8, 0), refused=(("triton", "wrong"),)))
    assert one_video.device(pipe)["refused"] == {"triton": "wrong"}
    assert target.of(jax.devices()).refused == ()
