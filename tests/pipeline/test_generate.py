"""The stages and what `generate` makes of them, on a tiny random repository."""

import dataclasses
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jvdiff
from jvdiff import pipeline, precision, streaming
from jvdiff.errors import CheckpointError, NumericsError, UsageError
from jvdiff.models import wan
from jvdiff.models.family import Clip, Request
from jvdiff.models.vae_tiles import Tiles
from jvdiff.models.wan import conditions
from jvdiff.models.wan import family as wan_family
from jvdiff.runtime.target import Target

PROMPT = "a red seven moving left"


@pytest.fixture(scope="module")
def pipe(tiny_repository):
    return jvdiff.load(tiny_repository)


@pytest.fixture(scope="module")
def out(pipe):
    return jvdiff.generate(pipe, PROMPT, seed=3)


def test_shapes_dtypes_and_the_repositorys_defaults(pipe, out):
    assert out.video.shape == (1, 5, 16, 16, 3) and out.video.dtype == np.uint8
    assert out.latents.shape == (1, 2, 2, 2, 4) and out.latents.dtype == np.float32
    assert np.isfinite(out.latents).all() and out.video.std() > 1
    assert out.seeds == (3,)
    expected = {"num_frames": 5, "steps": 4, "guidance": 3.0, "shift": 3.0, "solver": "unipc", "grid": "diffusers"}
    assert expected.items() <= vars(out.settings).items()
    assert pipe.precision == dataclasses.replace(precision.TABLE["float32"], vae_decode="exact")


def test_a_clip_does_not_depend_on_its_batch(pipe, out):
    batch = jvdiff.generate(pipe, ["a blue two", PROMPT, "left"], seed=2)
    # The noise is bit-equal; matrix products of another height round differently.
    np.testing.assert_allclose(batch.latents[1], out.latents[0], rtol=1e-4, atol=1e-5)
    assert np.abs(batch.video[1].astype(int) - out.video[0]).max() <= 1
    assert batch.seeds == (2, 3, 4)
    assert not np.array_equal(batch.latents[0], batch.latents[1])


def test_given_noise_replaces_the_seed(pipe, out):
    noise = np.asarray(pipeline.initial_noise([3], (2, 2, 2, 4)))
    given = jvdiff.generate(pipe, [PROMPT], noise=noise)
    np.testing.assert_array_equal(given.latents, out.latents)
    assert len(given.seeds) == 1  # what a solver draws is of the seed
    for other in (noise[:, :1], noise.tolist()):
        with pytest.raises(UsageError, match=r"float32\[1, 2, 2, 2, 4\]"):
            jvdiff.generate(pipe, [PROMPT], noise=other)
    with pytest.raises(UsageError, match="the solver of this clip draws no noise; leave it out"):
        jvdiff.generate(pipe, [PROMPT], renoise=np.zeros((3, 1, 2, 2, 2, 4), np.float32))


def test_what_inspect_said_is_loaded_as_a_folder_is(tiny_repository, tiny_causal_repository):
    with pytest.raises(UsageError, match=r"run it with `jvdiff stream`"):
        jvdiff.load(pipeline.inspect(tiny_causal_repository))
    with pytest.raises(UsageError, match=r"run it with `jvdiff sample`"):
        streaming.load(pipeline.inspect(tiny_repository))
    other = dataclasses.replace(pipeline.inspect(tiny_repository).family, name="mine")
    with pytest.raises(UsageError, match=r"family is 'mine', and .* was inspected as"):
        jvdiff.load(pipeline.inspect(tiny_repository), family=other)


def test_noise_is_standard_normal_and_every_seed_counts():
    seeds = [0, 1, 2**31, 2**32 - 1]
    noise = np.asarray(pipeline.initial_noise(seeds, (4, 16, 16, 4)))
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert len({clip.tobytes() for clip in noise}) == len(seeds)
    np.testing.assert_array_equal(noise[1], jax.random.normal(jax.random.key(1), (4, 16, 16, 4)))


def encoded(pipe, clip, *prompts):
    """Conditions of these prompts: their text and the negative prompt's, or None."""
    inputs = pipe.family.inputs(pipe.models, clip, Request(prompts=prompts))
    return pipeline.encode(pipe.context, clip, inputs, pipe.run)


