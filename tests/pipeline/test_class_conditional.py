"""Labels become clips, on a tiny random model: saving, loading, each solver, guidance, and what cannot be."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdiff.diffusion import variance_preserving as vp
from jvdiff.digits import clips as digits
from jvdiff.errors import CheckpointError, NumericsError, UsageError
from jvdiff.models import latent_video
from jvdiff.pipeline import class_conditional as cc

SHIPPED = Path(__file__).parents[2] / "checkpoints" / "digits-classes"
CONFIGS = cc.Configs(
    latent_video.DiTConfig(hidden_size=16, depth=1, num_heads=2, num_classes=3, freq_dim=16),
    latent_video.VAEConfig(
        width=4, multipliers=(1, 1, 1, 1), blocks=1, groups=2, latents_mean=(0.1, 0.0, 0.0, -0.2), latents_std=(2.0,)
    ),
)
SETTINGS = cc.Settings(num_frames=8, height=16, width=32, fps=5, steps=3, guidance=2.0)
CLASSES = ("ant", "bee", "cow")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A repository in which no leaf is zero, so that nothing is idle."""
    rng = np.random.default_rng(0)

    def random(leaf):
        return rng.standard_normal(leaf.shape, np.float32) * max(leaf.shape[-2:-1] or (9,)) ** -0.5

    params = {
        part: jax.tree.map(random, latent_video.abstract_params(cfg))
        for part, cfg in (("transformer", CONFIGS.transformer), ("vae", CONFIGS.vae))
    }
    folder = tmp_path_factory.mktemp("model") / "repository"
    cc.save(folder, CONFIGS, params, CLASSES, SETTINGS)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return cc.load(folder, "float32")


def test_what_was_saved_is_loaded(model, folder):
    assert (model.configs, model.classes, model.defaults) == (CONFIGS, CLASSES, SETTINGS)
    assert cc.load(folder, "bfloat16").params["transformer"]["head"]["kernel"].dtype == jnp.bfloat16
    assert len(model.digest) == 64


def test_the_model_that_ships_draws_on_black():
    model = cc.load(SHIPPED, "float32")
    assert sorted(model.classes) == sorted(digits.DIGITS)
    video = cc.generate(model, ["seven"], seed=0, steps=5).video[0]
    light = video.max(axis=-1).astype(int)  # [F,Y,X]
    assert video.shape == (16, 64, 64, 3) and np.median(light) < 20
    drawn = (light > 100).sum(axis=(1, 2))
    assert (drawn > 20).all() and (drawn < 800).all()  # of 4,096 pixels, in every frame


@pytest.mark.parametrize("solver", cc.SOLVERS)
def test_every_solver_makes_the_same_clip_again(model, solver):
    one, two = (cc.generate(model, ["cow", 0], seed=4, solver=solver) for _ in range(2))
    assert one.video.shape == (2, 8, 16, 32, 3) and one.video.dtype == np.uint8
    assert one.latents.shape == (2, 2, 2, 4, 4) and one.labels == (2, 0) and one.seeds == (4, 5)
    np.testing.assert_array_equal(one.video, two.video)
    assert np.any(one.latents != cc.generate(model, ["cow", 0], seed=5, solver=solver).latents)
    assert np.any(one.latents[0] != cc.generate(model, ["bee", 0], seed=4, solver=solver).latents[0])


def test_a_clip_does_not_depend_on_what_else_is_in_the_batch(model):
    together, alone = cc.generate(model, [0, 1, 2], seed=4), cc.generate(model, [1], seed=5)
    np.testing.assert_allclose(together.latents[1], alone.latents[0], rtol=0, atol=2e-5)


def test_encoded_clips_are_the_normalised_means(model):
    """What `decode` takes: the clips' own latents, with the statistics of the configuration taken off."""
    video, vae = np.random.default_rng(0).integers(256, size=(2, 8, 16, 32, 3), dtype=np.uint8), model.params["vae"]
    latents = cc.encode(CONFIGS, vae, video)
    mean, _ = latent_video.encode(vae, CONFIGS.vae, jnp.asarray(video, jnp.float32) / 127.5 - 1.0)
    np.testing.assert_allclose(2.0 * latents + np.array([0.1, 0.0, 0.0, -0.2]), mean, rtol=0, atol=1e-5)
    assert latents.dtype == np.float32 and cc.decode(CONFIGS, vae, latents).shape == video.shape
    with pytest.raises(UsageError, match="nearest size that fits is 8 frames of 16x24"):
        cc.encode(CONFIGS, vae, video[:, :, :, :21])


