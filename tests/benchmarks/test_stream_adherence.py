"""The benchmark of streams: a pipeline is told each prompt in time, and what it shows is counted where it should be."""

import importlib
import itertools
from pathlib import Path

import numpy as np
import pytest

from jvdiff.digits import clips as digits
from jvdiff.digits.clips import Combo
from jvdiff.digits.judge import Seen, Shape


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("stream_adherence")


def test_real_streams_turn_at_chunks_of_all_numbers(benchmark):
    videos, wanted = benchmark.streams(30, 12, seed=3)
    assert videos.shape == (30, 9 + 11 * 12, 64, 64, 3) and {len(w) for w in wanted} == {12}
    turns = [[i for i in range(1, 12) if w[i] != w[i - 1]] for w in wanted]
    assert {i for t in turns for i in t} == set(range(1, 12))
    assert all(later - sooner >= 3 for t in turns for sooner, later in itertools.pairwise(t))
    again = benchmark.streams(2, 12, seed=3)
    np.testing.assert_array_equal(again[0], videos[:2])
    assert again[1] == wanted[:2]


class Recorded:
    """A pipeline that shows the number of the chunk and writes down what it is asked."""

    def __init__(self):
        self.calls = []

    def initialize_cache(self, key, prompts):
        self.calls.append(("start", tuple(prompts)))
        return 0

    def set_prompts(self, cache, prompts):
        self.calls.append(("prompts", tuple(prompts)))
        return cache

    def generate(self, i, cache):
        assert cache == i
        self.calls.append(("generate", i))
        return np.full((2, 12 if i else 9, 64, 64, 3), i, np.uint8), cache, "clean"

    def finalize(self, i, cache, final):
        assert final == "clean"
        return cache + 1, {}


def test_a_pipeline_is_told_each_prompt_before_its_chunk(benchmark):
    left, up = Combo("red", 7, "left"), Combo("red", 7, "up")
    pipe = Recorded()
    video = benchmark.generate(pipe, [[left, left, up, up], [left, left, left, up]], seed=0)
    assert video.shape == (2, 45, 64, 64, 3) and video.dtype == np.uint8
    assert video[0, [0, 8, 9, 21, 44], 0, 0, 0].tolist() == [0, 0, 1, 2, 3]
    to_left, to_up = digits.prompt(*left), digits.prompt(*up)
    assert pipe.calls == [
        ("start", (to_left, to_left)),
        ("generate", 0),
        ("generate", 1),
        ("prompts", (to_up, to_left)),
        ("generate", 2),
        ("prompts", (to_up, to_up)),
        ("generate", 3),
    ]


def test_direction_counts_only_after_the_chunk_in_which_it_changes(benchmark):
    left, up = Combo("red", 7, "left"), Combo("red", 7, "up")
    seen = [[Seen("red", 7, "left"), Seen("red", 1, "left"), Seen("red", 7, "left"), Seen("blue", 7, "up")]]
    result = benchmark.score(seen, [[left, left, up, up]], range(1, 5))
    counts = {field: (count["right"], count["of"]) for field, count in result.items()}
    assert counts == {"colour": (3, 4), "digit": (3, 4), "direction": (3, 3), "all": (1, 3), "turning": (0, 1)}
    only_up = benchmark.score(seen, [[left, left, up, up]], [3, 4], frozenset({up}))
    assert only_up["direction"] == {"right": 1, "of": 1, "percent": 100.0}


def test_real_streams_reach_the_goals_and_drift_is_seen(benchmark):
    wanted = [[Combo("red", 7, "left")] * 40] * 10
    seen = [[Seen(*combo) for combo in stream] for stream in wanted]
    report = benchmark.report_on(seen, wanted)
    assert all(benchmark.goals_met(report).values())
    for stream in seen[:2]:
        stream[35:] = [Seen("red", 1, "left")] * 5
    report = benchmark.report_on(seen, wanted)
    assert report["drift_points"]["chunk 5 to 40"] == {"colour": 0.0, "digit": 20.0, "direction": 0.0, "all": 20.0}
    assert benchmark.goals_met(report) == {"digit": True, "colour": True, "direction": True, "drift": False}


def test_a_rollout_is_right_at_a_chunk_if_its_shape_is_too(benchmark):
    left, up = Combo("red", 7, "left"), Combo("red", 7, "up")
    good, stripe, bar, drawn_anew = Shape(0.5, 0.9), Shape(1.0, 0.3), Shape(0.7, 0.8), Shape(0.5, 0.6)
    seen = [[Seen("red", 7, "left")] * 2] * 6 + [[Seen("red", 7, "left"), Seen("red", 1, "left")]]
    shapes = [[good, shape] for shape in (good, stripe, bar, drawn_anew, good, good, good)]
    wanted = [[left] * 2] * 4 + [[left, up], [up, up], [left] * 2]
    result = benchmark.held_at(seen, shapes, wanted, 2)
    counts = {way: row["rollouts"] for way, row in result.items()}
    assert counts == {
        "digit": 6, "colour": 7, "direction": 6, "closed": 1, "too_long": 2, "lost": 2, "right": 3, "kept": 2,
    }  # fmt: skip
    assert result["kept"] == {"rollouts": 2, "of": 7, "interval_percent": [8.2, 64.1]}
    assert benchmark.held_at(seen, shapes, wanted, 1)["right"]["rollouts"] == 6


def test_the_shape_of_each_chunk_is_compared_with_the_second(benchmark):
    videos, _ = benchmark.streams(2, 5, seed=3)
    videos[0, 33:45] = videos[0, 33:34]  # chunk 4 stands still
    videos[1, 45:] = 255
    shapes = benchmark.shapes_in(videos)
    assert [[shape.lost for shape in stream] for stream in shapes] == [[False] * 5, [False] * 4 + [True]]
    assert [[shape.closed for shape in stream] for stream in shapes] == [[False] * 5, [False] * 4 + [True]]
