"""Pictures as conditions of Wan: what goes into the network, told against a restatement in few lines.

B batch · T latent frames · H W latent grid · C latent channels · F pixel frames · Y X pixel height, width
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff.errors import UsageError
from jvdiff.models import wan
from jvdiff.models.family import Models, Request
from jvdiff.models.text import umt5
from jvdiff.models.vision import clip, pictures
from jvdiff.models.wan import conditions, family

VAE = wan.VAEConfig(
    base_dim=4,
    dim_mult=(1, 2),
    num_res_blocks=1,
    temperal_downsample=(True,),
    z_dim=3,
    latents_mean=(0.5, -0.3, 0.1),
    latents_std=(2.0, 0.7, 1.3),
)
TOWER = clip.Config(
    12, 20, num_hidden_layers=3, num_attention_heads=2, image_size=9, patch_size=4, hidden_act="gelu", projected=False
)
DIT = wan.DiTConfig(
    num_attention_heads=2, attention_head_dim=12, in_channels=8, out_channels=3, text_dim=10, freq_dim=8, ffn_dim=16,
    num_layers=2, image_dim=12, added_kv_proj_dim=24,
)  # fmt: skip
PROCESSOR = pictures.Processor(9, (0.48, 0.45, 0.40), (0.26, 0.26, 0.27))


def picture(seed, height=13, width=31):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def made(random_params):
    """(pixels of two pictures, `Condition.latents` of three clips that share them, those of one picture alone)."""
    params = random_params(wan.abstract_params(VAE))
    pixels = np.stack([pictures.squash(picture(i), 8, 12) for i in range(2)])[None]  # [P,n,Y,X,3]
    both = conditions._picture_program(VAE, None, 3, 4, None)(params, pixels)
    one = conditions._picture_program(VAE, None, 1, 1, None)(params, pixels[:, :1])
    return params, pixels, np.asarray(both), np.asarray(one)


def test_the_mask_is_of_pixel_frames_and_stands_before_the_latents(made):
    _, _, both, one = made
    assert both.shape == (3, 4, 4, 6, 2 + 3) and one.shape == (1, 1, 4, 6, 5)
    mask = both[..., :2]  # of the two pixel frames of a latent frame, the same at every place
    assert (mask == mask[:1, :, :1, :1]).all()
    assert mask[0, :, 0, 0].tolist() == [[1, 1], [0, 0], [0, 0], [0, 1]]
    assert (one[..., :2] == 1).all()  # of a clip of one frame


def test_the_latents_are_the_mean_of_a_clip_that_is_grey_between_its_pictures(made):
    """Not black, not a sample, normalised; the later frames have seen the first."""
    params, pixels, both, one = made
    video = np.zeros((1, 7, 8, 12, 3), np.float32)  # [1,F,Y,X,3]
    video[:, 0], video[:, -1] = (pixels[0, i] / np.float32(255) * 2 - 1 for i in (0, 1))
    encoded = jax.jit(wan.encode, static_argnums=1)(params, VAE, video)
    want = (np.asarray(encoded) - np.array(VAE.latents_mean)) / np.array(VAE.latents_std)
    np.testing.assert_allclose(both[:1, ..., 2:], want, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(both[0], both[2])  # one picture for all clips
    np.testing.assert_allclose(
        one[..., 2:], want[:, :1], rtol=1e-5, atol=1e-4
    )  # causal: the first frame sees nothing else
    assert np.abs(want[:, 1] - want[:, 2]).max() > 1e-3


def test_the_networks_input_is_noise_then_condition():
    x, behind = jnp.zeros((1, 1, 2, 2, 3)), jnp.ones((1, 1, 2, 2, 5))
    out = conditions.network_input(conditions.Condition(x, latents=behind), x)
    assert out[0, 0, 0, 0].tolist() == [0] * 3 + [1] * 5
    assert conditions.network_input(conditions.Condition(x), x) is x


def test_both_ways_start_from_the_original(tiny_repository):
    """The image encoder sees the picture cut to a square, and nothing of how the VAE's is squashed."""
    tokenizer = family.TOKENIZER.read(tiny_repository / "tokenizer")
    configs = {"transformer": DIT, "vae": VAE, "text_encoder": umt5.Config(), "image_encoder": TOWER}
    models = Models(configs, {"tokenizer": tokenizer, "image_processor": PROCESSOR}, {})
    clip_of = family.IMAGE_TO_VIDEO.clip(models, family.Settings(num_frames=3, height=8, width=12, steps=1))
    shown, other = picture(0), picture(1)
    one = conditions.inputs(models, clip_of, Request(prompts=("a", "red"), images=(shown, shown)))
    assert one.pixels.shape == (1, 1, 8, 12, 3) and one.seen.shape == (1, 1, 9, 9, 3)  # what is shared is there once
    np.testing.assert_array_equal(one.seen[0, 0], pictures.seen_by_clip(shown, PROCESSOR))
    np.testing.assert_array_equal(one.pixels[0, 0], pictures.squash(shown, 8, 12))
    two = conditions.inputs(models, clip_of, Request(prompts=("a", "red"), images=(shown, other)))
    assert two.pixels.shape == (2, 1, 8, 12, 3)
    last = Request(prompts=("a",), images=(shown,), last_images=(other,))
    with pytest.raises(UsageError, match="take one picture"):
        conditions.inputs(models, clip_of, last)
    configs["transformer"] = dataclasses.replace(DIT, pos_embed_seq_len=2 * TOWER.tokens)
    both = conditions.inputs(models, clip_of, last)
    np.testing.assert_array_equal(both.pixels[0], [pictures.squash(each, 8, 12) for each in (shown, other)])
    np.testing.assert_array_equal(both.seen[0, 1], pictures.seen_by_clip(other, PROCESSOR))
    shapes = jax.tree.map(jnp.shape, conditions.longest(models, clip_of, 1))
    assert shapes.pixels == both.pixels.shape and shapes.seen == both.seen.shape


