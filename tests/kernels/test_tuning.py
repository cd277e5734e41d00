"""How kernels are cut: what ships, what this machine's own file says, and the command that writes it."""

import importlib
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff.commands import tune
from jvdiff.kernels import block_sparse, tuning
from jvdiff.kernels.block_sparse import cuts, mosaic_gpu, triton
from jvdiff.plan import resources
from jvdiff.runtime.target import Target

H200 = "NVIDIA H200"
WIDE = {"warpgroups": 3, "step": 128, "stages": 2, "producer": True}
new_jax = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Mosaic's interpreter needs JAX 0.11 (Python 3.12)")


@pytest.fixture
def own(tmp_path, monkeypatch, caplog):
    """Writes this machine's own file of cuts; caplog gets what is said of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def write(content):
        cuts.path().parent.mkdir(exist_ok=True)
        cuts.path().write_text(content if isinstance(content, str) else json.dumps(content))
        cuts._own.cache_clear()
        cuts._cut.cache_clear()

    write({})
    yield write
    cuts._own.cache_clear()
    cuts._cut.cache_clear()


def test_this_machines_file_goes_before_what_ships(own, caplog):
    own({"mosaic_gpu": {H200: {"384x128": {"forward": WIDE}, "192x128": {"forward": WIDE | {"step": 64}}}}})
    forward = lambda block, kind=H200, dtype=jnp.bfloat16: mosaic_gpu.shapes(block, 128, dtype, kind)["forward"]  # noqa: E731
    assert forward(384) == forward(768) == mosaic_gpu.Shape(**WIDE)  # the largest that divides the block
    assert forward(192).step == 64 and forward(576).step == 64
    assert forward(64) == mosaic_gpu.shipped(64, 128, jnp.bfloat16, H200)["forward"]
    assert forward(384, kind="NVIDIA H100 80GB HBM3").warpgroups == 2
    assert mosaic_gpu.shapes(384, 128, jnp.bfloat16, H200)["dq"].warpgroups == 2  # the other kernels as they ship
    assert not caplog.records


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (WIDE | {"warpgroups": 2, "step": 100}, "a step of 100 rows does not divide a block of 384"),
        (WIDE | {"stages": 4}, "bytes of shared memory; there are 232,448"),
        (WIDE | {"producer": False}, "producer is False with 3 warpgroups"),
        (WIDE | {"stages": "2"}, "must be whole numbers"),
        ({"step": 128}, "expected warpgroups, step, stages, producer, found {'step': 128}"),
        (7, "found 7"),
    ],
)
def test_an_entry_that_is_no_cut_is_a_sentence_once(entry, said, own, caplog):
    own({"mosaic_gpu": {H200: {"384x128": {"forward": entry}}}})
    for _ in range(2):
        found = mosaic_gpu.shapes(384, 128, jnp.bfloat16, H200)
        assert found == mosaic_gpu.shipped(384, 128, jnp.bfloat16, H200)
    (record,) = caplog.records
    assert f"tuned.json: mosaic_gpu, {H200}, 384x128, forward is left out" in record.message and said in record.message


@pytest.mark.parametrize("content", ["{", "[]", '{"mosaic_gpu": 3}', '{"mosaic_gpu": {"x": {"wide": {}}}}'])
def test_a_file_that_cannot_be_read_is_a_sentence_once(content, own, caplog):
    own(content)
    for _ in range(2):
        assert mosaic_gpu.shapes(384, 128, jnp.bfloat16, H200)["forward"].warpgroups == 2
    (record,) = caplog.records
    assert "Run jvdiff tune, or remove it" in record.message


def test_what_the_compiler_refuses_is_cut_as_it_ships(own, caplog, monkeypatch):
    """On the GPU that the entry is for, a kernel of one block is compiled before anything else is."""
    own({"triton": {"NVIDIA A100": {"64x128": {"forward": triton.Shape(64, 64, 128, 4, 3)._asdict()}}}})
    gpu = Target("gpu", "NVIDIA A100", (8, 0))
    shipped = triton.shipped(64, 128, jnp.bfloat16, gpu.kind)
    assert triton.shapes(64, 128, jnp.bfloat16, gpu.kind)["forward"].channels == 128  # elsewhere it is believed
    cuts._cut.cache_clear()
    monkeypatch.setattr(cuts, "here", lambda: gpu)
    assert triton.shapes(64, 128, jnp.bfloat16, gpu.kind) == shipped  # Triton's kernels do not compile for a CPU
    (record,) = caplog.records
    assert "interpret mode" in record.message and "cut as it ships" in record.message


def tiny(monkeypatch, case, module, tried):
    """One small case, and few cuts to try."""
    monkeypatch.setitem(tuning.MODELS, case.model, ((2, 4, 8), 1))
    monkeypatch.setitem(tuning.PATTERNS, case.pattern, ((1, 4, 4), lambda n: 2))
    monkeypatch.setattr(tuning, "HEAD_DIM", 16)
    monkeypatch.setattr(tuning, "CASES", (case,))
    monkeypatch.setattr(module, "CUTS", dict.fromkeys(cuts.KERNELS, ()) | {case.kernel: tried})


def test_the_fastest_cut_is_written(own, monkeypatch, capsys):
    """Triton's kernels, interpreted: one cut is right, one cannot be, and one is wrong."""
    case = tuning.Case("tiny", "VSA tiny", "forward")
    slow, wrong = triton.Shape(16, 16, 16, 4, 1), triton.Shape(16, 16, 8, 4, 1)
    tiny(monkeypatch, case, triton, (slow, triton.Shape(16, 16, 16, 4, 2), wrong))
    monkeypatch.setattr(triton, "INTERPRET", True)
    monkeypatch.setattr(triton, "shipped", lambda *_: dict.fromkeys(cuts.KERNELS, slow))
    monkeypatch.setattr(triton, "unfit", lambda *_: None)
    monkeypatch.setattr(tuning, "_in_turn", lambda runs: [3.0, 2.0][: len(runs)])
    real = tuning.program

    def program(implementation, shape, kernel, cut, target):
        run = real(implementation, shape, kernel, slow, target)
        return jax.jit(lambda *x: jax.tree.map(lambda y: y * 1.5, run(*x))) if cut == wrong else run

    monkeypatch.setattr(tuning, "program", program)
    own({"mosaic_gpu": {H200: {"384x128": {"forward": WIDE}}}})
    assert tune.main(["jvdiff tune", "--seconds=3600"]) == 0
    out = capsys.readouterr().out
    assert "wrong by 5e-01" in out and "3000.000 ms" in out and str(cuts.path()) in out
    written = json.loads(cuts.path().read_text())
    kind = jax.devices()[0].device_kind
    assert written["triton"][kind]["16x16"] == {"forward": triton.Shape(16, 16, 16, 4, 2)._asdict()}
    assert written["mosaic_gpu"][H200]["384x128"] == {"forward": WIDE}  # what was there stays


