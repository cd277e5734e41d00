"""Doors that the digits model goes through: a transform of its weights, kernels of eight bits, a sampler that draws.

And weights that leave the device between stages.
"""

import dataclasses
import functools
import json
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jvdiff
from jvdiff import pipeline
from jvdiff.commands import sample
from jvdiff.errors import UsageError
from jvdiff.models.family import Request, read_weights
from jvdiff.models.quantised import Quantised, quantise

DIGITS = Path(__file__).parents[2] / "checkpoints" / "digits"
PROMPT = "a red seven moving left"
SIZES = {"num_frames": 5, "steps": 2}


@dataclasses.dataclass(frozen=True)
class Changed:
    """A transform: the kernels of the layers become something else."""

    digest: str
    change: object

    def abstract(self, path, struct):
        return jax.eval_shape(self.change, struct) if self.kernel(path) else struct

    def apply(self, path, array):
        return self.change(array) if self.kernel(path) else array

    def kernel(self, path):
        return path.startswith("blocks/") and path.endswith("/kernel")


EIGHT_BITS = Changed("int8", quantise)


def shaken(seed):
    """Kernels moved at random by as much as rounding to eight bits may move them."""
    random = np.random.default_rng(seed)
    return Changed(f"shaken {seed}", lambda w: w + quantise(w).scale * random_like(random, w))


def random_like(random, leaf):
    if not isinstance(leaf, np.ndarray):  # traced for its shape
        return jnp.zeros(leaf.shape, jnp.float32)
    return random.uniform(-0.5, 0.5, leaf.shape).astype(np.float32)


@functools.cache
def loaded(mesh=None):
    return jvdiff.load(DIGITS, "float32", mesh)


def through(transform, mesh=None):
    """The pipeline with the transformer's weights read through a transform."""
    pipe = loaded(mesh)
    part, cfg = pipe.family.parts["transformer"], pipe.models.configs["transformer"]
    params = read_weights(DIGITS / "transformer", part, cfg, jnp.float32, pipe.placement, transform=transform)
    return dataclasses.replace(pipe, weights=pipeline.Weights({**pipe.weights, "transformer": params}))


def latents(pipe, **given):
    return jvdiff.generate(pipe, PROMPT, seed=3, **SIZES | given).latents


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_a_clip_of_eight_bits_is_as_far_off_as_rounding_explains():
    """A weight moves by up to half a scale, as if at random: the clip no farther than for weights moved at random."""
    expected, small = latents(loaded()), through(EIGHT_BITS)
    kernel = small.weights["transformer"]["blocks"]["ffn"]["up"]["kernel"]
    assert isinstance(kernel, Quantised) and kernel.values.dtype == jnp.int8
    bound = 1.3 * max(distance(latents(through(shaken(seed))), expected) for seed in range(3))
    assert 0 < distance(latents(small), expected) < bound
    rolled = Changed("rolled", lambda w: dataclasses.replace(quantise(w), scale=jnp.roll(quantise(w).scale, 1, -1)))
    assert distance(latents(through(rolled)), expected) > bound  # scales of other columns


def test_eight_bits_on_a_mesh_are_those_of_one_device():
    """The same integers and scales, and the clip but for rounding; bit for bit in tests/test_same_clip.py."""
    alone, apart = through(EIGHT_BITS), through(EIGHT_BITS, "fsdp=2")
    kernel = apart.weights["transformer"]["blocks"]["ffn"]["up"]["kernel"]
    assert not kernel.values.is_fully_replicated
    jax.tree.map(np.testing.assert_array_equal, apart.weights["transformer"], alone.weights["transformer"])
    assert distance(latents(apart), latents(alone)) < 1e-5