def test_the_stages_in_a_row_are_generate(pipe, out):
    clip, seen = pipe.clip(), []
    conditions = encoded(pipe, clip, PROMPT)
    noise, solver = pipeline.initial_noise([3], clip.latents), clip.sampler.make()
    state = pipeline.begin(clip, solver, noise, [3])
    keep = lambda done, _: seen.append(done)  # noqa: E731
    state = pipeline.denoise(pipe.context, clip, conditions, state, solver, pipe.run, callback=keep)
    assert seen == [1, 2, 3, 4]
    np.testing.assert_array_equal(np.asarray(state.x), out.latents)
    np.testing.assert_array_equal(pipeline.decode(pipe.context, clip, state.x, pipe.run), out.video)
    assert np.isfinite(noise).all()  # the caller's noise was not donated


def test_decoding_in_chunks_is_the_whole_decoder(pipe, out):
    vae, latents = pipe.models.configs["vae"], jnp.asarray(out.latents)
    decode = jax.jit(lambda params, z: wan.decode(params, vae, wan.denormalize_latents(vae, z)))
    whole = decode(pipe.weights["vae"], latents)
    whole = np.round(np.clip(np.asarray(whole) / 2 + 0.5, 0, 1) * 255)
    assert np.abs(whole - out.video).max() <= 1


def test_tiles_side_by_side_are_clips_of_their_own(pipe):
    """Every tile over all frames, and a chance to stop after each; then frame after frame. Here they do not overlap."""
    clip = pipe.clip(vae_tiles=Tiles((16, 16), (16, 16)), height=32)
    assert clip.settings.vae_tiles == "16x16:16x16" and clip.vae_tiles == Tiles((16, 16), (16, 16))
    z, told = np.asarray(pipeline.initial_noise([0], clip.latents)), []
    video = pipeline.decode(pipe.context, clip, z, pipe.run, callback=told.append)
    assert told == [0, 0, 1, 2]
    each = [pipeline.decode(pipe.context, pipe.clip(), part, pipe.run) for part in np.split(z, 2, axis=2)]
    assert np.abs(np.concatenate(each, axis=2).astype(int) - video).max() <= 1
    with pytest.raises(UsageError, match=r"multiples of 8\. The nearest is 16x16:8x16\."):
        pipe.clip(vae_tiles="16x16:8x12")
    assert not pipe.clip(vae_tiles="off").vae_tiles


def test_short_text_rows_stand_for_512(pipe, out, monkeypatch):
    monkeypatch.setattr(conditions, "TEXT_BUCKETS", (512,))
    full = jvdiff.generate(pipe, PROMPT, seed=3)
    np.testing.assert_allclose(full.latents, out.latents, rtol=1e-4, atol=1e-4)


def test_text_rows_are_zero_beyond_the_prompt(pipe):
    text, negative = (each.text for each in encoded(pipe, pipe.clip(), PROMPT, "left"))
    assert text.shape == (2, 32, 16) and negative.shape == text.shape
    used = np.asarray(jnp.any(text != 0, axis=-1)).sum(axis=1)
    assert used.tolist() == [6, 2] and np.asarray(negative)[0, 1:].max() == 0  # words and eos; eos alone


def test_a_prompt_of_512_tokens_or_more_uses_every_row(pipe, caplog):
    ids, mask = conditions.tokenize(pipe.models.files["tokenizer"], ["red " * 511])
    assert ids.shape == (1, 512) and mask.all() and not caplog.records
    with caplog.at_level(logging.WARNING, "jvdiff"):
        ids, mask = conditions.tokenize(pipe.models.files["tokenizer"], ["red " * 600])
    assert ids.shape == (1, 512) and mask.all() and ids[0, -1] == 1
    assert "the last 89 of its 601 tokens are cut" in caplog.text


@pytest.fixture
def calls(monkeypatch):
    """Batch sizes at which the network is traced; fresh programs before and after."""
    seen, velocity = [], wan.velocity

    def counted(params, cfg, latents, *args, **kwargs):
        seen.append(latents.shape[0])
        return velocity(params, cfg, latents, *args, **kwargs)

    monkeypatch.setattr(wan, "velocity", counted)
    wan_family._velocity.cache_clear()
    yield seen
    wan_family._velocity.cache_clear()


def test_guidance_1_runs_the_network_once_a_step(pipe, calls):
    one = jvdiff.generate(pipe, PROMPT, seed=3, guidance=1)
    assert set(calls) == {1}
    calls.clear()
    other = jvdiff.generate(pipe, PROMPT, seed=3, guidance=2)
    assert set(calls) == {2}
    assert not np.array_equal(one.latents, other.latents)