@new_jax
def test_hoppers_cuts_are_tried_backwards_too(own, monkeypatch):
    """Mosaic's kernels, interpreted: each of two cuts of dq gives what the other gives."""
    interpreter: Any = importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    case = tuning.Case("tiny", "VSA tiny", "dq")
    tiny(monkeypatch, case, mosaic_gpu, (mosaic_gpu.Shape(2, 64, 2, True),))
    monkeypatch.setitem(tuning.MODELS, case.model, ((2, 8, 24), 1))
    monkeypatch.setitem(tuning.PATTERNS, case.pattern, ((2, 8, 8), lambda n: 2))
    monkeypatch.setattr(tuning, "HEAD_DIM", 64)
    monkeypatch.setattr(mosaic_gpu, "INTERPRET", interpreter.InterpretGPUParams())
    one = mosaic_gpu.Shape(1, 64, 1, False)
    monkeypatch.setattr(mosaic_gpu, "shipped", lambda *_: dict.fromkeys(cuts.KERNELS, one))
    monkeypatch.setattr(tuning, "_in_turn", lambda runs: [2.0, 3.0][: len(runs)])
    ((rows, best),) = tuning.tune("mosaic_gpu", Target("gpu", H200, (9, 0)), [case], 300)
    assert [(row.problem, row.difference < 0.01) for row in rows] == [("", True)] * 2
    assert best == {("mosaic_gpu", H200, 128, 64, "dq"): one}


