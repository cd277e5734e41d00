"""The geometry of tiles, windows, counts and schedules against tables made from the original programs."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from jvdiff import kernels
from jvdiff.kernels import mask_search, sliding_tile, tiles

DATA = Path(__file__).parents[1] / "data" / "sparse"


def table(name):
    return json.loads((DATA / name).read_text())


def geometry(grid, tile):
    sizes = tiles.variable_block_sizes(grid, tile)
    place, reverse = tiles.non_pad_index(sizes, int(np.prod(tile))), tiles.reverse_partition_indices(grid, tile)
    return {
        "tile_partition_indices": tiles.partition_indices(grid, tile),
        "reverse_tile_partition_indices": reverse,
        "variable_block_sizes": sizes,
        "non_pad_index": place,
        "untile_combined_index": place[reverse],
    }


def test_a_ragged_grid_in_full():
    want = np.load(DATA / "vsa_meta_5x6x7_t4x4x4.npz")
    for name, got in geometry((5, 6, 7), (4, 4, 4)).items():
        np.testing.assert_array_equal(got, want[name], err_msg=name)


@pytest.mark.parametrize("entry", table("vsa_meta_production.json"), ids=lambda e: f"{e['shape']}-{e['tile']}")
def test_production_grids(entry):
    grid, tile = tuple(entry["shape"]), tuple(entry["tile"])
    for name, got in geometry(grid, tile).items():
        digest = hashlib.sha256(got.astype("<i8").tobytes()).hexdigest()
        assert digest == entry["sha256_le_int64"][name], name
    assert list(tiles.counts(grid, tile)) == entry["num_tiles"]
    for sparsity, kept in entry["topk"].items():
        assert tiles.top_k_count(float(sparsity), entry["blocks"]) == kept


def test_counts_of_kept_blocks():
    for key, want in table("vsa_topk_rule.json")["table"].items():
        sparsity, n = key.split("|")
        assert tiles.top_k_count(float(sparsity), int(n)) == want, key
    with pytest.raises(ValueError, match="NaN"):
        tiles.top_k_count(float("nan"), 4)


def test_warm_up():
    for recipe in table("vsa_sparsity_schedule.json"):
        for step, want in recipe["values"].items():
            got = kernels.sparsity_schedule(int(step), recipe["target"], recipe["decay_rate"], recipe["interval"])
            assert got == want, (recipe, step)
    for bad in [(-1, 0.9, 0.1, 1), (0, 1.1, 0.1, 1), (0, 0.9, 0.0, 1), (0, 0.9, 0.1, 0), (0, float("nan"), 0.1, 1)]:
        with pytest.raises(ValueError, match="sparsity_schedule"):
            kernels.sparsity_schedule(*bad)


def test_windows_on_one_axis():
    for key, want in table("sta_axis_tables.json").items():
        n, w = (int(x[1:]) for x in key.split("_"))
        start, width = sliding_tile.axis_window(n, w)
        assert [[int(s), width] for s in start] == want, key


@pytest.mark.parametrize("entry", table("sta_production_windows.json"), ids=lambda e: f"{e['grid']}-{e['window']}")
def test_production_windows(entry):
    q2k, count = sliding_tile.window_lists(tuple(entry["num_tiles"]), (tuple(entry["window"]),))
    n = q2k.shape[2]
    mask = np.zeros((n, n), bool)
    np.put_along_axis(mask, q2k[0, 0].astype(np.int64), True, axis=1)
    assert hashlib.sha256(np.packbits(mask).tobytes()).hexdigest() == entry["block_mask_sha256"]
    assert (count == entry["key_tiles_per_query"]).all() and (np.diff(q2k) > 0).all()


def test_the_search_for_windows_repeats_the_original_choice():
    want = table("sta_mask_search.json")
    candidates, full = tuple(map(tuple, want["candidates"])), tuple(want["full"])
    got = mask_search.choose_windows(np.array(want["losses"]), candidates, full, want["skip_time_steps"])
    text = mask_search.to_json(got)
    assert json.loads(text) == want["strategy"]
    assert mask_search.from_json(text) == got
    assert mask_search.sparsity(got, full) == pytest.approx(want["overall_sparsity"], abs=1e-12)


@pytest.mark.parametrize(
    "text", ["[]", "{}", "no", '{"0_0": [1, 1, 1]}', '{"0_0_1": [1, 1, 1]}', '{"0_0_0": [1, 1]}', '{"0_0_0": 3}']
)
def test_a_wrong_strategy_file_is_refused(text):
    with pytest.raises(ValueError, match="mask strategy"):
        mask_search.from_json(text)


def test_wrong_losses_are_refused():
    losses = np.zeros((1, 2, 1, 1, 1))
    with pytest.raises(ValueError, match="choose_windows"):
        mask_search.choose_windows(losses, ((1, 1, 1),), (3, 3, 3), 0)
    with pytest.raises(ValueError, match="choose_windows"):
        mask_search.choose_windows(losses * np.nan, ((1, 1, 1), (3, 3, 3)), (3, 3, 3), 0)


@pytest.mark.parametrize("bad", [(0, 1, 1), (1, 1), (1.5, 1, 1)])
def test_wrong_sizes_are_refused(bad):
    with pytest.raises(ValueError, match="grid must be three whole numbers"):
        tiles.partition_indices(bad, (1, 1, 1))
    with pytest.raises(ValueError, match="tile must be three whole numbers"):
        tiles.variable_block_sizes((4, 4, 4), bad)
