"""A window for each timestep, layer and head: the file, what is refused, and the attention against a dense mask."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff.errors import CorruptFile, UsageError
from jvdiff.kernels import SlidingTile, patterns, tiles, windows

GOOD = {
    "version": 1,
    "tile": [1, 2, 3],
    "canvas": [2, 4, 6],
    "choices": [[1, 1, 1], [2, 1, 2]],
    "table": [[[0, 1], [1, 0]], [[0, 0], [1, 1]]],
    "timesteps": [900, 100.5],
    "recorded": {"checkpoint_digest": "ab"},
}


def written(folder, **changes):
    file = folder / "windows.json"
    file.write_text(json.dumps(GOOD | changes))
    return file


def test_a_file_is_a_pattern_that_has_its_digest(tmp_path):
    file = written(tmp_path)
    pattern = patterns.read(f"windows:{file}", 2, 2)
    assert patterns.read(str(pattern), 2, 2) == pattern and str(pattern) == f"windows:{file}"
    assert pattern.digest == hashlib.sha256(file.read_bytes()).hexdigest()
    assert windows.parse(windows.to_text(pattern.table).encode(), "it").table.tolist() == GOOD["table"]
    assert pattern.recorded_of == "ab" and pattern.full(True) == patterns.Dense()
    best = patterns.VideoSparse((1, 2, 2), 0.5)
    assert best.full(True) == patterns.VideoSparse((1, 2, 2), 0.0) and best.full(False) == patterns.Dense()
    file.write_text(json.dumps(GOOD | {"recorded": {}}))
    assert patterns.read(f"windows:{file}") != pattern


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version is 2; expected 1"),
        ({"canvas": [2, 4]}, "canvas is [2, 4]; expected three whole numbers from 1, [T,H,W]"),
        ({"choices": []}, "choices is not a list of windows"),
        ({"choices": [[1, 1, 1], [1, 0, 1]]}, "choices[1] is [1, 0, 1]; expected three whole numbers"),
        ({"choices": [[1, 1, 1], [1, 3, 1]]}, "choices[1] is [1, 3, 1], and the canvas has [2, 2, 2] tiles"),
        ({"table": [[[0, 2], [1, 0]]] * 2}, "table[0][0][1] is 2, and there are 2 choices, from 0"),
        ({"table": [[[0, 1], [1]]] * 2}, "table is not [rows][layers][heads] whole numbers"),
        ({"table": [[[0, 1.5], [1, 0]]] * 2}, "table is not [rows][layers][heads] whole numbers"),
        ({"table": [[[0, float("nan")], [1, 0]]] * 2}, "NaN is not a number in JSON"),
        ({"timesteps": [900, 900]}, "timesteps is not 2 falling numbers from 1000 to 0"),
        ({"timesteps": [900]}, "timesteps is not 2 falling numbers"),
        ({"recorded": []}, "recorded is not an object"),
        ({"more": 1}, "expected an object of version, tile, canvas, choices, table, timesteps, recorded"),
    ],
)
def test_what_is_no_table_is_a_sentence(tmp_path, changes, message):
    file = written(tmp_path, **changes)
    with pytest.raises(CorruptFile) as error:
        patterns.read(f"windows:{file}")
    assert str(error.value).startswith(f"{file}: not a table of windows: {message}")


def test_a_table_of_another_model_video_or_sampler_is_refused(tmp_path):
    file = written(tmp_path)
    for heads, layers in ((3, 2), (2, 1)):
        with pytest.raises(UsageError, match=f"for 2 layers of 2 heads, and the model has {layers} of {heads}"):
            patterns.read(f"windows:{file}", heads, layers)
    with pytest.raises(UsageError, match="is for 2x4x6 tokens, and the video has 2x4x5; expected another size"):
        patterns.read(f"windows:{file}").at([900, 100], (2, 4, 5))
    by_step = patterns.read(f"windows:{written(tmp_path, timesteps=None)}")
    assert by_step.at([800, 30], (2, 4, 6)).timesteps == (800.0, 30.0)
    with pytest.raises(UsageError, match="has rows for 2 steps, and there are 3"):
        by_step.at([900, 100, 50], (2, 4, 6))
    with pytest.raises(UsageError, match="cannot be read"):
        patterns.read("windows:nowhere.json")


def test_the_nearest_timestep_says_which_row(tmp_path):
    pattern = patterns.read(f"windows:{written(tmp_path)}")
    at = lambda *t: np.asarray(pattern.of_layers(np.float32(t)[:, None], 2, 2))  # noqa: E731
    rows = np.array(GOOD["table"])  # [rows,layers,heads]
    np.testing.assert_array_equal(at(900, 1000, 500.25, 500, 0), rows[[0, 0, 0, 1, 1]].swapaxes(0, 1))


def strategy(**changes):
    """FastVideo's file of one step, two layers and two heads."""
    every = {"0_0_0": [3, 1, 10], "0_0_1": [3, 6, 10], "0_1_0": [1, 6, 5], "0_1_1": [3, 6, 1]} | changes
    return json.dumps({key: window for key, window in every.items() if window is not None}).encode()


