"""What is read from the compilers' output, and what the command line says to mistakes."""

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[2]
MOSAIC = """Resources(smem_scratch_bytes=50176, tmem_scratch_cols=0)
Resources(smem_scratch_bytes=66560, tmem_scratch_cols=0)
Resources(smem_scratch_bytes=99328, tmem_scratch_cols=0)
ptxas info    : Function properties for block_sparse_dkv_mosaic_gpu_kernel
    8 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 241 registers, used 2 barriers, 1 bytes smem
ptxas info    : Function properties for loop_fusion
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 25 registers, used 0 barriers
ptxas info    : Function properties for block_sparse_forward_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 128 registers, used 2 barriers, 1 bytes smem
ptxas info    : Function properties for block_sparse_dq_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 162 registers, used 2 barriers, 1 bytes smem
"""
TRITON = """thunk_emitter.cc:186] Generating: block_sparse_dq
xtile_compiler.cc:599] Shared memory usage: 73748 B
thunk_emitter.cc:186] Generating: block_sparse_forward
xtile_compiler.cc:599] Shared memory usage: 49172 B
ptxas info    : Function properties for block_sparse_dq
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 127 registers, used 1 barriers, 416 bytes cmem[0]
ptxas info    : Function properties for block_sparse_forward
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 237 registers, used 1 barriers, 416 bytes cmem[0]
"""


@pytest.fixture
def compile_gpu(monkeypatch):
    jax.devices()  # the backend starts with the flags of all tests, not with those below
    for name in ("JAX_PLATFORMS", "MOSAIC_GPU_DUMP_PTXAS", "MOSAIC_GPU_DUMP_RESOURCES", "TF_CPP_VMODULE", "XLA_FLAGS"):
        monkeypatch.setenv(name, "")  # the script sets them: taken back afterwards
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "1")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("compile_gpu")


def test_what_the_compilers_print_is_read(compile_gpu):
    found = compile_gpu.read_log(MOSAIC, compile_gpu.KERNELS)
    assert found["forward"] == {"registers": 128, "spills": 0, "shared_memory": 50176}
    assert found["dq"] == {"registers": 162, "spills": 0, "shared_memory": 66560}
    assert found["dkv"] == {"registers": 241, "spills": 4, "shared_memory": 99328}
    found = compile_gpu.read_log(TRITON, compile_gpu.KERNELS)
    assert found["forward"] == {"registers": 237, "spills": 0, "shared_memory": 49172}
    assert found["dq"] == {"registers": 127, "spills": 0, "shared_memory": 73748}


@pytest.mark.parametrize(
    ("registers", "shared_memory", "threads", "expected"),
    [(128, 50_176, 128, 4), (129, 50_176, 128, 3), (168, 164_864, 384, 1), (96, 25_600, 128, 5), (32, 0, 128, 16)],
)
def test_how_many_fit_on_an_sm(compile_gpu, registers, shared_memory, threads, expected):
    fit = compile_gpu.ctas("h200", registers=registers, shared_memory=shared_memory, threads=threads)
    assert fit == expected
    assert compile_gpu.ctas("rtx_4090", registers=32, shared_memory=0, threads=128) == 12  # 1,536 threads


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target=a100", "--implementation=mosaic_gpu"], "mosaic_gpu needs an NVIDIA GPU of the Hopper generation"),
        (["--model=Wan 2B"], "invalid choice"),
        (["--step", "--mesh=auto"], "'auto' is no mesh"),
        (["--step", "--target=tpu"], "invalid choice"),
    ],
)
def test_mistakes_end_with_a_sentence_and_status_2(arguments, message, monkeypatch, capsys, compile_gpu):
    monkeypatch.setattr(compile_gpu.plan, "check_target", lambda target: None)
    monkeypatch.setattr(compile_gpu.plan, "run_with_compiler", lambda target, command: None)
    monkeypatch.setattr(sys, "argv", ["compile_gpu.py", *arguments])
    try:
        status = compile_gpu.main()
    except SystemExit as stop:  # argparse's way
        status = stop.code
    assert status == 2 and message in capsys.readouterr().err


def test_without_the_compiler_it_says_how_to_install_it(monkeypatch, capsys, compile_gpu, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["compile_gpu.py"])
    assert compile_gpu.main() == 7
    assert "-m jvdiff.commands.compiler --install" in capsys.readouterr().err


def test_a_check_needs_the_gpu_that_was_predicted(monkeypatch, capsys, compile_gpu):
    monkeypatch.setattr(sys, "argv", ["compile_gpu.py", "--step", "--check"])
    assert compile_gpu.main() == 7
    assert "--check compares with an H200, and this is" in capsys.readouterr().err


def test_a_step_is_measured_with_random_weights(compile_gpu):
    small = {"num_attention_heads": 2, "attention_head_dim": 12, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2}
    cfg = compile_gpu.wan.DiTConfig(in_channels=4, out_channels=4, text_dim=16, **small)
    assert 0 < compile_gpu.measure(cfg, 32, 32) < 60


def test_the_docs_have_the_predictions_of_the_results(compile_gpu):
    rows = json.loads(compile_gpu.PREDICTIONS.read_text())["rows"]
    assert {row["step"] for row in rows} == set(compile_gpu.STEPS)
    lines = (ROOT / "docs" / "scaling.md").read_text().splitlines()
    for row in rows:
        mesh = "one GPU" if row["gpus"] == 1 else row["mesh"]
        seconds = f"{row['seconds_exposed']:.{3 if row['seconds_exposed'] < 1 else 2}f} |"
        assert any(line.startswith(f"| {row['gpus']} | {mesh} |") and seconds in line for line in lines), row
    eight = [row for row in rows if row["step"] == "Wan 14B 720p" and row["gpus"] == 8]
    assert max(row["efficiency_exposed"] for row in eight) >= 0.85


def test_the_meshes_of_the_table_are_of_one_to_eight_devices(compile_gpu):
    assert {mesh.devices for mesh in compile_gpu.MESHES} == {1, 2, 4, 8}
    assert len(set(compile_gpu.MESHES)) == len(compile_gpu.MESHES)


def test_help_names_the_patterns():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/compile_gpu.py", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "VSA 4x4x4" in done.stdout
