"""The speed comparison runs, counts and writes what it says; with tiny sizes and without the rival."""

import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff.errors import SetupError
from jvdiff.models import wan
from jvdiff.weights.naming import flatten


@pytest.fixture
def benchmark(monkeypatch):
    root = Path(__file__).parents[2]
    for folder in (root, root / "benchmarks"):
        monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module("compare_diffusers")


def test_every_model_is_timed_alone(benchmark, tmp_path, capsys):
    assert benchmark.main(["--quick", "--alone", "--output", str(tmp_path / "results.json")]) == 0
    report = json.loads((tmp_path / "results.json").read_text())
    names = ["DiT", "VAE decode", "VAE encode", "UMT5", "I2V", "CLIP", "Llama", "CLIP text"]
    assert [row["name"] for row in report["rows"]] == names
    for row in report["rows"]:
        assert row["ours_s"] > 0 and row["compile_s"] > 0 and row["ours_tflops_per_s"] > 0 and "ratio" not in row
    assert {"cpu", "cores", "jax", "date", "threads"} <= report["machine"].keys()
    assert "VAE decode" in capsys.readouterr().out


@pytest.mark.parametrize("absent", ["accelerate", "diffusers"])
def test_what_the_rival_lacks_is_told_before_anything_is_timed(benchmark, absent, monkeypatch, capsys):
    def timed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: name != absent or None)
    monkeypatch.setattr(benchmark, "measure", timed)
    if absent == "accelerate":
        with pytest.raises(SetupError, match=r"needs the package accelerate.*\nRun: pip install accelerate"):
            benchmark.main(["--quick", "--checkpoint=somewhere"])
        return
    with pytest.raises(KeyboardInterrupt):
        benchmark.main(["--quick", "--checkpoint=somewhere"])
    assert "not installed: diffusers (make parity installs them)" in capsys.readouterr().err


def test_runs_alternate_and_the_ratio_is_of_medians(benchmark):
    order = []
    result = np.ones((2, 3), np.float32)

    def side(name, value):
        return lambda: order.append(name) or value

    ours, theirs, difference = benchmark.alternate(side("ours", result), side("theirs", result * 2), 3)
    assert order == ["ours", "theirs"] * 4 and len(ours) == len(theirs) == 3 and difference == 0.5
    row = benchmark.Row("a", "1x2", [1.0, 9.0, 2.0], [4.0, 4.0, 40.0], 1.0, difference, flops=4e12, products=0.5)
    record = row.record()
    assert (record["ours_s"], record["theirs_s"], record["ratio"]) == (2.0, 4.0, 0.5)
    assert (record["ours_tflops_per_s"], record["share_of_products"]) == (2.0, 0.25)
    assert "0.50" in benchmark.table([row]) and "25%" in benchmark.table([row])


def test_the_sizes_are_those_that_ship(benchmark):
    """The digits rows have the sizes of the training configurations."""
    from jvdiff.config import load

    def same(cfg, mapping):
        return all(getattr(cfg, name) == value for name, value in mapping.items())

    trained = load("train_digits_dit")
    assert same(benchmark.DIGITS_VAE, load("train_digits_vae").vae)
    assert same(benchmark.DIGITS_DIT, trained.transformer) and same(benchmark.DIGITS_TEXT, trained.text_encoder)
    assert benchmark.DIGITS_DIT.in_channels == benchmark.DIGITS_VAE.z_dim


def test_gpu_rows_are_the_published_model_at_its_size(benchmark):
    case = next(iter(benchmark.cases("gpu")))
    assert case.cfg == wan.WAN_2_1_T2V_1_3B and case.shape == "1x21x60x104x16 bfloat16"
    assert all(case.dtype == "bfloat16" for case in benchmark.cases("gpu", quick=True))


def test_random_weights_leave_no_layer_idle(benchmark):
    for case in benchmark.cases("cpu", quick=True):
        assert all(np.any(leaf != 0) for leaf in flatten(benchmark.random_params(case.cfg)).values())


def test_bare_products_are_compiled_once_and_count_as_often_as_they_run(benchmark, monkeypatch):
    def program(x, y):
        twice = x @ y @ y
        return jax.lax.scan(lambda carry, _: (carry @ y, None), twice, length=5)[0]

    x, y = jnp.ones((3, 4)), jnp.ones((4, 4))
    monkeypatch.setattr(benchmark, "in_turn", lambda runs, repeats: [[1.0] * repeats for _ in runs])
    assert benchmark.bare(jax.make_jaxpr(program)(x, y).jaxpr, 3) == 7.0
