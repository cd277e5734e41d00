"""The speed of attention is measured on results that are right, and its cost is counted as it grows."""

import importlib
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff.kernels import Dense, SlidingTile, VideoSparse
from jvdiff.models import latent_video


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def attention(load, monkeypatch):
    module = load("attention")
    monkeypatch.setattr(module, "matmul_peak", lambda *_: 1e9)
    return module


def test_every_pattern_is_timed_and_right(attention, tmp_path, capsys):
    assert attention.main(["--quick", "--alone", "--device", "cpu", "--output", str(tmp_path / "out.json")]) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert len(report["rows"]) == len(attention.QUICK[1]) * 2
    for row in report["rows"]:
        assert row["ms"] > 0 and row["difference"] < 1e-5 and row["x_rivals"] == {} and row["implementation"] == "xla"
        assert row["x_dense"] == 1 if row["pattern"] == "dense" else row["kept"] < 0.6
    assert {"cpu", "cores", "jax", "date"} <= report["machine"].keys()
    assert "video_sparse:2x4x4:0.5" in capsys.readouterr().out


def test_kept_pairs_are_those_of_the_lists(attention):
    shape = attention.Shape("ragged", (3, 4, 4), 2, 8)
    pairs = lambda name: attention.problem(shape, name, jnp.float32).pairs  # noqa: E731
    assert pairs("dense") == 2 * 48**2
    assert pairs("sliding_tile:2x4x4:1x1x1") == 2 * (32**2 + 16**2)
    assert pairs("video_sparse:2x4x4:0") == 2 * 48**2


def test_who_fails_or_is_wrong_is_named_and_left_out(attention):
    problem = attention.problem(attention.Shape("small", (2, 4, 4), 2, 8), "dense", jnp.float32)
    right = attention.ours(problem, "xla", "forward")

    def wrong():
        return attention.Contestant(right.run, right.wait, lambda: [2 * x for x in right.result()])

    def broken():
        raise RuntimeError("no such kernel")

    notes = []
    makers = {"right": lambda: right, "wrong": wrong, "broken": broken}
    admitted = attention.admit(problem, "forward", makers, notes.append)
    assert list(admitted) == ["right"] and admitted["right"][1] < 1e-6
    assert "wrong is wrong" in notes[0] and "broken did not run: RuntimeError: no such kernel" in notes[1]


def test_runs_take_turns(load):
    order = []
    seconds = load("timing").in_turn([lambda: order.append("a"), lambda: order.append("b")], 3)
    assert order == ["a", "b"] * 3 and [len(s) for s in seconds] == [3, 3]


def test_the_production_shapes_have_the_published_numbers_of_tokens(attention):
    assert [(int(np.prod(s.grid)), s.heads) for s in attention.PRODUCTION[0]] == [
        (32760, 12),
        (75600, 40),
        (115200, 24),
    ]


def test_sliding_tiles_cost_grows_linearly_in_frames(load):
    """Where the window is smaller than the time axis; video sparse attention at a fixed sparsity stays quadratic."""
    kept = load("attention_cost").kept
    sta = [kept((T, 30, 52), SlidingTile((6, 8, 8), (3, 3, 3)))[0] for T in (18, 36, 72, 144)]
    np.testing.assert_array_equal(sta, sta[0] * np.array([1, 2, 4, 8]))
    vsa = [kept((T, 32, 52), VideoSparse((4, 4, 4), 0.9)) for T in (16, 32, 64)]
    fine, coarse = (np.array(x) for x in zip(*vsa, strict=True))
    np.testing.assert_allclose(fine / fine[0], [1, 4, 16], rtol=0.01)
    np.testing.assert_array_equal(coarse / coarse[0], [1, 4, 16])
    assert np.all(coarse * 300 < fine)


def test_programs_multiply_what_is_kept(load):
    """On a grid without ragged tiles the program's products are the kept pairs, and VSA's coarse ones."""
    cost = load("attention_cost")
    grid, heads, head_dim = (4, 8, 8), 2, 8
    for pattern in (Dense(), SlidingTile((2, 4, 4), (1, 1, 1)), VideoSparse((2, 4, 4), 0.5)):
        expected = 4 * sum(cost.kept(grid, pattern)) * heads * head_dim
        assert cost.program(grid, pattern, heads, head_dim) == pytest.approx(expected)


def test_the_cost_table_has_a_row_for_each_model_and_pattern(load, tmp_path):
    cost = load("attention_cost")
    rows = list(cost.rows([cost.Model("tiny", 8, 8, 1, 8)], (5, 9)))
    assert len(rows) == 2 * len(cost.PATTERNS) and cost.table(rows).count("tiny") == len(cost.PATTERNS)
    cost.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_factorised_attention_is_counted_in_compiled_programs(load):
    """T frames of L tokens: all of them with all, or L with L and T with T; the softmax is the little more."""
    cost = load("attention_cost")
    cfg = latent_video.DiTConfig(hidden_size=128, depth=2, num_heads=2, num_classes=3)
    found = cost.factorised(cfg, (1, 6, 16, 16, 4))
    T, L, D = 6, 64, 128
    assert 1 < found["full_flops"] / (4 * (T * L) ** 2 * D) < 1.06
    assert 1 < found["factorised_flops"] / (4 * T * L * (T + L) * D) < 1.06
    linear = 2 * T * L * D**2 * (8 + 12) + 2 * 9 * D**2  # two attentions, the feed-forward; the modulation
    assert found["factorised_block_flops"] == pytest.approx(linear + 4 * T * L * (T + L) * D, rel=0.001)
    assert found["full_block_flops"] == pytest.approx(linear - 8 * T * L * D**2 + 4 * (T * L) ** 2 * D, rel=0.05)
    assert "| 6 latent frames | 384 |" in cost.factorised_table([found])
