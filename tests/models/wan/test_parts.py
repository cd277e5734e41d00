"""The parts that `jvdiff.models.wan` exports, as functions: what they give is what a pipeline gives its transformer."""

import jax
import jax.numpy as jnp
import numpy as np

import jvdiff
from jvdiff.models import wan
from jvdiff.models.vision import clip


def test_text_is_what_a_pipeline_makes_of_it(tiny_repository):
    pipe = jvdiff.load(tiny_repository, "float32")
    prompts = ["a red seven moving left", "two"]
    ids, mask = wan.tokenize(pipe.models.files["tokenizer"], prompts)
    with pipe.weights.use("text_encoder") as params:
        text = jax.jit(wan.encode_text, static_argnums=1)(params, pipe.models.configs["text_encoder"], ids, mask)
    made, _ = jvdiff.embed(pipe, prompts, guidance=1.0)["text_embeddings"]
    np.testing.assert_allclose(text, made, rtol=0, atol=1e-6)
    assert not np.asarray(text)[~mask].any() and np.asarray(text)[mask].any()


def test_pictures_go_through_the_tower():
    cfg, struct = clip.VIT_H_14, jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    seen = jax.eval_shape(lambda params, x: wan.encode_pictures(params, cfg, x), clip.abstract_params(cfg), struct)
    assert (seen.shape, seen.dtype) == ((2, 257, 1280), jnp.float32)


def test_the_posterior_has_a_mean_and_a_log_variance(tiny_repository):
    cfg = jvdiff.pipeline.inspect(tiny_repository).models.configs["vae"]
    video = jax.ShapeDtypeStruct((1, 5, 16, 24, 3), jnp.float32)
    encode = lambda params, x: wan.encode(params, cfg, x, logvar=True)  # noqa: E731
    mean, logvar = jax.eval_shape(encode, wan.abstract_params(cfg), video)
    assert mean.shape == logvar.shape == (1, 2, 2, 3, cfg.z_dim)