def test_the_tower_gives_the_stream_before_its_last_layer(random_params):
    params = random_params(clip.abstract_params(TOWER))
    encode = jax.jit(clip.encode, static_argnums=1)
    pixels = np.random.default_rng(0).standard_normal((2, 9, 9, 3), np.float32)
    rows = encode(params, TOWER, pixels)
    assert rows.shape == (2, 5, 12)  # the class and 2x2 patches; a border of one pixel is left
    for layer, matters in ((0, True), (1, True), (2, False)):
        stacked = params["layers"]["mlp"]["up"]["kernel"].copy()
        stacked[layer] = 0
        mlp = {**params["layers"]["mlp"], "up": {**params["layers"]["mlp"]["up"], "kernel": stacked}}
        other = encode({**params, "layers": {**params["layers"], "mlp": mlp}}, TOWER, pixels)
        assert bool((other != rows).any()) == matters
    for name in ("class_embed", "place_embed", "pre_norm"):  # the norm before the layers is within
        changed = jax.tree.map(lambda x: x + np.float32(1), params[name])
        assert (encode({**params, name: changed}, TOWER, pixels) != rows).any(), name


def test_what_text_and_pictures_give_is_added(random_params):
    """With values of zero the picture tokens give nothing, and take no weight from the text."""
    params = random_params(wan.abstract_params(DIT))
    velocity = jax.jit(wan.velocity, static_argnums=1, static_argnames="text_length")
    rng = np.random.default_rng(0)
    x, text, image = (rng.standard_normal(s, np.float32) for s in ((1, 2, 2, 4, 8), (1, 3, 10), (1, 5, 12)))
    args = x, jnp.array([500.0]), text
    seen = velocity(params, DIT, *args, image=image, text_length=7)
    cross = params["blocks"]["cross_attn"]
    blind = {**cross, "image_v": jax.tree.map(np.zeros_like, cross["image_v"])}
    without = velocity(
        {**params, "blocks": {**params["blocks"], "cross_attn": blind}}, DIT, *args, image=image, text_length=7
    )
    plain = dataclasses.replace(DIT, image_dim=None, added_kv_proj_dim=None)
    np.testing.assert_allclose(without, velocity(params, plain, *args, text_length=7), atol=1e-5)
    assert np.abs(np.asarray(seen - without)).max() > 1e-2
    for given, cfg, words in (
        (None, DIT, "none are given"),
        (image, plain, "image_dim is None"),
        (image[..., 1:], DIT, "expected"),
    ):
        with pytest.raises(UsageError, match=words):
            wan.velocity(params, cfg, *args, image=given)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_dim": 13}, "gives 12"),
        ({"pos_embed_seq_len": 9}, "makes 5 of each of two"),
        ({"in_channels": 3}, "expected 8 and 3"),
    ],
)
def test_what_does_not_fit_together(change, words):
    text = umt5.Config(d_model=10)
    configs = {"transformer": DIT, "vae": VAE, "text_encoder": text, "image_encoder": TOWER}
    models = Models(configs, {"image_processor": PROCESSOR}, {"_class_name": "WanImageToVideoPipeline"})
    assert family.IMAGE_TO_VIDEO.misfits(models) is None
    configs["transformer"] = dataclasses.replace(DIT, **change)
    assert words in family.IMAGE_TO_VIDEO.misfits(models)
    configs["transformer"] = DIT
    models.files["image_processor"] = dataclasses.replace(PROCESSOR, side=10)
    assert "takes pictures of 9" in family.IMAGE_TO_VIDEO.misfits(models)
    del models.files["image_processor"], configs["image_encoder"]
    assert "there is none" in family.IMAGE_TO_VIDEO.misfits(models)
