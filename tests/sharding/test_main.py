"""The command line that says where weights would live."""

import subprocess
import sys
from pathlib import Path

import pytest

from jvdiff.sharding.__main__ import main

CONFIG = "from jvdiff import sample\nget_config = sample.default_config\n"


@pytest.fixture
def bytes_of(tmp_path, capsys):
    """What it prints for Wan 14B in bfloat16 under a mesh."""
    path = tmp_path / "wan.py"
    path.write_text(CONFIG)

    def run(mesh, *more):
        name = "--config.checkpoint=Wan2.1-T2V-14B-Diffusers"
        argv = ["sharding", f"--config={path}", name, "--config.precision=bfloat16", *more]
        status = main([*argv, *([] if mesh is None else [f"--config.mesh={mesh}"])])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def table(out):
    rows = (line.split() for line in out.splitlines() if line.rstrip().endswith("%"))
    return {row[0]: (int(row[-3].replace(",", "")), int(row[-2].replace(",", ""))) for row in rows}


def test_bytes_of_each_component(bytes_of):
    """Each device has a share of what a mesh divides; the VAE, and what no axis divides, is on all of them."""
    whole = {}
    for mesh, divided in (("data=2", 1), ("sequence=8", 1), ("fsdp=8", 8), ("tensor=8", 8), ("fsdp=2,sequence=4", 2)):
        status, out, _ = bytes_of(mesh)
        assert status == 0 and f"mesh: {mesh}, " in out
        found = table(out)
        whole = whole or found
        assert whole["transformer"][0] == found["transformer"][0] > 2 * 14e9
        assert found["vae"][0] == found["vae"][1]
        for part in ("transformer", "text_encoder"):
            assert 1 <= divided * found[part][1] / found[part][0] < 1.01
        assert found["in"][1] == sum(found[part][1] for part in ("transformer", "text_encoder", "vae"))


def test_leaf_by_leaf(bytes_of):
    out = bytes_of("tensor=8", "--leaves")[1]
    line = next(line for line in out.splitlines() if line.strip().startswith("blocks/ffn/up/kernel"))
    assert line.split()[1:] == [
        "bfloat16[40,",
        "5120,",
        "13824]",
        f"{2 * 40 * 5120 * 13824 // 8:,}",
        "-,",
        "-,",
        "tensor",
    ]
    rows = [line for line in out.splitlines() if line.startswith("  ") and "[" in line]
    each = [int(line.split("]")[1].split()[0].replace(",", "")) for line in rows]
    assert sum(each) == table(out)["in"][1]
    assert any(line.endswith("on every device") for line in rows)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (None, "mesh is missing; name its axes"),
        ("auto", "mesh is 'auto'; name its axes"),
        ("tensor=3", "tensor=3 does not divide the 40 attention heads.\nThe nearest mesh that works is"),
        ("sequnce=4", "mesh has an axis 'sequnce'"),
    ],
)
def test_mistakes_are_sentences_with_status_2(bytes_of, mesh, message):
    status, out, error = bytes_of(mesh)
    assert status == 2 and out == "" and message in error


def test_no_leaves_flag_reaches_the_config(bytes_of):
    assert bytes_of("tensor=8", "--leafs")[0] == 2


def test_who_reads_may_stop_early():
    """As `head -1` does, whose end is no bug of ours."""
    command = [
        sys.executable,
        "-m",
        "jvdiff.sharding",
        "--config=configs/digits.py",
        "--config.mesh=fsdp=8",
        "--leaves",
    ]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root, text=True) as running:
        assert running.stdout.readline().startswith("mesh: fsdp=8")
        running.stdout.close()
        assert running.stderr.read() == ""
    assert running.returncode == 0