def test_later_shapes_try_what_was_not_slow_before(monkeypatch):
    """Times are compared in that of the cut that ships; the best over all shapes is taken. Nothing is run."""
    times = {"a": [1.0, 1.0], "b": [0.8, 0.9], "c": [2.0], "d": [0.79, 1.1]}
    tried = []

    def timed(case, shape, implementation, cuts, target):
        tried.append(list(cuts))
        return [tuning.Row(case, 64, cut, "", times[cut][len(tried) - 1]) for cut in cuts]

    monkeypatch.setattr(tuning, "_timed", timed)
    monkeypatch.setattr(
        tuning, "shape_of", lambda *_: tuning.Shape(64, 1, (64, 64), block_sparse.Lists(*[None] * 3), 1)
    )
    monkeypatch.setattr(tuning, "candidates", lambda *_: list("abcd"))
    *_, (_, best) = tuning.tune("mosaic_gpu", Target("gpu", H200), tuning.CASES[:2], 60)
    assert tried == [list("abcd"), list("abd")] and best == {("mosaic_gpu", H200, 64, 128, "forward"): "b"}
    assert list(tuning.tune("mosaic_gpu", Target("gpu", H200), tuning.CASES[:2], -1)) == []  # no time, no case


@pytest.mark.parametrize("case", tuning.CASES, ids=str)
def test_the_cut_that_ships_is_the_first_of_every_case(case):
    gpu = Target("gpu", H200, (9, 0))
    shape = tuning.shape_of(case, "mosaic_gpu", gpu) if case.model == "1.3B 480p" else None
    block = shape.block if shape else 64
    found = tuning.candidates("mosaic_gpu", case.kernel, block, H200)
    assert found[0] == mosaic_gpu.shipped(block, 128, jnp.bfloat16, H200)[case.kernel] and len(found) < 12
    if shape and case.pattern == tuning.STREAM:
        assert shape.rows == (4736, 32768) and np.sum(shape.lists.kv_sizes) == 32_760  # 37 blocks of 12 heads


def test_without_a_gpu_it_says_what_can_be_done(capsys, monkeypatch):
    monkeypatch.setattr(resources, "ask", lambda: None)  # which changes the environment
    assert tune.main(["jvdiff tune"]) == 7
    assert "jvdiff tune --target=h200 compiles every cut" in capsys.readouterr().err
    assert tune.main(["jvdiff tune", "--only=nothing like it"]) == 2
    assert "1.3B 480p, STA 6x8x8, forward" in capsys.readouterr().err
    assert tune.main(["jvdiff tune", "--target=tpu"]) == 2


@pytest.mark.skipif(
    not (find_spec("jax_plugins") and find_spec("jax_plugins.xla_cuda13")), reason="the CUDA compiler is not installed"
)
def test_every_cut_compiles_without_a_gpu(monkeypatch):
    """Of one shape; the others take as long again."""
    command = [sys.executable, "-m", "jvdiff", "tune", "--target=h200", "--only=1.3B 480p, STA 6x8x8, forward"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=900)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()[2:]]
    assert len(lines) == 11
    assert all(spills == "0" and int(registers) <= 168 for *_, registers, spills, _, _, _ in lines)