def test_large_clips_are_guided_in_turn_with_the_same_result(pipe, out, monkeypatch):
    assert pipe.clip().batched(1, None) and not pipe.clip(num_frames=81, height=480, width=832).batched(1, None)
    monkeypatch.setattr(Clip, "batched", lambda *_: False)
    in_turn = jvdiff.generate(pipe, PROMPT, seed=3).latents
    np.testing.assert_allclose(in_turn, out.latents, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("num_frames", 80, "nearest is 81"),
        ("num_frames", 0, "nearest is 1"),
        ("height", 479, "nearest is 480"),
        ("height", 30, "nearest is 32"),
        ("width", 17, "nearest is 16"),
        ("width", 10**9, "nearest is 16384"),
        ("width", "64", "expected a whole number"),
        ("height", 16.5, "expected a whole number"),
        ("steps", 0, "nearest is 1"),
        ("guidance", float("nan"), "expected 1.0 to 100.0"),
        ("guidance", 0.5, "without guidance"),
        ("shift", float("inf"), "nearest is 100"),
        ("solver", "ddim", "unipc, euler"),
        ("grid", "training", "diffusers, wan"),
        ("grid", "sigmas:1,2", "at most 1"),
        ("attention", "flash9", "xla"),
        ("pattern", "dance", "expected 'dense'"),
        ("negative_prompt", "bad \ud800", "surrogate"),
        ("seed", -1, "0 to 4294967295"),
        ("seed", 2**32, "0 to 4294967295"),
        ("seed", "seven", "whole number"),
        ("seed", True, "whole number"),
    ],
)
def test_values_that_cannot_be_are_refused_with_the_nearest_ones(pipe, field, value, message):
    with pytest.raises(UsageError, match=message) as caught:
        jvdiff.generate(pipe, PROMPT, **{field: value})
    assert len(str(caught.value).splitlines()) <= 6


@pytest.mark.parametrize("prompt", ["", " \n", "&nbsp;", "half \udc00", 7, None])
def test_prompts_that_are_no_text_are_refused(pipe, prompt):
    with pytest.raises(UsageError, match=r"prompt|surrogate"):
        jvdiff.generate(pipe, [prompt])


def test_no_prompts_at_all_are_refused(pipe):
    with pytest.raises(UsageError, match="at least one"):
        jvdiff.generate(pipe, [])


def test_no_seed_draws_one_that_makes_the_clip_again(pipe):
    first = jvdiff.generate(pipe, PROMPT, steps=1)
    again = jvdiff.generate(pipe, PROMPT, steps=1, seed=first.seeds[0])
    np.testing.assert_array_equal(first.latents, again.latents)


def test_nan_names_the_step_and_keeps_the_latents_before_it(pipe, monkeypatch):
    velocity = wan.velocity

    def breaks(params, cfg, latents, timestep, *args, **kwargs):
        v = velocity(params, cfg, latents, timestep, *args, **kwargs)
        return jnp.where(timestep[:, None, None, None, None] < 800.0, jnp.nan, v)  # the third of 999, 900, 750, 500

    good = {}
    keep = lambda done, state: good.update({done: np.array(state.x)})  # noqa: E731
    jvdiff.generate(pipe, PROMPT, seed=3, callback=keep)
    monkeypatch.setattr(wan, "velocity", breaks)
    wan_family._velocity.cache_clear()
    with pytest.raises(NumericsError, match=r"after step 3 of 4, 100.0% .* float32") as caught:
        jvdiff.generate(pipe, PROMPT, seed=3)
    wan_family._velocity.cache_clear()
    assert caught.value.step == 2
    np.testing.assert_array_equal(caught.value.latents, good[2])


def test_nan_in_the_decoder_names_the_frame(pipe, out):
    latents = out.latents.copy()
    latents[0, 1] = np.nan
    with pytest.raises(NumericsError, match="latent frame 2 of 2"):
        pipeline.decode(pipe.context, pipe.clip(), latents, pipe.run)


def test_nan_in_the_text_encoder_is_named(pipe):
    weights = dict(pipe.weights) | {"text_encoder": jax.tree.map(lambda x: x * jnp.nan, pipe.weights["text_encoder"])}
    with pytest.raises(NumericsError, match=r"text encoder: 18\.8% of the numbers of its output"):
        jvdiff.generate(dataclasses.replace(pipe, weights=pipeline.Weights(weights)), PROMPT)