def test_a_renoising_sampler_resumes_bit_for_bit(tmp_path):
    given = ["--solver=renoise:1000,750,500,250", "--num_frames=5", "--save_arrays=true", f"--checkpoint={DIGITS}"]

    def run(folder, *flags):
        assert sample.main(["sample", f"--output={tmp_path / folder}", *given, *flags]) == 0

    made = (f"--prompt={PROMPT}", "--seed=3")
    run("whole", *made)
    run("out", *made, "--stop_at=2")
    stem = "a-red-seven-moving-left_seed3"
    state = tmp_path / "out" / f"{stem}.state"
    noise = json.loads((state / "state.json").read_text())["arrays"]["noise"]
    assert (noise["dtype"], noise["shape"]) == ("uint32", [1, 2])  # the clip's key
    run("out", f"--resume={state}")
    with np.load(tmp_path / "whole" / f"{stem}.npz") as whole, np.load(tmp_path / "out" / f"{stem}.npz") as finished:
        np.testing.assert_array_equal(finished["latents"], whole["latents"])
        np.testing.assert_array_equal(finished["video"], whole["video"])
    record = json.loads((tmp_path / "out" / f"{stem}.json").read_text())
    assert (record["steps"], record["resumed_at_step"], len(record["sigmas"])) == (4, 2, 5)


def test_renoised_by_what_is_given_in_place_of_what_is_drawn(tiny_repository):
    """The same clip where the noise is what the clip's own key draws."""
    pipe = jvdiff.load(tiny_repository)
    given = {"solver": "renoise:1000,500", "seed": 3}
    key = jax.random.fold_in(jax.random.key(np.uint32(3)), 0)
    drawn = jax.random.normal(jax.random.fold_in(key, 1), pipe.clip().latents)[None, None]  # [steps-1,B,T,H,W,C]
    expected = jvdiff.generate(pipe, PROMPT, **given).latents
    np.testing.assert_allclose(jvdiff.generate(pipe, PROMPT, renoise=drawn, **given).latents, expected, atol=1e-5)
    assert np.abs(jvdiff.generate(pipe, PROMPT, renoise=-drawn, **given).latents - expected).max() > 1e-2
    for wrong in (drawn[:0], drawn[:, :, :1], np.zeros((1, 2), np.uint32)):
        with pytest.raises(UsageError, match=r"renoise is .*; this request needs float32\[1, 1, 2, 2, 2, 4\]"):
            jvdiff.generate(pipe, PROMPT, renoise=wrong, **given)


def test_a_part_that_cannot_come_back_is_still_away(monkeypatch):
    weights, full = pipeline.Weights({"vae": {"w": jax.numpy.ones(2)}}), RuntimeError("RESOURCE_EXHAUSTED")
    weights.leave("vae")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="RESOURCE"):
        patch.setattr(jax, "device_put", mock.Mock(side_effect=full))
        weights["vae"]
    assert weights.away() == ("vae",) and isinstance(weights["vae"]["w"], jax.Array) and not weights.away()


@pytest.mark.parametrize("mesh", [None, "fsdp=2"])
def test_a_part_leaves_between_stages_and_comes_back_without_a_change_of_bits(tiny_repository, mesh):
    pipe = jvdiff.load(tiny_repository, mesh=mesh)
    expected = jvdiff.generate(pipe, PROMPT, seed=3)
    clip, weights = pipe.clip(), pipe.weights
    inputs, solver = pipe.family.inputs(pipe.models, clip, Request(prompts=(PROMPT,))), clip.sampler.make()
    conditions = pipeline.encode(pipe.context, clip, inputs, pipe.run)
    there = jax.tree.leaves(weights["text_encoder"])
    places = [leaf.sharding for leaf in there]
    for part in ("text_encoder", "vae", "text_encoder"):
        weights.leave(part)
    assert weights.away() == ("text_encoder", "vae") and all(leaf.is_deleted() for leaf in there)
    state = pipeline.begin(clip, solver, pipeline.initial_noise([3], clip.latents), [3])
    state = pipeline.denoise(pipe.context, clip, conditions, state, solver, pipe.run)
    weights.leave("transformer")
    video = pipeline.decode(pipe.context, clip, state.x, pipe.run)  # the VAE comes back
    assert weights.away() == ("text_encoder", "transformer")
    np.testing.assert_array_equal(np.asarray(state.x), expected.latents)
    np.testing.assert_array_equal(video, expected.video)
    again = jvdiff.generate(pipe, PROMPT, seed=3)
    np.testing.assert_array_equal(again.latents, expected.latents)
    assert weights.away() == () and [leaf.sharding for leaf in jax.tree.leaves(weights["text_encoder"])] == places
