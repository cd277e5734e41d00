"""What the runs are given: cached latents, and the parts of a stream (the runs themselves: tests/test_train.py)."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jvdiff.config import load
from jvdiff.digits import clips as digits
from jvdiff.digits import runs as digits_runs
from jvdiff.errors import UsageError
from jvdiff.models import wan
from jvdiff.sharding import MeshShape, make_mesh


def test_cached_latents_are_of_the_same_vae_and_clips_on_any_number_of_devices(tmp_path, monkeypatch):
    cfg = wan.VAEConfig(base_dim=4, z_dim=4, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)
    encode = lambda params, cfg, video: video[:, ::2, ::4, ::4, :1] * params["w"].reshape(1, 1, 1, 1, 4)  # noqa: E731
    monkeypatch.setattr(digits_runs.wan, "encode", encode)
    one, other = {"w": jnp.ones(4)}, {"w": jnp.full(4, 2.0)}

    def run(name, params, clips=20, seed=0, **axes):
        mesh = make_mesh(MeshShape(**axes))
        return digits_runs.encoded_clips(cfg, params, digits.batch, "", clips, seed, mesh, tmp_path / name)

    latents, prompts = run("a", one)
    np.testing.assert_array_equal(run("a", one)[0], latents)
    np.testing.assert_array_equal(run("b", one, fsdp=2, tensor=2)[0], latents)
    np.testing.assert_array_equal(run("a", other)[0], 2 * latents)  # not what was cached of another VAE
    assert len(run("a", one, clips=3)[0]) == 3 and list(run("a", one)[1]) == list(prompts)
    assert list(run("a", one, seed=1)[1]) != list(prompts)


@pytest.mark.parametrize("gap", [0, 2])
def test_what_lies_behind_a_gap_follows_the_first_chunk_of_the_same_stream(tmp_path, monkeypatch, gap):
    """And has its own prompts; only the chunk that nothing foretells is left out of the loss."""
    given, drawn = {}, []

    def encoded(cfg, params, draw, kind, *rest):
        video, texts = draw(np.random.default_rng(0), 6)
        chunks = 1 + (video.shape[1] - 9) // 12
        drawn.append((chunks, rest[0], rest[-1].name))
        latents = 100.0 * np.arange(6)[:, None] + np.arange(3 * chunks)  # which clip, which frame
        return latents[:, :, None, None, None], np.array(texts)

    def task(transformer, text_encoder, batches, pattern, **options):
        given.update(batches=batches)
        raise StopIteration

    monkeypatch.setattr(digits_runs, "encoded_clips", encoded)
    monkeypatch.setattr(digits_runs, "teacher_forcing_task", task)
    config = load("train_digits_stream")
    config.update({"gap": gap, "clips": 6, "batch": 64, "drop_text": 0.0, "first": {"clips": 9, "batch": 8}})
    with pytest.raises(StopIteration):
        digits_runs.train_stream(config, tmp_path)
    assert drawn == [(4 + gap, 6, "latents.npz"), (1, 9, "first.npz")]
    alone, later = (given["batches"](step) for step in (1, 2))  # every other step is of first chunks
    assert (alone.latents.ravel().reshape(8, 3) % 100 == np.arange(3)).all() and alone.ids.shape[:2] == (8, 1)
    assert (alone.weight == 1).all() and later.latents.shape == (64, 12, 1, 1, 1)
    batch = given["batches"](0)
    frames = batch.latents[:, :, 0, 0, 0]
    clip, frame = np.divmod(frames.astype(int), 100)
    assert (clip == clip[:, :1]).all() and len(set(clip[:, 0])) == 6
    chunk = frame.reshape(64, 4, 3) // 3
    left_out = chunk[:, 1, 0] - 1
    assert set(left_out) == set(range(gap + 1))
    assert (chunk == (np.arange(4) + left_out[:, None] * (np.arange(4) > 0))[..., None]).all()
    assert (frame.reshape(64, 4, 3) % 3 == np.arange(3)).all()
    said = {}
    for row, part in np.ndindex(64, 4):  # a prompt is that of the chunk, wherever it comes to stand
        key = int(clip[row, 0]), int(chunk[row, part, 0])
        assert said.setdefault(key, tuple(batch.ids[row, part])) == tuple(batch.ids[row, part])
    assert any(said[one] != said[other] for one in said for other in said if one[0] == other[0])
    np.testing.assert_array_equal(batch.weight, np.where(left_out[:, None] * (np.arange(4) == 1) > 0, 0.0, 1.0))


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ({"clips": 8}, "first.batch is None; expected a whole number from 1"),
        ({"clips": 8, "batch": 0}, "first.batch is 0; expected a whole number from 1"),
        ({"clips": 8, "batch": 8, "chunks": 1}, "first has an unknown field 'chunks'"),
        ({"clips": 8, "batch": 7}, "first.batch is 7; expected a multiple of the 2 that share it (loop.mesh)"),
    ],
)
def test_first_chunks_that_cannot_be(tmp_path, first, message):
    config = load("train_digits_stream")
    config.first = ConfigDict(first)
    config.loop.mesh = "data=2"
    with pytest.raises(UsageError, match=re.escape(message)):
        digits_runs.train_stream(config, tmp_path)