def test_bfloat16_follows_the_table(tiny_repository, out):
    half = jvdiff.load(tiny_repository, precision="bfloat16")
    kinds = {part: {str(x.dtype) for x in jax.tree.leaves(tree)} for part, tree in half.weights.items()}
    assert kinds["text_encoder"] == {"bfloat16"} and kinds["vae"] == {"float32"}
    assert half.weights["transformer"]["blocks"]["ffn"]["up"]["kernel"].dtype == jnp.bfloat16
    latents = jvdiff.generate(half, PROMPT, seed=3).latents
    assert latents.dtype == np.float32 and np.abs(latents - out.latents).max() < 0.5 * np.abs(out.latents).max()


def test_precision_is_a_name_of_the_table():
    assert precision.choose(target=Target("gpu", "NVIDIA H200", (9, 0))) == precision.TABLE["bfloat16"]
    assert precision.choose(target=Target("cpu", "cpu")).name == "float32"
    with pytest.raises(UsageError, match="bfloat16, float32"):
        precision.choose("float8")


@pytest.mark.parametrize(
    ("name", "asked", "platform", "decoded"),
    [
        (None, None, "gpu", "bf16"),
        ("float32", None, "gpu", "tf32"),
        ("bfloat16", "exact", "gpu", "exact"),
        ("bfloat16", None, "cpu", "exact"),
        (None, "tf32", "cpu", "tf32"),
    ],
)
def test_how_frames_are_decoded(name, asked, platform, decoded):
    dtypes = precision.choose(name, asked, Target(platform, platform))
    assert (dtypes.vae, dtypes.vae_decode) == ("float32", decoded)


def test_a_way_to_decode_that_is_none():
    with pytest.raises(UsageError, match="vae_decode is 'float32'; expected one of exact, tf32, bf16"):
        precision.choose(None, "float32")


def test_the_device_decodes_one_frame_ahead_and_no_more(pipe, out):
    """The next frame is dispatched before the last one's pixels are copied, and none after that."""
    said = []

    def run(stage, *arguments):
        said.append("dispatched")
        return pipe.run(stage, *arguments)

    clip = pipe.clip(num_frames=13)
    latents = np.array(pipeline.initial_noise([0, 1], clip.latents))
    video = pipeline.decode(pipe.context, clip, latents, run, callback=lambda done: said.append("copied"))
    one = ["dispatched", *["dispatched", "copied"] * 3, "copied"]
    assert said == 2 * one and video.shape == (2, 13, 16, 16, 3)
    latents[1, 2] = np.nan
    with pytest.raises(NumericsError, match=r"latent frame 3 of 4 are NaN or infinite \(vae_decode: exact\)") as raised:
        pipeline.decode(pipe.context, clip, latents, pipe.run)
    assert raised.value.step == 2


def test_a_tokenizer_with_more_words_than_the_encoder_is_refused(tiny_repository, tmp_path):
    from jvdiff.digits import tokenizer as digits_tokenizer

    copy = tmp_path / "repository"
    shutil.copytree(tiny_repository, copy)
    digits_tokenizer.save(digits_tokenizer.build([f"word{i}" for i in range(500)]), copy / "tokenizer")
    with pytest.raises(CheckpointError, match="rows"):
        jvdiff.load(copy)


def test_both_solvers_and_grids_run(pipe):
    seen = {
        jvdiff.generate(pipe, PROMPT, seed=3, steps=3, solver=solver, grid=grid, num_frames=1).latents.tobytes()
        for solver in ("unipc", "euler")
        for grid in ("diffusers", "wan")
    }
    assert len(seen) == 4


def test_compiling_ahead_is_compiling(pipe, out, caplog):
    clip, names = pipe.clip(num_frames=9), []
    inputs = pipe.family.inputs(pipe.models, clip, Request(prompts=(PROMPT,)))
    for call in pipeline.trace(pipe.context, pipe.weights, clip, inputs):
        call.traced.lower().compile()
        names.append((call.stage.name, call.times))
    assert names == [("text", 1), ("denoise", 4), ("decode first", 1), ("decode next", 2)]
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        jvdiff.generate(pipe, PROMPT, seed=3, num_frames=9)
    finished = [r.getMessage() for r in caplog.records if "Finished XLA compilation" in r.getMessage()]
    assert not [m for m in finished if any(n in m for n in ("jit(text)", "jit(denoise)", "jit(decode)"))]


def test_model_index_and_defaults_are_plain_json(tiny_repository):
    assert json.loads((tiny_repository / "model_index.json").read_text())["_class_name"] == "WanPipeline"
