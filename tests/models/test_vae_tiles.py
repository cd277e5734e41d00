"""Tiles of a VAE's pictures: where they are and how they are joined; with a VAE in tests/models/wan and tests/parity.

B batch · F frames · H W rows and columns · C channels.
"""

from functools import partial

import jax
import numpy as np
import pytest

from jvdiff.errors import UsageError
from jvdiff.models import vae_tiles
from jvdiff.models.vae_tiles import Tiles


def joined(tiles, where):
    """Line by line and in place, as one would write it first."""
    tiles = [[tile.copy() for tile in row] for row in tiles]
    for i, row in enumerate(tiles):
        for j, tile in enumerate(row):
            for axis, before in ((2, i and tiles[i - 1][j]), (3, j and row[j - 1])):
                if not isinstance(before, np.ndarray):
                    continue
                extent = min(where.overlap[axis - 2], before.shape[axis], tile.shape[axis])
                new, old = np.moveaxis(tile, axis, 0), np.moveaxis(before, axis, 0)
                for n in range(extent):
                    new[n] = old[len(old) - extent + n] * (1 - n / extent) + new[n] * (n / extent)
    height, width = where.keep
    rows = [np.concatenate([tile[:, :, :height, :width] for tile in row], axis=3) for row in tiles]
    return np.concatenate(rows, axis=2)[:, :, : where.size[0], : where.size[1]]


@pytest.mark.parametrize("size", [(10, 13), (4, 9)])
def test_tiles_are_blended_with_blended_ones_from_above_then_from_the_left(size):
    """The last tiles are narrower than the overlap, or have nothing that the ones before lack."""
    where = vae_tiles.cut(size, (5, 6), (3, 4), up=2)
    assert [piece.start for piece in where.rows] == list(range(0, size[0], 3))
    random = np.random.default_rng(0)
    tiles = [
        [
            random.standard_normal((1, 2, 2 * (y.stop - y.start), 2 * (x.stop - x.start), 3), np.float32)
            for x in where.columns
        ]
        for y in where.rows
    ]
    found = jax.jit(partial(vae_tiles.join, where=where))(tiles)
    assert found.shape == (1, 2, 2 * size[0], 2 * size[1], 3)
    np.testing.assert_allclose(found, joined(tiles, where), atol=1e-6)


def test_tiles_of_one_size_run_together_and_come_back_in_order():
    x = np.arange(7 * 8, dtype=np.float32).reshape(1, 1, 7, 8, 1)
    where = vae_tiles.cut((7, 8), (4, 4), (3, 3))
    traced = []

    def run(tile):
        traced.append(tile.shape[2:4])
        return tile * 2

    tiles, whole = jax.jit(lambda x: (tiles := vae_tiles.each(run, x, where), vae_tiles.join(tiles, where)))(x)
    assert sorted(traced) == [(1, 2), (1, 4), (4, 2), (4, 4)]
    for row, y in zip(tiles, where.rows, strict=True):
        for tile, columns in zip(row, where.columns, strict=True):
            np.testing.assert_array_equal(tile, 2 * x[:, :, y, columns])
    np.testing.assert_allclose(whole, 2 * x)


def test_their_text():
    assert vae_tiles.read("256x128:192x96") == Tiles((256, 128), (192, 96))
    assert str(Tiles((256, 128), (192, 96))) == "256x128:192x96"
    assert vae_tiles.read(None) is None and vae_tiles.read("off") is None
    assert vae_tiles.read(Tiles()) == Tiles()


@pytest.mark.parametrize("text", ["256:192", "256x256", "256x256:256x257", "0x8:8x8", "on", 256, "256x256x8:192x192x8"])
def test_what_is_no_tiles(text):
    with pytest.raises(UsageError, match=r"expected .* of the stride.*or off|expected strides from 1"):
        vae_tiles.read(text)


def test_what_a_vae_cannot_be_cut_into():
    with pytest.raises(UsageError, match=r"multiples of 16\. The nearest is 256x256:192x192\."):
        vae_tiles.read("256x256:192x200").check(16)
