"""What encoders make of a request, kept and given again in its place."""

import dataclasses

import jax
import numpy as np
import pytest

import jvdiff
from jvdiff import pipeline
from jvdiff.errors import CheckpointError, UsageError

PROMPTS = ["a red seven moving left", "two"]
GIVEN = {"negative_prompt": "blue", "steps": 2, "seed": 3}


@pytest.fixture(scope="module")
def pipe(tiny_repository):
    return jvdiff.load(tiny_repository, "float32")


@pytest.fixture(scope="module")
def deaf(pipe):
    """The same without a text encoder that could be used."""
    broken = jax.tree.map(lambda x: x * np.nan, pipe.weights["text_encoder"])
    return dataclasses.replace(pipe, weights=pipeline.Weights({**pipe.weights, "text_encoder": broken}))


def test_embeddings_make_the_clips_of_their_prompts(pipe, deaf, tmp_path):
    """Through a file too; and as diffusers has them, with 512 rows."""
    clips = jvdiff.generate(pipe, PROMPTS, **GIVEN).latents
    made = jvdiff.embed(pipe, PROMPTS, negative_prompt="blue")
    pipeline.save_embeddings(tmp_path / "texts.safetensors", made)
    read = pipeline.read_embeddings(tmp_path / "texts.safetensors")
    again = jvdiff.generate(deaf, **read, **GIVEN)
    np.testing.assert_array_equal(again.latents, clips)
    assert again.subjects == ("", "") and jvdiff.generate(deaf, PROMPTS, **read, **GIVEN).subjects == tuple(PROMPTS)
    rows, other = (np.pad(x, ((0, 0), (0, 512 - x.shape[1]), (0, 0))) for x in made["text_embeddings"])
    whole = jvdiff.generate(deaf, text_embeddings=(rows, other[:1]), **GIVEN).latents
    np.testing.assert_array_equal(whole, clips)
    swapped = jvdiff.generate(deaf, text_embeddings=(rows[::-1], other), **GIVEN).latents
    assert np.abs(swapped - clips).max() > 1e-3


def test_each_clip_may_have_a_negative_prompt_of_its_own(pipe):
    """One to one, as if each clip were alone; one for all is the same as a list of equal ones."""
    both = jvdiff.embed(pipe, PROMPTS, negative_prompt=["blue", "left left"])["text_embeddings"]
    for i, negative in enumerate(["blue", "left left"]):
        alone = jvdiff.embed(pipe, PROMPTS[i], negative_prompt=negative)["text_embeddings"]
        for one, other in zip(alone, both, strict=True):
            np.testing.assert_allclose(one[0], other[i], rtol=0, atol=1e-5)
    assert np.abs(both[1][0] - both[1][1]).max() > 0.1
    for wrong, words in (
        (["blue"], "negative_prompt has 1 texts for 2 clips; expected one for all, or one each"),
        (["blue", 5], "negative_prompt is 5; expected text"),
        (["blue", "bad \ud800"], "surrogate"),
    ):
        with pytest.raises(UsageError, match=words):
            jvdiff.generate(pipe, PROMPTS, negative_prompt=wrong)


def test_without_guidance_there_is_no_other_half(pipe, tmp_path):
    made = jvdiff.embed(pipe, PROMPTS[0], guidance=1.0)
    assert made["text_embeddings"][1] is None
    pipeline.save_embeddings(tmp_path / "text", made)
    assert pipeline.read_embeddings(tmp_path / "text")["text_embeddings"][1] is None
    with pytest.raises(UsageError, match="guidance needs those of the negative prompt too"):
        jvdiff.generate(pipe, **made)
    (tmp_path / "text").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="cannot be read as a file of embeddings"):
        pipeline.read_embeddings(tmp_path / "text")


@pytest.mark.parametrize(
    ("embeddings", "words"),
    [
        ({"text_embeddings": np.zeros((1, 4, 15), np.float32)}, "have width 15; this model's have 16"),
        ({"text_embeddings": np.zeros((1, 513, 16), np.float32)}, "have 513 rows; expected at most 512"),
        ({"text_embeddings": np.zeros((1, 4, 16), np.int32)}, r"are int32\[1, 4, 16\]; expected floats"),
        ({"image_embeddings": np.zeros((1, 4, 16), np.float32)}, "takes no image_embeddings"),
    ],
)
def test_embeddings_that_cannot_be_used(pipe, embeddings, words):
    with pytest.raises(UsageError, match=words):
        jvdiff.generate(pipe, None if "text_embeddings" in embeddings else "two", guidance=1.0, **embeddings)