def test_ddim_is_the_euler_step_and_the_others_are_not(model):
    found = {solver: cc.generate(model, [1], seed=0, solver=solver).latents for solver in cc.SOLVERS}
    np.testing.assert_array_equal(found["ddim"], found["euler"])
    for other in ("ddpm", "unipc"):
        assert np.abs(found[other] - found["ddim"]).max() > 1e-2


def test_guidance_one_is_the_conditional_model(model):
    """One DDIM step of it, by hand in DDPM's own coordinates; and guidance moves away from no class."""
    abar = vp.alphas_cumprod()[999]
    noise = cc.initial_noise([3], cc.latent_shape(CONFIGS, SETTINGS))

    def clean(labels):
        v = latent_video.denoise(model.params["transformer"], CONFIGS.transformer, noise, jnp.full(1, 999.0), labels)
        return np.sqrt(abar) * noise - np.sqrt(1 - abar) * v

    given, none = clean(jnp.array([1])), clean(jnp.array([3]))
    for guidance in (1.0, 2.5):
        found = cc.generate(model, [1], seed=3, steps=1, guidance=guidance).latents
        np.testing.assert_allclose(found, none + guidance * (given - none), rtol=0, atol=1e-4)
    assert np.abs(given - none).max() > 0.05


@pytest.mark.parametrize(
    ("labels", "given", "message"),
    [
        ([], {}, "no labels; give at least one"),
        (["dog"], {}, "class_label is 'dog'; expected a number from 0 to 2, or a name: 0 ant, 1 bee, 2 cow"),
        ([3], {}, "class_label is 3; expected a number from 0 to 2"),
        ([True], {}, "class_label is True"),
        ([0], {"height": 20}, "height is 20; this model needs a multiple of 16. The nearest is 16"),
        ([0], {"num_frames": 3}, "num_frames is 3; this model needs a multiple of 4. The nearest is 4"),
        ([0], {"steps": 0}, "steps is 0; expected 1 to 1000"),
        ([0], {"guidance": float("nan")}, "guidance is nan; expected 1 to 100"),
        ([0], {"solver": "heun"}, "solver is 'heun'; expected one of ddim, ddpm, unipc, euler"),
        ([0], {"shift": 3.0}, "unknown setting shift; expected some of num_frames, height"),
        ([0], {"seed": -1}, "seed is -1"),
    ],
)
def test_what_cannot_be_is_a_sentence(model, labels, given, message):
    with pytest.raises(UsageError, match=message):
        cc.generate(model, labels, **given)


def test_nan_is_told_with_its_step(model):
    broken = jax.tree.map(lambda x: x * jnp.nan, model.params["transformer"])
    noise = cc.initial_noise([0], cc.latent_shape(CONFIGS, SETTINGS))
    with pytest.raises(NumericsError, match="after step 1 of 3 the latents are not finite"):
        cc.sample(CONFIGS, broken, jnp.array([0]), SETTINGS, noise)
    with pytest.raises(NumericsError, match="the pixels of clip 1 of 1 are not finite"):
        cc.decode(CONFIGS, model.params["vae"], noise * jnp.nan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "WanPipeline"}, "describes a 'WanPipeline'; expected 'LatentVideoPipeline'"),
        ({"classes": ["one"]}, "takes 3 classes and 4 latent channels, there are 1 and 4"),
        ({"defaults": {"steps": "many"}}, "steps is 'many'; expected 1 to 1000"),
        ({"defaults": {"speed": 3}}, "unexpected keyword argument 'speed'"),
    ],
)
def test_damaged_repositories(folder, tmp_path, change, message):
    shutil.copytree(folder, tmp_path / "copy")
    index = json.loads((tmp_path / "copy" / "model_index.json").read_text())
    (tmp_path / "copy" / "model_index.json").write_text(json.dumps(index | change))
    with pytest.raises(CheckpointError, match=message):
        cc.load(tmp_path / "copy", "float32")
    with pytest.raises(UsageError, match="there is no such folder"):
        cc.load(tmp_path / "nowhere")