def test_a_mask_strategy_of_fastvideo_is_converted_exactly():
    made = windows.from_strategy(strategy(), (6, 8, 8), (18, 48, 80), "mask_strategy_wan.json")
    found = [[list(made.choices[head]) for head in layer] for layer in made.table[0]]
    assert found == [[[3, 1, 10], [3, 6, 10]], [[1, 6, 5], [3, 6, 1]]] and made.timesteps is None
    assert windows.parse(windows.to_text(made).encode(), "it").choices == made.choices
    wide = windows.from_strategy(strategy(**{"0_0_0": [9, 1, 10]}), (6, 8, 8), (18, 48, 80), "it")
    np.testing.assert_array_equal(wide.table, made.table)  # the whole axis either way
    few, broken = {"0_1_1": None}, {"0_0_0": [1.5, 1, 1]}
    for wrong, message in ((few, "3 entries do not fill"), (broken, "expected three whole")):
        with pytest.raises(CorruptFile, match=message):
            windows.from_strategy(strategy(**wrong), (6, 8, 8), (18, 48, 80), "it")


def masked(q, k, v, grid, tile, window_of):
    """float64: attention of each head within its window, by every token's tile; window_of: [B][N]."""
    counts = tiles.counts(grid, tile)
    place = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, 3) // tile  # [L,3]
    out = np.zeros(q.shape)
    for b, head in np.ndindex(len(q), q.shape[2]):
        seen = np.ones((len(place),) * 2, bool)
        for axis, (n, w) in enumerate(zip(counts, window_of[b][head], strict=True)):
            width = min(2 * (w // 2) + 1, n)
            first = np.clip(place[:, axis] - w // 2, 0, n - width)[:, None]
            seen &= (first <= place[:, axis]) & (place[:, axis] < first + width)
        logits = np.where(seen, q[b, :, head] @ k[b, :, head].T * q.shape[-1] ** -0.5, -np.inf)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        out[b, :, head] = weights / weights.sum(axis=1, keepdims=True) @ v[b, :, head]
    return out


CASES = [
    ((3, 4, 5), (2, 2, 2), ((1, 1, 1), (2, 1, 3), (1, 2, 1)), "xla"),
    ((5, 4, 7), (2, 3, 3), ((3, 1, 1), (1, 1, 3)), "reference"),
]


@pytest.mark.parametrize(("grid", "tile", "choices", "implementation"), CASES)
def test_each_head_sees_its_own_window(tmp_path, grid, tile, choices, implementation):
    """Of three heads, and of two clips at different timesteps; heads that lie on this device are some of all."""
    random = np.random.default_rng(0)
    table = random.integers(0, len(choices), (2, 2, 5))
    values = dict(tile=tile, canvas=grid, choices=choices, table=table.tolist())
    pattern = patterns.read(f"windows:{written(tmp_path, **values)}", 5, 2)
    q, k, v = random.standard_normal((3, 2, int(np.prod(grid)), 3, 8)).astype(np.float32)
    chosen = pattern.of_layers(np.float32([[700], [30]]), 2, 5)[1]
    order = lambda x: pattern.ordered(jnp.asarray(x), grid)  # noqa: E731
    how = dict(grid=grid, chosen=chosen, first_head=jnp.int32(2), implementation=implementation)
    out = pattern.unordered(pattern.attend(order(q), order(k), order(v), None, **how), grid)
    want = masked(q, k, v, grid, tile, [[choices[c] for c in table[row, 1, 2:]] for row in (0, 1)])
    np.testing.assert_allclose(out, want, atol=2e-6)


def test_a_share_is_that_of_the_rows(tmp_path):
    """How long a list is counts on a GPU alone: a CPU computes as many places as the widest window has."""
    grid, kept = (2, 8, 8), [1 / 8, 4 / 8]  # of 2x2x2 tiles: one, and all of two axes
    pattern = patterns.read(f"windows:{written(tmp_path, tile=[1, 4, 4], canvas=grid)}")
    q = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
    mean = np.mean([kept[c] for c in np.ravel(GOOD["table"])])
    assert pattern.share(q, grid, implementation="triton") == pytest.approx(mean)
    assert pattern.share(q, grid) == pattern.share(q, grid, implementation="reference") == kept[1]
    assert SlidingTile((1, 4, 4), (1, 1, 1)).share(q, grid) == kept[0]
